"""Daily training: each day is measured by a model that has seen nothing of it, then trained on."""

import datetime as dt
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from shop import build
from shop_days import DATES
from sklearn.metrics import log_loss, roc_auc_score

from clsd_tf.continual.daily_training import days_between, train_daily
from clsd_tf.continual.progressive_validation import EarlierModel, validate_progressively
from clsd_tf.data import input_pipeline
from clsd_tf.spec.feature_spec import parse_spec
from clsd_tf.storage.dataset_dir import SPLITS
from clsd_tf.storage.files import ArtifactError, read_json, write_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import load_model, restored_model
from clsd_tf.training.config import load_config
from clsd_tf.training.lineage import TrainedOn
from clsd_tf.training.run import train

pytestmark = pytest.mark.usefixtures("deterministic")

ROOT = pathlib.Path(__file__).parent.parent
_SETTINGS = ["method=bce", "backbone=fm", "embeddings.dim=4", "batch_size=32", "max_epochs=1", "learning_rate=0.02"]
_CONFIG = load_config(None, _SETTINGS)


@pytest.fixture(scope="module")
def datasets(shop_days):
    """The pattern of the paths of the three days' datasets."""
    return str(shop_days[0].path.parent / "{date}")


def days_of(datasets, directory, first=DATES[0], last=DATES[-1]):
    return days_between(first, last, datasets, str(directory / "{date}"))


@pytest.fixture(scope="module")
def trained_days(datasets, tmp_path_factory):
    """(the three days, what daily training gave of them). Read-only."""
    days = days_of(datasets, tmp_path_factory.mktemp("trained"))
    return days, list(train_daily(days, _CONFIG, title=None))


# Progressive validation.


def rows_of(dataset, name):
    return np.concatenate([input_pipeline.read_columns(dataset, split, [name])[name] for split in SPLITS])


def test_each_day_is_measured_by_the_model_of_the_day_before(trained_days):
    days, found = trained_days
    assert [day["date"] for day in found] == [str(date) for date in DATES]
    assert found[0]["prequential"] is None
    for earlier, entry in zip(days, found[1:], strict=False):
        assert entry["prequential"]["scored_by"] == earlier.work_dir.fingerprint
        assert entry["prequential"]["overall"]["rows"] == 300
        assert entry["prequential"]["groups"]["city_group"]["other"]["rows"] > 0
    earlier, day = days[1:]
    model = EarlierModel(earlier.work_dir, day.dataset)
    batches = [input_pipeline.batches(day.dataset, split, batch_size=64) for split in SPLITS]
    ctr = np.concatenate([model.predict(batch) for batch in batches])
    label = rows_of(day.dataset, "label")
    overall = found[2]["prequential"]["overall"]
    assert overall["auc"] == pytest.approx(roc_auc_score(label, ctr), abs=1e-6)
    assert overall["log_loss"] == pytest.approx(log_loss(label, ctr), rel=1e-5)
    # A model that has seen the day is another one.
    own = load_model(day.work_dir, day.dataset).predict(batches[0], verbose=0)
    assert np.abs(own - ctr[: len(own)]).max() > 1e-3


def test_new_values_are_out_of_vocabulary_for_the_earlier_model(trained_days, shop_content, tmp_path):
    # Built so that no vocabulary may grow: what is new becomes out of vocabulary by the transform itself.
    earlier, day = trained_days[0][:2]
    for index in (1, 2, 3):
        shop_content["features"][index].setdefault("vocabulary", {})["max_size"] = 1
    raw = day.dataset.path.parent.parent / f"raw-{day.date}"
    as_served = build(parse_spec(shop_content, "shop"), raw, tmp_path / "dataset", grow_from=earlier.dataset.path)
    assert as_served.inputs == earlier.dataset.inputs != day.dataset.inputs
    plain = restored_model(earlier.work_dir, TrainedOn.read(earlier.work_dir).inputs)
    model = EarlierModel(earlier.work_dir, day.dataset)
    for split in SPLITS:
        expected = plain.predict(input_pipeline.batches(as_served, split, batch_size=64), verbose=0)
        received = model.predict(input_pipeline.batches(day.dataset, split, batch_size=64))
        np.testing.assert_array_equal(received, expected)
    new = rows_of(day.dataset, "item") != rows_of(as_served, "item")
    assert 10 < new.sum() < 100


def test_a_model_is_not_measured_on_what_it_may_have_seen(trained_days):
    first, second, third = trained_days[0]
    with pytest.raises(ArtifactError, match=r"events begin at 2023-11-17.* Allowed: after 2023-11-17T17:56"):
        validate_progressively(third.work_dir, third.dataset)
    with pytest.raises(ArtifactError, match=r"events begin at 2023-11-15.* Allowed: after 2023-11-16T17:56"):
        validate_progressively(second.work_dir, first.dataset)


def test_ids_are_the_same_on_all_days(shop_days):
    for name in shop_days[0].spec.vocabularies:
        first, second, third = (dataset.layout.vocabulary_values(name) for dataset in shop_days)
        assert first == second[: len(first)]
        assert second == third[: len(second)]
        assert len(first) < len(second) < len(third)


# Lineage.


def test_lineage_names_all_runs_before(trained_days):
    first, second, third = trained_days[0]
    found = read_json(third.work_dir.lineage)
    runs = [*found["ancestors"], found["run"]]
    assert [run["dataset_fingerprint"] for run in runs] == [day.dataset.fingerprint for day in trained_days[0]]
    fingerprints = [first.work_dir.fingerprint, second.work_dir.fingerprint]
    assert [run.get("work_fingerprint") for run in runs] == [*fingerprints, None]
    assert [run["rows"] for run in runs] == [240] * 3
    for run, date in zip(runs, DATES, strict=True):
        assert run["first_event"] == f"{date}T00:00:00+00:00"
        assert run["last_event"] == f"{date}T17:56:00+00:00"  # Event 269 of 300: test rows were not seen.
    with pytest.raises(ArtifactError, match=rf"--init_from .* {fingerprints[0]}. Allowed: {fingerprints[1]}"):
        train(third.dataset, _CONFIG, third.work_dir, title=None, init_from=first.work_dir)
    # It has all that it needs of the one before it.
    assert train(third.dataset, _CONFIG, third.work_dir, title=None) == read_json(third.work_dir.history)


def test_a_run_does_not_go_on_with_a_shrunk_vocabulary(trained_days, tmp_path):
    first, second, _ = trained_days[0]
    with pytest.raises(ArtifactError, match=r"vocabulary of item. Received: 8 values. Allowed: the 9 of the run"):
        train(first.dataset, _CONFIG, WorkDir(tmp_path / "run"), title=None, init_from=second.work_dir)


# Going on.


def contents(directory):
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file() and path.name != ".lock"}


def test_days_that_are_done_stay_as_they_are(trained_days):
    days, found = trained_days
    directory = days[0].work_dir.path.parent
    before = contents(directory)
    assert list(train_daily(days, _CONFIG, title=None)) == found
    assert contents(directory) == before


def test_later_training_goes_on_from_days_that_are_done_or_measured(trained_days, datasets, tmp_path):
    (_, second, third), found = trained_days
    shutil.copytree(second.work_dir.path, tmp_path / str(second.date))
    (tmp_path / str(third.date)).mkdir()
    run = WorkDir(tmp_path / str(third.date))
    shutil.copy2(third.work_dir.prequential, run.prequential)  # As if killed before it trained.
    written_at = run.prequential.stat().st_mtime_ns
    assert list(train_daily(days_of(datasets, tmp_path, first=second.date), _CONFIG, title=None)) == found[1:]
    assert run.prequential.stat().st_mtime_ns == written_at
    assert read_json(run.lineage) == read_json(third.work_dir.lineage)
    received, expected = (load_model(each, third.dataset) for each in (run, third.work_dir))
    for mine, other in zip(received.backbone.variables, expected.backbone.variables, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_a_measurement_by_another_run_is_refused(trained_days, datasets, tmp_path):
    days, _ = trained_days
    shutil.copytree(days[0].work_dir.path, tmp_path / str(DATES[0]))
    (tmp_path / str(DATES[1])).mkdir()
    measured = {**read_json(days[1].work_dir.prequential), "scored_by": "0123456789abcdef"}
    write_json(WorkDir(tmp_path / str(DATES[1])).prequential, measured)
    with pytest.raises(ArtifactError, match=r"measured by another run .* Received: {'scored_by': '0123456789abcdef'"):
        list(train_daily(days_of(datasets, tmp_path), _CONFIG, title=None))


# What is refused before anything is trained.


def test_missing_days_are_named(datasets, tmp_path):
    with pytest.raises(ArtifactError, match=r"needs a complete dataset. Missing: 2023-11-13, 2023-11-14, 2023-11-18"):
        days_of(datasets, tmp_path, dt.date(2023, 11, 13), dt.date(2023, 11, 18))


def test_a_dataset_of_another_day_is_refused(shop_days, tmp_path):
    path = tmp_path / "2023-11-14"
    shutil.copytree(shop_days[0].path, path)
    day = dt.date(2023, 11, 14)
    with pytest.raises(ArtifactError, match=r"with events from 2023-11-15 .* Allowed: 2023-11-14"):
        days_between(day, day, str(tmp_path / "{date}"), str(tmp_path / "runs" / "{date}"))


@pytest.mark.parametrize(
    ("first", "last", "pattern", "message"),
    [
        (DATES[1], DATES[0], "{date}", r"Received: 2023-11-16 to 2023-11-15"),
        (DATES[0], DATES[1], "{day}", r"work_dirs must hold {date}.* Received: '{day}'"),
    ],
)
def test_a_range_without_days_or_a_path_without_date_is_refused(datasets, first, last, pattern, message):
    with pytest.raises(ValueError, match=message):
        days_between(first, last, datasets, pattern)


# The command.


def command(datasets, directory):
    return [
        sys.executable, "-m", "pipelines.train_daily", f"--datasets={datasets}", f"--work_dirs={directory}/{{date}}",
        f"--first_date={DATES[0]}", f"--last_date={DATES[-1]}", *(f"--set={setting}" for setting in _SETTINGS),
    ]  # fmt: skip


def run(arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_the_command_shows_how_each_day_was_predicted_and_the_lineage(trained_days, datasets, tmp_path):
    days, found = trained_days
    for day in days:  # All is done already: it only has to tell.
        shutil.copytree(day.work_dir.path, tmp_path / str(day.date))
    shown = run(command(datasets, tmp_path))
    output = shown.communicate(timeout=240)[0]
    assert shown.returncode == 0, output
    last = WorkDir(tmp_path / str(DATES[2]))
    assert read_json(last.days) == found
    page = last.days_report.read_text()
    assert page.count("<svg") == 3  # Overall, and AUC by each of two user groups.
    for entry in found[1:]:
        assert f"{entry['prequential']['overall']['auc']:.4f}" in output
        assert f"{entry['prequential']['overall']['auc']:.4f}" in page
    for ancestor in read_json(last.lineage)["ancestors"]:
        assert ancestor["work_fingerprint"] in output
        assert ancestor["work_fingerprint"] in page


@pytest.mark.long
def test_daily_training_that_is_killed_goes_on_and_ends_as_if_uninterrupted(trained_days, datasets, tmp_path):
    _, found = trained_days
    killed = run(command(datasets, tmp_path))
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / str(DATES[1]) / "prequential.json").exists():
            assert killed.poll() is None, killed.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
    first, second = (WorkDir(tmp_path / str(date)) for date in DATES[:2])
    assert first.is_complete
    assert not second.is_complete
    before = contents(first.path)
    again = run(command(datasets, tmp_path))
    output = again.communicate(timeout=240)[0]
    assert again.returncode == 0, output
    assert contents(first.path) == before
    received = read_json(WorkDir(tmp_path / str(DATES[2])).days)
    assert [day["date"] for day in received] == [str(date) for date in DATES]
    for entry, expected in zip(received[1:], found[1:], strict=True):
        assert entry["prequential"]["overall"] == expected["prequential"]["overall"]
        assert entry["prequential"]["groups"] == expected["prequential"]["groups"]
