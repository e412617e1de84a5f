"""What README shows works: the script runs, the request fits, the flags exist."""

import argparse
import json
import pathlib
import re
import subprocess
import sys

import pytest
import tensorflow as tf
import urllib3
from apache_beam.options.pipeline_options import PipelineOptions

import feature_specs
from clsd_tf.commands.command_line import COMMANDS
from clsd_tf.data.examples import parse_raw_examples, raw_tensor_specs
from export.server.local_server import LocalServer

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_script_is_short_and_runs_as_it_is(feed_dataset, tmp_path):
    (script,) = [block for block in blocks("python") if "ClsdModel(" in block]
    assert len(script.splitlines()) <= 20
    assert script.count("import ") == 2
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "dataset").symlink_to(feed_dataset.path)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\[0\.\d+", done.stdout)  # The first predictions.


def test_the_rest_request_names_exactly_the_raw_inputs():
    (body,) = re.findall(r"-d '(\{.*?\})'\n", README, flags=re.DOTALL)
    (instance,) = json.loads(body)["instances"]
    raw_inputs = {entry.name: entry for entry in feature_specs.get_spec("movielens_100k").raw_inputs}
    assert set(instance) == set(raw_inputs)
    for name, value in instance.items():
        expected = {"string": str, "int64": int, "float": float}[raw_inputs[name].dtype]
        values = value if raw_inputs[name].is_list else [value]
        assert isinstance(value, list) == raw_inputs[name].is_list
        assert all(isinstance(entry, expected) for entry in values)


class _AnyRow(tf.Module):
    """A stand-in for the demo's model: its inputs, and for every row a ctr of .25."""

    def __init__(self, raw_inputs):
        super().__init__()

        def by_example(examples):
            return {"ctr": 0.25 * tf.ones_like(tf.cast(parse_raw_examples(examples, raw_inputs)["age"], tf.float32))}

        def by_tensor(**raw):
            return {"ctr": 0.25 * tf.ones_like(tf.cast(raw["age"], tf.float32))}

        examples = tf.TensorSpec([None], tf.string, "examples")
        self.functions = {
            "serving_default": tf.function(by_example, autograph=False).get_concrete_function(examples=examples),
            "predict_raw": tf.function(by_tensor, autograph=False).get_concrete_function(
                **raw_tensor_specs(raw_inputs)
            ),
        }


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    servable_dir = tmp_path_factory.mktemp("servables")
    model = _AnyRow(feature_specs.get_spec("movielens_100k").raw_inputs)
    tf.saved_model.save(model, str(servable_dir / "movielens_100k" / "1"), signatures=model.functions)
    with LocalServer(servable_dir) as running:
        yield running


def test_the_curl_line_is_answered(server):
    (address, body) = re.search(r"curl -X POST http://localhost:8501(\S+) -d '(\{.*?\})'\n", README, re.DOTALL).groups()
    answer = urllib3.request("POST", f"http://{server.rest_address}{address}", body=body.encode())
    assert (answer.status, answer.json()) == (200, {"predictions": [0.25]})


def test_the_grpc_script_is_answered(server):
    (script,) = [block for block in blocks("python") if "PredictionServiceStub" in block]
    script = script.replace("localhost:8500", server.grpc_address)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "float_val: 0.25" in done.stdout, done.stderr


def test_every_command_and_flag_in_the_documentation_exists():
    documents = ("README.md", "BUILD.md", "docs/serving.md", "docs/training.md")
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in documents)
    commands = re.findall(r"python -m ((?:pipelines|export)\.\w+)([^\n`]*)", text)
    named = re.findall(r"(?:^|`)clsd ([a-z][a-z-]*)([^\n`]*)", text, flags=re.MULTILINE)
    assert {name for name, _ in named} <= COMMANDS.keys()
    commands += [(COMMANDS[name], arguments) for name, arguments in named]
    assert len(commands) >= 9
    options = argparse.ArgumentParser(conflict_handler="resolve")
    for option in (PipelineOptions, *PipelineOptions.__subclasses__()):
        if "_add_argparse_args" in vars(option):
            option._add_argparse_args(options)
    beam = {name.removeprefix("--") for action in options._actions for name in action.option_strings}
    of_all = {"plugin", "help"}
    for module, arguments in commands:
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        for flag in re.findall(r"--(\w+)", arguments):
            assert f'"{flag}"' in source or flag in beam | of_all, f"{module} has no flag --{flag}"
