"""A training run from start to end: teacher, fit, calibration and the mark of a complete work directory."""

import json
import shutil

import numpy as np
import pytest
from scipy.special import expit

from clsd_tf.data import input_pipeline
from clsd_tf.methods.clsd.guards import ConfidenceGuardError
from clsd_tf.metrics import pointwise
from clsd_tf.spec.feature_spec import parse_spec
from clsd_tf.storage.dataset_dir import DatasetDir, DatasetLayout
from clsd_tf.storage.files import ArtifactError, read_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import load_model, predict, predict_logits
from clsd_tf.training.callbacks import TrainingDivergedError
from clsd_tf.training.run import train
from clsd_tf.training.teachers.stored import stored_scores

pytestmark = pytest.mark.usefixtures("deterministic")


def modification_times(directory):
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def bce_run(run_of, tiny):
    """Plain BCE."""
    return run_of(tiny("method=bce"), "bce")


# From loss warm-up to the weighted loss.


def test_the_same_config_gives_the_same_run(clsd_run, feed_dataset, tmp_path):
    again = WorkDir(tmp_path / "again")
    assert train(feed_dataset, clsd_run.config, again, title=None) == clsd_run.history
    assert read_json(again.calibration) == read_json(clsd_run.work_dir.calibration)
    first, second = (predict(load_model(work_dir, feed_dataset), feed_dataset, "test") for work_dir in (
        clsd_run.work_dir, again
    ))  # fmt: skip
    np.testing.assert_array_equal(first, second)


def test_clsd_starts_as_bce_and_departs_from_it_after_loss_warmup(clsd_run, bce_run, run_of, tiny):
    bce = bce_run.history
    assert clsd_run.history[0]["bce"] != bce[0]["bce"]  # 13 steps, of which 5 are warm-up.
    clsd = run_of(tiny("method.loss_warmup_steps=13", "calibration.method=none"), "late").history  # All of epoch 1.
    for name in ("loss", "bce", "mean_ctr", "val_log_loss"):
        assert clsd[0][name] == bce[0][name]
        assert clsd[1][name] != bce[1][name]
    assert clsd[0]["max_click_confidence"] == clsd[0]["min_click_confidence"] == 1.0
    assert clsd[1]["min_click_confidence"] < 1.0 < clsd[1]["max_click_confidence"]
    assert [entry["competes"] for entry in clsd] == [False, True]


def test_bce_has_no_loss_warmup_and_no_ad_gate(bce_run):
    assert [entry["competes"] for entry in bce_run.history] == [True, True]
    assert not [name for name in bce_run.history[0] if "ad_gate" in name or "click_confidence/" in name]


def test_a_run_trains_on_the_scores_of_its_teacher(feed_dataset, tiny, tmp_path):
    # AdGate's loss in the first steps is about the mean over clicks of (1 - score)^2: it starts at correction 0 and
    # moves slowly. Own predictions start at .5, where it would be .25.
    shutil.copytree(feed_dataset.path, tmp_path / "dataset")
    dataset, work_dir = DatasetDir(tmp_path / "dataset"), WorkDir(tmp_path / "run")
    config = tiny("backbone=lr", "max_epochs=1", "method.teacher=cross_fit", "method.ad_gate.learning_rate=0.001")
    history = train(dataset, config, work_dir, title=None)
    scores = stored_scores(work_dir, dataset)
    columns = input_pipeline.read_columns(dataset, "train", ["row_id", "label"])
    np.testing.assert_array_equal(scores.row_ids, columns["row_id"])
    expected = np.square(1 - scores.values[columns["label"] == 1]).mean()
    assert history[0]["ad_gate_loss"] == pytest.approx(expected, rel=0.05)
    assert abs(expected - 0.25) > 0.1 * 0.25


# Clicks of strong interest only.


@pytest.fixture(scope="module")
def weak_clicks(feed_dataset):
    columns = input_pipeline.read_columns(feed_dataset, "train", ["row_id", "label", "intensity_label"])
    return set(columns["row_id"][(columns["label"] == 1) & (columns["intensity_label"] == 0)])


def test_intense_clicks_alone_train_as_if_weak_clicks_had_no_weight(
    feed_dataset, tiny, weak_clicks, with_changed_records, tmp_path
):
    def change(feature):
        if feature["row_id"].int64_list.value[0] in weak_clicks:
            feature["sample_weight"].float_list.value[0] = 0.0

    assert 100 < len(weak_clicks) < 1000
    weightless = with_changed_records(feed_dataset, tmp_path / "dataset", change)
    sizes = ["method=bce", "backbone=lr", "learning_rate=0.05", "calibration.method=none"]
    oracle = train(feed_dataset, tiny("method.clicks=intense", *sizes), WorkDir(tmp_path / "oracle"), title=None)
    expected = train(weightless, tiny("clicks=all", *sizes), WorkDir(tmp_path / "expected"), title=None)
    every = train(feed_dataset, tiny("clicks=all", *sizes), WorkDir(tmp_path / "every"), title=None)
    assert oracle == expected
    assert oracle[1]["mean_ctr"] < every[1]["mean_ctr"] - 0.01


def test_intense_clicks_need_an_intensity_label(feed_dataset, tiny, tmp_path):
    shutil.copytree(feed_dataset.path, tmp_path / "dataset")
    layout = DatasetLayout(tmp_path / "dataset")
    content = json.loads(layout.spec.read_text(encoding="utf-8"))
    content["intensity_label"] = None
    spec = parse_spec(content, "test")
    layout.spec.write_text(spec.to_json(), encoding="utf-8")
    layout.mark_complete(spec)
    with pytest.raises(ValueError, match=r"needs a spec with an intensity_label\. Received: none\. Use clicks=all"):
        train(DatasetDir(layout.root), tiny("method.clicks=intense"), WorkDir(tmp_path / "run"), title=None)


# Calibration.


@pytest.fixture(scope="module")
def validation(feed_dataset):
    columns = input_pipeline.read_columns(feed_dataset, "validation", ["label", "sample_weight", "age_group"])
    return columns["label"], columns["sample_weight"], columns["age_group"]


def test_after_platt_calibration_mean_ctr_is_the_click_rate_of_validation(bce_run, feed_dataset, validation):
    label, weight, _ = validation
    model = load_model(bce_run.work_dir, feed_dataset)
    assert pointwise.pcoc(label, predict(model, feed_dataset, "validation"), weight) == pytest.approx(1, abs=1e-3)
    uncalibrated = expit(predict_logits(model, feed_dataset, "validation"))
    assert abs(pointwise.pcoc(label, uncalibrated, weight) - 1) > 0.01


def test_calibration_per_group_moves_each_group_towards_its_click_rate(clsd_run, feed_dataset, validation):
    label, _, group = validation
    model = load_model(clsd_run.work_dir, feed_dataset)
    ctr = predict(model, feed_dataset, "validation")
    stored = read_json(clsd_run.work_dir.calibration)
    assert (stored["method"], stored["group"]["name"]) == ("platt", "age_group")
    curve = stored["overall"]
    of_all = expit(curve["slope"] * predict_logits(model, feed_dataset, "validation") + curve["intercept"])
    for index in np.unique(group):
        # An own curve has the group's click rate as its mean; it counts by its share.
        rows, share = group == index, stored["group_shares"][index]
        assert 0 < share < 1
        expected = share * label[rows].mean() + (1 - share) * of_all[rows].mean()
        assert ctr[rows].mean() == pytest.approx(expected, abs=1e-4)


def test_without_calibration_none_is_stored_or_loaded(feed_dataset, tiny, tmp_path):
    work_dir = WorkDir(tmp_path / "run")
    train(feed_dataset, tiny("method=bce", "backbone=lr", "calibration.method=none"), work_dir, title=None)
    assert not work_dir.calibration.exists()
    assert load_model(work_dir, feed_dataset).calibration is None


def test_an_unknown_group_is_refused_with_the_known_ones_before_anything_is_trained(feed_dataset, tiny, tmp_path):
    work_dir = WorkDir(tmp_path / "run")
    with pytest.raises(ValueError, match=r"Received: 'agegroup'\. Allowed: age_group, gender_group"):
        train(feed_dataset, tiny("backbone=lr", "calibration.user_group=agegroup"), work_dir, title=None)
    assert not work_dir.config.exists()


# Complete, stopped, refused.


def test_a_finished_run_is_left_as_it_is(clsd_run, feed_dataset):
    assert clsd_run.work_dir.is_complete
    before = modification_times(clsd_run.work_dir.path)
    assert train(feed_dataset, clsd_run.config, clsd_run.work_dir, title=None) == clsd_run.history
    assert modification_times(clsd_run.work_dir.path) == before


def test_a_finished_run_refuses_another_config(clsd_run, feed_dataset, tiny):
    with pytest.raises(ArtifactError, match="belongs to a run with another config"):
        train(feed_dataset, tiny("calibration.method=none"), clsd_run.work_dir, title=None)


def test_a_run_killed_before_its_calibration_ends_as_the_others(clsd_run, feed_dataset, tmp_path):
    killed = WorkDir(tmp_path / "killed")
    shutil.copytree(clsd_run.work_dir.path, killed.path)
    killed.success.unlink()
    killed.calibration.unlink()
    assert train(feed_dataset, clsd_run.config, killed, title=None) == clsd_run.history
    assert killed.is_complete
    assert read_json(killed.calibration) == read_json(clsd_run.work_dir.calibration)


def test_a_run_that_a_guard_stops_is_stopped_at_the_same_step_however_often_it_is_started(feed_dataset, tiny, tmp_path):
    # AdGate starts at correction 0, about .5 away from 1 - teacher_score. Of 25 steps an epoch, the 20th is checked.
    config = tiny("backbone=lr", "method.guards.max_ad_gate_drift=0.001", "batch_size=128", "checkpoint_every_steps=15")
    work_dir = WorkDir(tmp_path / "run")
    for _ in range(3):  # More often than the run has epochs.
        with pytest.raises(ConfidenceGuardError, match=r"AdGate.* at step 20\. Allowed: 0\.001"):
            train(feed_dataset, config, work_dir, title=None)
        assert not work_dir.is_complete
        assert not work_dir.calibration.exists()


def test_a_run_that_diverges_looks_unfinished(feed_dataset, tiny, tmp_path):
    work_dir = WorkDir(tmp_path / "run")
    with pytest.raises(TrainingDivergedError):
        train(feed_dataset, tiny("method=bce", "backbone=lr", "learning_rate=1e38"), work_dir, title=None)
    assert not work_dir.is_complete


@pytest.mark.parametrize(
    "assignment",
    ["method.loss_warmup_steps=1000", "backbone_arguments={depth: 3}", "method.ad_gate.features=[item_category]"],
)
def test_a_refused_config_trains_no_teacher(feed_dataset, tiny, tmp_path, assignment):
    # On real data a teacher takes hours.
    shutil.copytree(feed_dataset.path, tmp_path / "dataset", ignore=shutil.ignore_patterns("teacher_scores"))
    dataset = DatasetDir(tmp_path / "dataset")
    config = tiny("backbone=lr", "max_epochs=1", "method.teacher=cross_fit", assignment)
    with pytest.raises(ValueError, match="Received"):
        train(dataset, config, WorkDir(tmp_path / "run"), title=None)
    assert not list(dataset.teacher_scores.rglob("scores.npz"))
