"""The one transform: raw column values -> ids and floats, in TensorFlow ops.

The Beam job calls it on batches, TFRecords hold its output, and the exported SavedModel contains the same graph, so
training and serving cannot disagree.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Collection, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tensorflow as tf

from clsd_tf.data.examples import arrow_to_tensors
from clsd_tf.spec.feature_base import SpecEntry
from clsd_tf.spec.feature_spec import FeatureSpec
from clsd_tf.spec.id_features import CategoricalFeature, Hashing, IdFeature, MultiValuedFeature
from clsd_tf.spec.model_inputs import MISSING_ID, MISSING_INT64, NumericStatistics, RawInput, Statistics
from clsd_tf.spec.number_features import NumberFeature
from clsd_tf.spec.past_features import HistoryFeature
from clsd_tf.spec.user_groups import UserGroup

Tensors = Mapping[str, tf.Tensor]


class _VocabularyFile(tf.lookup.TextFileInitializer):
    """A vocabulary file, value -> line number.

    TensorFlow names the table after the file's path, which would then stand in every exported model; this name is
    made of the contents instead.
    """

    def __init__(self, path: pathlib.Path):
        self._content_name = f"{path.stem}_{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
        index = tf.lookup.TextFileIndex
        super().__init__(str(path), tf.string, index.WHOLE_LINE, tf.int64, index.LINE_NUMBER)

    @property
    def _shared_name(self) -> str:
        return self._content_name


class VocabularyLookup(tf.Module):
    """Text -> id: 0 for "", then ``num_oov_indices`` hashed ids, then line number of the value in ``path``."""

    def __init__(self, path: pathlib.Path, num_oov_indices: int):
        super().__init__()
        self._num_oov_indices = num_oov_indices
        self._ranks = tf.lookup.StaticHashTable(_VocabularyFile(path), default_value=-1)

    def __call__(self, values: tf.Tensor) -> tf.Tensor:
        ranks = self._ranks.lookup(values)
        ids = tf.where(ranks >= 0, 1 + self._num_oov_indices + ranks, oov_ids(values, self._num_oov_indices))
        return tf.where(values == "", tf.cast(MISSING_ID, tf.int64), ids)


def oov_ids(values: tf.Tensor, num_oov_indices: int) -> tf.Tensor:
    """Hashes text that is in no vocabulary.

    Args:
      values: text of any shape.
      num_oov_indices: number of ids.

    Returns:
      int64 in [1, num_oov_indices], in the shape of ``values``.
    """
    return 1 + tf.strings.to_hash_bucket_fast(values, num_oov_indices)


class HashLookup(tf.Module):
    """Text of any shape -> ids in [1, buckets], 0 for "": one, or on a last axis the ``ids_per_value`` of the rule.

    Hash 0 of seed 0 is FarmHash64; the others are SipHash with the seed and their number as key. So ids are the same on
    every machine and in every process.
    """

    def __init__(self, rule: Hashing):
        super().__init__()
        self._rule = rule

    def __call__(self, values: tf.Tensor) -> tf.Tensor:
        missing, zero = values == "", tf.cast(MISSING_ID, tf.int64)
        if self._rule.method == "single":
            return tf.where(missing, zero, 1 + self._hash(values, self._rule.buckets))
        ids = tf.stack(self._several_ids(values), axis=-1)
        return tf.where(missing[..., tf.newaxis], zero, ids)

    def _several_ids(self, values: tf.Tensor) -> list[tf.Tensor]:
        rule = self._rule
        if rule.method == "multi":
            return [1 + self._hash(values, rule.buckets, index) for index in range(rule.num_hashes)]
        hashes = self._hash(values, rule.num_remainders * rule.num_quotients)
        return [1 + hashes % rule.num_remainders, 1 + rule.num_remainders + hashes // rule.num_remainders]

    def _hash(self, values: tf.Tensor, num_buckets: int, index: int = 0) -> tf.Tensor:
        if self._rule.seed == index == 0:
            return tf.strings.to_hash_bucket_fast(values, num_buckets)
        return tf.strings.to_hash_bucket_strong(values, num_buckets, key=[self._rule.seed, index])


class FeatureTransform(tf.Module):
    """Raw columns -> model inputs.

    Args:
      spec: the feature spec.
      statistics: fitted on the training split.
      vocabulary_dir: holds ``<feature>.txt``, one value a line, most frequent first.
    """

    def __init__(self, spec: FeatureSpec, statistics: Statistics, vocabulary_dir: pathlib.Path):
        super().__init__()
        self._statistics = statistics
        self._entries = {entry.name: entry for entry in spec.entries}
        features = spec.features_of(IdFeature)
        own = {feature.name: self._lookup(feature, vocabulary_dir) for feature in features if not feature.shares}
        self._lookups = {feature.name: own[spec.id_source(feature).name] for feature in features}

    def _lookup(self, feature: IdFeature, directory: pathlib.Path) -> tf.Module:
        if hashing := feature.resolved_hash:
            return HashLookup(hashing)
        rule = feature.resolved_vocabulary
        assert rule is not None, "an own feature has a hash or a vocabulary"
        return VocabularyLookup(directory / f"{feature.name}.txt", rule.num_oov_indices)

    def __call__(self, raw: Tensors, *, inputs: Collection[str] | None = None) -> dict[str, tf.Tensor]:
        """Transforms a batch.

        Args:
          raw: one tensor per ``spec.raw_inputs``: [batch], or for histories [batch, any], ragged or padded with "".
            Missing is "", NaN or MISSING_INT64.
          inputs: names of raw inputs: only what is made of them is transformed. All by default.

        Returns:
          int64 ids [batch] or [batch, num_ids], float32 numbers [batch], and int64 user-group ids [batch].
        """
        return {
            name: self._rows(entry, raw[entry.raw_name])
            for name, entry in self._entries.items()
            if inputs is None or entry.raw_name in inputs
        }

    def _rows(self, entry: SpecEntry, values: tf.Tensor) -> tf.Tensor:
        if entry.is_list:
            assert entry.values_per_row is not None, "rows of lists are of one length"
            return side_by_side(self.column(entry.name, last_values(values, entry.values_per_row)))
        return self.column(entry.name, values)

    def column(self, name: str, values: tf.Tensor) -> tf.Tensor:
        """Transforms the raw values of one feature or user group, each on its own.

        Every output depends on its own value alone, so the distinct values of a column can be transformed once and the
        result gathered by row.

        Args:
          name: of a feature or user group of the spec.
          values: raw values [num_values], missing as in ``__call__``. Of a history: single values of the feature it is
            made of, of any shape.

        Returns:
          What ``__call__`` gives for rows of these values. Of a history the id of each value, in the shape of
          ``values``; with several ids per value they are on another axis.
        """
        match self._entries[name]:
            case UserGroup() as group:
                return group_ids(group, values)
            case CategoricalFeature():
                return self._lookups[name](as_text(values))
            case MultiValuedFeature() as feature:
                pieces = tf.strings.split(as_text(values), feature.separator)
                return side_by_side(self._lookups[name](first_values(pieces, feature.max_values)))
            case HistoryFeature() as feature:
                return self._lookups[feature.of](values)
            case NumberFeature() as feature:
                return numeric_values(feature, self._statistics.numeric[name], values)
            case entry:
                raise TypeError(f"each kind of feature must have its case here. Received: {type(entry).__name__}")


# --- A table at once -------------------------------------------------------------------------------------------------


def transform_distinct(transform: FeatureTransform, spec: FeatureSpec, table: pa.Table) -> dict[str, np.ndarray]:
    """Transforms a table by the distinct values of each column.

    Args:
      transform: fitted for ``spec``.
      spec: declares features and user groups.
      table: one column per raw input; lists without missing values, none longer than ``values_per_row``.

    Returns:
      What ``transform`` gives for the rows: int64 ids [num_rows] or [num_rows, num_ids], float32 [num_rows].
    """
    encoded = {entry.name: _Distinct.of(table.column(entry.name), entry) for entry in spec.raw_inputs}
    outputs = {}
    for entry in spec.entries:
        column = encoded[entry.raw_name]
        distinct = transform.column(entry.name, column.values).numpy()
        if entry.is_list:
            assert entry.values_per_row is not None, "rows of lists are of one length"
            # Several ids may stand for one value: [num_rows, values_per_row, ids_per_value].
            ids = distinct[column.padded_codes(entry.values_per_row)]
            outputs[entry.name] = ids.reshape([table.num_rows, -1])
        else:
            outputs[entry.name] = distinct[column.codes]
    return outputs


@dataclasses.dataclass(frozen=True)
class _Distinct:
    """A column as its distinct raw values, the missing one last, and a code per row.

    Attributes:
      values: raw tensor [num_distinct].
      codes: int64 [num_rows]; of a history [num_values] over all rows.
      lengths: of the histories, [num_rows]; None for other columns.
    """

    values: tf.Tensor
    codes: np.ndarray
    lengths: np.ndarray | None

    @classmethod
    def of(cls, column: pa.ChunkedArray, entry: RawInput) -> _Distinct:
        values = column.combine_chunks()
        lengths = None
        if entry.is_list:
            lengths = pc.list_value_length(values).to_numpy()
            values = pc.list_flatten(values)
        encoded = pc.dictionary_encode(values)
        distinct = pa.concat_arrays([encoded.dictionary, pa.nulls(1, encoded.dictionary.type)])
        codes = pc.fill_null(encoded.indices, len(distinct) - 1).to_numpy()
        scalar = dataclasses.replace(entry, is_list=False)
        [tensor] = arrow_to_tensors(pa.table({entry.name: distinct}), [scalar]).values()
        return cls(tensor, codes, lengths)

    def padded_codes(self, max_length: int) -> np.ndarray:
        """Codes of histories, left-aligned and padded with the missing value: [num_rows, max_length]."""
        assert self.lengths is not None, "of histories"
        padded = np.full((len(self.lengths), max_length), len(self.values) - 1)
        rows = np.repeat(np.arange(len(self.lengths)), self.lengths)
        starts = np.cumsum(self.lengths) - self.lengths
        padded[rows, np.arange(len(self.codes)) - np.repeat(starts, self.lengths)] = self.codes
        return padded


# --- What a kind of feature does with its values ---------------------------------------------------------------------


def as_text(values: tf.Tensor) -> tf.Tensor:
    """Writes values as text.

    Args:
      values: strings or int64, of any shape.

    Returns:
      Strings as they are; int64 in decimal, with the missing value as "".
    """
    if values.dtype == tf.string:
        return values
    return tf.where(values == MISSING_INT64, "", tf.strings.as_string(values))


def first_values(values: tf.RaggedTensor, max_values: int) -> tf.Tensor:
    """Keeps the first values of each row.

    Args:
      values: strings, ragged [batch, any]; empty ones do not count.
      max_values: how many to keep.

    Returns:
      Strings [batch, max_values], padded with "".
    """
    places = tf.where(values.values != "")[:, 0]
    rows = tf.gather(values.value_rowids(), places)
    return _padded(tf.gather(values.values, places), rows, values.nrows(), max_values)


def last_values(values: tf.Tensor | tf.RaggedTensor, max_length: int) -> tf.Tensor:
    """Keeps the last values of each row.

    Args:
      values: strings [batch, any], ragged or padded with ""; empty ones do not count.
      max_length: how many to keep.

    Returns:
      Strings [batch, max_length], left-aligned, padded with "".
    """
    if isinstance(values, tf.RaggedTensor):
        places = tf.where(values.values != "")[:, 0]
        rows, num_rows = tf.gather(values.value_rowids(), places), values.nrows()
        values = tf.gather(values.values, places)
    else:
        places = tf.where(values != "")
        rows, num_rows = places[:, 0], tf.shape(values, tf.int64)[0]
        values = tf.gather_nd(values, places)
    ends = tf.RaggedTensor.from_value_rowids(values, rows, num_rows, validate=False).row_splits[1:]
    from_the_end = tf.gather(ends, rows) - tf.range(tf.size(values, tf.int64))  # 1 is the last value of a row.
    places = tf.where(from_the_end <= max_length)[:, 0]
    return _padded(tf.gather(values, places), tf.gather(rows, places), num_rows, max_length)


def _padded(values: tf.Tensor, rows: tf.Tensor, num_rows: tf.Tensor, width: int) -> tf.Tensor:
    """Strings and the rows that they belong to, ascending -> [num_rows, width], cut off or padded with ""."""
    ragged = tf.RaggedTensor.from_value_rowids(values, rows, num_rows, validate=False)
    return ragged.to_tensor("", shape=[None, width])


def side_by_side(ids: tf.Tensor) -> tf.Tensor:
    """Lays the ids of a row side by side.

    Args:
      ids: [batch, max_values] or [batch, max_values, ids_per_value].

    Returns:
      [batch, max_values * ids_per_value], value by value.
    """
    if ids.shape.rank == 2:
        return ids
    return tf.reshape(ids, [-1, ids.shape[1] * ids.shape[2]])


def as_float(values: tf.Tensor) -> tf.Tensor:
    """Casts numbers.

    Args:
      values: int64 or float, of any shape.

    Returns:
      float32, NaN for missing.
    """
    if values.dtype == tf.int64:
        return tf.where(values == MISSING_INT64, float("nan"), tf.cast(values, tf.float32))
    return tf.cast(values, tf.float32)


def numeric_values(feature: NumberFeature, statistics: NumericStatistics, raw: tf.Tensor) -> tf.Tensor:
    """Scales numbers: log1p if asked for, then (x - mean) / std, (x - min) / (max - min), or the bucket of x.

    Args:
      feature: says which.
      statistics: fitted on the training split, after log1p.
      raw: int64 or float, of any shape.

    Returns:
      float32, the training mean's for missing; or of buckets int64 ids, 1 + number of boundaries <= x, 0 for missing.
    """
    values = as_float(raw)
    missing = tf.math.is_nan(values)
    if feature.log1p:
        positive = tf.where(values > 0.0, values, 0.0)  # Negative values are bad rows when the dataset is built.
        # In float64: the last bits of TensorFlow's float32 logarithm depend on a value's place in the batch, so that
        # a served value would differ from the trained one.
        values = tf.cast(tf.math.log1p(tf.cast(positive, tf.float64)), tf.float32)
    if feature.scaling == "quantile_buckets":
        boundaries = tf.constant(statistics.boundaries, tf.float32)
        buckets = 1 + tf.searchsorted(boundaries, values, side="right", out_type=tf.int64)
        return tf.where(missing, tf.cast(MISSING_ID, tf.int64), buckets)
    values = tf.where(missing, tf.constant(statistics.mean, tf.float32), values)
    if feature.scaling == "standardise":
        return (values - statistics.mean) / statistics.scale
    if feature.scaling == "min_max":
        return (values - statistics.minimum) / ((statistics.maximum - statistics.minimum) or 1.0)
    return values


def group_ids(group: UserGroup, raw: tf.Tensor) -> tf.Tensor:
    """Finds the user group of each value.

    Args:
      group: its intervals or values.
      raw: numbers or strings [batch].

    Returns:
      int64 [batch], indices of ``group.labels``: 0 unknown, then intervals or listed values, then other.
    """
    unknown = tf.cast(MISSING_ID, tf.int64)
    if group.boundaries is not None:
        values = as_float(raw)
        boundaries = tf.constant(group.boundaries, tf.float32)
        ids = 1 + tf.searchsorted(boundaries, values, side="right", out_type=tf.int64)
        return tf.where(tf.math.is_nan(values), unknown, ids)
    # [batch, num_values], with "other" as the column that matches when none does.
    matches = raw[:, tf.newaxis] == tf.constant(group.values)[tf.newaxis, :]
    matches = tf.concat([matches, ~tf.reduce_any(matches, axis=1, keepdims=True)], axis=1)
    ids = 1 + tf.argmax(tf.cast(matches, tf.int32), axis=1)
    return tf.where(raw == "", unknown, ids)
