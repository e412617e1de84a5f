"""Evaluation overall and per user group, and the HTML report."""

import re

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from clsd_tf import input_pipeline
from clsd_tf.evaluation import HEADLINES, evaluate, measure, table_rows
from clsd_tf.report import render_report
from clsd_tf.training import build_model, load_config, predict

CONFIG = load_config(None, ["embedding_dim=4", "hidden_units=[8]", "clsd.teacher=self"])


@pytest.fixture(scope="module")
def evaluated(feed_dataset):
    model = build_model(CONFIG, feed_dataset.inputs)
    return evaluate(model, feed_dataset, "test"), predict(model, feed_dataset, "test")


def test_overall_and_group_auc_agree_with_scikit_learn(feed_dataset, evaluated):
    evaluation, pctr = evaluated
    columns = input_pipeline.read_columns(feed_dataset, "test", ["label", "intensity_label", "age_group"])
    assert evaluation["overall"]["auc"] == pytest.approx(roc_auc_score(columns["label"], pctr), abs=1e-9)
    clicked = columns["label"] == 1
    among_clicks = roc_auc_score(columns["intensity_label"][clicked], pctr[clicked])
    assert evaluation["overall"]["intensity_auc_among_clicks"] == pytest.approx(among_clicks, abs=1e-9)
    (group,) = [group for group in feed_dataset.inputs.groups if group.name == "age_group"]
    for label, entry in evaluation["groups"]["age_group"].items():
        rows = columns["age_group"] == group.labels.index(label)
        assert entry["rows"] == rows.sum()
        assert entry["auc"] == pytest.approx(roc_auc_score(columns["label"][rows], pctr[rows]), abs=1e-9)


def test_groups_cover_all_rows_once(evaluated):
    evaluation, _ = evaluated
    for groups in evaluation["groups"].values():
        assert sum(entry["rows"] for entry in groups.values()) == evaluation["overall"]["rows"]


def test_dropout_is_off_when_a_model_is_evaluated(feed_dataset):
    model = build_model(CONFIG.model_copy(update={"dropout": 0.9}), feed_dataset.inputs)
    np.testing.assert_array_equal(predict(model, feed_dataset, "test"), predict(model, feed_dataset, "test"))


def test_measures_without_an_intensity_label_or_a_click_are_none():
    columns = {
        "label": np.zeros(3, np.float32),
        "pctr": np.array([0.1, 0.2, 0.3]),
        "sample_weight": np.ones(3),
        "user_hash": np.arange(3),
        "intensity_label": None,
    }
    found = measure(columns)
    assert found["auc"] is found["gauc"] is found["pcoc"] is found["intensity_auc"] is None
    assert found["mean_pctr"] == pytest.approx(0.2)


def test_table_has_a_row_per_group_and_a_cell_per_headline(evaluated):
    evaluation, _ = evaluated
    rows = table_rows(evaluation)
    assert rows[0][0] == "overall"
    assert len(rows) == 1 + sum(len(groups) for groups in evaluation["groups"].values())
    assert {len(row) for row in rows} == {1 + len(HEADLINES)}


def history():
    epoch = {"loss": 0.5, "bce": 0.6, "val_log_loss": 0.65, "val_auc": 0.7, "mean_pctr": 0.4}
    groups = {"click_confidence/age_group/<18": 1.0, "ad_gate/age_group/<18": None}
    return [{"epoch": 0, **epoch, **groups}, {"epoch": 1, **epoch, **groups}]


def test_report_is_one_file_that_loads_nothing(evaluated):
    evaluation, _ = evaluated
    page = render_report(evaluation, history(), {"train": CONFIG.to_dict()})
    assert "<script" not in page
    assert not re.search(r"(src|href)=\"(https?:)?//", page)
    # Training curves, monitors of age_group, calibration of both user groups.
    assert page.count("<svg") == 4
    assert f"{evaluation['overall']['auc']:.4f}" in page


def test_report_escapes_what_comes_from_the_spec(evaluated):
    evaluation, _ = evaluated
    page = render_report({**evaluation, "label": "<img src=x>"}, history(), {"train": CONFIG.to_dict()})
    assert "<img src=x>" not in page
    assert "&lt;img src=x&gt;" in page
