"""The fit loop: what it leaves, its resume, the weights it keeps, and what it refuses."""

import io
import json
import re
import shutil

import numpy as np
import pytest
import rich.console
import tensorflow as tf
from runs import fitted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clsd_tf.data import input_pipeline
from clsd_tf.data.input_pipeline import RowValues
from clsd_tf.distributed.strategies import at_epoch_ends
from clsd_tf.metrics import pointwise
from clsd_tf.storage.dataset_dir import DatasetDir, DatasetLayout
from clsd_tf.storage.files import ArtifactError, read_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training import callbacks
from clsd_tf.training.assembly import predict
from clsd_tf.training.callbacks import TrainingDivergedError
from clsd_tf.training.claim import claim
from clsd_tf.training.config import parse_config
from clsd_tf.training.fit import steps_per_epoch

pytestmark = pytest.mark.usefixtures("deterministic")


@pytest.fixture(scope="module")
def train_ids(feed_dataset):
    return input_pipeline.read_columns(feed_dataset, "train", ["row_id"])["row_id"]


def validation_auc(model, dataset):
    columns = input_pipeline.read_columns(dataset, "validation", ["label", "sample_weight"])
    return pointwise.auc(columns["label"], predict(model, dataset, "validation"), columns["sample_weight"])


# What a fit leaves.


def test_a_work_directory_holds_all_that_later_jobs_need(clsd_run, feed_dataset):
    work_dir = clsd_run.work_dir
    assert work_dir.resolved_config == {
        "train": clsd_run.config.to_dict(),
        "dataset_fingerprint": feed_dataset.fingerprint,
    }
    assert parse_config(work_dir.resolved_config["train"], "config.json") == clsd_run.config
    assert read_json(work_dir.history) == clsd_run.history
    assert list(work_dir.checkpoints.glob("ckpt-26.index"))
    assert work_dir.best_weights.with_suffix(".index").is_file()
    assert not list(work_dir.path.glob("*incomplete*"))


def test_history_has_finite_numbers_for_each_epoch(clsd_run):
    assert [entry["epoch"] for entry in clsd_run.history] == [0, 1]
    names = {
        "loss", "bce", "mean_ctr", "ad_gate_loss", "effective_click_share", "min_click_confidence",
        "max_click_confidence", "val_auc", "val_log_loss",
    }  # fmt: skip
    for entry in clsd_run.history:
        assert all(np.isfinite(entry[name]) for name in names)
        assert np.isfinite(entry["click_confidence/age_group/18-30"])
        # The feed has no user of unknown age: a mean of nothing is written as null.
        assert entry["click_confidence/age_group/unknown"] is None
    assert clsd_run.history[1]["bce"] < clsd_run.history[0]["bce"]


def test_tensorboard_events_hold_the_scalars_of_every_user_group(clsd_run, feed_dataset):
    events = EventAccumulator(str(clsd_run.work_dir.tensorboard)).Reload()
    tags = set(events.Tags()["tensors"])
    for group in feed_dataset.inputs.groups:
        for label in group.labels:
            assert f"click_confidence/{group.name}/{label}" in tags
            assert f"ad_gate/{group.name}/{label}" in tags
    for name in ("loss", "val_auc", "click_confidence/age_group/18-30"):
        values = [float(tf.make_ndarray(event.tensor_proto)) for event in events.Tensors(name)]
        assert values == pytest.approx([entry[name] for entry in clsd_run.history])
        assert [event.step for event in events.Tensors(name)] == [13, 26]  # Optimizer steps.


def test_tensorboard_events_show_what_happens_within_an_epoch(feed_dataset, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "_SCALARS_EVERY_STEPS", 5)
    fitted(
        feed_dataset,
        tiny("max_epochs=1", "method.teacher=self", "method.loss_warmup_steps=1"),
        WorkDir(tmp_path),
        title=None,
    )
    events = EventAccumulator(str(WorkDir(tmp_path).tensorboard)).Reload()
    for name in ("loss", "mean_ctr", "effective_click_share", "ad_gate_loss", "min_click_confidence"):
        assert [event.step for event in events.Tensors(name)] == [5, 10, 13]


@pytest.fixture(scope="module")
def overfitted(feed_dataset, tiny, tmp_path_factory):
    """A fit that learns much too fast: the model that it gave and its AUC on validation after each epoch."""
    config = tiny("method=bce", "learning_rate=0.05", "max_epochs=12", "patience_epochs=2")
    model, history = fitted(feed_dataset, config, WorkDir(tmp_path_factory.mktemp("runs") / "overfitted"), title=None)
    return model, [entry["val_auc"] for entry in history]


def test_the_model_has_the_weights_of_the_best_epoch_not_of_the_last(overfitted, feed_dataset):
    model, aucs = overfitted
    assert max(aucs) > aucs[-1] + 0.001
    assert validation_auc(model, feed_dataset) == max(aucs)


def test_a_fit_stops_when_patience_runs_out(overfitted):
    _, aucs = overfitted
    assert len(aucs) < 12
    best = int(np.argmax(aucs))
    assert len(aucs) == best + 1 + 2  # Two epochs without a better AUC.


def test_progress_is_one_line_an_epoch_under_the_title(feed_dataset, tiny, tmp_path, capsys):
    config = tiny("method=bce", "backbone=lr")
    _, history = fitted(feed_dataset, config, WorkDir(tmp_path / "run"), title="my run")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": loss")[0] for line in lines] == ["my run epoch 1", "my run epoch 2"]
    assert f"validation AUC {history[1]['val_auc']:.4f}" in lines[1]


# A fit that has ended.


def test_a_fit_that_is_done_trains_no_further(clsd_run, feed_dataset):
    checkpoints = sorted(clsd_run.work_dir.checkpoints.iterdir())
    before = [path.stat().st_mtime_ns for path in checkpoints]
    model, history = fitted(feed_dataset, clsd_run.config, clsd_run.work_dir, title=None)
    assert history == clsd_run.history
    assert [path.stat().st_mtime_ns for path in checkpoints] == before
    assert validation_auc(model, feed_dataset) == max(entry["val_auc"] for entry in history)


# What stops or refuses a fit.


def test_a_loss_that_is_not_finite_stops_the_fit_and_names_the_step(feed_dataset, tiny, train_ids, tmp_path):
    # An infinite weight on a row of the fifth batch.
    config = tiny("backbone=lr")
    batches = input_pipeline.training_epochs(
        feed_dataset, batch_size=config.batch_size, seed=config.seed, first_epoch=0, num_epochs=1
    )
    fifth, _, _ = next(iter(batches.skip(4)))
    weights = np.where(train_ids == fifth["row_id"][0].numpy(), np.inf, 1.0).astype(np.float32)
    work_dir = WorkDir(tmp_path / "run")
    with pytest.raises(TrainingDivergedError, match=r"the loss must be finite. Received: loss=(nan|inf) at step 5\."):
        fitted(feed_dataset, config, work_dir, title=None, row_weights=RowValues(train_ids, weights))
    assert not list(work_dir.checkpoints.glob("*.index"))


def test_a_loss_that_is_not_finite_is_seen_at_the_end_of_an_epoch_whose_steps_nobody_tells():
    # As to the chief of parameter servers.
    tf.keras.utils.set_random_seed(0)
    model = tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=[1])])
    model.compile("sgd", "mse")
    told, numbers = at_epoch_ends(callbacks.StopOnNonFiniteLoss()), np.array([[1.0], [np.inf], [1.0]], np.float32)
    model.fit(numbers[:1], numbers[:1], verbose=0, callbacks=[told])
    with pytest.raises(TrainingDivergedError, match=r"Received: loss=(nan|inf) at step 4\."):
        model.fit(numbers, numbers, batch_size=1, verbose=0, callbacks=[told])


def test_a_fit_that_fails_gives_the_cursor_back_to_the_terminal(feed_dataset, tiny, tmp_path, monkeypatch):
    terminal = io.StringIO()
    console = rich.console.Console(file=terminal, force_terminal=True, force_interactive=True)
    monkeypatch.setattr(callbacks, "console", console)
    with pytest.raises(TrainingDivergedError):
        fitted(feed_dataset, tiny("method=bce", "backbone=lr", "learning_rate=1e38"), WorkDir(tmp_path), title="my run")
    assert "my run epoch 1" in terminal.getvalue()
    assert re.findall(r"\x1b\[\?25[lh]", terminal.getvalue()) == ["\x1b[?25l", "\x1b[?25h"]  # Hidden, shown.


def test_a_training_row_without_a_teacher_score_is_refused(feed_dataset, tiny, train_ids, tmp_path):
    config = tiny("backbone=lr", "method.teacher=cross_fit", "max_epochs=1")
    scores = RowValues(train_ids[1:], np.full(len(train_ids) - 1, 0.5, np.float32))
    with pytest.raises(ArtifactError, match=r"scores every training row\. Received: 3,199 scores\. Allowed: 3,200"):
        fitted(feed_dataset, config, WorkDir(tmp_path / "run"), title=None, teacher_scores={"teacher_score": scores})


def test_a_huge_learning_rate_stops_the_fit_with_advice(feed_dataset, tiny, tmp_path):
    with pytest.raises(TrainingDivergedError, match="Lower learning_rate"):
        fitted(feed_dataset, tiny("method=bce", "learning_rate=1e30"), WorkDir(tmp_path / "run"), title=None)


@pytest.mark.parametrize("steps", [26, 1000])  # 2 epochs of 13 steps.
def test_a_loss_warmup_that_never_ends_is_refused(feed_dataset, tiny, tmp_path, steps):
    assert steps_per_epoch(feed_dataset, tiny()) == 13  # 3,200 rows in batches of 256.
    with pytest.raises(ValueError, match=rf"loss_warmup_steps .* Received: {steps}. Allowed: less than 26"):
        fitted(feed_dataset, tiny(f"method.loss_warmup_steps={steps}"), WorkDir(tmp_path / "run"), title=None)


def test_a_refused_config_does_not_claim_the_work_directory(feed_dataset, tiny, tmp_path):
    # The user corrects the value and runs the same command again.
    for refused in ("method.loss_warmup_steps=1000", "backbone=deep_fm", "backbone_arguments={depth: 3}"):
        work_dir = WorkDir(tmp_path / "run")
        with pytest.raises(ValueError, match="Received"):
            fitted(feed_dataset, tiny(refused), work_dir, title=None)
        assert not work_dir.config.exists()


def test_another_config_in_the_same_work_directory_is_refused(clsd_run, feed_dataset, tiny):
    other = tiny("calibration.user_group=age_group", "learning_rate=0.5", "seed=3")
    with pytest.raises(ArtifactError) as error:
        claim(clsd_run.work_dir, other, feed_dataset)
    message = str(error.value)
    assert "Received: {'learning_rate': 0.5, 'seed': 3}" in message
    assert "Allowed: {'learning_rate': 0.002, 'seed': 1}" in message
    assert "Choose another --work_dir" in message


def test_settings_without_influence_on_the_result_may_change_when_a_run_goes_on(clsd_run, feed_dataset, tiny):
    before = clsd_run.work_dir.config.read_bytes()
    claim(
        clsd_run.work_dir,
        tiny(
            "calibration.user_group=age_group", "checkpoint_every_steps=3", "checkpoint_every_minutes=null",
            "checkpoints_to_keep=1", "max_cache_bytes=0",
        ),
        feed_dataset,
    )  # fmt: skip
    assert clsd_run.work_dir.config.read_bytes() == before


def test_another_dataset_in_the_same_work_directory_is_refused(clsd_run, feed_dataset, tmp_path):
    path = tmp_path / "dataset"
    shutil.copytree(feed_dataset.path, path)
    layout = DatasetLayout(path)
    layout.counts.write_text(json.dumps({**read_json(layout.counts), "note": "another"}), encoding="utf-8")
    layout.mark_complete(feed_dataset.spec)
    with pytest.raises(ArtifactError, match="trained on another dataset"):
        claim(clsd_run.work_dir, clsd_run.config, DatasetDir(path))
