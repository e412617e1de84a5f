"""Features that become ids, and the two ways to number their values: by a vocabulary and by a hash."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import pydantic

from clsd_tf.spec.feature_base import BaseFeature
from clsd_tf.spec.model_inputs import CategoricalInput
from clsd_tf.spec.tables import ColumnType, Name
from clsd_tf.spec.validation import StrictModel


class Vocabulary(StrictModel):
    """Ids by frequency in the training split: 0 missing, then ``num_oov_indices`` ids, then values by count.

    Attributes:
      min_count: a value seen less often in training is out of vocabulary.
      max_size: keep at most this many values.
      num_oov_indices: out-of-vocabulary values are hashed into this many ids.
      weighted: each row counts its sample weight, to the millionth, instead of 1; for ``min_count``, too.
      max_tracked: with more distinct values than this, those seen most often are found approximately, in memory for
        this many. A count may then be too low, by at most the sum of all counts / (max_tracked + 1).
    """

    min_count: int = pydantic.Field(default=1, ge=1)
    max_size: int | None = pydantic.Field(default=None, ge=1)
    num_oov_indices: int = pydantic.Field(default=1, ge=1)
    weighted: bool = False
    max_tracked: int = pydantic.Field(default=5_000_000, ge=1)

    @pydantic.model_validator(mode="after")
    def _check_max_tracked(self) -> Vocabulary:
        if self.max_size is not None and self.max_size > self.max_tracked:
            raise ValueError(
                f"max_tracked must be at least max_size. Received: {self.max_tracked} and {self.max_size}. "
                "Raise max_tracked or lower max_size"
            )
        return self


class Hashing(StrictModel):
    """Ids by hash, of a fixed number whatever the data: 0 missing, then ``buckets`` ids.

    Two values share an embedding

    - ``single``: if they share a bucket.
    - ``quotient_remainder``: only if they share both ids, hash mod r and hash div r of one hash below r * q, where r
      and q are the halves of ``buckets``; so buckets^2 / 4 embeddings, each the product of two rows (Shi et al., 2020,
      "Compositional Embeddings Using Complementary Partitions for Memory-Efficient Recommendation Systems").
    - ``multi``: only if they share all ``num_hashes`` buckets of independent hashes, whose rows are summed (Serra and
      Karatzoglou, 2017, "Getting Deep Recommenders Fit"; without learned weights what Svenstrup et al., 2017, "Hash
      Embeddings for Efficient Word Representations" do).

    Attributes:
      buckets: rows of the embedding table beside that of missing values.
      num_hashes: of ``multi``.
      seed: another one makes other values collide.
    """

    buckets: int = pydantic.Field(ge=1, le=2**32)  # The product of the halves must be an int64.
    method: Literal["single", "quotient_remainder", "multi"] = "single"
    num_hashes: int = pydantic.Field(default=2, ge=2)
    seed: int = pydantic.Field(default=0, ge=0)

    @pydantic.model_validator(mode="after")
    def _check(self) -> Hashing:
        if self.method != "multi" and self.num_hashes != 2:
            raise ValueError(f"num_hashes is for method multi. Received: {self.num_hashes} for {self.method}")
        if self.method == "quotient_remainder" and self.buckets < 2:
            raise ValueError("quotient_remainder needs 2 or more buckets. Received: 1")
        return self

    @property
    def ids_per_value(self) -> int:
        """Ids that stand for one value, side by side."""
        return {"single": 1, "quotient_remainder": 2, "multi": self.num_hashes}[self.method]

    @property
    def combiner(self) -> Literal["sum", "product"]:
        """Operation that makes a value's embedding of those of its ids, see ``CategoricalInput``."""
        return "product" if self.method == "quotient_remainder" else "sum"

    @property
    def num_remainders(self) -> int:
        """Ids of hash mod r: the r of ``quotient_remainder``."""
        return self.buckets // 2

    @property
    def num_quotients(self) -> int:
        """Ids of hash div r: the q of ``quotient_remainder``."""
        return self.buckets - self.num_remainders


class IdFeature(BaseFeature):
    """A feature that becomes ids: by a vocabulary of the training split, or by hash (``hash_buckets: N`` is short).

    ``shares`` names another such feature, whose ids and embedding table are this one's too: of two columns with cities,
    say. Its vocabulary is made of that feature's column alone.
    """

    column_types: ClassVar[tuple[ColumnType, ...]] = ("string", "int64")

    column: Name
    vocabulary: Vocabulary | None = None
    hash_buckets: int | None = pydantic.Field(default=None, ge=1)
    hash: Hashing | None = None
    shares: Name | None = None

    @pydantic.model_validator(mode="after")
    def _one_encoding(self) -> IdFeature:
        given = [name for name in ("vocabulary", "hash_buckets", "hash", "shares") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"give one of vocabulary, hash_buckets, hash and shares. Received: {', '.join(given)}")
        return self

    @pydantic.model_serializer(mode="wrap")
    def _leave_out_what_is_not_shared(self, serialize: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Fingerprints of specs that share nothing, and so the datasets built by them, stay what they were.
        return {name: value for name, value in serialize(self).items() if name != "shares" or value is not None}

    @property
    def raw_name(self) -> str:
        return self.column

    @property
    def counted_as(self) -> Literal["values"]:
        return "values"

    @property
    def resolved_hash(self) -> Hashing | None:
        """The rule by which values are hashed, or None when they have a vocabulary."""
        return Hashing(buckets=self.hash_buckets) if self.hash_buckets else self.hash

    @property
    def resolved_vocabulary(self) -> Vocabulary | None:
        """The vocabulary's rule, or None when values are hashed or another feature's vocabulary is shared."""
        return None if self.resolved_hash or self.shares else self.vocabulary or Vocabulary()

    def categorical_input(
        self, feature: Callable[[str], BaseFeature], vocabulary_lengths: Mapping[str, int]
    ) -> CategoricalInput | None:
        if self.shares:
            shared = feature(self.shares).categorical_input(feature, vocabulary_lengths)
            return shared and dataclasses.replace(shared, name=self.name, max_values=self.values_per_row)
        if hashing := self.resolved_hash:
            size, combiner = 1 + hashing.buckets, hashing.combiner
            return CategoricalInput(self.name, self.name, size, self.values_per_row, hashing.ids_per_value, combiner)
        rule = self.vocabulary or Vocabulary()
        size = 1 + rule.num_oov_indices + vocabulary_lengths[self.name]
        return CategoricalInput(self.name, self.name, size, self.values_per_row)

    def meaning(self) -> dict[str, Any]:
        rule, hashing = self.resolved_vocabulary, self.resolved_hash
        meaning = self.model_dump(exclude={"name", "vocabulary", "hash_buckets", "hash", "max_values"})
        meaning["vocabulary.num_oov_indices"] = rule.num_oov_indices if rule else None
        return {**meaning, "hash": hashing.model_dump() if hashing else None}


class CategoricalFeature(IdFeature):
    """One value -> one id, by vocabulary (default) or by hash."""

    type: Literal["categorical"]


class MultiValuedFeature(IdFeature):
    """Text with separated values -> the first ``max_values`` ids, padded with 0; pooled by their mean embedding."""

    type: Literal["multi_valued"]
    separator: str = pydantic.Field(min_length=1)
    max_values: int = pydantic.Field(default=8, ge=1)

    @property
    def values_per_row(self) -> int:
        return self.max_values

    @property
    def value_separator(self) -> str:
        return self.separator
