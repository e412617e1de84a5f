"""Wire formats: batches <-> serialized tf.Example, for training records and for serving requests.

Whole batches are encoded with ``tf.io.encode_proto`` and decoded with ``tf.io.parse_example``; nothing handles one
example at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tensorflow as tf

from clsd_tf.data.columns import convert_column, decimals
from clsd_tf.spec.model_inputs import MISSING_INT64, ModelInputs, RawInput, RecordLayout
from clsd_tf.spec.record_fields import RECORD_FIELDS
from clsd_tf.spec.tables import Column

_LISTS = {
    tf.int64: ("int64_list", "Int64List"),
    tf.float32: ("float_list", "FloatList"),
    tf.string: ("bytes_list", "BytesList"),
}
_RAW_DTYPES = {"string": tf.string, "int64": tf.int64, "float": tf.float32}
_ROWS_PER_BATCH = 4096
_CELLS_PER_BATCH = 1 << 21  # Of a history that is padded to the longest of its batch: some 50 MB of strings.
_MISSING = {"string": "", "int64": MISSING_INT64, "float": float("nan")}


def encode_examples(features: Mapping[str, tf.Tensor | tf.RaggedTensor]) -> tf.Tensor:
    """Serializes a batch of tf.Examples.

    Args:
      features: int64, float32 or string tensors: [batch], [batch, n], or ragged [batch, any].

    Returns:
      Serialized tf.train.Example, string [batch]; features in name order.
    """
    entries = [_encode_entry(name, features[name]) for name in sorted(features)]
    entries = tf.stack(entries, axis=1)  # [batch, num_features]
    packed = _encode("Features", "feature", entries)
    return _encode("Example", "features", packed[:, tf.newaxis])


def _encode_entry(name: str, values: tf.Tensor | tf.RaggedTensor) -> tf.Tensor:
    """One map entry {name: Feature(values)} per row, string [batch]."""
    field, message = _LISTS[values.dtype]
    if isinstance(values, tf.RaggedTensor):
        sizes = tf.cast(values.row_lengths(), tf.int32)[:, tf.newaxis]
        values = values.to_tensor()
    else:
        values = values[:, tf.newaxis] if values.shape.rank == 1 else values
        sizes = tf.fill([tf.shape(values)[0], 1], tf.shape(values)[1])
    value_list = _encode(message, "value", values, sizes)
    feature = _encode("Feature", field, value_list[:, tf.newaxis])
    key = tf.fill([tf.shape(feature)[0], 1], name)
    return tf.io.encode_proto(
        sizes=tf.ones([tf.shape(feature)[0], 2], tf.int32),
        values=[key, feature[:, tf.newaxis]],
        field_names=["key", "value"],
        message_type="tensorflow.Features.FeatureEntry",
    )


def _encode(message: str, field: str, values: tf.Tensor, sizes: tf.Tensor | None = None) -> tf.Tensor:
    """Encodes ``values`` [batch, n] as the repeated or single ``field`` of ``message``."""
    if sizes is None:
        sizes = tf.fill([tf.shape(values)[0], 1], tf.shape(values)[1])
    return tf.io.encode_proto(sizes=sizes, values=[values], field_names=[field], message_type=f"tensorflow.{message}")


def record_tensors(
    features: Mapping[str, tf.Tensor | np.ndarray], inputs: ModelInputs, layout: RecordLayout
) -> dict[str, tf.Tensor]:
    """Lays out training records, ready for ``encode_examples``.

    Args:
      features: by name: model inputs, user groups and record fields, [batch] or [batch, num_ids].
      inputs: names and sizes.
      layout: ``named`` keeps one entry per name. ``packed`` puts all integers into ``ids`` [batch, num_ids] and all
        floats into ``numbers`` [batch, num_numbers], in the order of ``packed_columns``: encoded several times, and
        parsed three times as fast.

    Returns:
      int64 and float32 tensors by entry of the record.
    """
    ids, numbers = packed_columns(inputs)
    typed = {name: tf.cast(features[name], tf.int64) for name in ids}
    typed |= {name: tf.cast(features[name], tf.float32) for name in numbers}
    if layout == "named":
        return typed
    return {"ids": _side_by_side(typed, ids), "numbers": _side_by_side(typed, numbers)}


def packed_columns(inputs: ModelInputs) -> tuple[dict[str, int | None], dict[str, int | None]]:
    """Lists the columns of a record.

    Args:
      inputs: names and sizes.

    Returns:
      (integers, floats): name -> number of values per row, None for a single one; record fields come last.
    """
    integers, floats = ([field.name for field in RECORD_FIELDS if field.dtype == dtype] for dtype in ("int64", "float"))
    ids = {entry.name: entry.num_ids for entry in inputs.categorical}
    ids |= dict.fromkeys([*(group.name for group in inputs.groups), *integers])
    return ids, dict.fromkeys([*inputs.numeric, *floats])


def _side_by_side(features: Mapping[str, tf.Tensor], widths: Mapping[str, int | None]) -> tf.Tensor:
    return tf.concat([tf.reshape(features[name], [-1, width or 1]) for name, width in widths.items()], axis=1)


def parse_records(serialized: tf.Tensor, inputs: ModelInputs, layout: RecordLayout) -> dict[str, tf.Tensor]:
    """Parses training records.

    Args:
      serialized: string [batch].
      inputs: as they were when the records were written.
      layout: likewise.

    Returns:
      Model inputs, user groups and record fields by name: int64 [batch] or [batch, num_ids], float32 [batch].
    """
    ids, numbers = packed_columns(inputs)
    if layout == "named":
        spec = {name: _fixed(width, tf.int64) for name, width in ids.items()}
        return tf.io.parse_example(serialized, spec | {name: _fixed(None, tf.float32) for name in numbers})
    spec = {"ids": _fixed(_total(ids), tf.int64), "numbers": _fixed(_total(numbers), tf.float32)}
    return unpacked(tf.io.parse_example(serialized, spec), inputs)


def unpacked(packed: Mapping[str, tf.Tensor], inputs: ModelInputs) -> dict[str, tf.Tensor]:
    """Takes packed records apart.

    Args:
      packed: ``ids`` and ``numbers``, as ``record_tensors`` gives them.
      inputs: names and sizes.

    Returns:
      As ``parse_records``.
    """
    ids, numbers = packed_columns(inputs)
    return _apart(packed["ids"], ids) | _apart(packed["numbers"], numbers)


def parsed_bytes_per_row(inputs: ModelInputs) -> int:
    """Returns the memory of a training record of ``inputs`` once it is parsed: 8 bytes an integer, 4 a float."""
    ids, numbers = packed_columns(inputs)
    return tf.int64.size * _total(ids) + tf.float32.size * _total(numbers)


def _total(widths: Mapping[str, int | None]) -> int:
    return sum(width or 1 for width in widths.values())


def _fixed(width: int | None, dtype: tf.DType) -> tf.io.FixedLenFeature:
    return tf.io.FixedLenFeature([] if width is None else [width], dtype)


def _apart(packed: tf.Tensor, widths: Mapping[str, int | None]) -> dict[str, tf.Tensor]:
    parts = tf.split(packed, [width or 1 for width in widths.values()], axis=1)
    return {
        name: part[:, 0] if width is None else part for (name, width), part in zip(widths.items(), parts, strict=True)
    }


def parse_raw_examples(serialized: tf.Tensor, raw_inputs: Sequence[RawInput]) -> dict[str, tf.Tensor | tf.RaggedTensor]:
    """Parses serving requests: tf.Examples of raw values.

    A feature that is absent or empty takes its missing value; of several values of a scalar the first counts.

    Args:
      serialized: string [batch].
      raw_inputs: names and dtypes.

    Returns:
      The transform's raw tensors by name, [batch]. Histories are ragged, [batch, any]: padded to the longest, one
      request could take the memory of thousands.
    """
    # Ragged throughout: a fixed-length feature without a value fails the request, and with it its whole batch.
    spec = {
        entry.name: tf.io.RaggedFeature(_RAW_DTYPES[entry.dtype], row_splits_dtype=tf.int64) for entry in raw_inputs
    }
    parsed = tf.io.parse_example(serialized, spec)
    return {
        entry.name: parsed[entry.name] if entry.is_list else _first_or_missing(parsed[entry.name], entry)
        for entry in raw_inputs
    }


def _first_or_missing(values: tf.RaggedTensor, entry: RawInput) -> tf.Tensor:
    # Slicing and padding the ragged tensor would say the same in three times as many ops.
    starts, ends = values.row_splits[:-1], values.row_splits[1:]
    missing = tf.constant([_MISSING[entry.dtype]], _RAW_DTYPES[entry.dtype])
    or_missing = tf.concat([values.values, missing], axis=0)
    return tf.gather(or_missing, tf.where(starts < ends, starts, tf.size(values.values, tf.int64)))


def is_missing(values: tf.Tensor) -> tf.Tensor:
    """Returns True where a raw value of a scalar input is not known, in the shape of ``values``."""
    if values.dtype == tf.string:
        return values == ""
    return values == MISSING_INT64 if values.dtype == tf.int64 else tf.math.is_nan(values)


def encode_raw_rows(rows: pa.Table, raw_inputs: Sequence[RawInput]) -> list[bytes]:
    """Serializes serving requests: one tf.Example a row; a missing value is a feature without a value.

    Args:
      rows: one typed column per raw input; ``list<string>`` for histories.
      raw_inputs: names and dtypes.

    Returns:
      Serialized tf.train.Example, one per row.
    """
    encode = _raw_encoder(tuple(raw_inputs))
    serialized: list[bytes] = []
    for start in range(0, rows.num_rows, _ROWS_PER_BATCH):
        for batch in bounded_batches(rows.slice(start, _ROWS_PER_BATCH), raw_inputs):
            serialized += encode(**{entry.name: _ragged(batch, entry) for entry in raw_inputs}).numpy().tolist()
    return serialized


def bounded_batches(rows: pa.Table, raw_inputs: Sequence[RawInput]) -> Iterator[pa.Table]:
    """Cuts rows so that a history of 200,000 entries costs its own length, not that of all rows of its batch.

    Args:
      rows: as for ``arrow_to_tensors``.
      raw_inputs: names and dtypes.

    Yields:
      The rows in their order, in batches of at most two million rows x longest history; or of one row.
    """
    longest = max((_longest(rows.column(entry.name)) for entry in raw_inputs if entry.is_list), default=0)
    half = rows.num_rows // 2
    if half and rows.num_rows * longest > _CELLS_PER_BATCH:
        yield from bounded_batches(rows.slice(0, half), raw_inputs)
        yield from bounded_batches(rows.slice(half), raw_inputs)
    else:
        yield rows


def _longest(lists: pa.ChunkedArray) -> int:
    return pc.max(pc.list_value_length(lists)).as_py() or 0


@functools.lru_cache(maxsize=64)
def _raw_encoder(raw_inputs: tuple[RawInput, ...]) -> Callable[..., tf.Tensor]:
    """Values of each row -> serialized tf.Examples, as one graph: op by op, a request of few rows takes 40 ms."""

    def encode(**raw: tf.RaggedTensor) -> tf.Tensor:
        return encode_examples(raw)

    specs = {entry.name: tf.RaggedTensorSpec([None, None], _RAW_DTYPES[entry.dtype]) for entry in raw_inputs}
    return tf.function(encode, autograph=False).get_concrete_function(**specs)


def _ragged(rows: pa.Table, entry: RawInput) -> tf.RaggedTensor:
    """The values of each row that are not missing, [batch, any]."""
    values, row_of_value = rows.column(entry.name).combine_chunks(), np.arange(rows.num_rows)
    if entry.is_list:
        row_of_value = np.repeat(row_of_value, pc.fill_null(pc.list_value_length(values), 0))
        values = pc.list_flatten(values)
    is_missing = pc.is_nan(values) if entry.dtype == "float" else pc.equal(values, _MISSING[entry.dtype])
    present = pc.invert(pc.fill_null(is_missing, True))
    lengths = np.bincount(row_of_value[present.to_numpy(zero_copy_only=False)], minlength=rows.num_rows)
    splits = np.concatenate([[0], np.cumsum(lengths)])
    return tf.RaggedTensor.from_row_splits(_flat_tensor(values.filter(present), entry.dtype), splits, validate=False)


def raw_tensor_specs(raw_inputs: Sequence[RawInput]) -> dict[str, tf.TensorSpec]:
    """Describes the transform's raw tensors.

    Args:
      raw_inputs: names and dtypes.

    Returns:
      Name -> spec: [batch], and [batch, any] for histories.
    """
    return {
        entry.name: tf.TensorSpec([None, None] if entry.is_list else [None], _RAW_DTYPES[entry.dtype], entry.name)
        for entry in raw_inputs
    }


def tensors_to_arrow(tensors: Mapping[str, np.ndarray], raw_inputs: Sequence[RawInput]) -> pa.Table:
    """Turns the transform's raw tensors into columns as ``request_files.typed_rows`` gives them.

    Strings that are no UTF-8 get replacement characters, and so are still no known value; histories lose their padding.
    Numbers beyond what datasets hold (10^18 and more, infinity) become null.

    Args:
      tensors: [batch] each, and [batch, any] for histories; may hold more than the raw inputs.
      raw_inputs: names and dtypes.

    Returns:
      A column per raw input, null for missing values.
    """
    return pa.table({entry.name: _tensor_to_column(np.asarray(tensors[entry.name]), entry) for entry in raw_inputs})


def _tensor_to_column(values: np.ndarray, entry: RawInput) -> pa.Array:
    if entry.is_list:
        rows = [[_text(value) for value in row if value] for row in values.tolist()]
        return pa.array(rows, pa.list_(pa.string()))
    if entry.dtype == "string":
        return pa.array([_text(value) if value else None for value in values.tolist()], pa.string())
    numbers = decimals(values) if entry.dtype == "float" else values
    is_missing = np.isnan(numbers) if entry.dtype == "float" else numbers == MISSING_INT64
    converted, _ = convert_column(pa.array(numbers, mask=is_missing), Column(name=entry.name, type=entry.dtype))
    return converted


def _text(value: bytes) -> str:
    return value.decode("utf-8", errors="replace")


def arrow_to_tensors(table: pa.Table, raw_inputs: Sequence[RawInput]) -> dict[str, tf.Tensor]:
    """Turns Arrow columns into the transform's raw tensors, nulls as missing values.

    Args:
      table: one column per raw input; ``list<string>`` for histories.
      raw_inputs: names and dtypes.

    Returns:
      Tensors of [batch], and [batch, longest] for histories.
    """
    return {entry.name: _column_to_tensor(table.column(entry.name), entry) for entry in raw_inputs}


def _column_to_tensor(column: pa.ChunkedArray, entry: RawInput) -> tf.Tensor:
    if entry.is_list:
        lists = column.combine_chunks()
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
        flat = _flat_tensor(pc.list_flatten(lists), entry.dtype)
        return tf.RaggedTensor.from_row_lengths(flat, lengths.astype(np.int64)).to_tensor("")
    return _flat_tensor(column, entry.dtype)


def _flat_tensor(values: pa.ChunkedArray | pa.Array, dtype: str) -> tf.Tensor:
    if dtype == "string":
        values = values.cast(pa.binary())
    filled = pc.fill_null(values, _MISSING[dtype])
    return tf.constant(filled.to_numpy(zero_copy_only=False), _RAW_DTYPES[dtype], shape=[len(values)])
