"""Mergeable summaries of columns against exact counts."""

import functools
import itertools
import json
import pickle
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clsd_tf.data.hashing import hash_keys
from clsd_tf.statistics.sketches import DistinctSketch, Histogram, TopValues


def merged(parts):
    return functools.reduce(lambda left, right: left.merge(right), parts)


# --- Histogram: cut-offs of event times ------------------------------------------------------------------------------


def test_cut_offs_by_hand():
    # Times 1..10, one row each: 80 % lie before 9, 90 % before 10.
    assert Histogram.of_integers(np.arange(1, 11)).cut_offs([0.8, 0.9]) == [9, 10]


def test_cut_off_is_the_nearest_boundary_between_times():
    # 3 rows at 5, 3 at 6, 4 at 7. Boundaries: 0, 3, 6, 10 rows before; 0.5 -> 5 rows: 6 is nearer than 3.
    histogram = Histogram.of_integers(np.array([5] * 3 + [6] * 3 + [7] * 4))
    assert histogram.cut_offs([0.5]) == [7]
    assert histogram.cut_offs([0.2]) == [6]


def test_cut_offs_work_for_times_before_1970():
    assert Histogram.of_integers(np.arange(-10, 0)).cut_offs([0.8, 0.9]) == [-2, -1]


def test_size_is_bounded_and_no_value_is_lost():
    random = np.random.default_rng(0)
    histogram = merged(Histogram.of_integers(random.integers(0, 10**15, 40_000)) for _ in range(4))
    assert len(histogram.counts) <= Histogram.MAX_BUCKETS == 65_536
    assert histogram.count == 160_000
    # Uniform times: the 80 % cut lies at 80 % of the range. Sampling error of a quantile: 0.1 %.
    assert histogram.cut_offs([0.8])[0] == pytest.approx(0.8 * 10**15, rel=0.01)


# --- Histogram: merges and quantiles ---------------------------------------------------------------------------------

INTEGERS = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3), min_size=1, max_size=8)
FLOATS = st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([-0.0, 0.0, 1.5]), min_size=1)
FRACTIONS = st.lists(st.integers(0, 100).map(lambda percent: percent / 100), min_size=1, max_size=5)


@given(st.lists(INTEGERS, min_size=1, max_size=6), st.data())
@settings(max_examples=150, deadline=None)
def test_merge_order_does_not_matter(parts, data):
    def of(values):
        return Histogram.of_integers(np.array(values, np.int64), max_buckets=4)  # So that coarsening happens.

    order = data.draw(st.permutations(parts))
    at_once = of(list(itertools.chain(*parts))).to_dict()
    assert merged(map(of, parts)).to_dict() == merged(map(of, order)).to_dict() == at_once
    assert sum(at_once["counts"]) == sum(map(len, parts))


@given(INTEGERS, st.integers(2, 6))
@settings(max_examples=150, deadline=None)
def test_buckets_are_the_finest_that_fit(values, max_buckets):
    histogram = Histogram.of_integers(np.array(values, np.int64), max_buckets)
    shift = next(shift for shift in range(64) if len({value >> shift for value in values}) <= max_buckets)
    assert histogram.shift == shift
    assert dict(zip(histogram.buckets.tolist(), histogram.counts.tolist(), strict=True)) == Counter(
        value >> shift for value in values
    )


@given(INTEGERS, FRACTIONS)
@settings(max_examples=150, deadline=None)
def test_quantiles_of_integers_are_exact_while_every_value_has_its_bucket(values, fractions):
    values = np.array(values, np.int64)
    expected = np.quantile(values, fractions, method="inverted_cdf")
    quantiles = Histogram.of_integers(values).quantiles(fractions)
    assert quantiles.dtype == np.int64
    assert quantiles.tolist() == expected.tolist()


@given(FLOATS, FRACTIONS)
@settings(max_examples=150, deadline=None)
def test_quantiles_of_floats_are_exact_while_every_value_has_its_bucket(values, fractions):
    expected = np.quantile(values, fractions, method="inverted_cdf")
    assert Histogram.of_floats(np.array(values)).quantiles(fractions).tolist() == expected.tolist()


@given(FLOATS, FRACTIONS, st.integers(2, 5))
@settings(max_examples=150, deadline=None)
def test_coarse_quantiles_are_never_below_the_exact_ones_and_in_their_bucket(values, fractions, max_buckets):
    histogram = Histogram.of_floats(np.array(values), max_buckets)
    exact = np.quantile(values, fractions, method="inverted_cdf")
    quantiles = histogram.quantiles(fractions)
    assert np.isfinite(quantiles).all()
    assert (quantiles >= exact).all()
    for low, high in zip(exact, quantiles, strict=True):
        assert len(np.unique(Histogram.of_floats([low, high]).buckets >> histogram.shift)) == 1
    # What lies above the exact value and up to the answer is in the bucket of both: no other value.
    for low, high, fraction in zip(exact, quantiles, fractions, strict=True):
        assert np.mean(np.array(values) <= high) >= fraction
        bucket = [part.buckets >> (histogram.shift - part.shift) for part in map(Histogram.of_floats, ([low], [high]))]
        assert bucket[0].tolist() == bucket[1].tolist()


def test_quantile_error_of_many_floats_is_the_stated_one():
    values = np.random.default_rng(1).lognormal(size=50_000)
    histogram = Histogram.of_floats(values, max_buckets=4096)
    fractions = np.linspace(0, 1, 101)
    error = histogram.quantiles(fractions) / np.quantile(values, fractions, method="inverted_cdf") - 1
    bound = 2.0 ** (histogram.shift - 52)
    assert bound < 0.02
    assert (error >= 0).all()
    assert error.max() < bound


@pytest.mark.parametrize(("of", "dtype"), [(Histogram.of_integers, np.int64), (Histogram.of_floats, np.float64)])
def test_counts_stand_for_repeated_values(of, dtype):
    values, counts = np.array([5, -2, 5, 9], dtype), np.array([3, 1, 2, 1])
    assert of(values, 2, counts).to_dict() == of(np.repeat(values, counts), 2).to_dict()


def test_share_up_to_is_the_empirical_distribution():
    histogram = Histogram.of_floats(np.array([1.0, 2.0, 2.0, 5.0]))
    assert histogram.share_up_to(np.array([0.9, 1.0, 2.5, 5.0, 9.0])).tolist() == [0, 0.25, 0.75, 1, 1]


def test_floats_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"finite values. Received: 2 others of 3"):
        Histogram.of_floats(np.array([1.0, np.nan, np.inf]))


def test_quantiles_of_nothing_are_refused():
    empty = Histogram.of_integers(np.array([], np.int64))
    assert empty.count == 0
    for ask in (empty.quantiles, empty.cut_offs):
        with pytest.raises(ValueError, match="needs values"):
            ask([0.5])


def test_histograms_of_two_kinds_do_not_merge():
    with pytest.raises(ValueError, match=r"one kind .* Received: int64, 65536 and float64, 65536"):
        Histogram.of_integers(np.arange(3)).merge(Histogram.of_floats(np.arange(3.0)))


# --- Distinct values -------------------------------------------------------------------------------------------------


def test_few_distinct_values_are_counted_exactly():
    values = pa.array(["a", "b", None, "a", "", "c"])
    assert DistinctSketch.of(values).estimate == 4  # "" is a value, null is none.
    assert DistinctSketch.of(pa.array(range(4095))).estimate == 4095


def test_integers_and_their_text_are_the_same_values():
    both = DistinctSketch.of(pa.array([1, 2, 3])).merge(DistinctSketch.of(pa.array(["3", "4"])))
    assert both.estimate == 4


def test_estimates_have_the_stated_error_and_no_bias():
    # 200 disjoint sets of 2,000 values at size 102: relative standard error 1 / sqrt(100) = 10 %.
    sketches = [DistinctSketch.of(pa.array(range(start, start + 2000)), 102) for start in range(0, 400_000, 2000)]
    errors = np.array([sketch.estimate for sketch in sketches]) / 2000 - 1
    assert abs(errors.mean()) < 5 * 0.1 / np.sqrt(200)
    # The standard deviation of 200 normal draws has a relative standard error of 5 %; 97.5 % of 10 % at 2,000 values.
    assert 0.08 < errors.std() < 0.12


@given(st.lists(st.lists(st.integers(0, 60), max_size=40), min_size=1, max_size=5), st.data())
@settings(max_examples=50, deadline=None)
def test_merged_sketches_are_the_sketch_of_all_values(parts, data):
    sketches = [DistinctSketch.of(pa.array(part, pa.int64()), 16) for part in parts]
    whole = DistinctSketch.of(pa.array(list(itertools.chain(*parts)), pa.int64()), 16)
    order = data.draw(st.permutations(sketches))
    assert merged(sketches).to_dict() == merged(order).to_dict() == whole.to_dict()


def test_known_hashes_give_the_same_sketch():
    values = pa.array(["u1", "u2", "u1"])
    assert DistinctSketch.of_hashes(hash_keys(values)).to_dict() == DistinctSketch.of(values).to_dict()


def test_sketches_of_two_sizes_do_not_merge():
    values = pa.array([1, 2])
    with pytest.raises(ValueError, match=r"one size. Received: 8 and 9"):
        DistinctSketch.of(values, 8).merge(DistinctSketch.of(values, 9))


# --- Top values ------------------------------------------------------------------------------------------------------


def test_top_values_by_hand():
    # Counts a 3, b 2, c 2, d 1 with room for two: the third largest, 2, is subtracted from all.
    top = TopValues.of(pa.array(["a", "b", "c", "a", None, "d", "c", "b", "a"]), limit=2)
    assert top.most_common(5) == [("a", 1)]
    assert top.error == 2


def test_most_common_values_come_by_count_and_then_by_text():
    top = TopValues.of(pa.array(["b", "é", "a", "Z", "é", "10", "9"]), limit=10)
    assert top.most_common(4) == [("é", 2), ("10", 1), ("9", 1), ("Z", 1)]
    assert top.most_common(0) == []


VALUES = st.lists(st.sampled_from("abcdefgh"), max_size=30)


@given(st.lists(VALUES, min_size=1, max_size=5), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_counts_are_within_the_error_whatever_is_merged(parts, limit):
    top = merged(TopValues.of(pa.array(part, pa.string()), limit) for part in parts)
    exact, kept = Counter(itertools.chain(*parts)), dict(top.most_common(limit))
    assert len(kept) == top.table.num_rows <= limit
    for value in "abcdefgh":
        assert kept.get(value, 0) <= exact[value] <= kept.get(value, 0) + top.error
    assert top.error * (limit + 1) <= exact.total() - sum(kept.values())
    if len(exact) <= limit:
        assert kept == exact
        assert top.error == 0


@given(st.lists(VALUES, min_size=1, max_size=5), st.data())
@settings(max_examples=50, deadline=None)
def test_exact_counts_do_not_depend_on_the_order_of_merges(parts, data):
    tops = [TopValues.of(pa.array(part, pa.string()), 8) for part in parts]
    assert merged(tops).to_dict() == merged(data.draw(st.permutations(tops))).to_dict()


def test_weights_count_as_that_many_rows():
    weighted = TopValues.of_counts(pa.array([7, 8]), pa.array([3, 10**12]), limit=5)
    rows = TopValues.of(pa.chunked_array([["8", "7"], [None, "9", None]]), limit=5)
    assert weighted.merge(rows).most_common(5) == [("8", 10**12 + 1), ("7", 4), ("9", 1)]


def test_top_values_of_two_limits_do_not_merge():
    values = pa.array(["a"])
    with pytest.raises(ValueError, match=r"one limit. Received: 8 and 9"):
        TopValues.of(values, 8).merge(TopValues.of(values, 9))


# --- All of them -----------------------------------------------------------------------------------------------------

EXAMPLES = [
    Histogram.of_integers(np.array([-3, 5, 5, 9])),
    Histogram.of_floats(np.linspace(-1, 1, 50), max_buckets=8),
    DistinctSketch.of(pa.array(range(100)), 16),
    TopValues.of(pa.array(["a", "b", "a", "c"]), 2),
    TopValues.of(pa.array([], pa.string()), 2),
    DistinctSketch.of(pa.array([], pa.string())),
]


@pytest.mark.parametrize("sketch", EXAMPLES, ids=lambda sketch: type(sketch).__name__)
def test_sketches_survive_json_and_pickling(sketch):
    content = sketch.to_dict()
    assert type(sketch).from_dict(json.loads(json.dumps(content))).to_dict() == content
    assert pickle.loads(pickle.dumps(sketch)).to_dict() == content
    assert sketch.merge(type(sketch).from_dict(content)).to_dict() == sketch.merge(sketch).to_dict()
