"""A method that nothing in the project knows goes the whole way: one module of its own, no line changed elsewhere."""

import multiprocessing

import numpy as np
import pyarrow.parquet
import pytest
import yaml
from commands import run_command
from positive_weight import PositiveWeight, PositiveWeightConfig
from test_killed_training import Command, assert_same_bits

from clsd_tf.data.input_pipeline import read_columns
from clsd_tf.methods import METHODS
from clsd_tf.storage.files import read_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import load_model, predict
from clsd_tf.training.config import load_config
from clsd_tf.training.run import train

pytestmark = pytest.mark.usefixtures("deterministic")

PLUGIN = "--plugin=positive_weight"
SETTINGS = [
    "method.name=positive_weight", "backbone=fm", "embeddings.dim=4", "batch_size=32", "max_epochs=2",
    "patience_epochs=3", "checkpoint_every_steps=7",
]  # fmt: skip


def succeeds(module, *arguments):
    done = run_command(module, PLUGIN, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(feed_dataset, tmp_path_factory):
    """A run that was killed and resumed, by the command; equal to one of the library that was not."""
    directory = tmp_path_factory.mktemp("own_method")
    processes = multiprocessing.get_context("forkserver")
    killed = Command(processes, str(feed_dataset.path), WorkDir(directory / "run"), SETTINGS, (PLUGIN,))
    with killed.started() as process:
        killed.wait_for_checkpoints(process, 2)
    assert not killed.work_dir.is_complete
    with killed.started() as process:
        process.join(120)
    assert killed.work_dir.is_complete, killed.output.read_text(encoding="utf-8")
    whole = WorkDir(directory / "whole")
    train(feed_dataset, load_config(None, SETTINGS), whole, title=None)
    assert_same_bits(killed.work_dir, whole)
    return killed.work_dir


def test_its_settings_are_read_and_refused_like_any_others():
    assert load_config(None, ["method=positive_weight"]).method == PositiveWeightConfig()
    with pytest.raises(ValueError, match=r"method\.weight: Input should be greater than 0. Received: 0"):
        load_config(None, ["method=positive_weight", "method.weight=0"])
    with pytest.raises(ValueError, match=r"method\.mu: unknown key.*Allowed: clicks, focal_gamma, "):
        load_config(None, ["method=positive_weight", "method.mu=0.5"])


def test_clicks_that_count_three_times_raise_predictions_and_a_weight_of_1_is_bce(feed_dataset, run, tmp_path):
    def trained(name, *assignments):
        work_dir = WorkDir(tmp_path / name)
        train(feed_dataset, load_config(None, [*SETTINGS, *assignments]), work_dir, title=None)
        return work_dir

    bce, one = trained("bce", "method=bce"), trained("one", "method.weight=1")
    assert read_json(one.history) == read_json(bce.history)
    of_bce, of_run = (read_json(work_dir.history)[-1]["mean_ctr"] for work_dir in (bce, run))
    click_rate = feed_dataset.counts["splits"]["train"]["clicks"] / feed_dataset.num_rows("train")
    # Rows that count 3 times when clicked: the fixed point of odds is 3 times the odds of a click.
    expected = 3 * click_rate / (1 + 2 * click_rate)
    assert abs(of_bce - click_rate) < 0.05
    assert abs(of_run - expected) < 0.05


def test_it_is_evaluated_exported_and_keeps_the_contract_of_tf_serving(feed_dataset, run, tmp_path):
    on_run = (f"--dataset_dir={feed_dataset.path}", f"--work_dir={run.path}")
    succeeds("pipelines.evaluate", *on_run)
    assert 0.5 < read_json(run.evaluation("test"))["overall"]["auc"] < 1
    succeeds("export.main", *on_run, f"--servable_dir={tmp_path}", "--name=own", "--version=1")
    succeeds("export.contract", tmp_path / "own")
    scores, sample = tmp_path / "scores.csv", feed_dataset.layout.serving_sample
    succeeds("export.predict", f"--servable={tmp_path / 'own'}", f"--input={sample}", f"--output={scores}")
    served = [float(line.rsplit(",", 1)[1]) for line in scores.read_text(encoding="utf-8").splitlines()[1:]]
    row_ids = read_columns(feed_dataset, "test", ["row_id"])["row_id"]
    place = {row: index for index, row in enumerate(row_ids)}
    sampled = [place[row] for row in pyarrow.parquet.read_table(sample).column("row_id").to_pylist()]
    np.testing.assert_allclose(served, predict(load_model(run, feed_dataset), feed_dataset, "test")[sampled], atol=1e-6)
    card = (tmp_path / "own" / "1" / "assets.extra" / "model_card.md").read_text(encoding="utf-8")
    assert "A click counted 3 times in training" in card


def test_a_study_compares_it_with_its_placebo(feed_dataset, tmp_path):
    study = {
        "seeds": 2,
        "shared": {"max_epochs": 1, "batch_size": 256, "method": {"name": "positive_weight", "weight": 5.0}},
        "data": [{"name": "feed"}],
        "grids": [{"title": "own", "data": ["feed"], "backbones": ["lr"], "methods": ["positive_weight"]}],
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    succeeds(
        "pipelines.study",
        f"--study={tmp_path / 'own.yaml'}",
        f"--study_dir={tmp_path / 'study'}",
        f"--dataset_dir=feed={feed_dataset.path}",
    )
    results = pyarrow.parquet.read_table(tmp_path / "study" / "results.parquet").to_pylist()
    assert {row["method"] for row in results} == {"bce", "positive_weight", "positive_weight_shuffled"}
    config = read_json(tmp_path / "study/runs/feed/lr/positive_weight_shuffled/seed_1/result.json")["config"]["method"]
    assert (config["weight"], config["placebo"]) == (5.0, True)


def test_the_registry_gives_what_was_registered():
    assert isinstance(METHODS["positive_weight"], PositiveWeight)
