"""Rows that go through shuffle files: each partition comes back whole, in order, and nothing half-written is read."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.beam.shuffle_files import ShuffleFileWriter, read_partition, write_partitions


def table_of(numbers):
    texts = pa.array([f"t{number}" for number in numbers], pa.string())
    return pa.table({"number": pa.array(numbers, pa.int64()), "text": texts})


def numbers_of(paths, partition):
    return [number for table in read_partition(paths, partition) for number in table.column("number").to_pylist()]


@given(st.lists(st.integers(0, 4), max_size=40), st.integers(5, 7))
@settings(max_examples=60, deadline=None)
def test_a_partition_holds_its_rows_in_their_order(tmp_path_factory, partitions, num_partitions):
    path = str(tmp_path_factory.mktemp("shuffle") / "rows.arrow")
    write_partitions(path, table_of(range(len(partitions))), np.array(partitions, np.int64), num_partitions)
    for partition in range(num_partitions):
        expected = [row for row, own in enumerate(partitions) if own == partition]
        [table] = read_partition([path], partition)
        assert table.to_pylist() == table_of(expected).to_pylist()


def test_an_empty_partition_keeps_the_types(tmp_path):
    path = str(tmp_path / "rows.arrow")
    write_partitions(path, table_of([7]), np.array([0]), 2)
    [empty] = read_partition([path], 1)
    assert (empty.num_rows, empty.schema) == (0, table_of([]).schema)


def test_a_writer_flushes_what_has_come_together_and_loses_nothing(tmp_path):
    writer = ShuffleFileWriter(tmp_path, num_partitions=2, flush_bytes=table_of([1, 2, 3]).nbytes * 2)
    written = []
    for start in range(0, 15, 3):
        written += writer.add(table_of(range(start, start + 3)), np.arange(start, start + 3) % 2)
    assert len(written) == 2  # Every second table makes a file.
    written += writer.flush()
    assert len(written) == 3
    assert writer.flush() == []
    assert sorted(numbers_of(written, 0)) == list(range(0, 15, 2))
    assert sorted(numbers_of(written, 1)) == list(range(1, 15, 2))
    assert {str(path) for path in tmp_path.iterdir()} == set(written)


def test_a_writer_that_fails_leaves_no_file_under_its_name(tmp_path):
    path = tmp_path / "rows.arrow"
    with pytest.raises(IndexError):
        write_partitions(str(path), table_of([1]), np.array([0, 5]), 2)  # Two partitions for one row.
    assert not path.exists()
