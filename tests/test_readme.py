"""What README shows works: the script runs, the request fits, the flags exist."""

import argparse
import json
import pathlib
import re
import subprocess
import sys

from apache_beam.options.pipeline_options import PipelineOptions

import feature_specs

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_script_is_short_and_runs_as_it_is(feed_dataset, tmp_path):
    (script,) = [block for block in blocks("python") if "ClsdModel(" in block]
    assert len(script.splitlines()) <= 30
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


def test_the_grpc_request_is_a_valid_request():
    (script,) = [block for block in blocks("python") if "PredictionServiceStub" in block]
    built = (
        script[: script.index("with grpc")]
        + "print(request.model_spec.name, len(request.inputs['examples'].string_val))"
    )
    done = subprocess.run([sys.executable, "-c", built], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["movielens_100k", "1"], done.stderr


def test_every_command_and_flag_in_the_documentation_exists():
    text = README + (ROOT / "BUILD.md").read_text(encoding="utf-8")
    commands = re.findall(r"python -m ((?:pipelines|export)\.\w+)([^\n`]*)", text)
    assert len(commands) >= 9
    options = argparse.ArgumentParser(conflict_handler="resolve")
    for option in (PipelineOptions, *PipelineOptions.__subclasses__()):
        if "_add_argparse_args" in vars(option):
            option._add_argparse_args(options)
    beam = {name.removeprefix("--") for action in options._actions for name in action.option_strings}
    for module, arguments in commands:
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        for flag in re.findall(r"--(\w+)", arguments):
            assert f'"{flag}"' in source or flag in beam, f"{module} has no flag --{flag}"
