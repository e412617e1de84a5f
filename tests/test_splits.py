"""Which split a row belongs to; hashes of row ids and keys."""

import datetime as dt
import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clsd_tf.data.hashing import hash_keys, mix_row_ids
from clsd_tf.spec.feature_spec import parse_spec
from clsd_tf.spec.tables import Split
from clsd_tf.statistics.sketches import Histogram
from feature_specs.overrides import override_split_rule
from pipelines.rows.splits import expected_rows, split_cut_offs, split_indices


def rows(times=None, users=None, row_ids=None):
    """Joined rows in their order; what is not given is 0, 1, 2, ... (row ids, times) or one user."""
    given = next(column for column in (times, users, row_ids) if column is not None)
    default = np.arange(len(given))
    return pa.table(
        {
            "row_id": default if row_ids is None else row_ids,
            "event_time": default if times is None else times,
            "user_hash": np.zeros(len(given), np.int64) if users is None else users,
        }
    )


# --- Split -----------------------------------------------------------------------------------------------------------


def test_rows_of_one_time_are_never_separated():
    histogram = Histogram.of_integers(np.array([1] * 50 + [2] * 50))
    times = np.array([1] * 50 + [2] * 50)
    splits = split_indices(Split(), histogram.cut_offs([0.8, 0.9]), rows(times))
    assert all(len(set(splits[times == time])) == 1 for time in (1, 2))


def test_time_split_puts_a_row_at_the_cut_off_into_the_later_split():
    times = np.array([9, 10, 19, 20, 100])
    assert split_indices(Split(), [10, 20], rows(times)).tolist() == [0, 1, 1, 2, 2]


def test_cut_off_dates_replace_fractions():
    split = Split(validation_from=dt.datetime(2024, 1, 2), test_from=dt.datetime(2024, 1, 3, 12))
    # 2024-01-02 is 1,704,153,600 s after 1970; without time zone a date is UTC.
    histogram = Histogram.of_integers(np.arange(5))
    assert split_cut_offs(split, histogram) == [1_704_153_600_000_000, 1_704_283_200_000_000]


def test_events_from_until_on_are_left_out():
    day = 86_400_000_000
    split = Split(
        validation_from=dt.datetime(1970, 1, 11), test_from=dt.datetime(1970, 1, 21), until=dt.datetime(1970, 1, 31)
    )
    cut_offs = split_cut_offs(split, Histogram.of_integers(np.arange(5)))
    assert cut_offs == [10 * day, 20 * day, 30 * day]
    times = np.array([0, 10 * day, 20 * day, 30 * day - 1, 30 * day, 99 * day])
    assert split_indices(split, cut_offs, rows(times)).tolist() == [0, 1, 2, 2, 3, 3]


def test_cut_off_dates_respect_their_time_zone():
    zone = dt.timezone(dt.timedelta(hours=2))
    split = Split(validation_from=dt.datetime(2024, 1, 2, tzinfo=zone), test_from=dt.datetime(2024, 1, 3, tzinfo=zone))
    assert split_cut_offs(split, Histogram.of_integers([]))[0] == (1_704_153_600 - 7200) * 1_000_000


def test_random_split_has_the_fractions_and_does_not_follow_time():
    row_ids = np.arange(100_000)
    splits = split_indices(Split(rule="random", seed=4), [], rows(row_ids=row_ids))
    shares = np.bincount(splits) / len(splits)
    # Standard error of a share of 0.8 in 100,000 rows is 0.0013: 5 of them.
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.0065)
    assert np.mean(splits[:50_000] == 0) == pytest.approx(0.8, abs=0.01)


def test_random_split_is_deterministic_and_changes_with_the_seed():
    row_ids = np.arange(1000)
    splits = [split_indices(Split(rule="random", seed=seed), [], rows(row_ids=row_ids)) for seed in (1, 1, 2)]
    assert np.array_equal(splits[0], splits[1])
    assert not np.array_equal(splits[0], splits[2])


def test_split_of_a_row_does_not_depend_on_the_other_rows():
    row_ids = np.arange(1000)
    split = Split(rule="random", seed=1)
    whole = split_indices(split, [], rows(row_ids=row_ids))
    assert np.array_equal(split_indices(split, [], rows(row_ids=row_ids[::-3])), whole[::-3])


def test_the_gap_before_validation_and_before_test_is_left_out():
    day = 86_400_000_000
    split = Split(gap_days=0.5)
    # Validation begins on day 10, test on day 20: [9.5, 10) would be training, [19.5, 20) validation.
    times = (np.array([9.4, 9.5, 9.9, 10, 19.4, 19.5, 20, 99]) * day).astype(np.int64)
    assert split_indices(split, [10 * day, 20 * day], rows(times)).tolist() == [0, 3, 3, 1, 1, 3, 2, 2]


def test_a_gap_longer_than_validation_leaves_no_training_row_near_the_test():
    day = 86_400_000_000
    times = np.arange(0, 12) * day
    # Validation is day 9, test from day 10. Days 6 to 8 lie before validation, day 9 before test.
    expected = [0] * 6 + [3] * 4 + [2] * 2
    assert split_indices(Split(gap_days=3), [9 * day, 10 * day], rows(times)).tolist() == expected


def test_events_from_until_on_stay_left_out_with_a_gap():
    day = 86_400_000_000
    split = Split(gap_days=1)
    times = np.array([18, 19, 20, 29, 30]) * day
    assert split_indices(split, [10 * day, 20 * day, 30 * day], rows(times)).tolist() == [1, 3, 2, 2, 3]


def test_user_split_never_separates_a_user_and_has_the_fractions():
    users = np.sort(np.random.default_rng(0).integers(0, 2**62, 20_000).repeat(3))
    splits = split_indices(Split(rule="user", seed=1), [], rows(users=users)).reshape(-1, 3)
    assert (splits == splits[:, :1]).all()
    # Standard error of a share of 0.1 in 20,000 users is 0.0021, of 0.8 it is 0.0028: 5 of them.
    assert np.bincount(splits[:, 0]) / 20_000 == pytest.approx([0.8, 0.1, 0.1], abs=0.014)


def test_user_split_depends_on_the_user_and_the_seed_alone():
    users = np.arange(1000)
    whole = split_indices(Split(rule="user", seed=1), [], rows(users=users))
    some = split_indices(Split(rule="user", seed=1), [], rows(users=users[::7], row_ids=users[::7] + 5))
    assert np.array_equal(some, whole[::7])
    assert not np.array_equal(split_indices(Split(rule="user", seed=2), [], rows(users=users)), whole)


def test_last_events_of_each_user_are_test_and_those_before_validation():
    split = Split(rule="last_n_per_user", validation_events=2, test_events=1)
    # Three users with 5, 4 and 3 events; the last has none left to train on and is in training as a whole.
    users = np.repeat([3, 7, 8], [5, 4, 3])
    assert split_indices(split, [], rows(users=users)).tolist() == [0, 0, 1, 1, 2, 0, 1, 1, 2, 0, 0, 0]


def naive_last_n(users, validation_events, test_events):
    """User by user, as the documentation says it."""
    result = []
    for _, group in itertools.groupby(users):
        size = len(list(group))
        held_out = [1] * validation_events + [2] * test_events
        result += [0] * (size - len(held_out)) + held_out if size > len(held_out) else [0] * size
    return result


@given(st.lists(st.integers(0, 4), max_size=40).map(sorted), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_last_n_per_user_equals_a_naive_loop(users, validation_events, test_events):
    split = Split(rule="last_n_per_user", validation_events=validation_events, test_events=test_events)
    result = split_indices(split, [], rows(users=np.array(users, np.int64)))
    assert result.tolist() == naive_last_n(users, validation_events, test_events)


def test_another_rule_takes_the_dates_and_the_gap_of_the_time_rule_away(shop_content):
    shop_content["split"] = {"validation_from": "2024-01-02", "test_from": "2024-01-03", "gap_days": 0.5, "seed": 3}
    spec = parse_spec(shop_content, "shop")
    assert override_split_rule(spec, "user").split == Split(rule="user", seed=3)
    assert override_split_rule(spec, "time").split == spec.split


# --- Hashes ----------------------------------------------------------------------------------------------------------


def test_mixed_row_ids_are_uniform():
    mixed = mix_row_ids(np.arange(100_000), seed=0)
    assert mixed.dtype == np.uint64
    assert len(np.unique(mixed)) == 100_000
    for bits in (mixed >> np.uint64(60), mixed & np.uint64(15)):  # The high and the low 4 bits.
        counts = np.bincount(bits.astype(np.int64), minlength=16)
        # 16 cells of 6,250 expected: chi-squared with 15 degrees of freedom exceeds 50 with probability 1e-5.
        assert ((counts - 6250) ** 2 / 6250).sum() < 50


def test_mixed_row_ids_are_the_published_splitmix64_sequence():
    # First outputs of SplitMix64 seeded with 0: state 1, 2, 3 times the golden gamma.
    gamma = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        states = gamma * np.arange(3, dtype=np.uint64)
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert mix_row_ids(states, seed=0).tolist() == expected


def test_mixed_row_ids_of_two_seeds_are_unrelated():
    first, second = (mix_row_ids(np.arange(10_000), seed) / 2.0**64 for seed in (101, 102))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05  # 5 standard errors of 1 / sqrt(10,000).


def test_hash_of_a_key_is_stable_and_63_bit():
    hashes = hash_keys(pa.chunked_array([["u1", "u2"], ["u1"]]))
    assert hashes.dtype == np.int64
    assert hashes[0] == hashes[2] != hashes[1]
    assert (hashes >= 0).all()


def test_hash_of_an_integer_key_is_that_of_its_text():
    assert hash_keys(pa.array([17])).tolist() == hash_keys(pa.array(["17"])).tolist()


def test_expected_rows_of_cut_offs_are_those_of_the_histogram():
    histogram = Histogram.of_integers(np.arange(10))
    assert expected_rows(Split(), [6, 8], histogram) == {"train": 6, "validation": 2, "test": 2}
    assert expected_rows(Split(), [6, 8, 9], histogram) == {"train": 6, "validation": 2, "test": 1}
    assert expected_rows(Split(rule="user"), [], histogram) == {"train": 8, "validation": 1, "test": 1}
