"""Offline metrics against scikit-learn and against hand-worked examples."""

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from clsd_tf.metrics import pointwise

# Few distinct scores, so that most examples have ties within and across the classes.
_ROWS = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.sampled_from([0.1, 0.2, 0.2000001, 0.5, 0.9]),
        st.sampled_from([0.0, 0.5, 1.0, 3.7]),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=40,
)


def _columns(rows):
    labels, scores, weights, users = (np.array(column) for column in zip(*rows, strict=True))
    return labels, scores, weights, users


def _has_both_classes(labels, weights):
    return (labels * weights).sum() > 0 and ((1 - labels) * weights).sum() > 0


@given(_ROWS)
def test_auc_with_ties_and_weights_equals_scikit_learn(rows):
    labels, scores, weights, _ = _columns(rows)
    if not _has_both_classes(labels, weights):
        assert pointwise.auc(labels, scores, weights) is None
        return
    expected = sklearn.metrics.roc_auc_score(labels, scores, sample_weight=weights)
    assert pointwise.auc(labels, scores, weights) == pytest.approx(expected, abs=1e-12)


@given(_ROWS)
def test_auc_without_weights_equals_scikit_learn(rows):
    labels, scores, _, _ = _columns(rows)
    if len(set(labels)) == 1:
        assert pointwise.auc(labels, scores) is None
        return
    assert pointwise.auc(labels, scores) == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores), abs=1e-12)


def test_auc_counts_pairs_and_half_of_ties():
    # Clicks .8 and .5, others .5 and .2. Pairs: .8>.5, .8>.2, .5=.5 (half), .5>.2 -> 3.5 of 4.
    labels, scores = np.array([1, 0, 1, 0]), np.array([0.8, 0.5, 0.5, 0.2])
    assert pointwise.auc(labels, scores) == 0.875


def test_auc_weighs_each_pair_by_both_weights():
    # Weight 3 on the click that loses: pairs won 1 * 1, lost 3 * 1 -> 1 / 4.
    assert pointwise.auc(np.array([1, 1, 0]), np.array([0.9, 0.1, 0.5]), np.array([1.0, 3.0, 1.0])) == 0.25


def test_auc_of_float32_scores_is_exact():
    # The two scores differ in float32's last bit only.
    scores = np.array([0.5, np.nextafter(np.float32(0.5), np.float32(1))], np.float32)
    assert pointwise.auc(np.array([0, 1]), scores) == 1.0


@pytest.mark.parametrize("labels", [[0, 0], [1, 1], []])
def test_auc_of_one_class_or_no_rows_is_none(labels):
    assert pointwise.auc(np.array(labels), np.linspace(0, 1, len(labels))) is None


def test_auc_is_none_when_a_class_has_no_weight():
    assert pointwise.auc(np.array([0, 1, 1]), np.array([0.1, 0.2, 0.3]), np.array([1.0, 0.0, 0.0])) is None


def test_gauc_weighs_users_by_impressions_and_leaves_out_users_of_one_class():
    # User 1: 2 rows, AUC 1. User 2: 3 rows, click .3 beats .1 and loses to .9 -> AUC .5. User 3: clicks only. User 4:
    # one row. (2 * 1 + 3 * .5) / 5 = .7, and 5 of 8 impressions enter.
    users = np.array([2, 1, 3, 2, 1, 4, 2, 3])
    labels = np.array([1, 1, 1, 0, 0, 0, 0, 1])
    scores = np.array([0.3, 0.8, 0.9, 0.9, 0.2, 0.4, 0.1, 0.1])
    value, share = pointwise.gauc(labels, scores, users)
    assert value == pytest.approx(0.7)
    assert share == 5 / 8


def test_gauc_impressions_are_sums_of_sample_weights():
    # User 1 has AUC 1 and weight 2, user 2 AUC 0 and weight 6: 2 / 8.
    users, labels = np.array([1, 1, 2, 2]), np.array([1, 0, 1, 0])
    value, share = pointwise.gauc(labels, np.array([0.9, 0.1, 0.1, 0.9]), users, np.array([1.0, 1.0, 3.0, 3.0]))
    assert value == pytest.approx(0.25)
    assert share == 1.0


@given(_ROWS)
def test_gauc_equals_a_loop_over_users_with_scikit_learn(rows):
    labels, scores, weights, users = _columns(rows)
    weights = weights + 0.25  # gauc's share of impressions needs some.
    total = mass = 0.0
    for user in set(users):
        own = users == user
        if len(set(labels[own])) == 2:
            value = sklearn.metrics.roc_auc_score(labels[own], scores[own], sample_weight=weights[own])
            total += value * weights[own].sum()
            mass += weights[own].sum()
    value, share = pointwise.gauc(labels, scores, users, weights)
    assert share == pytest.approx(mass / weights.sum())
    assert value == (pytest.approx(total / mass, abs=1e-12) if mass else None)


def test_gauc_of_no_rows_is_none():
    empty = np.array([])
    assert pointwise.gauc(empty, empty, empty) == (None, 0.0)


@given(_ROWS)
def test_log_loss_equals_scikit_learn(rows):
    labels, ctr, weights, _ = _columns(rows)
    weights = weights + 0.25
    expected = sklearn.metrics.log_loss(labels, ctr, sample_weight=weights, labels=[0, 1])
    assert pointwise.log_loss(labels, ctr, weights) == pytest.approx(expected, rel=1e-9)


def test_log_loss_of_a_certain_and_wrong_prediction_is_finite():
    # ctr is clipped to [1e-7, 1 - 1e-7]: -log(1e-7) = 16.118.
    for label, ctr in ((1, 0.0), (0, 1.0)):
        assert pointwise.log_loss(np.array([label]), np.array([ctr])) == pytest.approx(16.118, abs=1e-3)


@pytest.mark.parametrize("weights", [None, np.array([1.0, 2.0, 3.0, 4.0])])
def test_normalized_entropy_of_the_constant_click_rate_is_1(weights):
    labels = np.array([1, 0, 0, 1])
    rate = np.average(labels, weights=weights)
    assert pointwise.normalized_entropy(labels, np.full(4, rate), weights) == pytest.approx(1.0)


def test_normalized_entropy_is_below_1_for_a_better_and_above_1_for_a_worse_prediction():
    labels = np.array([1, 0, 0, 0])
    assert pointwise.normalized_entropy(labels, np.array([0.7, 0.1, 0.1, 0.1])) < 1
    assert pointwise.normalized_entropy(labels, np.array([0.1, 0.7, 0.7, 0.7])) > 1


@pytest.mark.parametrize("label", [0, 1])
def test_normalized_entropy_of_one_class_is_none(label):
    assert pointwise.normalized_entropy(np.full(3, label), np.full(3, 0.5)) is None


def test_pcoc_is_mean_ctr_over_click_rate():
    # Mean ctr .3, click rate .25 -> 1.2. With weight 0 on the third row: (.2 + .2 + .2) / 3 over 1 / 3 = .6.
    labels, ctr = np.array([1, 0, 0, 0]), np.array([0.2, 0.2, 0.6, 0.2])
    assert pointwise.pcoc(labels, ctr) == pytest.approx(1.2)
    assert pointwise.pcoc(labels, ctr, np.array([1.0, 1.0, 0.0, 1.0])) == pytest.approx(0.6)


def test_pcoc_without_clicks_is_none():
    assert pointwise.pcoc(np.zeros(2), np.array([0.5, 0.5])) is None


def test_ece_is_the_mean_gap_of_the_bins():
    # Two bins of two rows: ctr .1, click rate .5 -> gap .4; ctr .8, click rate 1 -> gap .2. Mean .3.
    labels, ctr = np.array([1, 0, 1, 1]), np.array([0.1, 0.1, 0.7, 0.9])
    assert pointwise.ece(labels, ctr, num_bins=2) == pytest.approx(0.3)


def test_ece_weighs_rows():
    # Weights 3, 1, 2, 2 cut into masses 4 and 4. Bin 1: ctr (3 * .1 + .3) / 4 = .15, click rate 3 / 4 -> gap .6.
    # Bin 2: ctr .8, click rate .5 -> gap .3. Mean .45.
    labels, ctr = np.array([1, 0, 0, 1]), np.array([0.1, 0.3, 0.7, 0.9])
    assert pointwise.ece(labels, ctr, np.array([3.0, 1.0, 2.0, 2.0]), num_bins=2) == pytest.approx(0.45)


def test_calibration_bins_are_sorted_and_of_equal_mass():
    random = np.random.default_rng(0)
    ctr = random.random(1000)
    labels = random.random(1000) < ctr
    bins = pointwise.calibration_bins(labels, ctr, num_bins=20)
    assert [entry["weight"] for entry in bins] == [50.0] * 20
    assert [entry["ctr"] for entry in bins] == sorted(entry["ctr"] for entry in bins)
    assert np.mean([entry["ctr"] for entry in bins]) == pytest.approx(ctr.mean())
    assert np.mean([entry["click_rate"] for entry in bins]) == pytest.approx(labels.mean())


def test_calibration_bins_of_equal_mass_with_weights():
    # Total mass 8, two bins of 4: the first row alone, then the other four.
    bins = pointwise.calibration_bins(
        np.array([1, 0, 0, 1, 1]), np.array([0.1, 0.2, 0.3, 0.4, 0.5]), np.array([4.0, 1.0, 1.0, 1.0, 1.0]), num_bins=2
    )
    assert [entry["weight"] for entry in bins] == [4.0, 4.0]
    assert [entry["click_rate"] for entry in bins] == [1.0, 0.5]
    assert [entry["ctr"] for entry in bins] == pytest.approx([0.1, 0.35])


def test_calibration_bins_of_fewer_rows_than_bins_leave_out_empty_bins():
    bins = pointwise.calibration_bins(np.array([1, 0]), np.array([0.8, 0.2]), num_bins=20)
    assert bins == [
        {"ctr": 0.2, "click_rate": 0.0, "weight": 1.0},
        {"ctr": 0.8, "click_rate": 1.0, "weight": 1.0},
    ]


def test_calibration_ignores_rows_of_weight_0():
    labels, ctr, weights = np.array([1, 0, 1]), np.array([0.2, 0.5, 0.9]), np.array([1.0, 0.0, 1.0])
    kept = weights > 0
    assert pointwise.calibration_bins(labels, ctr, weights) == pointwise.calibration_bins(labels[kept], ctr[kept])
    assert pointwise.ece(labels, ctr, weights) == pytest.approx(pointwise.ece(labels[kept], ctr[kept]))
