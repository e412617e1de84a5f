"""The directories that couple the jobs: complete or refused, and changed contents are noticed."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from clsd_tf.spec.feature_spec import FeatureSpec
from clsd_tf.storage.dataset_dir import DatasetDir, DatasetLayout
from clsd_tf.storage.files import ArtifactError, read_json, require_absent, staged_directory, write_json
from clsd_tf.storage.work_dir import WorkDir


@pytest.fixture
def copied(feed_dataset, tmp_path):
    """A copy of the dataset that a test may damage."""
    path = tmp_path / "copy"
    shutil.copytree(feed_dataset.path, path)
    return path


def refusal(path):
    """The message with which a dataset directory is refused."""
    with pytest.raises(ArtifactError) as caught:
        DatasetDir(path)
    return str(caught.value)


# --- DatasetDir ------------------------------------------------------------------------------------------------------


def test_complete_dataset_is_accepted_wherever_it_is_moved(copied, feed_dataset):
    dataset = DatasetDir(copied)
    assert dataset.fingerprint == feed_dataset.fingerprint
    assert dataset.spec == feed_dataset.spec
    assert dataset.inputs == feed_dataset.inputs


def test_absent_dataset_is_refused_with_its_path_and_the_remedy(tmp_path):
    message = refusal(tmp_path / "nothing")
    assert f"Received: {tmp_path / 'nothing'}, which does not exist" in message
    assert "Run `python -m pipelines.build_dataset` first" in message


def test_dataset_without_success_marker_is_refused(copied):
    (copied / "_SUCCESS").unlink()
    message = refusal(copied)
    assert "a dataset directory is complete when it holds _SUCCESS" in message
    assert f"Received: {copied}, which has none" in message


def test_spec_changed_after_writing_is_refused_with_both_fingerprints(copied, feed_dataset):
    path = DatasetLayout(copied).spec
    content = read_json(path)
    content["label"] = "click != 0"
    path.write_text(json.dumps(content), encoding="utf-8")
    message = refusal(copied)
    assert "the feature spec was changed after the directory was written" in message
    changed = FeatureSpec.model_validate_json(json.dumps(content)).fingerprint
    assert f"Received: fingerprint {changed}. Allowed: {feed_dataset.spec.fingerprint}" in message
    assert "Build the dataset again" in message


def test_statistics_changed_after_writing_are_refused_with_both_fingerprints(copied, feed_dataset):
    path = DatasetLayout(copied).statistics
    content = read_json(path)
    content["numeric"]["item_duration"]["mean"] += 1
    path.write_text(json.dumps(content), encoding="utf-8")
    message = refusal(copied)
    assert "the dataset was changed after the directory was written" in message
    received = DatasetLayout(copied).fingerprint()
    assert received != feed_dataset.fingerprint
    assert f"Received: fingerprint {received}. Allowed: {feed_dataset.fingerprint}" in message


@pytest.mark.parametrize("change", ["swap", "remove", "add"])
def test_changed_vocabularies_are_refused(copied, change):
    path = DatasetLayout(copied).vocabulary("item")
    if change == "swap":
        first, second, *rest = path.read_text().splitlines()
        path.write_text("".join(f"{line}\n" for line in (second, first, *rest)))
    elif change == "remove":
        path.unlink()
    else:
        (path.parent / "extra.txt").write_text("a\n")
    assert "the dataset was changed" in refusal(copied)


def test_changed_counts_are_refused(copied):
    path = DatasetLayout(copied).counts
    counts = read_json(path)
    counts["splits"]["train"]["rows"] += 1
    write_json(path, counts)
    assert "the dataset was changed" in refusal(copied)


def test_spec_that_is_no_longer_valid_is_refused_as_an_artifact(copied):
    path = DatasetLayout(copied).spec
    path.write_text(path.read_text().replace('"label"', '"lable"'), encoding="utf-8")
    assert str(copied) in refusal(copied)


@pytest.mark.parametrize("name", ["feature_spec.json", "statistics.json", "counts.json"])
def test_absent_file_is_refused_as_an_artifact(copied, name):
    (copied / name).unlink()
    assert name in refusal(copied)


def test_missing_shard_is_refused(copied):
    # As if the training split had had two files, of which the second is gone.
    [shard] = (copied / "records").glob("train-*")
    shard.rename(shard.with_name("train-00000-of-00002.tfrecord"))
    with pytest.raises(ArtifactError, match="train"):
        DatasetDir(copied).record_files("train")


def test_split_without_records_is_refused(copied):
    for path in (copied / "records").glob("test-*"):
        path.unlink()
    with pytest.raises(ArtifactError, match="test"):
        DatasetDir(copied).record_files("test")


def test_unknown_split_names_the_known_ones(feed_dataset):
    with pytest.raises(ValueError, match=r"train, validation, test\. Received: 'dev'"):
        feed_dataset.record_files("dev")


def test_a_dataset_directory_shows_its_path_its_rows_and_its_fingerprint(feed_dataset):
    train, validation, test = (feed_dataset.num_rows(split) for split in ("train", "validation", "test"))
    assert repr(feed_dataset) == (
        f"DatasetDir('{feed_dataset.path}': {train:,} train, {validation:,} validation, {test:,} test rows, "
        f"fingerprint {feed_dataset.fingerprint})"
    )


# --- Staging ---------------------------------------------------------------------------------------------------------


def test_staged_directory_appears_under_its_name_only_at_the_end(tmp_path):
    final = tmp_path / "deep" / "final"
    with staged_directory(final) as staging:
        (staging / "file").write_text("x")
        assert not final.exists()
        assert staging.parent == final.parent
    assert (final / "file").read_text() == "x"
    assert [path.name for path in final.parent.iterdir()] == ["final"]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_kept(tmp_path):
    left = tmp_path / ".final.incomplete-0badc0de"
    other = tmp_path / ".final-2.incomplete-0badc0de"
    for path in (left, other):
        path.mkdir()
        (path / "file").write_text("x")
    with staged_directory(tmp_path / "final") as living:
        assert not left.exists()
        assert other.exists()
        with staged_directory(tmp_path / "final") as second:
            assert living.is_dir()
            assert second != living
        shutil.rmtree(tmp_path / "final")
    assert {path.name for path in tmp_path.iterdir()} == {"final", other.name}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_exception_in_a_staged_directory_leaves_nothing(tmp_path, error):
    def fail():
        with staged_directory(tmp_path / "final") as staging:
            (staging / "file").write_text("x")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_refused_before_anything_is_written(tmp_path):
    final = tmp_path / "final"
    final.mkdir()
    with (
        pytest.raises(FileExistsError, match=r"must not exist yet\. Received: .*final\. Choose another name"),
        staged_directory(final),
    ):
        pytest.fail("the block must not run")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_output_that_appears_meanwhile_is_not_overwritten(tmp_path):
    final = tmp_path / "final"

    def race():
        with staged_directory(final) as staging:
            (staging / "file").write_text("mine")
            final.mkdir()
            (final / "file").write_text("theirs")

    with pytest.raises(FileExistsError):
        race()
    assert (final / "file").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_file_in_place_of_an_output_directory_is_refused(tmp_path):
    (tmp_path / "final").touch()
    with pytest.raises(FileExistsError, match="Received: "):
        require_absent(tmp_path / "final")


# --- WorkDir ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def work_dir(feed_dataset, tmp_path):
    """A finished run on ``feed_dataset``, as far as its marker goes."""
    work = WorkDir(tmp_path / "run")
    work.path.mkdir()
    write_json(work.config, {"dataset_fingerprint": feed_dataset.fingerprint})
    work.mark_complete("0123456789abcdef")
    return work


def test_finished_run_on_the_dataset_is_accepted(work_dir, feed_dataset):
    assert work_dir.is_complete
    work_dir.require_complete(feed_dataset)
    work_dir.require_same_dataset(feed_dataset)


def test_unfinished_run_is_refused_with_the_remedy(work_dir, feed_dataset):
    work_dir.success.unlink()
    assert not work_dir.is_complete
    with pytest.raises(ArtifactError) as caught:
        work_dir.require_complete(feed_dataset)
    message = str(caught.value)
    assert "a work directory is complete when it holds _SUCCESS" in message
    assert f"Received: {work_dir.path}, which has none" in message
    assert "Run `python -m pipelines.train` (again) first" in message


def test_absent_run_is_refused(tmp_path, feed_dataset):
    with pytest.raises(ArtifactError, match=r"Received: .*nowhere, which does not exist"):
        WorkDir(tmp_path / "nowhere").require_complete(feed_dataset)


@pytest.mark.parametrize("check", ["require_complete", "require_same_dataset"])
def test_run_on_another_dataset_is_refused_with_both_fingerprints(work_dir, feed_dataset, check):
    write_json(work_dir.config, {"dataset_fingerprint": "0123456789abcdef"})
    with pytest.raises(ArtifactError) as caught:
        getattr(work_dir, check)(feed_dataset)
    message = str(caught.value)
    assert f"{work_dir.path} was trained on another dataset" in message
    assert f"Received: {feed_dataset.path} with fingerprint {feed_dataset.fingerprint}" in message
    assert "Allowed: 0123456789abcdef" in message


def test_a_work_directory_shows_its_path_and_how_far_it_is(work_dir, tmp_path):
    assert repr(work_dir) == f"WorkDir('{work_dir.path}': complete, fingerprint 0123456789abcdef)"
    work_dir.success.unlink()
    assert repr(work_dir) == f"WorkDir('{work_dir.path}': not finished)"
    assert repr(WorkDir(tmp_path / "nowhere")) == f"WorkDir('{tmp_path / 'nowhere'}': not started)"


def test_json_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_a_work_directory_is_held_by_one_process(tmp_path):
    work_dir = WorkDir(tmp_path / "work")
    with (
        work_dir.exclusive(),
        pytest.raises(ArtifactError, match=r"only one process may train.*Received: .*work"),
        WorkDir(tmp_path / "work").exclusive(),
    ):
        pass
    with work_dir.exclusive():  # Free again.
        assert work_dir.path.is_dir()


# --- Without locks ---------------------------------------------------------------------------------------------------

_WITHOUT_FCNTL = """
import pathlib, sys

class NoFcntl:
    def find_spec(self, name, path=None, target=None):
        if name == "fcntl":
            raise ModuleNotFoundError("No module named 'fcntl'")

sys.modules.pop("fcntl", None)
sys.meta_path.insert(0, NoFcntl())
from clsd_tf import DatasetDir, WorkDir
from clsd_tf.storage.files import ArtifactError, locked, staged_directory

print(DatasetDir(sys.argv[1]).num_rows("train"))
here = pathlib.Path(sys.argv[2])
for lock in (WorkDir(here / "run").exclusive(), staged_directory(here / "new"), locked(here, wait=False)):
    try:
        with lock:
            print("held")
    except ArtifactError as error:
        print(error)
"""


def test_where_the_platform_has_no_locks_reading_works_and_locking_says_what_is_missing(feed_dataset, tmp_path):
    command = [sys.executable, "-c", _WITHOUT_FCNTL, feed_dataset.path, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows, *refusals = done.stdout.splitlines()
    assert rows == str(feed_dataset.num_rows("train")), done.stderr
    refusal = r"needs the Python module fcntl\. Received: platform \w+, which has none\. Use Linux"
    assert [bool(re.search(refusal, line)) for line in refusals] == [True] * 3
