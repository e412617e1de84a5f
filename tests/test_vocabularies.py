"""Vocabularies: what is counted, how values are ranked, and that ids keep their meaning as vocabularies grow."""

import functools
import itertools
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from clsd_tf.data.transform import FeatureTransform, VocabularyLookup
from clsd_tf.layers.embedding_config import EmbeddingConfig
from clsd_tf.layers.embeddings import FieldEmbeddings
from clsd_tf.spec.feature_spec import parse_spec
from clsd_tf.spec.id_features import Vocabulary
from clsd_tf.spec.model_inputs import Statistics
from clsd_tf.spec.validation import SpecError
from clsd_tf.statistics.sketches import TopValues
from clsd_tf.storage.dataset_dir import DatasetDir, DatasetLayout
from pipelines.rows.vocabularies import VocabularyCounts, check_compatible, rank

COLUMNS = {"user_id": pa.string(), "item_id": pa.int64(), "tags": pa.string(), "sample_weight": pa.float64()}
CONTENT = {
    "name": "feed",
    "tables": {
        "log": {
            "path": "log.csv",
            "format": "csv",
            "columns": [
                {"name": "user_id", "type": "string"},
                {"name": "item_id", "type": "int64"},
                {"name": "tags", "type": "string"},
                {"name": "age", "type": "float"},
                {"name": "time", "type": "int64"},
                {"name": "clicked", "type": "int64"},
            ],
        }
    },
    "user_key": "user_id",
    "item_key": "item_id",
    "event_time": {"column": "time", "unit": "seconds"},
    "label": "clicked == 1",
    "features": [
        {"name": "item", "type": "categorical", "column": "item_id"},
        {"name": "tags", "type": "multi_valued", "column": "tags", "separator": "|"},
        {"name": "user", "type": "categorical", "column": "user_id", "vocabulary": {"weighted": True}},
        {"name": "hashed", "type": "categorical", "column": "user_id", "hash_buckets": 9},
        {"name": "age", "type": "numeric", "column": "age", "scaling": "quantile_buckets", "num_buckets": 4},
        {"name": "past_items", "type": "history", "of": "item", "max_length": 3},
    ],
    "user_groups": [{"name": "age_group", "column": "age", "boundaries": [30]}],
}
SPEC = parse_spec(CONTENT, "feed")


def changed(path, value):
    content = json.loads(json.dumps(CONTENT))
    *parents, last = path
    node = content
    for part in parents:
        node = node[part]
    node[last] = value
    return parse_spec(content, "feed")


def ranked(counts, spec, previous=None):
    """Vocabulary name -> its values in the order of their ids."""
    return {
        name: rank(counts.values[name], rule, (previous or {}).get(name, ()))
        for name, rule in spec.vocabularies.items()
    }


def log(**columns):
    """Training rows of the given raw columns; the other columns are missing, weights 1."""
    size = len(next(iter(columns.values())))
    columns = {"sample_weight": [1.0] * size, **columns}
    return pa.table({name: pa.array(columns.get(name, [None] * size), kind) for name, kind in COLUMNS.items()})


def counts_of(table, name, spec=SPEC):
    counted = VocabularyCounts.of(table, spec).values[name]
    return dict(counted.most_common(counted.table.num_rows))


def top(counts, limit=1000):
    return TopValues.of_counts(pa.array(list(counts), pa.string()), pa.array(list(counts.values()), pa.int64()), limit)


# --- Counting --------------------------------------------------------------------------------------------------------


def test_integers_are_counted_by_their_decimal_text_and_missing_ones_are_not():
    assert counts_of(log(item_id=[7, -3, 7, None, 10, 7]), "item") == {"7": 3, "-3": 1, "10": 1}


def test_every_part_of_a_multi_valued_text_counts_except_empty_ones():
    assert counts_of(log(tags=["a|b", "b||b|", None, "", "a|b", "|"]), "tags") == {"a": 2, "b": 4}


def test_values_with_line_breaks_are_not_counted():
    table = log(user_id=["a\nb", "a", "a\r", "\n", "a b"], tags=["a|b\nc", "c\r|c", "c", None, None])
    assert counts_of(table, "user").keys() == {"a", "a b"}
    assert counts_of(table, "tags") == {"a": 1, "c": 2}


def test_a_weighted_vocabulary_counts_millionths_of_weight():
    table = log(user_id=["a", "b", "a", "c", "d"], sample_weight=[0.1, 2.0, 0.2, 0.0, 0.0000014])
    assert counts_of(table, "user") == {"a": 300_000, "b": 2_000_000, "d": 1}


def test_hashed_features_and_numbers_have_no_counts():
    assert VocabularyCounts.of(log(user_id=["a"]), SPEC).values.keys() == {"item", "tags", "user"}


VALUES = st.sampled_from([None, "", "a", "b", "ü", "a\n", "\r", " ", "a|b", "|", "b|a|a", "A"])
ROWS = st.lists(
    st.tuples(
        VALUES,
        st.one_of(st.none(), st.integers(-2, 3)),
        VALUES,
        st.floats(0, 100, width=32),
    ),
    max_size=30,
)


def naive_counts(rows):
    """The three vocabularies of the spec, one row and one value at a time."""
    users, items, tags = Counter(), Counter(), Counter()
    for user, item, tag_text, weight in rows:
        if user and not set(user) & {"\n", "\r"} and round(weight * 1e6):
            users[user] += round(weight * 1e6)
        if item is not None:
            items[str(item)] += 1
        for tag in (tag_text or "").split("|"):
            if tag and not set(tag) & {"\n", "\r"}:
                tags[tag] += 1
    return {"user": users, "item": items, "tags": tags}


@given(ROWS, st.lists(st.integers(0, 30), max_size=6))
@settings(max_examples=60, deadline=None)
def test_counts_equal_a_naive_loop_however_the_rows_are_divided(rows, cuts):
    columns = zip(*rows, strict=True) if rows else [()] * 4
    table = log(**dict(zip(COLUMNS, columns, strict=True)))
    edges = [0, *sorted(cuts), len(rows)]
    parts = [table.slice(low, max(0, high - low)) for low, high in itertools.pairwise(edges)]
    merged = VocabularyCounts.merge_all(VocabularyCounts.of(part, SPEC) for part in parts if part.num_rows or not rows)
    covered = [row for low, high in itertools.pairwise(edges) for row in rows[low : max(low, high)]]
    assert {name: dict(counts.most_common(99)) for name, counts in merged.values.items()} == naive_counts(covered)
    assert merged.errors(SPEC) == {"item": 0, "tags": 0, "user": 0}


def test_parts_are_merged_in_their_order_and_by_twos():
    # With an error the result depends on the order, so that must be fixed: neighbours first, what is left last.
    spec = changed(("features", 0, "vocabulary"), {"max_tracked": 8})
    random = np.random.default_rng(0)
    parts = [VocabularyCounts.of(log(item_id=random.geometric(0.1, 80)), spec) for _ in range(7)]
    first = parts[0].merge(parts[1]).merge(parts[2].merge(parts[3]))
    expected = first.merge(parts[4].merge(parts[5]).merge(parts[6])).values["item"]
    merged = VocabularyCounts.merge_all(iter(parts)).values["item"]
    assert merged.table.equals(expected.table)
    assert merged.error == expected.error > 0
    one_by_one = functools.reduce(VocabularyCounts.merge, parts).values["item"]
    assert one_by_one.to_dict() != merged.to_dict()


def test_beyond_max_tracked_the_frequent_values_are_found_and_the_error_is_known():
    spec = changed(("features", 0, "vocabulary"), {"max_tracked": 50})
    random = np.random.default_rng(0)
    items = random.permutation(np.concatenate([np.repeat(np.arange(10), 500), np.arange(100, 5100)]))
    parts = [VocabularyCounts.of(log(item_id=part), spec) for part in np.array_split(items, 7)]
    merged = VocabularyCounts.merge_all(parts)
    error = merged.errors(spec)["item"]
    assert 0 < error <= len(items) / 51
    assert set(ranked(merged, spec)["item"][:10]) == set(map(str, range(10)))
    assert all(500 - error <= count <= 500 for _, count in merged.values["item"].most_common(10))


def test_the_error_of_a_weighted_vocabulary_is_in_weight():
    spec = changed(("features", 2, "vocabulary"), {"weighted": True, "max_tracked": 1})
    # 3.0 and 0.5: the second largest sum is subtracted from all.
    counts = VocabularyCounts.of(log(user_id=["a", "b"], sample_weight=[3.0, 0.5]), spec)
    assert counts.errors(spec)["user"] == 0.5
    assert ranked(counts, spec)["user"] == ["a"]


# --- Ranking ---------------------------------------------------------------------------------------------------------


def test_values_are_ranked_by_falling_count_and_ties_by_text():
    counts = top({"b": 2, "10": 2, "9": 2, "ü": 5, "Z": 2, "rare": 1})
    assert rank(counts, Vocabulary()) == ["ü", "10", "9", "Z", "b", "rare"]
    assert rank(counts, Vocabulary(min_count=2, max_size=3)) == ["ü", "10", "9"]


def test_min_count_of_a_weighted_vocabulary_is_a_sum_of_weights():
    counts = top({"a": 2_000_000, "b": 1_999_999, "c": 7_500_000})
    assert rank(counts, Vocabulary(weighted=True, min_count=2)) == ["c", "a"]


def test_previous_values_keep_their_places_and_new_ones_follow():
    counts = top({"new": 9, "old": 1, "newer": 9, "rare": 1})
    assert rank(counts, Vocabulary(min_count=2), ["gone", "old"]) == ["gone", "old", "new", "newer"]


@pytest.mark.parametrize(("max_size", "expected"), [(1, ["x", "y"]), (2, ["x", "y"]), (3, ["x", "y", "b"])])
def test_max_size_bounds_new_values_and_drops_no_previous_one(max_size, expected):
    assert rank(top({"a": 1, "b": 2, "x": 1}), Vocabulary(max_size=max_size), ["x", "y"]) == expected


DAYS = st.lists(
    st.dictionaries(st.sampled_from([*"abcdefghij", "ü", "1", "01", " "]), st.integers(1, 5)), min_size=1, max_size=6
)


@given(DAYS, st.integers(1, 3), st.one_of(st.none(), st.integers(1, 12)))
@settings(max_examples=150, deadline=None)
def test_no_value_ever_changes_its_id(days, min_count, max_size):
    rule = Vocabulary(min_count=min_count, max_size=max_size)
    vocabulary, places = [], {}
    for day in days:
        grown = rank(top(day), rule, vocabulary)
        assert grown[: len(vocabulary)] == vocabulary
        assert len(set(grown)) == len(grown)
        assert len(grown) <= max(max_size or len(grown), len(vocabulary))
        new = grown[len(vocabulary) :]
        assert new == sorted(new, key=lambda value: (-day[value], value))
        candidates = {value for value, count in day.items() if count >= min_count} - set(vocabulary)
        assert set(new) <= candidates
        if max_size is None or len(grown) < max_size:
            assert set(new) == candidates
        for place, value in enumerate(grown):
            assert places.setdefault(value, place) == place
        vocabulary = grown


# --- Growing from a dataset ------------------------------------------------------------------------------------------


@pytest.fixture
def dataset_of(tmp_path):
    """(spec, vocabularies) -> a dataset directory without records."""

    def write(spec, vocabularies):
        layout = DatasetLayout(tmp_path / "dataset")
        layout.vocabularies.mkdir(parents=True)
        for name, values in vocabularies.items():
            layout.vocabulary(name).write_bytes("".join(f"{value}\n" for value in values).encode())
        layout.spec.write_text(spec.to_json())
        layout.counts.write_text("{}")
        lengths = {name: len(values) for name, values in vocabularies.items()}
        layout.statistics.write_text(Statistics(lengths, {}).to_json())
        layout.mark_complete(spec)
        return DatasetDir(layout.root)

    return write


ODD_VALUES = ["a b", " a", "a\x0bb", "\x0c", "\x85", "\u2028", "a\x1cb", "ü", "\x00", "\ufeffx"]


def test_previous_vocabularies_are_read_value_by_value(dataset_of):
    vocabularies = {"item": ["7", "-3"], "tags": ODD_VALUES, "user": []}
    dataset = dataset_of(SPEC, vocabularies)
    assert {name: dataset.layout.vocabulary_values(name) for name in vocabularies} == vocabularies
    # TensorFlow reads the file line by line, too: 0 missing, 1 out of vocabulary.
    ids = VocabularyLookup(dataset.layout.vocabulary("tags"), 1)(tf.constant(ODD_VALUES)).numpy()
    assert ids.tolist() == list(range(2, 2 + len(ODD_VALUES)))


def test_features_may_come_and_go(dataset_of):
    dataset = dataset_of(SPEC, {"item": ["7"], "tags": [], "user": ["u"]})
    spec = changed(("features", 2, "name"), "viewer")
    check_compatible(spec, dataset.spec)
    previous = {name: dataset.layout.vocabulary_values(name) for name in spec.vocabularies}
    assert previous == {"item": ["7"], "tags": [], "viewer": []}
    grown = ranked(VocabularyCounts.of(log(item_id=[1, 7], user_id=["u", "v"]), spec), spec, previous)
    assert grown == {"item": ["7", "1"], "tags": [], "viewer": ["u", "v"]}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("features", 0, "vocabulary"), {"num_oov_indices": 2}, "item.vocabulary.num_oov_indices. Received: 2. Allow"),
        (("features", 0, "column"), "user_id", "item.column. Received: 'user_id'. Allowed: 'item_id'"),
        (("features", 1, "separator"), ",", "tags.separator. Received: ','. Allowed: '|'"),
        (("features", 3, "hash_buckets"), 10, "hashed.hash. Received: {'buckets': 10, "),
        (("features", 3, "hash_buckets"), None, "hashed.hash. Received: None. Allowed: {'buckets': 9, "),
        (("features", 4, "num_buckets"), 5, "age.num_buckets. Received: 5. Allowed: 4"),
        (("features", 4, "scaling"), "none", "age.scaling. Received: 'none'. Allowed: 'quantile_buckets'"),
        (("features", 4, "log1p"), True, "age.log1p. Received: True. Allowed: False"),
        (("features", 5, "of"), "user", "past_items.of. Received: 'user'. Allowed: 'item'"),
        (("user_groups", 0, "boundaries"), [31], "age_group.boundaries. Received: (31.0,). Allowed: (30.0,)"),
    ],
)
def test_ids_that_would_change_their_meaning_are_refused(dataset_of, path, value, message):
    dataset = dataset_of(SPEC, {"item": ["7"], "tags": [], "user": ["u"]})
    with pytest.raises(SpecError, match="keeps the meaning of its ids") as error:
        check_compatible(changed(path, value), dataset.spec)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("features", 0, "vocabulary"), {"min_count": 9, "max_size": 5}),
        (("features", 1, "max_values"), 3),
        (("features", 5, "max_length"), 9),
        (("features", 3), {"name": "hashed", "type": "categorical", "column": "user_id", "hash": {"buckets": 9}}),
        (("label",), "clicked == 0"),
    ],
)
def test_what_leaves_ids_their_meaning_may_change(path, value):
    check_compatible(changed(path, value), SPEC)


def test_the_embeddings_of_one_day_are_the_first_rows_of_those_of_the_next(tmp_path):
    spec = changed(("features",), [CONTENT["features"][0], CONTENT["features"][5]])
    days = [log(item_id=[5, 5, 9, 2]), log(item_id=[2, 8, 8, 8, 9, 4])]
    first = ranked(VocabularyCounts.of(days[0], spec), spec)
    second = ranked(VocabularyCounts.of(days[1], spec), spec, first)
    assert (first["item"], second["item"]) == (["5", "2", "9"], ["5", "2", "9", "8", "4"])
    raw = {"item_id": tf.constant([5, 2, 9, -(2**63)], tf.int64), "past_items": tf.constant([["9", "2"]] * 4)}
    raw["age"] = tf.zeros([4])
    fields = []
    table = np.random.default_rng(0).normal(size=[7, 2])  # Missing, out of vocabulary and five values.
    for day, values in enumerate((first["item"], second["item"])):
        (tmp_path / str(day)).mkdir()
        (tmp_path / str(day) / "item.txt").write_text("".join(f"{value}\n" for value in values))
        statistics = Statistics({"item": len(values)}, {})
        features = FeatureTransform(spec, statistics, tmp_path / str(day))(raw)
        layer = FieldEmbeddings(spec.model_inputs(statistics.vocabulary_lengths), EmbeddingConfig(dim=2))
        layer(features)
        assert layer.get_weights()[0].shape == (2 + len(values), 2)
        layer.set_weights([table[: 2 + len(values)]])
        fields.append(layer(features).numpy())
    np.testing.assert_array_equal(fields[0], fields[1])
