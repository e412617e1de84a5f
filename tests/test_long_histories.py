"""Long histories cost their own length, not that of every row of their batch."""

import resource
import sys

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf

from clsd_tf.data.examples import bounded_batches, encode_raw_rows, parse_raw_examples, raw_tensor_specs
from clsd_tf.serving.servable import LocalServable
from clsd_tf.spec.model_inputs import RawInput

RAW_INPUTS = (RawInput("recent", "string", is_list=True), RawInput("user", "string"))
MAX_CELLS = 1 << 21


def rows(lengths):
    """A row for each length of its history; the user is the row's number."""
    offsets = np.cumsum([0, *lengths])
    entries = pa.array(["a"]).take(pa.array(np.zeros(offsets[-1], np.int64)))
    recent = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), entries)
    return pa.table({"recent": recent, "user": [str(row) for row in range(len(lengths))]})


def with_a_long_one(num_rows, place, length):
    lengths = np.full(num_rows, 3)
    lengths[place] = length
    return rows(lengths)


@pytest.mark.parametrize("place", [0, 2000, 4095])
def test_batches_keep_the_order_and_are_small_where_a_history_is_long(place):
    table = with_a_long_one(4096, place, 200_000)
    batches = list(bounded_batches(table, RAW_INPUTS))
    assert pa.concat_tables(batches).equals(table)
    longest = [max(map(len, batch["recent"].to_pylist())) for batch in batches]
    assert max(len(batch) * cells for batch, cells in zip(batches, longest, strict=True)) <= MAX_CELLS
    assert len(batches) < 20  # Rows that stand far from the long one stay together.


def test_a_row_alone_may_be_longer_and_rows_without_histories_stay_together():
    assert [len(batch) for batch in bounded_batches(rows([MAX_CELLS + 1, 1]), RAW_INPUTS)] == [1, 1]
    assert [len(batch) for batch in bounded_batches(rows([0] * 5000), RAW_INPUTS)] == [5000]
    assert [len(batch) for batch in bounded_batches(rows([1] * 5000).select(["user"]), RAW_INPUTS[1:])] == [5000]
    assert [len(batch) for batch in bounded_batches(rows([]), RAW_INPUTS)] == [0]


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_encoding_needs_memory_by_the_length_of_histories():
    table = with_a_long_one(1000, 500, 20_000)  # Padded together they are 20 million strings of 24 bytes.
    encode_raw_rows(table.slice(0, 10), RAW_INPUTS)
    before = peak_bytes()  # Of the process: a larger peak of another test can hide one here.
    serialized = encode_raw_rows(table, RAW_INPUTS)
    assert peak_bytes() - before < 200e6
    parsed = parse_raw_examples(tf.constant(serialized[499:502]), RAW_INPUTS)
    assert parsed["user"].numpy().tolist() == [b"499", b"500", b"501"]
    assert parsed["recent"].row_lengths().numpy().tolist() == [3, 20_000, 3]


class _CellsModel(tf.Module):
    """``ctr`` = how many cells the histories of a call take up, padding included."""

    def cells(self, recent, user):
        return {"ctr": tf.fill([tf.size(user)], tf.cast(tf.size(recent), tf.float32))}


def test_a_servable_is_never_called_with_more_cells(tmp_path):
    model = _CellsModel()
    signature = tf.function(model.cells, autograph=False).get_concrete_function(**raw_tensor_specs(RAW_INPUTS))
    tf.saved_model.save(model, str(tmp_path / "1"), signatures={"predict_raw": signature})
    cells = LocalServable(tmp_path).score(with_a_long_one(1000, 500, 20_000))
    assert cells.shape == (1000,)
    assert cells[:500].tolist() == [500 * 3] * 500  # Rows that stand far from the long one share a call.
    assert 20_000 <= cells.max() <= MAX_CELLS
