"""Errors over users: against resampling of users, and by hand."""

import numpy as np
import pytest

from clsd_tf.metrics import pointwise
from clsd_tf.metrics.significance import bootstrap_interval
from clsd_tf.metrics.user_errors import auc_difference_error, gauc_difference_error

_NORMAL_975 = 1.959964


def simulated(num_users=400, seed=0):
    """Rows of users who differ in click rate and in how good either model is for them, for two seeds of models."""
    random = np.random.default_rng(seed)
    users = np.repeat(np.arange(num_users), random.integers(2, 12, num_users))
    taste = random.normal(0, 1, num_users)[users]
    interest = taste + random.normal(0, 1, len(users))
    labels = (interest + random.normal(0, 1, len(users)) > 0.5).astype(float)
    baseline = np.stack([interest + random.normal(0, 1.5, len(users)) for _ in range(2)])
    better = random.normal(0.3, 0.5, num_users)[users]
    treatment = baseline + better * (interest - 0.2) + random.normal(0, 0.3, baseline.shape)
    # Rounded, so that there are ties.
    return labels, treatment.round(1), baseline.round(1), users, random.choice([0.5, 1.0, 2.0], len(users))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("error", "measure"),
    [
        (auc_difference_error, lambda labels, scores, users, weights: pointwise.auc(labels, scores, weights)),
        (
            gauc_difference_error,
            lambda labels, scores, users, weights: pointwise.gauc(labels, scores, users, weights)[0],
        ),
    ],
)
def test_the_error_is_that_of_resampled_users(error, measure, weighted):
    labels, treatment, baseline, users, weights = simulated()
    weights = weights if weighted else np.ones(len(labels))

    def difference(labels, treatment, baseline, users, weights):
        pairs = zip(treatment.T, baseline.T, strict=True)
        return np.mean([measure(labels, t, users, weights) - measure(labels, b, users, weights) for t, b in pairs])

    columns = [labels, treatment.T, baseline.T, users, weights]
    low, high = bootstrap_interval(difference, columns, num_resamples=800, clusters=users)
    # 800 resamples know the ends of an interval to about 5 % of its half width.
    assert error(labels, treatment, baseline, users, weights) == pytest.approx((high - low) / 2 / _NORMAL_975, rel=0.12)


def test_rows_of_one_user_that_stand_for_each_other_count_once():
    labels, treatment, baseline, users, _ = simulated()
    twice = [np.concatenate([x, x], axis=-1) for x in (labels, treatment, baseline, users)]
    for error in (auc_difference_error, gauc_difference_error):
        assert error(*twice) == pytest.approx(error(labels, treatment, baseline, users))


def test_by_hand():
    # Users 0, 1 and 2 have a click and a non-click each. Baseline: all clicks above all non-clicks. Treatment: user 2's
    # click falls below every non-click. Placements of clicks: 1, 1, 0; of non-clicks: 2/3 each.
    labels, users = np.array([1, 0, 1, 0, 1, 0]), np.array([0, 0, 1, 1, 2, 2])
    baseline, treatment = np.array([[1, 0, 1, 0, 1, 0]]), np.array([[1, 0, 1, 0, -1, 0]])
    # d is 0, 0, -1 of clicks and -1/3 of non-clicks, their mean -1/3: influence 1/9, 1/9, -2/9.
    expected = np.sqrt(3 / 2 * (1 / 81 + 1 / 81 + 4 / 81))
    assert auc_difference_error(labels, treatment, baseline, users) == pytest.approx(expected)
    # GAUC: d_u is 0, 0, -1, its mean -1/3: influence 2 * 1/3 / 6 twice, and 2 * -2/3 / 6.
    assert gauc_difference_error(labels, treatment, baseline, users) == pytest.approx(expected)


def test_equal_models_have_no_error_and_one_user_none_to_tell():
    labels, treatment, _, users, _ = simulated()
    for error in (auc_difference_error, gauc_difference_error):
        assert error(labels, treatment, treatment, users) == 0.0
        assert error(labels, treatment, treatment + 1, np.zeros(len(users))) is None
        assert error(np.ones(len(labels)), treatment, treatment, users) is None
