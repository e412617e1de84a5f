"""The teacher that is a file: scores from anywhere, one for each training row."""

import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from runs import teacher_scores
from test_killed_training import assert_same_bits, tensors

from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import SUCCESS, ArtifactError, read_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.run import train
from clsd_tf.training.teachers.stored import stored_scores

pytestmark = pytest.mark.usefixtures("deterministic")


@pytest.fixture(scope="module")
def dataset(feed_dataset, tmp_path_factory):
    """A copy of the feed's dataset, since teachers add their scores to it."""
    path = tmp_path_factory.mktemp("scores_file") / "dataset"
    shutil.copytree(feed_dataset.path, path, ignore=shutil.ignore_patterns("teacher_scores"))
    return DatasetDir(path)


@pytest.fixture(scope="module")
def trained(dataset, tiny, tmp_path_factory):
    """Name, assignments -> the work directory of a run of the feed."""

    def trained(name, *assignments):
        work_dir = WorkDir(tmp_path_factory.mktemp("runs") / name)
        train(dataset, tiny("backbone=lr", *assignments), work_dir, title=None)
        return work_dir

    return trained


@pytest.fixture(scope="module")
def cross_fit_run(trained):
    return trained("cross_fit", "method.teacher=cross_fit")


@pytest.fixture(scope="module")
def cross_fit_scores(dataset, cross_fit_run):
    return stored_scores(cross_fit_run, dataset)


@pytest.fixture(scope="module")
def file(cross_fit_scores, tmp_path_factory):
    """The scores of the cross_fit teacher, in an order of rows that no record file has."""
    path = tmp_path_factory.mktemp("scores") / "scores.parquet"
    order = np.random.default_rng(0).permutation(len(cross_fit_scores.values))
    write(path, cross_fit_scores.row_ids[order], cross_fit_scores.values[order])
    return path


@pytest.fixture(scope="module")
def run(trained, file):
    return trained("scores", teacher(file))


def write(path, row_ids, scores, names=("row_id", "score")):
    pyarrow.parquet.write_table(pa.table(dict(zip(names, (row_ids, scores), strict=True))), path)


def teacher(path):
    return f"method.teacher={{scores: {path}}}"


def test_scores_of_a_file_train_as_those_of_the_teacher_that_made_them(run, cross_fit_run, cross_fit_scores, dataset):
    assert_same_bits(run, cross_fit_run)
    found = stored_scores(run, dataset)
    np.testing.assert_array_equal(found.row_ids, cross_fit_scores.row_ids)
    np.testing.assert_array_equal(found.values, cross_fit_scores.values)


def test_other_scores_train_another_model(run, trained, cross_fit_scores, tmp_path):
    path = tmp_path / "scores.parquet"
    write(path, cross_fit_scores.row_ids, cross_fit_scores.values[::-1])
    other = trained("other", teacher(path))
    assert read_json(other.history)[-1]["bce"] != read_json(run.history)[-1]["bce"]


def test_a_click_without_a_score_counts_1(dataset, trained, cross_fit_scores, tmp_path):
    # Neither null nor NaN is a score; of no click is there any, and the model is that of ordinary training.
    row_ids, path = cross_fit_scores.row_ids, tmp_path / "scores.parquet"
    write(path, row_ids, pa.array([None if row % 2 else np.nan for row in row_ids], pa.float64()))
    scored, bce = trained("no_scores", teacher(path)), trained("bce", "method=bce")
    assert np.isnan(stored_scores(scored, dataset).values).all()
    weights, expected = tensors(scored.best_weights), tensors(bce.best_weights)
    assert {name for name in weights if name.startswith("backbone/")} == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(weights[name], value, err_msg=name)


def test_other_integers_and_floats_are_taken(dataset, tiny, cross_fit_scores, tmp_path):
    path = tmp_path / "scores.parquet"
    write(path, cross_fit_scores.row_ids.astype(np.uint64), np.full(len(cross_fit_scores.row_ids), 0.25, np.float32))
    found = teacher_scores(dataset, tiny(teacher(path)))
    np.testing.assert_array_equal(found.values, np.float32(0.25))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, scores: (ids, scores, ("row_id", "ctr")), r"row_id \(int64\) and score \(float\)\. .*score"),
        (lambda ids, scores: (ids, scores, ("row", "score")), r"row_id \(int64\) and score \(float\)\. .*row_id"),
        (lambda ids, scores: (ids, ["high"] * len(ids)), r"row_id \(int64\) and score \(float\)\. .*: 'high' as a"),
        (lambda ids, scores: (np.r_[ids, ids[:1]], np.r_[scores, 0.5]), "names each row once.* with a row twice$"),
        (lambda ids, scores: (ids[1:], scores[1:]), "with 1 training rows without a score, 0 scores of other rows$"),
        (lambda ids, scores: (np.r_[ids, -5], np.r_[scores, 0.5]), "with 0 training rows .* 1 scores of other rows$"),
        (lambda ids, scores: (ids, np.r_[scores[1:], 1.5]), r"scores in \[0, 1\]\. .* with 1 outside of it$"),
        (lambda ids, scores: (ids, np.r_[scores[1:], -1e-9]), r"scores in \[0, 1\]\. .* with 1 outside of it$"),
        (lambda ids, scores: (ids, np.r_[scores[1:], np.inf]), r"scores in \[0, 1\]\. .* with 1 outside of it$"),
        (lambda ids, scores: (pa.array([None, *ids[1:]]), scores), "a row for each score.* with scores without row_id"),
    ],
    ids=[
        "no_score",
        "no_row_id",
        "text",
        "twice",
        "missing",
        "foreign",
        "above_1",
        "below_0",
        "infinite",
        "null_row_id",
    ],
)
def test_a_file_that_does_not_hold_a_score_for_each_row_is_refused(
    dataset, tiny, cross_fit_scores, tmp_path, change, message
):
    path = tmp_path / "scores.parquet"
    write(path, *change(cross_fit_scores.row_ids, cross_fit_scores.values.astype(np.float64)))
    with pytest.raises(ArtifactError, match=message) as error:
        teacher_scores(dataset, tiny(teacher(path)))
    assert str(path) in str(error.value)


def test_what_is_no_parquet_file_is_refused(dataset, tiny, tmp_path):
    path = tmp_path / "scores.parquet"
    path.write_text("row_id,score\n1,0.5\n", encoding="utf-8")
    with pytest.raises(ArtifactError, match=rf"are a Parquet file .* Received: {re.escape(str(path))}: .*magic bytes"):
        teacher_scores(dataset, tiny(teacher(path)))


@pytest.mark.parametrize("name", ["absent.parquet", "."])
def test_a_file_that_is_not_there_is_refused_before_the_run_begins(dataset, tiny, tmp_path, name):
    config, work_dir = tiny(teacher(tmp_path / name)), WorkDir(tmp_path / "run")
    message = rf"must be there. Received: {re.escape(str(tmp_path / name))}: .* Put it there, or name another"
    with pytest.raises(ArtifactError, match=message):
        train(dataset, config, work_dir, title=None)
    assert not work_dir.config.exists()
    with pytest.raises(ArtifactError, match=message):
        teacher_scores(dataset, config)


def test_a_file_that_was_refused_may_be_corrected(dataset, tiny, run, cross_fit_scores, tmp_path):
    path, work_dir = tmp_path / "scores.parquet", WorkDir(tmp_path / "run")
    row_ids, scores = cross_fit_scores.row_ids, cross_fit_scores.values
    config = tiny("backbone=lr", teacher(path))
    write(path, row_ids[1:], scores[1:])
    with pytest.raises(ArtifactError, match="without a score"):
        train(dataset, config, work_dir, title=None)
    write(path, row_ids, scores)
    train(dataset, config, work_dir, title=None)
    assert_same_bits(work_dir, run)
    np.testing.assert_array_equal(stored_scores(work_dir, dataset).values, scores)


@pytest.fixture
def killed(run, tmp_path):
    """The run as it was before its last file was written."""
    shutil.copytree(run.path, tmp_path / "killed")
    (tmp_path / "killed" / SUCCESS).unlink()
    return WorkDir(tmp_path / "killed")


def test_a_killed_run_goes_on_with_the_file_that_it_began_with_and_no_other(dataset, tiny, killed, run, file, tmp_path):
    config = tiny("backbone=lr", teacher(file))
    content = file.read_bytes()
    try:
        table = pyarrow.parquet.read_table(file)
        write(file, table.column("row_id"), np.full(len(table), 0.5))
        with pytest.raises(ArtifactError, match=rf"has read another file. Received: {file} .* Put that file back, or"):
            train(dataset, config, killed, title=None)
    finally:
        file.write_bytes(content)
    train(dataset, config, killed, title=None)
    assert_same_bits(killed, run)
    assert killed.fingerprint == run.fingerprint


def test_a_finished_run_is_analyzed_with_the_scores_that_it_was_trained_with(dataset, run, file, cross_fit_scores):
    moved = file.rename(file.with_name("elsewhere"))
    try:
        np.testing.assert_array_equal(stored_scores(run, dataset).values, cross_fit_scores.values)
    finally:
        moved.rename(file)
