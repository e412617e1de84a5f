"""Teachers that score before training: no row is scored by a model that saw it, and scores are kept and found again."""

import concurrent.futures
import os
import re
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from runs import fitted, scores_file, teacher_scores

from clsd_tf.commands.interruption import TrainingInterruptedError, handling_sigterm
from clsd_tf.data import input_pipeline
from clsd_tf.data.hashing import mix_row_ids
from clsd_tf.data.input_pipeline import RowValues
from clsd_tf.metrics import pointwise
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import ArtifactError, read_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import predict
from clsd_tf.training.teachers.stored import stored_scores

pytestmark = pytest.mark.usefixtures("deterministic")

DAY_MICROSECONDS = 86_400_000_000
NUM_FOLDS = 2


@pytest.fixture(scope="module")
def quick(tiny):
    """Assignments -> a config whose teacher is logistic regression in one epoch."""
    rates = ["learning_rate=0.05", "optimizer.embeddings.learning_rate=0.1"]
    sizes = ["backbone=lr", "max_epochs=1", *rates, f"method.num_folds={NUM_FOLDS}"]
    return lambda *assignments: tiny(*sizes, *assignments)


@pytest.fixture(scope="module")
def cross_fit(quick):
    return lambda *assignments: quick("method.teacher=cross_fit", *assignments)


@pytest.fixture(scope="module")
def prequential(quick):
    return quick("method.teacher=prequential")


@pytest.fixture(scope="module")
def dataset(feed_dataset, tmp_path_factory):
    """A copy of the feed's dataset, since teachers add their scores to it."""
    path = tmp_path_factory.mktemp("teachers") / "dataset"
    shutil.copytree(feed_dataset.path, path)
    return DatasetDir(path)


@pytest.fixture(scope="module")
def rows(dataset):
    names = ["row_id", "user_hash", "label", "sample_weight", "event_time"]
    return input_pipeline.read_columns(dataset, "train", names)


def fold_of(rows, fold_by, seed=1):
    users = rows["user_hash"].astype(np.uint64)
    keys = users if fold_by == "user" else users ^ mix_row_ids(rows["event_time"], 0)
    return mix_row_ids(keys, seed) % np.uint64(NUM_FOLDS)


def flip(feature):
    feature["label"].float_list.value[0] = 1 - feature["label"].float_list.value[0]


# Cross-fit.


@pytest.fixture(scope="module")
def in_fold_0(rows):
    """The rows that lie in fold 0 both by row and by user, about a quarter of them."""
    return (fold_of(rows, "row") == 0) & (fold_of(rows, "user") == 0)


@pytest.fixture(scope="module")
def flipped(dataset, rows, in_fold_0, with_changed_records, tmp_path_factory):
    """The dataset with the labels of ``in_fold_0`` turned round, in the records alone."""
    row_ids = set(rows["row_id"][in_fold_0])

    def change(feature):
        if feature["row_id"].int64_list.value[0] in row_ids:
            flip(feature)

    return with_changed_records(dataset, tmp_path_factory.mktemp("flipped") / "dataset", change)


@pytest.fixture(scope="module")
def by_row(dataset, cross_fit):
    return teacher_scores(dataset, cross_fit(), title=None)


@pytest.fixture(scope="module")
def by_user(dataset, cross_fit):
    return teacher_scores(dataset, cross_fit("method.fold_by=user"), title=None)


def test_every_training_row_gets_a_score_that_predicts_its_label(by_row, by_user, rows):
    for scores in (by_row, by_user):
        np.testing.assert_array_equal(scores.row_ids, rows["row_id"])
        assert scores.values.dtype == np.float32
        assert ((scores.values > 0) & (scores.values < 1)).all()
        assert pointwise.auc(rows["label"], scores.values) > 0.52


@pytest.mark.parametrize("fold_by", ["row", "user"])
def test_each_row_is_scored_by_a_model_that_never_saw_its_label(
    fold_by, request, flipped, rows, in_fold_0, cross_fit
):  # fmt: skip
    scores = request.getfixturevalue(f"by_{fold_by}")
    of_flipped = teacher_scores(flipped, cross_fit(f"method.fold_by={fold_by}"), title=None)
    folds = fold_of(rows, fold_by)
    assert abs((folds == 0).mean() - 0.5) < 0.15
    # Fold 0 is scored by a model of fold 1, where no label differs: bit for bit the same, also where its own differ.
    assert in_fold_0[folds == 0].mean() > 0.3
    np.testing.assert_array_equal(scores.values[folds == 0], of_flipped.values[folds == 0])
    # Fold 1 is scored by a model of fold 0, half of whose labels differ.
    assert (scores.values[folds == 1] != of_flipped.values[folds == 1]).mean() > 0.9


def test_an_event_that_the_log_repeats_is_scored_by_a_model_that_saw_neither_copy(
    dataset, cross_fit, with_changed_records, tmp_path
):
    # Every second row becomes the copy of the row before it: same user, same time, same label, another row id.
    last = []

    def repeat(feature):
        names = [name for name in feature if name != "row_id"]
        if last:
            for name in names:
                feature[name].CopyFrom(last[0][name])
            last.clear()
        else:
            last.append({name: type(feature[name]).FromString(feature[name].SerializeToString()) for name in names})

    repeated = with_changed_records(dataset, tmp_path / "repeated", repeat)
    scores = teacher_scores(repeated, cross_fit(), title=None)
    labels = input_pipeline.read_columns(repeated, "train", ["label", "user_hash", "event_time"])
    pairs = len(scores.values) // 2 * 2
    firsts, copies = scores.values[:pairs:2], scores.values[1:pairs:2]
    np.testing.assert_array_equal(labels["event_time"][:pairs:2], labels["event_time"][1:pairs:2])
    # Scored by one model, as equal inputs are: had their folds differed, half of the pairs would have two scores.
    np.testing.assert_array_equal(firsts, copies)


@pytest.mark.long
def test_repeats_are_averaged(dataset, rows, cross_fit, by_row, tmp_path):
    found = teacher_scores(dataset, cross_fit("method.num_repeats=2"), title=None)
    # The second division into folds has the seed 1001; its first model is the third of all, with the seed 3001.
    held_out = fold_of(rows, "row", seed=1001) == 0
    model, _ = fitted(
        dataset,
        cross_fit("method=bce", "seed=3001"),
        WorkDir(tmp_path / "fold"),
        title=None,
        row_weights=RowValues(rows["row_id"], (~held_out).astype(np.float32)),
    )
    second = predict(model, dataset, "train")[held_out]
    np.testing.assert_allclose(found.values[held_out], (by_row.values[held_out] + second) / 2, rtol=0, atol=1e-7)
    assert np.abs(second - by_row.values[held_out]).mean() > 0.005


# Scores are stored.


def test_scores_are_taken_from_the_dataset_the_second_time(dataset, cross_fit, by_row):
    file = scores_file(dataset, cross_fit())
    assert file.is_relative_to(dataset.path / "teacher_scores")
    assert {path.name for path in file.parent.iterdir()} == {"scores.npz", "teacher.json", ".lock"}  # No models.
    written = file.stat().st_mtime_ns
    (file.parent / "models").write_text("Here no model can be trained.", encoding="utf-8")
    again = teacher_scores(dataset, cross_fit("method.kappa=2.0"), title=None)
    np.testing.assert_array_equal(again.row_ids, by_row.row_ids)
    np.testing.assert_array_equal(again.values, by_row.values)
    assert file.stat().st_mtime_ns == written


def test_what_the_scores_depend_on_is_written_beside_them(dataset, cross_fit, by_row):
    told = read_json(scores_file(dataset, cross_fit()).with_name("teacher.json"))
    assert told["dataset_fingerprint"] == dataset.fingerprint
    assert (told["teacher"], told["num_folds"], told["fold_by"]) == ("cross_fit", NUM_FOLDS, "row")
    assert (told["train"]["backbone"], told["train"]["method"]["name"]) == ("lr", "bce")


@pytest.mark.parametrize(
    "assignment",
    [
        "seed=2", "backbone=fm", "embeddings.dim=5", "hidden_units=[9]", "dropout=0.5", "batch_size=100",
        "learning_rate=0.1", "max_epochs=3", "patience_epochs=5", "backbone_arguments={a: 1}", "method.num_folds=3",
        "method.fold_by=user", "method.num_repeats=2", "method.teacher=prequential",
    ],
)  # fmt: skip
def test_scores_have_another_file_where_they_would_differ(dataset, cross_fit, assignment):
    assert scores_file(dataset, cross_fit(assignment)) != scores_file(dataset, cross_fit())


@pytest.mark.parametrize(
    "assignment",
    [
        "method.kappa=2.0", "method.lambda=0.1", "method.mu=0.1", "method.global_weighting=mean_one",
        "method.loss_warmup_steps=7", "method.placebo=shuffled_confidence",
        "method.ad_gate.learning_rate=0.5", "method.guards.min_ctr_ratio=0.1",
        "checkpoint_every_steps=5", "checkpoint_every_minutes=null", "checkpoints_to_keep=9", "max_cache_bytes=0",
        "calibration.method=none", "method.loss=focal", "method.focal_gamma=2.0", "method.label_smoothing=0.2",
    ],
)  # fmt: skip
def test_runs_that_differ_in_the_use_of_scores_alone_share_them(dataset, cross_fit, assignment):
    assert scores_file(dataset, cross_fit(assignment)) == scores_file(dataset, cross_fit())


def test_folds_do_not_enter_where_there_are_none(dataset, quick, prequential):
    assert scores_file(dataset, quick("method.teacher=prequential", "method.num_folds=7")) == scores_file(
        dataset, prequential
    )


def test_a_killed_job_goes_on_with_the_folds_that_it_had_not_finished(feed_dataset, cross_fit, by_row, tmp_path):
    shutil.copytree(feed_dataset.path, tmp_path / "dataset")
    dataset = DatasetDir(tmp_path / "dataset")
    models = scores_file(dataset, cross_fit()).with_name("models")
    models.mkdir(parents=True)
    (models / "fold_1").write_text("The second fold ends the job here.", encoding="utf-8")

    def finished_files():
        return {path: path.stat().st_mtime_ns for path in (models / "fold_0").rglob("*") if path.is_file()}

    found = []
    for _ in range(2):
        with pytest.raises(FileExistsError, match="fold_1"):
            teacher_scores(dataset, cross_fit(), title=None)
        found.append(finished_files())
    assert any("best_weights" in str(path) for path in found[0])
    assert found[0] == found[1]  # The first fold was not trained again.
    (models / "fold_1").unlink()
    np.testing.assert_array_equal(teacher_scores(dataset, cross_fit(), title=None).values, by_row.values)
    assert not models.exists()


def test_who_needs_a_teacher_that_another_process_trains_waits_for_its_scores(dataset, cross_fit, by_row):
    config = cross_fit("seed=5")
    file = scores_file(dataset, config)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with WorkDir(file.parent).exclusive():
            waiting = pool.submit(teacher_scores, dataset, config, None)
            with pytest.raises(concurrent.futures.TimeoutError):
                waiting.result(timeout=0.5)
            np.savez(file, row_ids=by_row.row_ids, values=by_row.values + 1)  # What no training would give.
        np.testing.assert_array_equal(waiting.result(timeout=60).values, by_row.values + 1)


class _Trap:
    """Unpickling it leaves a directory behind."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return os.mkdir, (str(self._path),)


def test_stored_scores_are_never_unpickled(dataset, cross_fit, tmp_path):
    file = scores_file(dataset, cross_fit("seed=6"))
    file.parent.mkdir(parents=True)
    np.savez(file, row_ids=np.arange(3), values=np.array([_Trap(tmp_path / "sprung")], dtype=object))
    with pytest.raises((ArtifactError, ValueError)):
        teacher_scores(dataset, cross_fit("seed=6"), title=None)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", ["text", "nothing", "half"])
def test_a_file_that_cannot_be_read_is_named(dataset, cross_fit, by_row, content):
    file = scores_file(dataset, cross_fit("seed=7"))
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = scores_file(dataset, cross_fit()).read_bytes()
    file.write_bytes({"text": b"no scores", "nothing": b"", "half": whole[: len(whole) // 2]}[content])
    with pytest.raises(ArtifactError, match=re.escape(str(file))):
        teacher_scores(dataset, cross_fit("seed=7"), title=None)


def test_online_teachers_have_no_scores_to_store(dataset, quick):
    for assignments in (["method.teacher=self"], ["method.teacher=ema"], ["method=bce"]):
        assert quick(*assignments).teacher_runs == ()


def test_scores_are_found_for_a_run(clsd_run, dataset, cross_fit, by_row, tmp_path):
    work_dir = WorkDir(tmp_path)
    work_dir.config.write_text(
        f'{{"train": {cross_fit().model_dump_json(by_alias=True)}, "dataset_fingerprint": "{dataset.fingerprint}"}}',
        encoding="utf-8",
    )
    np.testing.assert_array_equal(stored_scores(work_dir, dataset).values, by_row.values)
    shutil.copytree(dataset.path, tmp_path / "bare", ignore=shutil.ignore_patterns("teacher_scores"))
    assert stored_scores(work_dir, DatasetDir(tmp_path / "bare")) is None  # Somebody tidied up.
    assert stored_scores(clsd_run.work_dir, dataset) is None  # The self teacher.


# Prequential.


@pytest.fixture(scope="module")
def of_days(dataset, prequential):
    return teacher_scores(dataset, prequential, title=None)


@pytest.fixture(scope="module")
def days(rows):
    return (rows["event_time"] - rows["event_time"].min()) // DAY_MICROSECONDS


def test_the_feed_trains_on_eight_days(days):
    assert np.unique(days).tolist() == list(range(8))


def test_a_score_does_not_know_labels_of_its_own_day_or_of_later_days(
    dataset, days, rows, of_days, prequential, with_changed_records, tmp_path, capsys
):
    row_ids = set(rows["row_id"][days >= 4])

    def change(feature):
        if feature["row_id"].int64_list.value[0] in row_ids:
            flip(feature)

    changed = teacher_scores(with_changed_records(dataset, tmp_path / "dataset", change), prequential, title="my run")
    np.testing.assert_array_equal(changed.row_ids, of_days.row_ids)
    before = days <= 4
    np.testing.assert_array_equal(changed.values[before], of_days.values[before])
    assert (changed.values[days > 4] != of_days.values[days > 4]).mean() > 0.9
    progress = capsys.readouterr().out.splitlines()
    assert progress == [f"my run: teacher scored 400 rows of day {day}" for day in range(1, 9)]


def test_scores_of_later_days_predict_their_labels(of_days, days, rows):
    np.testing.assert_array_equal(of_days.row_ids, rows["row_id"])
    late = days >= 4
    assert pointwise.auc(rows["label"][late], of_days.values[late]) > 0.54


def test_the_first_day_has_no_score_and_every_later_row_has_one(of_days, days):
    # No model precedes it; training counts its clicks 1.
    np.testing.assert_array_equal(np.isnan(of_days.values), days == 0)
    assert ((of_days.values[days > 0] > 0) & (of_days.values[days > 0] < 1)).all()


@pytest.fixture
def passed_on():
    """The SIGTERMs that nobody in the process took."""
    received = []
    with handling_sigterm(lambda number, _: received.append(number)):
        yield received


def test_days_that_were_scored_before_a_sigterm_are_kept(feed_dataset, prequential, of_days, passed_on, tmp_path):
    shutil.copytree(feed_dataset.path, tmp_path / "dataset", ignore=shutil.ignore_patterns("teacher_scores"))
    dataset = DatasetDir(tmp_path / "dataset")
    days = scores_file(dataset, prequential).parent / "models" / "days"

    def send_sigterm():
        while not (days / "ckpt-3.index").exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send_sigterm, daemon=True).start()
    with pytest.raises(TrainingInterruptedError, match="days that the teacher has scored are saved"):
        teacher_scores(dataset, prequential, title=None)
    assert not passed_on
    assert not scores_file(dataset, prequential).exists()
    done = int(re.search(r'"ckpt-(\d+)"', (days / "checkpoint").read_text(encoding="utf-8"))[1])
    assert 3 <= done < 8
    np.testing.assert_array_equal(teacher_scores(dataset, prequential, title=None).values, of_days.values)
    assert not days.exists()


def test_a_split_of_one_day_is_refused(dataset, prequential, with_changed_records, tmp_path):
    def change(feature):
        feature["event_time"].int64_list.value[0] = 1_700_000_000_000_000 + feature["row_id"].int64_list.value[0]

    one_day = with_changed_records(dataset, tmp_path / "dataset", change)
    with pytest.raises(ValueError, match=r"two days or more\. Received: one day\. Use teacher=cross_fit"):
        teacher_scores(one_day, prequential, title=None)
