"""Paired seeds: cells, their configs and the summary."""

import json

import pytest

from clsd_tf.artifacts import WorkDir
from clsd_tf.study import METRICS, Cell, run_cell, summarise, table_rows
from clsd_tf.training import load_config

TINY = load_config(None, ["embedding_dim=4", "hidden_units=[8]", "max_epochs=1", "clsd.loss_warmup_steps=2"])


def test_cells_of_one_seed_share_everything_but_the_method():
    bce, clsd = Cell("bce", 3).config(TINY), Cell("clsd_self", 3).config(TINY)
    assert bce.method == "bce"
    assert clsd.method == "clsd"
    assert clsd.clsd.teacher == "self"
    assert clsd.clsd.loss_warmup_steps == 2  # From the shared config.
    assert bce.model_copy(update={"method": "clsd", "clsd": clsd.clsd}) == clsd
    assert bce.seed == clsd.seed == 3


def test_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"Received: 'magic'. Allowed: bce, clsd_self, clsd_cross_fit"):
        Cell("magic", 1).config(TINY)


def write_results(study_dir, values):
    for (method, seed), auc in values.items():
        path = Cell(method, seed).work_dir(study_dir).evaluation("test")
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"overall": {**dict.fromkeys(METRICS), "auc": auc}}))
    return [Cell(method, seed) for method, seed in values]


def test_summary_pairs_seeds(tmp_path):
    cells = write_results(
        tmp_path, {("bce", 1): 0.70, ("bce", 2): 0.72, ("clsd_self", 1): 0.71, ("clsd_self", 2): 0.75}
    )
    found = summarise(cells, tmp_path, "test")
    assert found["bce"]["auc"]["mean"] == pytest.approx(0.71)
    assert "difference" not in found["bce"]["auc"]
    # Differences .01 and .03: mean .02, sd .01 * sqrt(2), standard error .01.
    assert found["clsd_self"]["auc"]["difference"] == pytest.approx(0.02)
    assert found["clsd_self"]["auc"]["standard_error"] == pytest.approx(0.01)
    assert "gauc" not in found["bce"]  # A metric that is not defined is left out, not invented.
    assert table_rows(found, ["auc", "gauc"])[1:] == [
        ["clsd_self", "0.7300 (0.0283)", "-"],
        ["  minus bce", "+0.0200 +- 0.0100", "-"],
    ]


def test_one_seed_has_no_standard_error(tmp_path):
    cells = write_results(tmp_path, {("bce", 1): 0.70, ("clsd_self", 1): 0.71})
    found = summarise(cells, tmp_path, "test")["clsd_self"]["auc"]
    assert found["standard_error"] is None
    assert found["std"] is None


def test_a_finished_cell_is_kept(feed_dataset, tmp_path):
    cell = Cell("bce", 1)
    run_cell(cell, str(feed_dataset.path), str(tmp_path), TINY, "test")
    work_dir: WorkDir = cell.work_dir(tmp_path)
    assert work_dir.is_complete
    before = work_dir.evaluation("test").stat().st_mtime_ns
    run_cell(cell, str(feed_dataset.path), str(tmp_path), TINY, "test")
    assert work_dir.evaluation("test").stat().st_mtime_ns == before
