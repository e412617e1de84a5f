"""The table of metrics and the rows that it measures: values by hand, what is missing, and a metric of one's own."""

import numpy as np
import pytest

from clsd_tf.continual.daily_training import days_table
from clsd_tf.continual.report import render_days
from clsd_tf.evaluation.evaluate import evaluation_table, measure_with_groups
from clsd_tf.metrics.scored_rows import ScoredRows
from clsd_tf.metrics.table import METRICS, Metric, definitions, headlines, measure, metrics_in
from clsd_tf.spec.model_inputs import GroupInput
from clsd_tf.study.measures import measure_slices
from clsd_tf.study.tables import GridTables, compare, render_html, summary_table
from clsd_tf.study.tables import tests_table as table_of_tests  # Under its own name pytest would run it.


def scored(**columns):
    """Two users with three rows each; clicks are rows 0, 3 and 4."""
    ctr = np.array([0.5, 0.4, 0.6, 0.8, 0.2, 0.1], np.float32)
    defaults = {
        "label": np.array([1.0, 0, 0, 1, 1, 0], np.float32),
        "ctr": ctr,
        "uncalibrated": ctr / 2,
        "sample_weight": np.ones(6, np.float32),
        "user_hash": np.array([7, 7, 7, 9, 9, 9]),
        "row_id": np.arange(6),
    }
    return ScoredRows(**{**defaults, **columns})


FULL = {
    "intensity_label": np.array([0.0, 0, 0, 1, 0, 0], np.float32),
    "genuine": np.array([1.0, 0, 1, 1, 0, 0]),
    "group_ids": {"city": np.array([0, 1, 0, 1, 0, 1])},
}


# Rows.


def test_selected_rows_keep_all_columns_together():
    rows = scored(**FULL).select(np.array([3, 0]))
    assert rows.row_id.tolist() == [3, 0]
    assert rows.ctr.tolist() == pytest.approx([0.8, 0.5])
    assert rows.intensity_label.tolist() == [1, 0]
    assert rows.group_ids["city"].tolist() == [1, 0]
    assert len(rows) == 2
    assert scored().select(np.array([0])).intensity_label is None


def test_views_of_rows_change_the_label_the_predictions_or_the_rows_alone():
    rows = scored(**FULL)
    assert rows.clicks().row_id.tolist() == [0, 3, 4]
    judged = rows.judged_by("genuine")
    assert judged.label.tolist() == rows.genuine.tolist()
    assert rows.without_calibration().ctr.tolist() == rows.uncalibrated.tolist()
    for view in (judged, rows.without_calibration()):
        assert view.user_hash.tolist() == rows.user_hash.tolist()
        assert view.group_ids == rows.group_ids


def test_splits_are_joined_in_their_order():
    one, other = scored(**FULL).select(np.array([0, 1])), scored(**FULL).select(np.array([5]))
    joined = ScoredRows.concatenated([one, other])
    assert joined.row_id.tolist() == [0, 1, 5]
    assert joined.group_ids["city"].tolist() == [0, 1, 1]
    assert ScoredRows.concatenated([scored(), scored()]).genuine is None


# Values.


def test_every_metric_by_hand():
    found = measure(scored(**FULL), "evaluation") | measure(scored(**FULL), "study")
    expected = {
        "rows": 6,
        "clicks": 3,
        "click_rate": 0.5,
        "mean_ctr": 2.6 / 6,
        # Of 9 pairs of a click and another row: .5 is above .4 and .1, .8 above all, .2 above .1.
        "auc": 6 / 9,
        # User 7: .5 is above one of .4 and .6; user 9: .8 and .2 are above .1.
        "gauc": (0.5 + 1.0) / 2,
        "gauc_share_of_rows": 1.0,
        # City 0, rows 0, 2, 4: .5 and .2 are below .6; city 1, rows 1, 3, 5: .8 is above both.
        "group_auc": (0.0 + 1.0) / 2,
        "intensity_auc": 1.0,
        "intensity_auc_among_clicks": 1.0,
        # .5, .6 and .8 against .4, .2 and .1.
        "genuine_auc": 1.0,
        "genuine_group_auc": 1.0,
        "pcoc": 2.6 / 3,
        "uncalibrated_pcoc": 1.3 / 3,
        "log_loss": -np.log([0.5, 0.6, 0.4, 0.8, 0.2, 0.9]).mean(),
        "uncalibrated_log_loss": -np.log([0.25, 0.8, 0.7, 0.4, 0.1, 0.95]).mean(),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert found["normalized_entropy"] == pytest.approx(expected["log_loss"] / np.log(2), rel=1e-6)
    assert set(found) - set(expected) == {"normalized_entropy", "ece", "uncalibrated_ece"}
    assert measure(scored(), "study_groups")["click_noise_floor"] == pytest.approx(0.05)  # One row is more than 5 %.


def test_metrics_that_rows_do_not_define_are_none():
    without = measure(scored(), "evaluation") | measure(scored(), "study")
    missing = {"intensity_auc", "intensity_auc_among_clicks", "group_auc", "genuine_auc", "genuine_group_auc"}
    assert {name for name, value in without.items() if value is None} == missing
    no_clicks = measure(scored(label=np.zeros(6, np.float32)), "evaluation")
    assert no_clicks["auc"] is no_clicks["gauc"] is no_clicks["pcoc"] is no_clicks["normalized_entropy"] is None
    assert no_clicks["mean_ctr"] == pytest.approx(2.6 / 6)


# The table.


def test_what_is_better_says_where_a_perfect_model_goes():
    perfect = scored(ctr=np.array([0.999, 0.001, 0.001, 0.999, 0.999, 0.001]))
    before, after = (measure(rows, "evaluation") for rows in (scored(), perfect))
    judged = [metric for metric in metrics_in("evaluation") if metric.better and before[metric.name] is not None]
    assert len(judged) == 6
    for metric in judged:
        change = after[metric.name] - before[metric.name]
        closer = abs(before[metric.name] - 1) - abs(after[metric.name] - 1)
        assert {"higher": change, "lower": -change, "near 1": closer}[metric.better] > 0, metric.name


def test_reports_select_metrics_in_the_order_of_the_table():
    assert [metric.name for metric in metrics_in("calibration")] == ["log_loss", "pcoc", "ece"]
    assert [metric.name for metric in metrics_in("days", {"pcoc", "gauc", "auc"})] == ["auc", "pcoc"]
    with pytest.raises(ValueError, match=r"unknown metric. Received: 'acu'. Allowed: auc, .*--plugin"):
        metrics_in("study", ["acu"])
    shown = headlines(["ece", "clicks", "auc", "calibration_bins"])
    assert [metric.heading for metric in shown] == ["AUC", "ECE"]  # The others are kept in files alone.
    assert definitions(shown).startswith("AUC: share of pairs of a click and another row that are in order. ECE: mean")


def test_every_reported_metric_of_a_ranking_says_what_chance_is():
    for metric in metrics_in("study_tests"):
        assert (metric.better, metric.chance, metric.at_most) == ("higher", 0.5, 1.0)


@pytest.fixture
def precision():
    """A metric of a user's own: the share of clicks in the upper half of the scores."""
    metric = Metric(
        "precision",
        lambda rows: float(rows.label[np.argsort(-rows.ctr)[: len(rows) // 2]].mean()),
        ("evaluation", "days", "study", "study_groups", "study_tests"),
        "precision of half",
        better="higher",
        at_most=1.0,
    )
    METRICS.register(metric.name)(metric)
    yield metric
    del METRICS[metric.name]


def test_a_metric_of_ones_own_is_measured_and_shown_everywhere(precision):
    # The upper half are rows 3, 2 and 0, of which two are clicks.
    groups, rows = [GroupInput("city", ("Rome", "Oslo"))], scored(**FULL)
    evaluation = measure_with_groups(rows, groups)
    assert evaluation["overall"]["precision"] == evaluation["uncalibrated"]["precision"] == pytest.approx(2 / 3)
    columns, (overall, *_) = evaluation_table(evaluation)
    assert dict(zip(columns, overall, strict=True))["precision of half"] == pytest.approx(2 / 3)
    measured = {(part, metric): value for part, metric, value in measure_slices(rows, groups)}
    assert measured["overall", "precision"] == measured["city=other", "precision"] == pytest.approx(2 / 3)
    day = {"date": "2026-11-02", "trained_rows": 5, "prequential": evaluation}
    page = render_days([day], {"ancestors": [], "run": RUN})
    assert "precision of half" in page
    results = [
        {"data": "d", "backbone": "b", "method": method, "seed": seed, "slice": "overall", "metric": "precision",
         "value": value + seed / 100}
        for method, value in (("bce", 0.5), ("mine", 0.6)) for seed in (1, 2, 3)
    ]  # fmt: skip
    compared = compare(results)
    assert summary_table(compared)[0] == ["data", "backbone", "method", "precision of half"]
    (line,) = table_of_tests(compared)[1]
    assert line[3:5] == ["precision of half", "+0.1000 +- 0.0000"]
    assert {row.lift for row in compared} == {None}  # A random ranking has no fixed precision.
    assert "higher is better" in render_html("mine", {}, [GridTables("Grid", compared)])


RUN = {"dataset_fingerprint": "0" * 16, "rows": 5, "first_event": "a", "last_event": "b"}


def test_a_metric_that_no_table_knows_is_refused_by_name():
    result = {"data": "d", "backbone": "b", "seed": 1, "slice": "overall", "metric": "precision", "value": 0.5}
    with pytest.raises(ValueError, match=r"unknown metric. Received: 'precision'"):
        compare([{**result, "method": method} for method in ("bce", "mine")])


def test_days_without_a_run_before_them_have_a_table_and_no_plot():
    day = {"date": "2026-11-01", "trained_rows": 5, "prequential": None}
    assert days_table([day]) == (["day", "trained rows"], [["2026-11-01", 5]])
    assert "<svg" not in render_days([day], {"ancestors": [], "run": RUN})
    measured = {**day, "date": "2026-11-02", "prequential": {"overall": {"auc": 0.75}, "groups": {}}}
    columns, lines = days_table([day, measured])
    assert (columns[2:], [line[2:] for line in lines]) == (["AUC"], [[None], [0.75]])
    assert render_days([day, measured], {"ancestors": [], "run": RUN}).count("<svg") == 1
