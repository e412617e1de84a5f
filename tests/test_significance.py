"""Paired differences against scipy."""

import numpy as np
import pytest
import scipy.stats

from clsd_tf.significance import paired_difference


def test_mean_and_standard_error_equal_those_of_scipys_paired_t_test():
    random = np.random.default_rng(0)
    baseline = random.normal(0.7, 0.01, 7)
    treatment = baseline + random.normal(0.003, 0.002, 7)
    result = paired_difference(treatment, baseline)
    # The statistic of ttest_rel is mean / standard error.
    expected = scipy.stats.ttest_rel(treatment, baseline)
    assert result.mean == pytest.approx(np.mean(treatment - baseline))
    assert result.standard_error == pytest.approx(result.mean / expected.statistic)
    assert result.num_pairs == 7


def test_pairs_cancel_what_both_runs_share():
    # Differences 1, 2, 3: mean 2, sd 1, standard error 1 / sqrt(3) = .5774, however far apart the seeds are.
    result = paired_difference([101.0, 2.0, -997.0], [100.0, 0.0, -1000.0])
    assert result.mean == pytest.approx(2.0)
    assert result.standard_error == pytest.approx(0.5774, abs=1e-4)


def test_one_pair_has_no_standard_error():
    result = paired_difference([0.72], [0.7])
    assert result.standard_error is None
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
