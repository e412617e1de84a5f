"""Intervals over users: SciPy's where users are single rows, those of resampled users where they are not."""

import numpy as np
import pytest
from scipy import stats

from clsd_tf.metrics.pointwise import auc
from clsd_tf.metrics.scored_rows import ScoredRows
from clsd_tf.metrics.significance import bootstrap_interval
from clsd_tf.metrics.table import measure
from clsd_tf.metrics.user_intervals import user_intervals


@pytest.fixture(scope="module")
def columns():
    """3,000 rows of 150 users, who click more or less: with ties, weights, and users who never click."""
    random = np.random.default_rng(5)
    users = random.integers(150, size=3000)
    ctr = np.round(random.beta(2, 5, 3000), 2).astype(np.float32)
    tendency = random.uniform(0.3, 1.4, 150)[users]
    label = (random.random(3000) < np.clip(ctr * tendency, 0, 1) * (users > 3)).astype(np.float32)
    return {
        "user_hash": users * 7919 - 10**6,
        "ctr": ctr,
        "label": label,
        "intensity_label": label * (random.random(3000) < 0.3 + 0.5 * ctr).astype(np.float32),
        "sample_weight": random.choice([0.5, 1.0, 2.0], 3000).astype(np.float32),
    }


def single_rows(**columns):
    rows = len(columns["label"])
    defaults = {"user_hash": np.arange(rows), "sample_weight": np.ones(rows), "intensity_label": None}
    return {**defaults, "ctr": np.full(rows, 0.25), **columns}


def measured(columns):
    """(rows, metric -> value)"""
    rows = ScoredRows(**columns, uncalibrated=columns["ctr"], row_id=np.arange(len(columns["label"])))
    return rows, measure(rows, "evaluation")


def intervals(columns):
    return user_intervals(*measured(columns))


def test_the_click_rate_of_single_rows_has_the_t_interval_of_a_mean():
    label = np.array([1.0, 0, 0, 1, 0, 0, 0, 1, 0, 0])
    expected = stats.t.interval(0.95, 9, loc=0.3, scale=stats.sem(label))
    assert intervals(single_rows(label=label))["click_rate"] == pytest.approx([max(expected[0], 0), expected[1]])


def test_the_log_loss_of_single_rows_has_the_t_interval_of_a_mean():
    label, ctr = np.array([1.0, 0, 0, 1, 0]), np.array([0.5, 0.2, 0.6, 0.9, 0.1])
    losses = -np.log(np.array([0.5, 0.8, 0.4, 0.9, 0.9]))
    expected = stats.t.interval(0.95, 4, loc=losses.mean(), scale=stats.sem(losses))
    found = intervals(single_rows(label=label, ctr=ctr))["log_loss"]
    assert found == pytest.approx([max(expected[0], 0), expected[1]])


def test_pcoc_by_hand():
    """Two users: predicted 1 and 2 of 1 and 3 clicks. R = 3/4, influences (1 - .75) / 4 and (2 - 2.25) / 4."""
    rows = single_rows(
        label=np.array([1.0, 0, 1, 1, 1]),
        ctr=np.array([0.5, 0.5, 0.5, 0.75, 0.75]),
        user_hash=np.array([1, 1, 2, 2, 2]),
    )
    error = np.sqrt(2 / 1 * 2 * (0.25 / 4) ** 2)
    low, high = 0.75 - 12.706205 * error, 0.75 + 12.706205 * error  # t quantile with 1 degree of freedom.
    assert low < 0
    assert intervals(rows)["pcoc"] == pytest.approx([0.0, high], rel=1e-6)


def test_gauc_of_equally_long_users_has_the_t_interval_of_the_mean_of_those_with_both_labels():
    random = np.random.default_rng(3)
    label = (random.random((26, 10)) < 0.4).astype(np.float64)
    label[6:] = 0
    ctr = np.round(random.random((26, 10)), 2)
    aucs = [auc(*user) for user in zip(label[:6], ctr[:6], strict=True)]
    expected = stats.t.interval(0.95, 5, loc=np.mean(aucs), scale=stats.sem(aucs))
    rows = single_rows(label=label.ravel(), ctr=ctr.ravel(), user_hash=np.repeat(np.arange(26), 10))
    assert 0 < expected[0] < expected[1] < 1
    assert intervals(rows)["gauc"] == pytest.approx(expected)


def test_only_users_who_clicked_count_among_clicks():
    """Of clicks 1, 2, 4 of users 1, 1, 2 with intensity and click 3 of user 3 without: AUC is (1 + 1/2 + 1) / 3.

    That of click 3 is the same, so that the influences of the users are (1 + 1/2 - 10/6) / 3, (1 - 5/6) / 3 and 0.
    """
    rows = single_rows(
        user_hash=np.array([1, 1, 2, 3, 4, 5, 6, 7, 8]),
        label=np.array([1.0, 1, 1, 1, 0, 0, 0, 0, 0]),
        intensity_label=np.array([1.0, 1, 1, 0, 0, 0, 0, 0, 0]),
        ctr=np.array([0.5, 0.3, 0.4, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1]),
    )
    low = 5 / 6 - 4.30265273 * np.sqrt(3 / 2 * 2 * (1 / 18) ** 2)  # t quantile with 2 degrees of freedom.
    assert intervals(rows)["intensity_auc_among_clicks"] == pytest.approx([low, 1.0])


@pytest.mark.parametrize(
    "metric",
    ["click_rate", "auc", "gauc", "log_loss", "normalized_entropy", "pcoc", "intensity_auc",
     "intensity_auc_among_clicks"],
)  # fmt: skip
def test_intervals_are_near_those_of_resampled_users(columns, metric):
    names = list(columns)
    low, high = bootstrap_interval(
        lambda *values: measured(dict(zip(names, values, strict=True)))[1][metric],
        [columns[name] for name in names],
        num_resamples=400,
        clusters=columns["user_hash"],
    )
    assert intervals(columns)[metric] == pytest.approx([low, high], abs=0.15 * (high - low))


def test_auc_of_single_rows_covers_the_truth_as_often_as_it_says():
    """Scores of clicks and others are normal, one standard deviation apart: AUC = Phi(1 / sqrt 2)."""
    random = np.random.default_rng(0)
    truth, covered = stats.norm.cdf(1 / np.sqrt(2)), 0
    for _ in range(300):
        label = np.repeat([1.0, 0.0], 60)
        scores = random.normal(label)
        # AUC reads the order only; a logistic curve keeps it and makes probabilities.
        low, high = intervals(single_rows(label=label, ctr=1 / (1 + np.exp(-scores))))["auc"]
        covered += low <= truth <= high
    assert 0.91 <= covered / 300 <= 0.98


def test_users_who_are_alike_make_intervals_wide():
    """Ten users with 50 equal rows each say as much as ten rows."""
    label = np.array([0.0, 1.0] * 5)
    ten = intervals(single_rows(label=label))["click_rate"]
    rows = {"label": np.repeat(label, 50), "user_hash": np.repeat(np.arange(10), 50)}
    assert intervals(single_rows(**rows))["click_rate"] == pytest.approx(ten)
    low, high = intervals(single_rows(label=rows["label"]))["click_rate"]
    assert high - low < (ten[1] - ten[0]) / 5


def test_intervals_stay_where_a_metric_can_be():
    perfect = single_rows(label=np.array([0.0, 0, 1, 1]), ctr=np.array([0.1, 0.2, 0.7, 0.8]))
    found = intervals(perfect)
    assert auc(perfect["label"], perfect["ctr"]) == 1
    assert found["auc"] == (1.0, 1.0)
    assert found["click_rate"][1] == 1.0
    assert all(low >= 0 for low, _ in filter(None, found.values()))


def test_metrics_that_are_not_defined_have_no_interval(columns):
    none = intervals({**columns, "label": np.zeros(3000, np.float32), "intensity_label": None})
    undefined = ("auc", "gauc", "pcoc", "normalized_entropy", "intensity_auc", "intensity_auc_among_clicks")
    assert [none[name] for name in undefined] == [None] * 6
    assert none["click_rate"] == (0.0, 0.0)


def test_one_user_has_no_interval():
    one = single_rows(label=np.array([1.0, 0, 0]), user_hash=np.array([4, 4, 4]))
    assert set(intervals(one).values()) == {None}


def test_only_metrics_that_were_measured_have_an_interval(columns):
    rows, values = measured(columns)
    found = user_intervals(rows, {name: values[name] for name in ("auc", "pcoc", "ece")})
    assert found == {name: user_intervals(rows, values)[name] for name in ("auc", "pcoc")}
