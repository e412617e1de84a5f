"""Evaluation overall and per user group, and the HTML report."""

import re

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import log_loss, roc_auc_score

from clsd_tf.data import input_pipeline
from clsd_tf.evaluation.evaluate import evaluate, evaluation_table
from clsd_tf.evaluation.report import render_report
from clsd_tf.training.assembly import build_model, load_model, predict, predict_logits


@pytest.fixture(scope="module")
def evaluated(clsd_run, feed_dataset):
    """Evaluation and predictions of a run that is calibrated in each age group."""
    model = load_model(clsd_run.work_dir, feed_dataset)
    return evaluate(model, feed_dataset, "test"), predict(model, feed_dataset, "test")


def test_overall_and_group_auc_agree_with_scikit_learn(feed_dataset, evaluated):
    evaluation, ctr = evaluated
    columns = input_pipeline.read_columns(feed_dataset, "test", ["label", "intensity_label", "age_group", "user_hash"])
    assert evaluation["overall"]["auc"] == pytest.approx(roc_auc_score(columns["label"], ctr), abs=1e-9)
    clicked = columns["label"] == 1
    among_clicks = roc_auc_score(columns["intensity_label"][clicked], ctr[clicked])
    assert evaluation["overall"]["intensity_auc_among_clicks"] == pytest.approx(among_clicks, abs=1e-9)
    (group,) = [group for group in feed_dataset.inputs.groups if group.name == "age_group"]
    shown = evaluation["groups"]["age_group"]
    assert {"30-45", "45-60", "other"} <= set(shown) < {*group.labels, "other"}  # Those of few users are in "other".
    own = {label: columns["age_group"] == group.labels.index(label) for label in shown if label != "other"}
    for label, entry in shown.items():
        rows = own[label] if label in own else ~np.any(list(own.values()), axis=0)
        assert len(set(columns["user_hash"][rows])) >= 20
        assert entry["rows"] == rows.sum()
        assert entry["auc"] == pytest.approx(roc_auc_score(columns["label"][rows], ctr[rows]), abs=1e-9)


def test_groups_cover_all_rows_once(evaluated):
    evaluation, _ = evaluated
    for groups in evaluation["groups"].values():
        assert sum(entry["rows"] for entry in groups.values()) == evaluation["overall"]["rows"]


def test_calibrated_and_uncalibrated_predictions_are_measured_side_by_side(clsd_run, feed_dataset, evaluated):
    evaluation, ctr = evaluated
    label = input_pipeline.read_columns(feed_dataset, "test", ["label"])["label"]
    logits = predict_logits(load_model(clsd_run.work_dir, feed_dataset), feed_dataset, "test")
    for part, scores in (("overall", ctr), ("uncalibrated", expit(logits.astype(np.float64)))):
        assert evaluation[part]["pcoc"] == pytest.approx(scores.mean() / label.mean(), rel=1e-5)
        assert evaluation[part]["log_loss"] == pytest.approx(log_loss(label, scores), rel=1e-5)
        # Scores that are equal in one precision only make a pair or two of 36,000.
        assert evaluation[part]["auc"] == pytest.approx(roc_auc_score(label, scores), abs=1e-4)
    assert abs(evaluation["overall"]["pcoc"] - evaluation["uncalibrated"]["pcoc"]) > 0.01


def test_without_calibration_both_measures_agree(feed_dataset, tiny):
    model = build_model(tiny("backbone=lr", "method=bce"), feed_dataset.inputs)
    evaluation = evaluate(model, feed_dataset, "test")
    assert evaluation["overall"].keys() == evaluation["uncalibrated"].keys()
    for name, value in evaluation["overall"].items():
        if name != "calibration_bins":
            assert evaluation["uncalibrated"][name] == pytest.approx(value, rel=1e-5), name


def test_rows_of_weight_0_are_left_out(feed_dataset, tiny, with_changed_records, tmp_path):
    def change(feature):
        feature["sample_weight"].float_list.value[0] = feature["row_id"].int64_list.value[0] % 2

    model = build_model(tiny("backbone=lr", "method=bce"), feed_dataset.inputs)
    weighted = with_changed_records(feed_dataset, tmp_path / "dataset", change)
    columns = input_pipeline.read_columns(feed_dataset, "train", ["row_id", "label"])
    counted = columns["row_id"] % 2 == 1
    overall = evaluate(model, weighted, "train")["overall"]
    assert overall["rows"] == counted.sum() == 1600
    assert overall["clicks"] == columns["label"][counted].sum()


def test_a_split_without_any_weight_is_refused(feed_dataset, tiny, with_changed_records, tmp_path):
    def change(feature):
        feature["sample_weight"].float_list.value[0] = 0.0

    model = build_model(tiny("backbone=lr", "method=bce"), feed_dataset.inputs)
    weightless = with_changed_records(feed_dataset, tmp_path / "dataset", change)
    with pytest.raises(ValueError, match=r"must not all have sample weight 0\. Received: train"):
        evaluate(model, weightless, "train")


def test_only_the_metrics_that_were_asked_for_are_measured_and_shown(feed_dataset, tiny):
    model = build_model(tiny("backbone=lr", "method=bce"), feed_dataset.inputs)
    evaluation = evaluate(model, feed_dataset, "test", metrics=["pcoc", "auc"])
    assert evaluation["overall"].keys() == {"auc", "pcoc", "calibration_bins"}
    assert evaluation_table(evaluation)[0] == ["", "AUC", "PCOC"]
    with pytest.raises(ValueError, match=r"unknown metric. Received: 'ndcg'. Allowed: .*auc"):
        evaluate(model, feed_dataset, "test", metrics=["ndcg"])


def test_the_table_has_a_line_per_group_and_a_column_per_headline(evaluated):
    evaluation, _ = evaluated
    columns, lines = evaluation_table(evaluation)
    ranking = ["AUC", "GAUC", "intensity AUC", "intensity AUC among clicks"]
    assert columns == ["", "rows", "click rate", *ranking, "log loss", "NE", "PCOC", "ECE"]
    assert lines[0][:4] == ["overall", *(evaluation["overall"][name] for name in ("rows", "click_rate", "auc"))]
    names = [f"{group} {label}" for group, labels in evaluation["groups"].items() for label in labels]
    assert [line[0] for line in lines] == ["overall", *names]
    assert {len(line) for line in lines} == {len(columns)}


def history():
    epoch = {"loss": 0.5, "bce": 0.6, "val_log_loss": 0.65, "val_auc": 0.7, "mean_ctr": 0.4}
    groups = {"click_confidence/age_group/30-45": 1.0, "ad_gate/age_group/30-45": None}
    return [{"epoch": 0, **epoch, **groups}, {"epoch": 1, **epoch, **groups}]


def test_report_is_one_file_that_loads_nothing(evaluated, clsd_run):
    evaluation, _ = evaluated
    page = render_report(evaluation, clsd_run.history, clsd_run.work_dir.resolved_config)
    assert "<script" not in page
    assert not re.search(r"(src|href)=\"(https?:)?//", page)
    # Training curves, and monitors and calibration of both user groups.
    assert page.count("<svg") == 5
    assert f"{evaluation['overall']['auc']:.4f}" in page
    assert "PCOC: predicted clicks over clicks, 1 is calibrated." in page
    assert page.count("Mean click confidence by group") == page.count("Mean ad gate by group") == 2


def test_report_escapes_what_comes_from_the_spec(evaluated, clsd_run):
    evaluation, _ = evaluated
    page = render_report({**evaluation, "label": "<img src=x>"}, history(), clsd_run.work_dir.resolved_config)
    assert page.count("<svg") == 4  # This history watched one user group.
    assert "<img src=x>" not in page
    assert "&lt;img src=x&gt;" in page
