"""Cells of a study: their configs and placebos, what is measured of a run, and which runs are kept."""

import shutil
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from runs import scores_file
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from clsd_tf.commands.interruption import EXIT_CODE
from clsd_tf.data import input_pipeline
from clsd_tf.evaluation.evaluate import evaluate
from clsd_tf.metrics.user_errors import auc_difference_error
from clsd_tf.spec.validation import SpecError
from clsd_tf.statistics.small_groups import merge_small_groups
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import ArtifactError, read_json
from clsd_tf.study.cells import (
    BASELINE,
    Cell,
    StudyRow,
    cell_config,
    errors_over_users,
    known_rows,
    merged,
    prepare_teacher,
    read_results,
    run_cell,
    run_seconds,
    stopped_cells,
    with_placebos,
)
from clsd_tf.study.measures import OVERALL
from clsd_tf.training.assembly import load_model, predict, predict_logits
from clsd_tf.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("deterministic")

# Configs.

_SETTINGS = st.recursive(
    st.integers() | st.lists(st.integers()), lambda inner: st.dictionaries(st.sampled_from("abc"), inner), max_leaves=8
)
_MAPPINGS = st.dictionaries(st.sampled_from("abc"), _SETTINGS)


def test_mappings_are_merged_key_by_key_and_other_values_replaced():
    base = {"clsd": {"mu": 0.5, "ad_gate": {"bound": 0.3, "hidden_units": [16]}}, "seed": 1, "hidden_units": [8, 4]}
    changes = {"clsd": {"ad_gate": {"bound": 0.1}, "kappa": 2.0}, "hidden_units": [2], "backbone": "fm"}
    assert merged(base, changes) == {
        "clsd": {"mu": 0.5, "kappa": 2.0, "ad_gate": {"bound": 0.1, "hidden_units": [16]}},
        "seed": 1,
        "hidden_units": [2],
        "backbone": "fm",
    }
    assert base["clsd"] == {"mu": 0.5, "ad_gate": {"bound": 0.3, "hidden_units": [16]}}


@given(_MAPPINGS, _MAPPINGS)
def test_a_second_merge_changes_nothing_and_every_change_is_there(base, changes):
    once = merged(base, changes)
    assert merged(once, changes) == once
    assert once.keys() == base.keys() | changes.keys()
    assert {key: once[key] for key in base.keys() - changes.keys()} == {
        key: base[key] for key in base.keys() - changes.keys()
    }
    assert merged({}, changes) == changes


def known(*names):
    return [StudyRow(name, known_rows()[name]) for name in names]


def test_every_known_method_is_a_valid_config_with_the_default_settings():
    for method in known(*known_rows()):
        assert cell_config({}, method, {}, 3).seed == 3
    assert cell_config({}, *known(BASELINE), {}, 1).method.name == "bce"


def test_the_method_goes_over_the_backbone_and_the_backbone_over_what_is_shared():
    shared = {"backbone": "deepfm", "learning_rate": 0.5, "batch_size": 7, "method": {"kappa": 3.0, "mu": 0.1}}
    backbone = {"backbone": "fm", "learning_rate": 0.25}
    method = StudyRow("mine", {"learning_rate": 0.125, "method": {"name": "clsd", "mu": 0.2, "lambda": 0.3}})
    config = cell_config(shared, method, backbone, 4)
    assert (config.backbone, config.learning_rate, config.batch_size, config.seed) == ("fm", 0.125, 7, 4)
    assert (config.method.kappa, config.method.mu, config.method.lambda_) == (3.0, 0.2, 0.3)


def test_methods_of_one_seed_share_everything_else():
    shared = {"learning_rate": 0.5, "method": {"teacher": "self"}}
    configs = [cell_config(shared, method, {}, 2) for method in known(BASELINE, "global", "oracle")]
    for config in configs:
        same = config.model_copy(update={"method": configs[0].method})
        assert same == configs[0]


def test_a_setting_out_of_range_names_the_method():
    with pytest.raises(SpecError, match=r"method mine is not valid:\n  method\.kapa: unknown key.*kappa"):
        cell_config({}, StudyRow("mine", {"method": {"kapa": 1.0}}), {}, 1)


# Placebos.


@pytest.mark.parametrize(
    ("methods", "placebos"),
    [
        (["both"], ["both_shuffled_confidence", "both_permuted_groups"]),
        (["global", "local"], ["global_shuffled_confidence", "local_permuted_groups"]),
        (["local", "global"], ["local_shuffled_confidence", "local_permuted_groups"]),
        (["global"], ["global_shuffled_confidence"]),  # Without AdGate there are no groups to permute.
        (["label_smoothing", "focal", "oracle"], []),
    ],
)
def test_placebos_of_the_first_methods_that_weight_clicks_and_have_a_gate_are_added(methods, placebos):
    methods = known(BASELINE, *methods)
    found = with_placebos(methods, {})
    assert found[: len(methods)] == methods
    assert [method.name for method in found[len(methods) :]] == placebos


def test_a_placebo_differs_from_its_method_in_the_placebo_alone():
    shared = {"method": {"kappa": 2.0, "teacher": "self"}}
    treated = StudyRow("mine", {"method": {"lambda": 0.2, "mu": 0.7}})
    _, shuffled, permuted = with_placebos([treated], shared)
    config = cell_config(shared, treated, {}, 1)
    for method, placebo in ((shuffled, "shuffled_confidence"), (permuted, "permuted_groups")):
        found = cell_config(shared, method, {}, 1)
        assert found.method.placebo == placebo
        changed = found.method.model_copy(update={"placebo": "none"})
        assert found.model_copy(update={"method": changed}) == config


def test_a_placebo_that_is_listed_already_is_not_added_twice():
    methods = with_placebos(known("both"), {})
    assert [method.name for method in with_placebos(methods, {})] == [method.name for method in methods]


# Cells.


@pytest.fixture(scope="module")
def quick(tiny):
    """Assignments -> config of a quick cell."""
    return lambda *assignments: tiny("backbone=lr", "max_epochs=1", "learning_rate=0.05", *assignments)


def run(cell, dataset, study_dir, truth=None):
    run_cell(cell, str(dataset.path), study_dir, "test", truth)


@pytest.fixture(scope="module")
def truth(feed_dataset, tmp_path_factory):
    """A ground truth of our own: at random, for more rows than the dataset has, from id 0 on."""
    path = tmp_path_factory.mktemp("truth") / "truth.parquet"
    is_genuine = np.random.default_rng(0).random(5000) < 0.4
    pa.parquet.write_table(pa.table({"is_genuine": is_genuine, "row_id": np.arange(5000)}), path)
    return str(path)


@pytest.fixture(scope="module")
def finished(feed_dataset, quick, truth, tmp_path_factory):
    """A cell that has run, and its study directory. Read-only."""
    cell, study_dir = Cell("feed", "lr", BASELINE, 1, quick("method=bce")), tmp_path_factory.mktemp("study")
    run(cell, feed_dataset, study_dir, truth)
    return cell, study_dir


def values(cell, study_dir):
    return {(row["slice"], row["metric"]): row["value"] for row in read_results([cell], study_dir)}


def test_a_cell_is_measured_as_evaluation_measures_its_run(finished, feed_dataset):
    cell, study_dir = finished
    found = values(cell, study_dir)
    evaluation = evaluate(load_model(cell.work_dir(study_dir), feed_dataset), feed_dataset, "test")
    for metric in ("auc", "gauc", "log_loss", "pcoc", "ece", "intensity_auc", "intensity_auc_among_clicks"):
        assert found[OVERALL, metric] == pytest.approx(evaluation["overall"][metric], rel=1e-6)
    for metric in ("log_loss", "pcoc", "ece"):
        assert found[OVERALL, f"uncalibrated_{metric}"] == evaluation["uncalibrated"][metric]  # To the bit.
    for group, labels in evaluation["groups"].items():
        for label, entry in labels.items():
            for metric in ("auc", "pcoc", "ece", "intensity_auc"):
                assert found[f"{group}={label}", metric] == pytest.approx(entry[metric], rel=1e-6)
    assert np.isfinite(list(found.values())).all()


def test_auc_within_groups_is_the_mean_of_the_groups_by_their_rows(finished, feed_dataset):
    cell, study_dir = finished
    columns = input_pipeline.read_columns(feed_dataset, "test", ["age_group", "label"])
    ctr = predict(load_model(cell.work_dir(study_dir), feed_dataset), feed_dataset, "test")
    ids = columns["age_group"]
    total = sum(np.sum(ids == i) * roc_auc_score(columns["label"][ids == i], ctr[ids == i]) for i in np.unique(ids))
    assert values(cell, study_dir)[OVERALL, "group_auc"] == pytest.approx(total / len(ids), rel=1e-9)


def test_the_noise_floor_of_every_group_is_the_mean_of_its_lowest_uncalibrated_scores(finished, feed_dataset):
    cell, study_dir = finished
    found = values(cell, study_dir)
    logits = predict_logits(load_model(cell.work_dir(study_dir), feed_dataset), feed_dataset, "test")
    names = [group.name for group in feed_dataset.inputs.groups]
    columns = input_pipeline.read_columns(feed_dataset, "test", [*names, "user_hash"])
    expected = {}
    for group in feed_dataset.inputs.groups:
        ids, labels = merge_small_groups(columns[group.name], group.labels, columns["user_hash"])
        for index in np.unique(ids):
            scores = np.sort(expit(logits[ids == index]))
            lowest = scores[: int(np.ceil(0.05 * len(scores)))]  # 5 %, at least one.
            expected[f"{group.name}={labels[index]}"] = pytest.approx(lowest.mean(), rel=1e-5)
    assert {part: value for (part, metric), value in found.items() if metric == "click_noise_floor"} == expected
    # 120 users: the youngest and the oldest are fewer than 20, and so are those of the third gender.
    assert {"age_group=other", "age_group=30-45", "gender_group=other", "gender_group=F"} <= set(expected)
    assert "age_group=<18" not in expected


def test_the_truth_is_joined_by_row_id(finished, feed_dataset, truth):
    cell, study_dir = finished
    is_genuine = {row["row_id"]: row["is_genuine"] for row in pa.parquet.read_table(truth).to_pylist()}
    row_ids = input_pipeline.read_columns(feed_dataset, "test", ["row_id"])["row_id"]
    ctr = predict(load_model(cell.work_dir(study_dir), feed_dataset), feed_dataset, "test")
    genuine = np.array([is_genuine[row_id] for row_id in row_ids])
    # AUC: the share of pairs that are in the right order, ties counting half.
    above, below = ctr[genuine][:, np.newaxis], ctr[~genuine]
    expected = (above > below).mean() + (above == below).mean() / 2
    assert values(cell, study_dir)[OVERALL, "genuine_auc"] == pytest.approx(expected, abs=1e-9)


def test_a_finished_cell_is_kept(finished, feed_dataset):
    cell, study_dir = finished
    assert cell.work_dir(study_dir).is_complete
    assert not list(cell.work_dir(study_dir).checkpoints.iterdir())  # What the best weights do not need is gone.
    before = cell.result(study_dir).stat().st_mtime_ns
    run(cell, feed_dataset, study_dir)
    assert cell.result(study_dir).stat().st_mtime_ns == before


def test_a_finished_cell_of_other_settings_is_refused(finished, feed_dataset, quick):
    # Somebody changed the study and kept its directory: the old numbers must not stand under the new settings.
    cell, study_dir = finished
    changed = Cell(cell.data, cell.backbone, cell.method, cell.seed, quick("method=bce", "embeddings.dim=5"))
    with pytest.raises(ArtifactError, match="another config"):
        run(changed, feed_dataset, study_dir)


def test_a_finished_cell_of_another_dataset_is_refused(finished, feed_dataset, tmp_path):
    cell, study_dir = finished
    shutil.copytree(study_dir, tmp_path / "study")
    config = cell.work_dir(tmp_path / "study").config
    config.write_text(config.read_text(encoding="utf-8").replace(feed_dataset.fingerprint, "0" * 16), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"trained on another dataset.* Allowed: 0{16}"):
        run(cell, feed_dataset, tmp_path / "study")


def test_a_cell_killed_before_its_result_is_measured_and_not_trained_again(finished, feed_dataset, tmp_path):
    cell, study_dir = finished
    shutil.copytree(study_dir, tmp_path / "study")
    cell.result(tmp_path / "study").unlink()
    written = cell.work_dir(tmp_path / "study").success.stat().st_mtime_ns
    run(cell, feed_dataset, tmp_path / "study", truth=None)
    assert cell.work_dir(tmp_path / "study").success.stat().st_mtime_ns == written
    # Without a ground truth nothing is measured by it.
    expected = {key: value for key, value in values(cell, study_dir).items() if "genuine" not in key[1]}
    assert values(cell, tmp_path / "study") == expected != values(cell, study_dir)


def test_a_teacher_is_prepared_for_all_cells_that_share_it(feed_dataset, quick, tmp_path):
    shutil.copytree(feed_dataset.path, tmp_path / "dataset", ignore=shutil.ignore_patterns("teacher_scores"))
    dataset = DatasetDir(tmp_path / "dataset")
    config = quick("method.teacher=cross_fit")
    prepare_teacher(str(dataset.path), config)
    for other in (config, quick("method.teacher=cross_fit", "method.placebo=shuffled_confidence", "method.mu=0.0")):
        assert scores_file(dataset, other).exists()
    assert not scores_file(dataset, quick("method.teacher=cross_fit", "seed=2")).exists()


def test_cells_of_a_study_have_directories_of_their_own(tmp_path):
    config = TrainConfig()
    cells = [
        Cell(data, backbone, method, seed, config)
        for data in ("a", "b") for backbone in ("lr", "fm") for method in ("x", "y") for seed in (1, 2)
    ]  # fmt: skip
    assert len({cell.work_dir(tmp_path).path for cell in cells}) == len({str(cell) for cell in cells}) == 16
    assert str(cells[0]) == "a lr x seed 1"


@pytest.fixture(scope="module")
def stopped(feed_dataset, quick, tmp_path_factory):
    """A cell that a guard stopped: AdGate starts about .5 away from 1 - teacher_score."""
    cell = Cell("feed", "lr", "local", 1, quick("method.guards.max_ad_gate_drift=0.001"))
    study_dir = tmp_path_factory.mktemp("stopped")
    run(cell, feed_dataset, study_dir)
    return cell, study_dir


def test_a_cell_that_a_guard_stops_is_a_finding(stopped, feed_dataset):
    cell, study_dir = stopped
    assert not cell.work_dir(study_dir).is_complete
    assert read_results([cell], study_dir) == []
    before = cell.result(study_dir).stat().st_mtime_ns
    run(cell, feed_dataset, study_dir)  # And it is not tried again.
    assert cell.result(study_dir).stat().st_mtime_ns == before


def test_stopped_cells_come_with_the_guards_message(stopped, finished):
    cell, study_dir = stopped
    found = stopped_cells([cell], study_dir)
    assert list(found) == [cell]
    assert "AdGate's mean correction" in found[cell]
    assert "at step 13. Allowed: 0.001" in found[cell]
    assert stopped_cells([finished[0]], finished[1]) == {}


def test_results_have_a_row_for_each_number(finished):
    cell, study_dir = finished
    rows = read_results([cell, cell], study_dir)
    assert len(rows) == 2 * len(read_json(cell.result(study_dir))["rows"])
    assert all(list(row) == ["data", "backbone", "method", "seed", "slice", "metric", "value"] for row in rows)
    assert {(row["data"], row["backbone"], row["method"], row["seed"]) for row in rows} == {("feed", "lr", "bce", 1)}


@pytest.fixture(scope="module")
def paired(feed_dataset, quick, tmp_path_factory):
    """Cells of two methods and two seeds on one dataset, and their study directory. Read-only."""
    study_dir = tmp_path_factory.mktemp("paired")
    changes = {BASELINE: ["method=bce"], "global": ["method.lambda=1.0", "method.mu=0.0", "method.teacher=self"]}
    cells = [
        Cell("feed", "lr", method, seed, quick(*settings, f"seed={seed}"))
        for method, settings in changes.items() for seed in (1, 2)
    ]  # fmt: skip
    for cell in cells:
        run(cell, feed_dataset, study_dir)
    return cells, study_dir


def test_errors_over_users_are_those_of_what_the_runs_predicted(paired, feed_dataset):
    cells, study_dir = paired
    found = errors_over_users(cells, study_dir, dict.fromkeys(cells, str(feed_dataset.path)), "test")
    ctr = [predict(load_model(cell.work_dir(study_dir), feed_dataset), feed_dataset, "test") for cell in cells]
    columns = input_pipeline.read_columns(feed_dataset, "test", ["label", "user_hash"])
    expected = auc_difference_error(columns["label"], ctr[2:], ctr[:2], columns["user_hash"])
    assert found["feed", "lr", "global", "auc"] == pytest.approx(expected, rel=1e-6)
    assert set(found) == {
        ("feed", "lr", "global", metric) for metric in ("auc", "gauc", "intensity_auc", "intensity_auc_among_clicks")
    }


def test_seeds_with_rows_of_their_own_have_no_error_over_users(paired, feed_dataset):
    cells, study_dir = paired
    paths = {cell: f"{feed_dataset.path}_{cell.seed}" for cell in cells}
    assert errors_over_users(cells, study_dir, paths, "test") == {}
    path = dict.fromkeys(cells, str(feed_dataset.path))
    assert errors_over_users(cells, study_dir, path, "test", baseline="global").keys() == {
        ("feed", "lr", BASELINE, metric) for metric in ("auc", "gauc", "intensity_auc", "intensity_auc_among_clicks")
    }
    one_seed = [cell for cell in cells if cell.seed == 1]
    assert errors_over_users(one_seed, study_dir, dict.fromkeys(cells, str(feed_dataset.path)), "test") == {}


def test_the_time_of_runs_is_kept_with_them(finished):
    cell, study_dir = finished
    assert run_seconds([cell, cell], study_dir) == 2 * read_json(cell.result(study_dir))["seconds"] > 0


_STUDY_WITH_A_WORKER = """
import concurrent.futures, multiprocessing, os, time
from clsd_tf.study.cells import start_worker

pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start_worker)
pool.submit(os.getpid).result()
pool.submit(time.sleep, 600)
print("at work", flush=True)
time.sleep(600)
"""


def test_workers_end_with_a_killed_study():
    with subprocess.Popen([sys.executable, "-c", _STUDY_WITH_A_WORKER], stdout=subprocess.PIPE, text=True) as study:
        assert study.stdout.readline() == "at work\n"
        study.kill()
        study.communicate(timeout=60)  # The pipe stays open as long as the worker lives.


_ENDLESS_STUDY = """
seeds: 3
data:
  - name: feed
    shared: {backbone: lr, batch_size: 1, max_epochs: 100, patience_epochs: null, checkpoint_every_steps: 1000}
grids:
  - {title: Endless, data: [feed], methods: [bce]}
"""


@pytest.mark.long
def test_a_study_passes_sigterm_on_and_each_worker_saves_the_run_it_trains(feed_dataset, tmp_path):
    (tmp_path / "endless.yaml").write_text(_ENDLESS_STUDY, encoding="utf-8")
    command = [
        sys.executable, "-m", "pipelines.study", f"--study={tmp_path / 'endless.yaml'}",
        f"--study_dir={tmp_path / 'study'}", f"--dataset_dir=feed={feed_dataset.path}",
    ]  # fmt: skip

    def checkpoints():
        return [tf.train.latest_checkpoint(str(path.parent)) for path in tmp_path.rglob("checkpoints/checkpoint")]

    def steps():
        return sorted(int(path.rsplit("-", 1)[1]) for path in checkpoints())

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as study:
        while len(checkpoints()) < 2:  # Of three runs, two side by side.
            assert study.poll() is None
            time.sleep(0.1)
        before = steps()
        study.terminate()
        output, _ = study.communicate(timeout=120)  # The pipe stays open as long as a worker lives.
        assert study.returncode == EXIT_CODE
    assert output.splitlines()[-1].endswith("Start the same command again to go on")
    assert len(steps()) == 2
    assert all(step > earlier for step, earlier in zip(steps(), before, strict=True))
    assert any(step % 1000 and step % 3200 for step in steps())  # Saved where SIGTERM found them.
