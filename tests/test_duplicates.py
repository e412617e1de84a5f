"""Events that a log holds twice: what the rule of the spec makes of them, and that they are counted."""

from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shop import build, events, lines_of, refused, write_shop

from clsd_tf.data.hashing import hash_keys
from clsd_tf.spec.feature_spec import parse_spec
from clsd_tf.storage.dataset_dir import SPLITS
from pipelines.rows.duplicates import without_duplicates


def table_of(rows):
    """(user, item, time) of each event; row ids from 0."""
    users, items, times = (pa.array(column) for column in zip(*rows, strict=True))
    columns = {"user_id": users, "item_id": items, "time": times, "user_hash": pa.array(hash_keys(users))}
    return pa.table({**columns, "row_id": pa.array(range(len(rows)), pa.int64())})


@pytest.fixture
def spec_with(shop_content):
    return lambda rule: parse_spec({**shop_content, "duplicates": rule}, "shop")


EVENTS = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xy"), st.integers(0, 2)), min_size=1, max_size=25)


@given(rows=EVENTS, data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_first_of_each_user_item_and_time_stays_whatever_the_order(shop_spec, rows, data):
    order = data.draw(st.permutations(range(len(rows))))
    kept, counts = without_duplicates(table_of(rows).take(order), shop_spec)
    expected = {rows.index(row) for row in rows}
    assert set(kept.column("row_id").to_pylist()) == expected
    dropped = len(rows) - len(expected)
    assert counts == (Counter(duplicates=dropped, duplicates_dropped=dropped) if dropped else Counter())


def test_all_stay_and_are_counted_where_the_spec_says_so(spec_with):
    kept, counts = without_duplicates(table_of([("a", "x", 1), ("a", "x", 1), ("a", "y", 1)]), spec_with("keep_all"))
    assert (kept.num_rows, counts) == (3, Counter(duplicates=1))


def twice(line):
    """The shop's events with one of them again at the end, and its log line number."""
    rows = events()
    return [*rows, rows[line - 2]]


def test_a_dataset_holds_a_repeated_event_once_and_says_so(shop_spec, tmp_path):
    dataset = build(shop_spec, write_shop(tmp_path / "raw", twice(50)), tmp_path / "dataset")
    assert sorted(line for split in SPLITS for line in lines_of(dataset, split)) == list(range(2, 202))
    assert dataset.counts["duplicates"] == 1
    assert dataset.counts["accounting"] == {
        "read": 201,
        "written": 200,
        "dead_lettered": 0,
        "duplicates_dropped": 1,
        "left_out": 0,
    }


def test_a_repeated_event_fails_the_build_by_its_rows_where_the_spec_says_so(spec_with, tmp_path):
    message = refused(spec_with("fail"), write_shop(tmp_path / "raw", twice(50)), tmp_path)
    assert "a key of tables.log must be unique" in message
    assert "row 50 of log.csv and row 202 of log.csv with the same user_id, item_id and event time (1 such" in message


def test_other_rules_are_refused(shop_content):
    with pytest.raises(ValueError, match="duplicates"):
        parse_spec({**shop_content, "duplicates": "drop"}, "shop")
