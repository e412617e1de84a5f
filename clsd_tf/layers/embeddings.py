"""Model inputs -> field embeddings."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import tensorflow as tf

from clsd_tf.layers.embedding_config import EmbeddingConfig
from clsd_tf.spec.model_inputs import MISSING_ID, CategoricalInput, ModelInputs

Quantization = Literal["float16", "int8"]

# Rows that are drawn at a time when a table gets its initial values.
_BLOCK_ROWS = 1 << 16
# The finaliser of MurmurHash3 for 64 bits: its two multipliers, as int64.
_MULTIPLIERS = (0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64)
_UNIFIED = "unified"


class SharedRows(NamedTuple):
    """Values that rows of a batch share: row i has ``values[row_of[i]]``. So one user's features serve many items.

    Attributes:
      values: [num_users] or [num_users, any].
      row_of: int64 [batch], in [0, num_users).
    """

    values: tf.Tensor
    row_of: tf.Tensor

    def repeated(self) -> tf.Tensor:
        """The values of each row, [batch, ...]."""
        return tf.gather(self.values, self.row_of)


def per_row(values: tf.Tensor | SharedRows) -> tf.Tensor:
    """Gives each row its values, whether rows share them or not.

    Args:
      values: [batch, ...], or shared by rows.

    Returns:
      [batch, ...].
    """
    return values.repeated() if isinstance(values, SharedRows) else values


class FieldEmbeddings(tf.keras.layers.Layer):
    """Embeds every field: e_c = table[id], mean over values where there are several, and e_n = x * v for numbers.

    The tables of all vocabularies are one variable, each from its own offset on, and a batch is one lookup: with 30
    fields, 30 lookups and as many sparse updates took most of a training step. Inputs that share a vocabulary share its
    rows (a history and the feature it is made of). Where several ids stand for one value, its embedding is their sum or
    product (``CategoricalInput.combiner``). The embedding of a padding value does not enter a mean; a field without any
    value is the zero vector.

    Args:
      inputs: the model inputs.
      config: size, initial values and penalty of the tables. The penalty is added to the layer's losses: of ``all``
        rows it is l2 * sum(table^2), which gives every row a gradient in every step; of ``touched`` ones l2 * the sum
        over the rows that a batch looks up, each once in each lookup (DIN looks its histories up apart).

    Returns:
      ``call`` maps the feature dict to [batch, num_fields, embedding_dim] in the layer's compute dtype (float32 by
      default), fields in the order of ``inputs``. Features may be ``SharedRows``: those are looked up once per value.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        config: EmbeddingConfig,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self._inputs = inputs
        self._config = config
        self._row_bounds = _row_bounds(inputs, config.unified_buckets)
        self._input_of = {entry.vocabulary: entry for entry in inputs.categorical}  # Any: they combine ids alike.
        self._quantized: tuple[tf.Variable, tf.Variable | None] | None = None

    def build(self, input_shape: Any) -> None:
        if self._inputs.categorical:
            num_rows = max(stop for _, stop in self._row_bounds.values())
            self._tables = self._add_vectors("tables", num_rows, penalised=self._config.l2_rows == "all")
        if self._inputs.numeric:
            self._numeric_vectors = self._add_vectors("numeric_vectors", len(self._inputs.numeric), penalised=True)
        super().build(input_shape)

    def _add_vectors(self, name: str, count: int, *, penalised: bool) -> tf.Variable:
        # Under a strategy, all replicas get what one initializer gave, and only that: there it gives all rows at once.
        fill = count > _BLOCK_ROWS and not tf.distribute.has_strategy()
        # In half precision, a variable that casts itself is copied whole before each lookup.
        vectors = self.add_weight(
            name=name,
            shape=[count, self._config.dim],
            initializer="zeros" if fill else lambda shape, dtype=None: tf.concat([*self._drawn(shape, dtype)], axis=0),
            regularizer=tf.keras.regularizers.L2(self._config.l2) if self._config.l2 and penalised else None,
            experimental_autocast=False,
        )
        if fill:
            with tf.init_scope():
                start = 0
                for block in self._drawn(vectors.shape, vectors.dtype):
                    vectors.scatter_update(tf.IndexedSlices(block, tf.range(start, start + len(block))))
                    start += len(block)
        return vectors

    def _drawn(self, shape: Sequence[int], dtype: tf.DType) -> Iterator[tf.Tensor]:
        """Initial values in blocks of rows: all at once they take three times their memory, which TensorFlow keeps."""
        count, dim = shape
        for start in range(0, count, _BLOCK_ROWS):
            scale = self._config.init_scale
            if self._config.initializer == "normal":  # One for each block: used again, it would repeat itself.
                initializer = tf.keras.initializers.RandomNormal(stddev=scale)
            else:
                initializer = tf.keras.initializers.RandomUniform(-scale, scale)
            yield initializer([min(_BLOCK_ROWS, count - start), dim], dtype)

    @property
    def tables(self) -> tf.Variable:
        """The embeddings of all vocabularies, float32 [num_rows, embedding_dim]; the layer must be built."""
        return self._tables

    @property
    def row_ranges(self) -> dict[str, range]:
        """Vocabulary -> its rows of ``tables``; a unified table is one range."""
        return {name: range(*bounds) for name, bounds in self._row_bounds.items()}

    def quantize(self, kind: Quantization) -> None:
        """Replaces the tables by smaller ones, for serving: from now on the layer can no longer be trained.

        Args:
          kind: ``float16`` halves them. ``int8`` keeps a row as round(row / scale) with scale = max|row| / 127 in
            float32: 4 bytes more than a byte a number; the error is at most scale / 2.

        Raises:
          ValueError: the layer has no tables: none of its inputs is categorical.
        """
        if not self.has_tables:
            raise ValueError("quantization is for tables of categorical inputs. Received: a layer with numbers only")
        table = tf.convert_to_tensor(self._tables)
        if kind == "float16":
            self._quantized = (tf.Variable(tf.cast(table, tf.float16), trainable=False, name="tables_float16"), None)
            return
        scales = tf.reduce_max(tf.abs(table), axis=1, keepdims=True) / 127.0
        numbers = tf.cast(tf.round(tf.math.divide_no_nan(table, scales)), tf.int8)
        self._quantized = (
            tf.Variable(numbers, trainable=False, name="tables_int8"),
            tf.Variable(scales, trainable=False, name="table_scales"),
        )

    @property
    def has_tables(self) -> bool:
        """True where an input is categorical."""
        return bool(self._inputs.categorical)

    @property
    def table_bytes(self) -> int:
        """Size of the tables as they are looked up."""
        parts = self._quantized or (self._tables,)
        return sum(part.dtype.size * part.shape.num_elements() for part in parts if part is not None)

    def _first_row(self, vocabulary: str) -> int:
        """Offset of a vocabulary's ids when they are looked up."""
        return self._row_bounds[vocabulary][0] if self._config.unified_buckets is None else _salt(vocabulary)

    def _rows(self, ids: tf.Tensor) -> tf.Tensor:
        """Rows of the tables: ids counted from ``_first_row``, of any shape -> [*ids.shape, embedding_dim]."""
        if self._config.unified_buckets is not None:
            ids = tf.math.floormod(_mixed(ids), self._config.unified_buckets)
        if self._quantized is None:
            if self._config.l2 and self._config.l2_rows == "touched":
                touched, _ = tf.unique(tf.reshape(ids, [-1]))
                rows = tf.nn.embedding_lookup(self._tables, touched)
                self.add_loss(self._config.l2 * tf.reduce_sum(tf.square(rows)))
            return tf.cast(tf.nn.embedding_lookup(self._tables, ids), self.compute_dtype)
        table, scales = self._quantized
        rows = tf.cast(tf.gather(table, ids), self.compute_dtype)
        return rows if scales is None else rows * tf.cast(tf.gather(scales, ids), self.compute_dtype)

    def call(self, features: Mapping[str, tf.Tensor | SharedRows]) -> tf.Tensor:
        fields = self._embed_categorical(features) if self.has_tables else []
        if self._inputs.numeric:
            numbers = tf.stack([per_row(features[name]) for name in self._inputs.numeric], axis=1)
            # [batch, num_numeric, 1] * [num_numeric, embedding_dim]
            fields.append(numbers[:, :, tf.newaxis] * tf.cast(self._numeric_vectors, self.compute_dtype))
        return tf.concat(fields, axis=1)

    def _embed_categorical(self, features: Mapping[str, tf.Tensor | SharedRows]) -> list[tf.Tensor]:
        """Embeddings of the categorical inputs, in their order: [batch, any number of fields, embedding_dim] each."""
        entries = self._inputs.categorical
        shared = [entry for entry in entries if isinstance(features[entry.name], SharedRows)]
        own = [entry for entry in entries if entry not in shared]
        if not shared:
            return self._embed_ids(features, entries)
        row_of = features[shared[0].name].row_of
        values = {entry.name: features[entry.name].values for entry in shared}
        parts = {True: tf.concat(self._embed_ids(values, shared), axis=1)}
        if own:
            parts[False] = tf.concat(self._embed_ids(features, own), axis=1)
        fields, starts = [], {True: 0, False: 0}
        # Neighbors of one kind stay one slice, so that what the users share is copied for each row only once.
        for is_shared, group in itertools.groupby(entries, lambda entry: entry in shared):
            start = starts[is_shared]
            starts[is_shared] += len(list(group))
            part = parts[is_shared][:, start : starts[is_shared]]
            fields.append(tf.gather(part, row_of) if is_shared else part)
        return fields

    def lookup(self, vocabulary: str, ids: tf.Tensor | SharedRows) -> tf.Tensor:
        """Embeds single values, without the mean over them.

        Args:
          vocabulary: of the ids.
          ids: int64 [..., num_values * ids_per_value]; any shape where a value has one id.

        Returns:
          [..., num_values, embedding_dim]; [*ids.shape, embedding_dim] where a value has one id.
        """
        if isinstance(ids, SharedRows):
            return tf.gather(self.lookup(vocabulary, ids.values), ids.row_of)
        return self._combined(self._rows(ids + self._first_row(vocabulary)), vocabulary)

    def present(self, vocabulary: str, ids: tf.Tensor | SharedRows) -> tf.Tensor:
        """Tells values from padding.

        Args:
          vocabulary: of the ids.
          ids: int64 [..., num_values * ids_per_value].

        Returns:
          bool [..., num_values].
        """
        return per_row(ids)[..., :: self._input_of[vocabulary].ids_per_value] != MISSING_ID

    def _combined(self, embedded: tf.Tensor, vocabulary: str) -> tf.Tensor:
        """[..., num_values * ids_per_value, embedding_dim] -> [..., num_values, embedding_dim]."""
        count = self._input_of[vocabulary].ids_per_value
        if count == 1:
            return embedded
        first, *others = [embedded[..., index::count, :] for index in range(count)]
        if self._input_of[vocabulary].combiner == "sum":
            return tf.add_n([first, *others])
        # Rows start near 0: a product of several would hardly learn, so all but the first are measured from 1.
        return functools.reduce(lambda product, other: product * (1.0 + other), others, first)

    def _embed_ids(self, features: Mapping[str, tf.Tensor], entries: Sequence[CategoricalInput]) -> list[tf.Tensor]:
        """Embeddings of these inputs, in their order: [rows, any number of fields, embedding_dim] each; one lookup."""
        columns: list[tf.Tensor] = []
        starts: dict[str, int] = {}
        for entry in entries:
            starts[entry.name] = sum(column.shape[1] for column in columns)
            ids = features[entry.name]
            columns.append(ids[:, tf.newaxis] if entry.num_ids is None else ids)
        first_rows = [self._first_row(entry.vocabulary) for entry in entries for _ in range(entry.num_ids or 1)]
        embedded = self._rows(tf.concat(columns, axis=1) + tf.constant(first_rows, tf.int64))
        fields = []
        # Neighbors with single ids stay one slice: fewer pieces to put together again.
        for is_single, adjacent in itertools.groupby(entries, lambda entry: entry.num_ids is None):
            group = list(adjacent)
            start = starts[group[0].name]
            if is_single:
                fields.append(embedded[:, start : start + len(group)])
                continue
            for entry in group:
                start = starts[entry.name]
                values = self._combined(embedded[:, start : start + (entry.num_ids or 1)], entry.vocabulary)
                if entry.max_values is not None:
                    values = self._mean_of_present(values, self.present(entry.vocabulary, features[entry.name]))
                fields.append(values)
        return fields

    def _mean_of_present(self, values: tf.Tensor, present: tf.Tensor) -> tf.Tensor:
        """Averages values [batch, max_values, embedding_dim] -> [batch, 1, embedding_dim]."""
        present = tf.cast(present, values.dtype)[:, :, tf.newaxis]
        total = tf.reduce_sum(values * present, axis=1, keepdims=True)
        return total / tf.maximum(tf.reduce_sum(present, axis=1, keepdims=True), 1.0)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "inputs": self._inputs.to_dict(), "config": self._config.model_dump()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FieldEmbeddings:
        inputs, settings = ModelInputs.from_dict(config["inputs"]), EmbeddingConfig(**config["config"])
        return cls(**{**config, "inputs": inputs, "config": settings})


def _row_bounds(inputs: ModelInputs, unified_buckets: int | None) -> dict[str, tuple[int, int]]:
    """First row and end of each vocabulary: Keras goes through what layers hold, and would through all of a range."""
    if unified_buckets is not None:
        return {_UNIFIED: (0, unified_buckets)}
    sizes = {entry.vocabulary: entry.vocabulary_size for entry in inputs.categorical}
    ends = itertools.accumulate(sizes.values())
    return {name: (end - sizes[name], end) for name, end in zip(sizes, ends, strict=True)}


def _salt(vocabulary: str) -> int:
    """Far enough apart that the ids of two vocabularies do not meet; of the name alone, so that rows stay where they
    are when vocabularies grow."""
    return int.from_bytes(hashlib.sha256(vocabulary.encode()).digest()[:8], "little", signed=True)


def _mixed(values: tf.Tensor) -> tf.Tensor:
    """A hash of int64 values, of the same shape: xor and multiply, twice (the finaliser of MurmurHash3)."""
    for multiplier in _MULTIPLIERS:
        shifted = tf.bitwise.right_shift(tf.bitcast(values, tf.uint64), tf.constant(33, tf.uint64))
        values = tf.bitwise.bitwise_xor(values, tf.bitcast(shifted, tf.int64)) * multiplier
    shifted = tf.bitwise.right_shift(tf.bitcast(values, tf.uint64), tf.constant(33, tf.uint64))
    return tf.bitwise.bitwise_xor(values, tf.bitcast(shifted, tf.int64))
