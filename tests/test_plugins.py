"""A user's own modules: found, loaded by every command and in a study's workers, and named where they fail."""

import concurrent.futures
import multiprocessing
import os
import pathlib
import subprocess
import sys

import pytest
from commands import run_command

from clsd_tf.backbones import BACKBONES, require_backbone
from clsd_tf.plugins.loading import PluginError, load_plugins
from clsd_tf.storage.files import read_json
from clsd_tf.study.cells import start_worker

ROOT = pathlib.Path(__file__).parent.parent
_TWO_LAYERS = """
import tensorflow as tf
from clsd_tf import FieldEmbeddings, feature_inputs, register_backbone

@register_backbone("{name}")
def two_layers(inputs, *, embeddings, hidden_units, dropout):
    features = feature_inputs(inputs)
    hidden = tf.keras.layers.Flatten()(FieldEmbeddings(inputs, embeddings)(features))
    hidden = tf.keras.layers.Dense(hidden_units[0], "relu")(hidden)
    return tf.keras.Model(features, tf.keras.layers.Dense(1)(hidden))
"""
_SETTINGS = ("backbone=mine", "hidden_units=[4]", "embeddings.dim=2", "batch_size=512", "max_epochs=1", "method=bce")


@pytest.fixture
def directory(tmp_path):
    """With a plug-in ``my_backbones`` of the backbone ``mine``."""
    (tmp_path / "my_backbones.py").write_text(_TWO_LAYERS.format(name="mine"), encoding="utf-8")
    return tmp_path


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Name, source -> a module in what is the current directory for one test, and forgotten after it."""
    known, modules = set(BACKBONES), set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield lambda name, source: (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    for name in set(BACKBONES) - known:
        del BACKBONES[name]
    for name in set(sys.modules) - modules:
        del sys.modules[name]


# --- Loading ---------------------------------------------------------------------------------------------------------


def test_a_module_in_the_current_directory_is_loaded_once(here):
    here("plain", "from clsd_tf import register_backbone\nregister_backbone('plain')('a factory')\n")
    load_plugins(["plain", "plain"])
    load_plugins(["plain"])
    assert BACKBONES["plain"] == "a factory"


def test_a_module_in_the_current_directory_hides_no_installed_one(here, monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    here("colorsys", "raise AssertionError\n")
    load_plugins(["colorsys"])
    assert hasattr(sys.modules["colorsys"], "rgb_to_hsv")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            "absent",
            r"Received: absent, which fails with ModuleNotFoundError: No module named 'absent'\. Allowed: a mod",
        ),
        ("broken.py", r"Received: broken\.py, which fails with .*broken\.py:2\)\. Allowed: a module, named as in"),
        ("broken", r"Received: broken, which fails with ZeroDivisionError: division by zero \(.*broken\.py:2\)\. All"),
        ("taken", r"Received: taken, which fails with ValueError: a backbone .*already.* \(.*taken\.py:2\)\. Allowed"),
    ],
)
def test_a_plug_in_that_cannot_be_imported_is_named_with_its_error_and_its_place(here, module, message):
    here("broken", "x = 1\nx / 0\n")
    here("taken", "from clsd_tf import register_backbone\nregister_backbone('dnn')(None)\n")
    with pytest.raises(PluginError, match=message):
        load_plugins([module])


def start(arguments, directory):
    """Python in a process of its own, with this project on its path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


def install(directory, entry_point):
    """Makes ``directory``, which is on the Python path, look like one with an installed package."""
    metadata = directory / "my_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(f"[clsd_tf.plugins]\n{entry_point}\n", encoding="utf-8")


def test_plug_ins_of_installed_packages_are_loaded_by_their_entry_points(here, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    here("packaged", "from clsd_tf import register_backbone\nregister_backbone('packaged')('a factory')\n")
    install(tmp_path, "some_name = packaged")
    load_plugins()
    assert BACKBONES["packaged"] == "a factory"


def test_an_entry_point_that_cannot_be_loaded_is_named(here, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "some_name = gone.away")
    with pytest.raises(PluginError, match=r"entry point some_name = gone\.away, which fails with ModuleNotFoundError"):
        load_plugins()


# --- Commands --------------------------------------------------------------------------------------------------------


def test_a_backbone_of_a_plug_in_is_trained_and_evaluated(feed_dataset, directory):
    on_run = (f"--dataset_dir={feed_dataset.path}", "--work_dir=run")
    settings = [f"--set={setting}" for setting in _SETTINGS]
    done = run_command("pipelines.train", *on_run, *settings, "--plugin=my_backbones", cwd=directory)
    assert done.returncode == 0, done.stderr
    done = run_command("pipelines.evaluate", *on_run, "--plugin=my_backbones", cwd=directory)
    assert done.returncode == 0, done.stderr
    assert read_json(directory / "run" / "evaluation_test.json")
    done = run_command("pipelines.evaluate", *on_run, cwd=directory)
    assert done.returncode == 1
    assert "unknown backbone. Received: 'mine'." in done.stderr
    assert "those of your own module with --plugin=<module>" in done.stderr


def test_a_plug_in_that_fails_ends_a_command_with_one_line(tmp_path):
    done = run_command("pipelines.train", "--print_config", "--plugin=absent", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: a plug-in cannot be imported. Received: absent, which fails with ModuleNotFound")


_SCRIPT = """
from clsd_tf.commands import command_line
command_line._clsd.add_command(command_line._Command("own", "own_main"))
command_line.clsd()
"""
_OWN = """
from clsd_tf.commands import console
console.run(lambda argv: print("main"))
"""


def test_the_console_script_finds_plug_ins_in_the_current_directory(tmp_path):
    """As installed: the script lies elsewhere, and its place is what heads the Python path."""
    script, own = tmp_path / "bin" / "clsd", tmp_path / "bin" / "own_main.py"
    script.parent.mkdir()
    script.write_text(_SCRIPT, encoding="utf-8")
    own.write_text(_OWN, encoding="utf-8")
    (tmp_path / "shouting.py").write_text("print('loaded')\n", encoding="utf-8")
    done = start([script, "own", "--plugin=shouting"], tmp_path)
    assert done.stdout == "loaded\nmain\n", done.stderr


def test_a_worker_of_a_study_knows_the_plug_ins_that_it_is_given(directory, monkeypatch):
    monkeypatch.chdir(directory)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, start_worker, (["my_backbones"],)) as pool:
        pool.submit(require_backbone, "mine").result()
        with pytest.raises(ValueError, match="unknown backbone"):
            pool.submit(require_backbone, "yours").result()


_STUDY = """
seeds: 2
data: [{name: feed, shared: {batch_size: 512, max_epochs: 1, hidden_units: [4], embedding_dim: 2}}]
grids:
  - {title: Own, data: [feed], backbones: [mine], methods: [bce]}
"""


@pytest.mark.long
def test_a_backbone_of_a_plug_in_is_known_to_the_workers_of_a_study(feed_dataset, directory):
    (directory / "own.yaml").write_text(_STUDY, encoding="utf-8")
    arguments = ("--study=own.yaml", "--study_dir=study", f"--dataset_dir=feed={feed_dataset.path}")
    done = start(["-m", "pipelines.study", *arguments, "--plugin=my_backbones"], directory)
    assert done.returncode == 0, done.stderr
    results = sorted(path.relative_to(directory / "study" / "runs") for path in directory.rglob("result.json"))
    assert [str(path) for path in results] == [f"feed/mine/bce/seed_{seed}/result.json" for seed in (1, 2)]
