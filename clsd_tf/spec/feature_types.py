"""The kinds of features and user groups that a feature spec declares."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

import pydantic

from clsd_tf.spec.model_inputs import OTHER_GROUP, UNKNOWN_GROUP
from clsd_tf.spec.tables import Comparison, Name
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

    min_count: int = pydantic.Field(1, ge=1)
    max_size: int | None = pydantic.Field(None, ge=1)
    num_oov_indices: int = pydantic.Field(1, ge=1)
    weighted: bool = False
    max_tracked: int = pydantic.Field(5_000_000, ge=1)

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
    num_hashes: int = pydantic.Field(2, ge=2)
    seed: int = pydantic.Field(0, ge=0)

    @pydantic.model_validator(mode="after")
    def _check(self) -> Hashing:
        if self.method != "multi" and self.num_hashes != 2:
            raise ValueError(f"num_hashes is for method multi. Received: {self.num_hashes} for {self.method}")
        if self.method == "quotient_remainder" and self.buckets < 2:
            raise ValueError("quotient_remainder needs 2 or more buckets. Received: 1")
        return self

    @property
    def ids_per_value(self) -> int:
        return {"single": 1, "quotient_remainder": 2, "multi": self.num_hashes}[self.method]

    @property
    def num_remainders(self) -> int:
        return self.buckets // 2

    @property
    def num_quotients(self) -> int:
        return self.buckets - self.num_remainders


class IdFeature(StrictModel):
    """What becomes ids: by a vocabulary of the training split, or by hash (``hash_buckets: N`` is short for one).

    ``shares`` names another such feature, whose ids and embedding table are this one's too: of two columns with cities,
    say. Its vocabulary is made of that feature's column alone.
    """

    name: Name
    column: Name
    vocabulary: Vocabulary | None = None
    hash_buckets: int | None = pydantic.Field(None, ge=1)
    hash: Hashing | None = None
    shares: Name | None = None

    @pydantic.model_validator(mode="after")
    def _one_encoding(self):
        given = [name for name in ("vocabulary", "hash_buckets", "hash", "shares") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"give one of vocabulary, hash_buckets, hash and shares. Received: {', '.join(given)}")
        return self

    @pydantic.model_serializer(mode="wrap")
    def _leave_out_what_is_not_shared(self, serialize: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Fingerprints of specs that share nothing, and so the datasets built by them, stay what they were.
        return {name: value for name, value in serialize(self).items() if name != "shares" or value is not None}

    @property
    def resolved_hash(self) -> Hashing | None:
        """How values are hashed, or None when they have a vocabulary."""
        return Hashing(buckets=self.hash_buckets) if self.hash_buckets else self.hash

    @property
    def ids_per_value(self) -> int:
        return self.resolved_hash.ids_per_value if self.resolved_hash else 1

    @property
    def resolved_vocabulary(self) -> Vocabulary | None:
        """The vocabulary's rule, or None when values are hashed or another feature's vocabulary is shared."""
        return None if self.resolved_hash or self.shares else self.vocabulary or Vocabulary()


class CategoricalFeature(IdFeature):
    """One value -> one id, by vocabulary (default) or by hash."""

    type: Literal["categorical"]


class MultiValuedFeature(IdFeature):
    """Text with separated values -> the first ``max_values`` ids, padded with 0; pooled by their mean embedding."""

    type: Literal["multi_valued"]
    separator: str = pydantic.Field(min_length=1)
    max_values: int = pydantic.Field(8, ge=1)


class NumericFeature(StrictModel):
    """A number: ``log1p`` first, then ``scaling`` by statistics of the training split; missing = training mean.

    ``quantile_buckets`` turns the number into an id (0 = missing) with ``num_buckets`` buckets of equal mass.
    """

    type: Literal["numeric"]
    name: Name
    column: Name
    log1p: bool = False
    scaling: Literal["none", "standardise", "min_max", "quantile_buckets"] = "standardise"
    num_buckets: int = pydantic.Field(10, ge=2)


class FromPastEvents(StrictModel):
    """What a feature of the user's own past looks at: events strictly before the one it describes.

    Attributes:
      where: only events for which this comparison of a log column holds, for example ``is_like == 1``. It may read
        labels and other held-out columns, which are known of past events; where the column is missing it does not hold.
      within_seconds: only events at most this old.
      delay_seconds: an event is seen once it is older than this: labels arrive late in production.
    """

    where: str | None = None
    within_seconds: float | None = pydantic.Field(None, gt=0, le=1e10)
    delay_seconds: float = pydantic.Field(0, ge=0, le=1e10)

    @pydantic.model_validator(mode="after")
    def _window_is_not_empty(self):
        if self.within_seconds is not None and self.within_seconds <= self.delay_seconds:
            raise ValueError(
                f"within_seconds must be more than delay_seconds. Received: {self.within_seconds:g} and "
                f"{self.delay_seconds:g}"
            )
        return self

    @property
    def where_comparison(self) -> Comparison | None:
        return Comparison.parse(self.where) if self.where else None


class HistoryFeature(FromPastEvents):
    """The user's last ``max_length`` values of the categorical feature ``of`` strictly before the event, oldest first.

    ``of`` is a feature of the log or of an item table; the history shares its vocabulary, and so its embedding table.
    In a serving request it is a list of values.
    """

    type: Literal["history"]
    name: Name
    of: Name
    max_length: int = pydantic.Field(20, ge=1)


class WindowFeature(NumericFeature, FromPastEvents):
    """A number made of the user's events strictly before the event; in a serving request, a number.

    Only the user's own events can be counted: rows are joined user by user, so an item's events are never together.

    Attributes:
      column: the feature's own name; need not be given.
      aggregate: ``count`` of events; ``rate``, the share of events for which ``where`` holds (missing without events);
        ``mean`` of ``value`` over the events that have it; ``seconds_since_last`` event.
      value: a numeric column of the log, held-out ones included.
      min_count: ``rate`` and ``mean`` of fewer events are missing.
    """

    type: Literal["window"]
    key: Literal["user"] = "user"
    aggregate: Literal["count", "rate", "mean", "seconds_since_last"]
    value: Name | None = None
    min_count: int = pydantic.Field(1, ge=1)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _column_is_its_name(cls, content: Any) -> Any:
        if not isinstance(content, dict) or "name" not in content:
            return content
        if content.get("column", content["name"]) != content["name"]:
            raise ValueError(f"a window has no column; value is what a mean is of. Received: {content['column']!r}")
        return {**content, "column": content["name"]}

    @pydantic.field_validator("key", mode="before")
    @classmethod
    def _users_only(cls, key: Any) -> Any:
        if key != "user":
            raise ValueError(
                f"windows are made of the user's own events; windows over an item's events, which lie with many users, "
                f"are not supported. Received: {key!r}. Allowed: 'user'"
            )
        return key

    @pydantic.model_validator(mode="after")
    def _check_aggregate(self) -> WindowFeature:
        if (self.aggregate == "mean") != (self.value is not None):
            raise ValueError(f"value is what a mean is of. Received: aggregate: {self.aggregate}, value: {self.value}")
        if self.aggregate == "rate" and not self.where:
            raise ValueError("a rate is the share of events where a comparison holds. Received: no where")
        return self


Feature = Annotated[
    CategoricalFeature | MultiValuedFeature | NumericFeature | HistoryFeature | WindowFeature,
    pydantic.Field(discriminator="type"),
]


class UserGroup(StrictModel):
    """A user-profile attribute that AdGate reads and every report is sliced by.

    Ids: 0 unknown; then one id per interval of ``boundaries`` ([b0, b1), ...) or per entry of ``values``, then other.
    """

    name: Name
    column: Name
    boundaries: tuple[float, ...] | None = pydantic.Field(None, min_length=1)
    values: tuple[str, ...] | None = pydantic.Field(None, min_length=1)

    @pydantic.model_validator(mode="after")
    def _check(self) -> UserGroup:
        if (self.boundaries is None) == (self.values is None):
            raise ValueError("a user group has either boundaries (numbers) or values (text). Received: both or none")
        if self.boundaries and list(self.boundaries) != sorted(set(self.boundaries)):
            raise ValueError(f"boundaries must increase. Received: {list(self.boundaries)}")
        reserved = {UNKNOWN_GROUP, OTHER_GROUP, ""} & set(self.values or ())
        if reserved:
            raise ValueError(f"{UNKNOWN_GROUP!r}, {OTHER_GROUP!r} and '' have ids of their own. Received: {reserved}")
        if self.values and len(set(self.values)) != len(self.values):
            raise ValueError(f"values must differ. Received: {list(self.values)}")
        return self

    @property
    def labels(self) -> tuple[str, ...]:
        """A readable label per id."""
        if self.values is not None:
            return (UNKNOWN_GROUP, *self.values, OTHER_GROUP)
        edges = [str(int(edge)) if edge.is_integer() else str(edge) for edge in self.boundaries]
        between = [f"{low}-{high}" for low, high in itertools.pairwise(edges)]
        return (UNKNOWN_GROUP, f"<{edges[0]}", *between, f">={edges[-1]}")
