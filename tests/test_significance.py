"""Paired differences, corrections and intervals against scipy, definitions and hand-worked examples."""

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from clsd_tf.metrics import pointwise
from clsd_tf.metrics.significance import bootstrap_interval, holm, paired_difference, rela_impr


def test_mean_error_p_value_and_interval_equal_those_of_scipys_paired_t_test():
    random = np.random.default_rng(0)
    baseline = random.normal(0.7, 0.01, 7)
    treatment = baseline + random.normal(0.003, 0.002, 7)
    result = paired_difference(treatment, baseline)
    # The statistic of ttest_rel is mean / standard error.
    expected = scipy.stats.ttest_rel(treatment, baseline)
    assert result.mean == pytest.approx(np.mean(treatment - baseline))
    assert result.standard_error == pytest.approx(result.mean / expected.statistic)
    assert result.num_pairs == 7
    assert result.t_p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert result.confidence_interval == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-9)


def test_pairs_cancel_what_both_runs_share():
    # Differences 1, 2, 3: mean 2, sd 1, standard error 1 / sqrt(3) = .5774, however far apart the seeds are.
    result = paired_difference([101.0, 2.0, -997.0], [100.0, 0.0, -1000.0])
    assert result.mean == pytest.approx(2.0)
    assert result.standard_error == pytest.approx(0.5774, abs=1e-4)


def test_one_pair_has_a_mean_and_nothing_else():
    result = paired_difference([0.72], [0.7])
    assert (result.standard_error, result.t_p_value, result.permutation_p_value) == (None, None, None)
    assert result.confidence_interval is None
    assert str(result) == "+0.0200 +- n/a"


def test_text_has_a_sign_and_four_decimals():
    # Differences -.01 and -.03: mean -.02, sd .01414, standard error .01.
    assert str(paired_difference([0.69, 0.67], [0.7, 0.7])) == "-0.0200 +- 0.0100"


def test_no_pairs_are_refused():
    with pytest.raises(ValueError, match="Received: 0 and 0"):
        paired_difference([], [])


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="Received: 2 and 1"):
        paired_difference([0.1, 0.2], [0.1])


def test_permutation_p_value_of_four_pairs_by_hand():
    # The sum is 5. Of 16 sign flips three reach it, 1 + 2 + 3 + 1, 1 + 2 + 3 - 1 and -1 + 2 + 3 + 1, and their
    # mirrors reach -5: 6 / 16.
    result = paired_difference([1.0, 2.0, 3.0, -1.0], [0.0] * 4)
    assert result.permutation_p_value == pytest.approx(6 / 16)


@settings(deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=2, max_size=7))
def test_permutation_p_value_is_the_share_of_sign_flips_at_least_as_far_from_0(differences):
    flips = itertools.product([-1, 1], repeat=len(differences))
    sums = [abs(sum(sign * value for sign, value in zip(signs, differences, strict=True))) for signs in flips]
    expected = np.mean([value >= abs(sum(differences)) for value in sums])
    # Tenths have no exact binary form: flips of equal sums must still count as equal.
    result = paired_difference([value / 10 for value in differences], [0.0] * len(differences))
    assert result.permutation_p_value == pytest.approx(expected)


def test_permutation_p_value_of_many_pairs_is_close_to_the_t_test_and_repeatable():
    random = np.random.default_rng(3)
    treatment, baseline = random.normal(0.25, 1, 60), np.zeros(60)
    first, second = (paired_difference(treatment, baseline) for _ in range(2))
    assert first == second
    # Near .05 the standard error of a share of 10,000 flips is .002.
    assert 0.02 < first.t_p_value < 0.2
    assert first.permutation_p_value == pytest.approx(first.t_p_value, abs=0.015)


def test_random_flips_of_more_than_14_pairs_can_reach_small_p_values():
    # 20 positive differences: of a million flips 2 are as far from 0, of 10,000 only the data's own signs.
    result = paired_difference(np.linspace(1, 2, 20), np.zeros(20))
    assert result.permutation_p_value == 1 / 10_000


def test_equal_runs_have_p_value_1():
    result = paired_difference([0.7, 0.8, 0.9], [0.7, 0.8, 0.9])
    assert (result.t_p_value, result.permutation_p_value) == (1.0, 1.0)
    assert result.confidence_interval == (0.0, 0.0)


def test_equal_differences_leave_only_the_permutation_test_in_doubt():
    # No spread: the t-test is certain. Two of eight flips are as far from 0.
    result = paired_difference([1.5, 2.5, 3.5], [1.0, 2.0, 3.0])
    assert result.t_p_value == 0.0
    assert result.permutation_p_value == pytest.approx(2 / 8)
    assert result.confidence_interval == (0.5, 0.5)


def test_holm_by_hand():
    # Sorted: .01 * 4 = .04; .02 * 3 = .06; .03 * 2 = .06; .04 * 1 = .04, raised to .06.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])


def test_holm_does_not_count_tests_that_were_not_made():
    assert holm([None, 0.02, None, 0.03]) == [None, pytest.approx(0.04), None, pytest.approx(0.04)]
    assert holm([None]) == [None]
    assert holm([]) == []


# 64ths: their small multiples are exact.
_P_VALUES = st.lists(st.one_of(st.none(), st.integers(0, 64).map(lambda number: number / 64)), max_size=8)


@settings(deadline=None)
@given(_P_VALUES)
def test_holm_is_the_smallest_alpha_at_which_the_step_down_procedure_rejects(p_values):
    known = [p_value for p_value in p_values if p_value is not None]

    def rejects(p_value, alpha):
        """The k-th smallest of m is rejected when it and all smaller ones pass: p_(k) <= alpha / (m - k + 1)."""
        passing = sorted(other for other in known if other <= p_value)
        return all(other * (len(known) - rank) <= alpha for rank, other in enumerate(passing))

    for p_value, adjusted in zip(p_values, holm(p_values), strict=True):
        if p_value is None:
            assert adjusted is None
        else:
            assert rejects(p_value, adjusted) or adjusted == 1
            assert not rejects(p_value, adjusted - 1 / 128)


@settings(deadline=None)
@given(_P_VALUES)
def test_holm_raises_p_values_keeps_their_order_and_stays_below_1(p_values):
    pairs = sorted(
        (before, after) for before, after in zip(p_values, holm(p_values), strict=True) if before is not None
    )
    assert all(before <= after <= 1 for before, after in pairs)
    assert [after for _, after in pairs] == sorted(after for _, after in pairs)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
def test_holm_refuses_what_is_no_p_value(wrong):
    with pytest.raises(ValueError, match=rf"Received: \[{wrong}\]"):
        holm([0.5, wrong])


def test_rela_impr_by_hand():
    # (.74 - .5) / (.7 - .5) - 1 = .2; a ranking that is random loses all.
    assert rela_impr(0.74, 0.7) == pytest.approx(0.2)
    assert rela_impr(0.5, 0.7) == -1.0
    assert rela_impr(0.7, 0.5) is None


def _mean(values):
    return values.mean()


def test_bootstrap_interval_of_a_mean_equals_scipys():
    values = np.random.default_rng(0).exponential(2.0, 300)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=4000, confidence_level=0.9, method="percentile", rng=np.random.default_rng(1)
    )
    # Two sets of resamples: the ends differ by about .005, of an interval of .4.
    result = bootstrap_interval(_mean, [values], num_resamples=4000, confidence=0.9)
    assert result == pytest.approx(tuple(expected.confidence_interval), abs=0.02)


def test_bootstrap_interval_is_made_of_quantiles_of_the_resampled_statistics():
    seen = []

    def statistic(values):
        seen.append(values.mean())
        return seen[-1]

    result = bootstrap_interval(statistic, [np.arange(10.0)], num_resamples=200, confidence=0.8)
    assert len(seen) == 200
    assert result == pytest.approx((np.quantile(seen, 0.1), np.quantile(seen, 0.9)))


@settings(deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=20), st.integers(0, 1000))
def test_bootstrap_of_equal_seeds_is_equal_and_lies_within_the_data(values, seed):
    values = np.array(values)
    first, second = (bootstrap_interval(_mean, [values], num_resamples=20, seed=seed) for _ in range(2))
    assert first == second
    assert values.min() - 1e-9 <= first[0] <= first[1] <= values.max() + 1e-9


def test_bootstrap_of_other_seeds_differs():
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap_interval(_mean, [values], seed=1) != bootstrap_interval(_mean, [values], seed=2)


def test_rows_of_all_columns_stay_together():
    values = np.arange(30.0)
    difference = bootstrap_interval(lambda left, right: (left - right).mean(), [values, values - 2], num_resamples=50)
    assert difference == (2.0, 2.0)


def test_clusters_are_drawn_whole_and_as_many_as_there_are():
    users, values = np.array([7, 3, 7, 5, 7, 3]), np.array([0, 1, 2, 3, 4, 5])  # Sizes 3 (of 7), 2 (of 3), 1 (of 5).
    rows_of = {7: [0, 2, 4], 3: [1, 5], 5: [3]}
    drawn = []

    def statistic(users, values):
        times = {user: (users == user).sum() / len(rows) for user, rows in rows_of.items()}
        assert sum(times.values()) == 3
        for user, rows in rows_of.items():
            assert sorted(values[users == user]) == sorted(rows * int(times[user]))
        drawn.append(times[7])
        return 0.0

    bootstrap_interval(statistic, [users, values], num_resamples=300, clusters=users)
    # User 7 is drawn 0 to 3 times, once on average.
    assert set(drawn) == {0, 1, 2, 3}
    assert np.mean(drawn) == pytest.approx(1.0, abs=0.15)


def test_repeated_rows_do_not_narrow_the_interval_of_their_clusters():
    values = np.random.default_rng(0).normal(size=40)
    alone = bootstrap_interval(_mean, [values])
    repeated, users = np.repeat(values, 5), np.repeat(np.arange(40), 5)
    assert bootstrap_interval(_mean, [repeated], clusters=users) == pytest.approx(alone)
    # As independent rows they would look sqrt(5) = 2.2 times as sure.
    low, high = bootstrap_interval(_mean, [repeated])
    assert (alone[1] - alone[0]) / (high - low) == pytest.approx(2.24, rel=0.15)


def test_the_interval_of_an_auc_contains_it():
    random = np.random.default_rng(0)
    ctr = random.random(400)
    labels = (random.random(400) < ctr).astype(float)
    low, high = bootstrap_interval(pointwise.auc, [labels, ctr], num_resamples=200)
    assert low < pointwise.auc(labels, ctr) < high
    assert high - low < 0.15


def test_resamples_without_a_value_are_left_out():
    # One click among three rows: (2 / 3)^3 = 30 % of the resamples have none, and no AUC.
    labels, scores = np.array([1, 0, 0]), np.array([0.9, 0.5, 0.1])
    assert bootstrap_interval(pointwise.auc, [labels, scores]) == (1.0, 1.0)


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_a_statistic_that_most_resamples_do_not_define_has_no_interval(nothing):
    calls = iter(range(100))
    assert bootstrap_interval(lambda _: nothing if next(calls) < 51 else 1.0, [np.ones(3)], num_resamples=100) is None
    calls = iter(range(100))
    result = bootstrap_interval(lambda _: nothing if next(calls) < 50 else 1.0, [np.ones(3)], num_resamples=100)
    assert result == (1.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": []}, r"Received: \[0\]"),
        ({"columns": [np.ones(0)]}, r"Received: \[0, 0\]"),
        ({"columns": [np.ones(3), np.ones(2)]}, r"Received: \[3, 2, 3\]"),
        ({"clusters": np.ones(2)}, r"Received: \[3, 2\]"),
        ({"num_resamples": 0}, "num_resamples must be at least 1. Received: 0"),
        ({"confidence": 1.0}, r"confidence must lie in \(0, 1\). Received: 1.0"),
    ],
)
def test_bootstrap_refuses_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(_mean, **{"columns": [np.ones(3)], **arguments})
