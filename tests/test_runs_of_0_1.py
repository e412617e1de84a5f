"""Work directories of version 0.1, whose config and run state had another layout: loaded, measured and gone on with."""

import json
import shutil

import pytest
import tensorflow as tf
from test_killed_training import assert_same_bits

from clsd_tf.evaluation.evaluate import evaluate
from clsd_tf.storage.files import SUCCESS, ArtifactError, read_json, write_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import load_model
from clsd_tf.training.checkpoints import Checkpoints, RunState, random_generators
from clsd_tf.training.claim import claim
from clsd_tf.training.config import parse_config
from clsd_tf.training.fit import prepare
from clsd_tf.training.run import train

pytestmark = pytest.mark.usefixtures("deterministic")

# Settings that had another name or place, and values that are not their defaults.
ASSIGNMENTS = [
    "calibration.user_group=age_group", "method.global_weighting=standardized", "method.local_weighting=mean_one",
    "method.normalizer_momentum=0.9", "method.loss=focal", "method.focal_gamma=0.5", "embeddings.l2=1e-6",
    "embeddings.initializer=uniform", "embeddings.init_scale=0.02",
]  # fmt: skip
NAMES = {
    "global_weighting": "global_form",
    "local_weighting": "local_form",
    "normalizer_momentum": "normaliser_momentum",
}
EMBEDDINGS = ("dim", "l2", "l2_rows", "initializer", "init_scale")


def as_0_1_wrote(config):
    """The config as version 0.1 wrote it to ``config.json``."""
    content = config.to_dict()
    method, embeddings = content.pop("method"), content.pop("embeddings")
    name = method.pop("name")
    content |= {key: method.pop(key) for key in ("loss", "label_smoothing", "focal_gamma", "clicks")}
    content |= {f"embedding_{key}": embeddings[key] for key in EMBEDDINGS}
    clsd = {NAMES.get(key, key): "standardised" if value == "standardized" else value for key, value in method.items()}
    return {**content, "unified_buckets": embeddings["unified_buckets"], "method": name, "clsd": clsd}


class StateOf01(RunState):
    """A run state that is written as version 0.1 wrote it."""

    def serialize(self):
        content = json.loads(super().serialize())
        return json.dumps({"best_auc": content.pop("best_value"), **content})


@pytest.fixture(scope="module")
def run(run_of, tiny):
    return run_of(tiny(*ASSIGNMENTS), "run")


@pytest.fixture
def old(run, tmp_path):
    """The finished run, as version 0.1 would have left it."""
    work_dir = WorkDir(shutil.copytree(run.work_dir.path, tmp_path / "old"))
    write_json(work_dir.config, {**work_dir.resolved_config, "train": as_0_1_wrote(run.config)})
    return work_dir


def test_the_layout_of_0_1_has_none_of_todays_keys_and_means_the_same(run):
    content = as_0_1_wrote(run.config)
    assert (content["method"], content["embedding_dim"], content["clsd"]["global_form"]) == ("clsd", 4, "standardised")
    assert not {"name", "global_weighting", "normalizer_momentum", "embeddings"} & {*content, *content["clsd"]}
    assert parse_config(content, "config.json") == run.config


def test_a_finished_run_is_loaded_and_measured_as_before(run, old, feed_dataset):
    before, after = (evaluate(load_model(of, feed_dataset), feed_dataset, "test") for of in (run.work_dir, old))
    assert before == after


def test_a_finished_run_is_left_as_it_is_by_the_config_that_it_had(run, old, feed_dataset):
    written = old.config.read_bytes()
    assert train(feed_dataset, run.config, old, title=None) == run.history
    assert train(feed_dataset, parse_config(as_0_1_wrote(run.config), "old.yaml"), old, title=None) == run.history
    assert old.config.read_bytes() == written


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "method.kappa=2.0",
            r"another config\. Received: \{'method.kappa': 2\.0\}\. Allowed: \{.*1\.0\}",
        ),
        ("embeddings.dim=5", r"another config\. Received: \{'embeddings.dim': 5\}\. Allowed: \{'embeddings.dim': 4\}"),
        ("seed=9", r"another config\. Received: \{'seed': 9\}\. Allowed: \{'seed': 1\}"),
        ("method=bce", r"another config\. Received: \{'method.name': 'bce', .*Allowed: \{'method.name': 'clsd', "),
    ],
)
def test_another_config_is_refused(old, feed_dataset, tiny, assignment, message):
    with pytest.raises(ArtifactError, match=message):
        claim(old, tiny(*ASSIGNMENTS, assignment), feed_dataset)


@pytest.fixture
def killed(run, old, feed_dataset):
    """The run after its first epoch: its only checkpoint holds the state in the layout of 0.1."""
    for path in (old.path / SUCCESS, old.calibration, *old.checkpoints.glob("ckpt-26.*"), *old.weights_files[1]):
        path.unlink()
    prepared = prepare(feed_dataset, run.config, old)
    state = StateOf01()
    vars(state).update(vars(prepared.keeper.state))
    parts = {"model": prepared.model, "random_generators": random_generators(prepared.model), "run": state}
    shutil.rmtree(old.checkpoints)
    Checkpoints(old.checkpoints, to_keep=2, **parts).save(13)
    return old


def test_a_killed_run_goes_on_from_where_it_was(run, killed, feed_dataset):
    saved = tf.train.load_checkpoint(str(killed.checkpoints)).get_tensor("run/.ATTRIBUTES/py_state")
    assert "best_value" not in json.loads(saved)
    state = prepare(feed_dataset, run.config, killed).keeper.state
    first = run.history[0]
    assert (state.epoch, state.best_epoch, state.best_value, state.history) == (1, 0, first["val_auc"], [first])
    assert train(feed_dataset, run.config, killed, title=None) == run.history
    assert_same_bits(killed, run.work_dir)
    assert killed.fingerprint == run.work_dir.fingerprint
    assert "clsd" in read_json(killed.config)["train"]  # What a directory says of itself is not written anew.
