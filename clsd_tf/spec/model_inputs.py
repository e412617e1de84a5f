"""Descriptions of what the transform gives a model: names, sizes and the statistics fitted on the training split."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

MISSING_ID = 0  # Id of a missing value and of padding, in every vocabulary and user group.
MISSING_INT64 = -(2**63)  # What a missing int64 is in a raw tensor; floats use NaN, strings "".
UNKNOWN_GROUP = "unknown"  # Label of user group 0: the profile or the value is missing.
OTHER_GROUP = "other"
RecordLayout = Literal["packed", "named"]  # See clsd_tf.data.examples.record_tensors.


@dataclasses.dataclass(frozen=True)
class RawInput:
    """A raw value that a serving request carries: ``is_list`` marks histories."""

    name: str
    dtype: Literal["string", "int64", "float"]
    is_list: bool = False


@dataclasses.dataclass(frozen=True)
class CategoricalInput:
    """Ids in [0, vocabulary_size): shape [batch] if ``num_ids`` is None, else [batch, num_ids].

    Attributes:
      max_values: values of a row, padded with missing ones; None for a single value.
      history_of: of a history, the input of single values that it is made of.
      ids_per_value: ids that stand for one value, side by side; all 0 where it is missing.
      combiner: what the embedding of a value is made of those of its ids e_0, e_1, ...: their sum, or the product
        e_0 * (1 + e_1) * ...
    """

    name: str
    vocabulary: str
    vocabulary_size: int
    max_values: int | None = None
    ids_per_value: int = 1
    combiner: Literal["sum", "product"] = "sum"
    history_of: str | None = None

    @property
    def num_ids(self) -> int | None:
        """Ids of a row: max_values * ids_per_value, value by value; None for a single one."""
        if self.max_values is None and self.ids_per_value == 1:
            return None
        return (self.max_values or 1) * self.ids_per_value


@dataclasses.dataclass(frozen=True)
class GroupInput:
    """User-group ids, shape [batch]; ``labels[id]`` is what a report calls the group."""

    name: str
    labels: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """All inputs that the transform gives a model: the only thing that models know of a data set.

    ``user_features`` names the categorical and numeric inputs that come from the user's profile.
    """

    categorical: tuple[CategoricalInput, ...]
    numeric: tuple[str, ...]
    groups: tuple[GroupInput, ...]
    user_features: tuple[str, ...] = ()

    @property
    def num_fields(self) -> int:
        """Fields that a backbone sees; user groups are none."""
        return len(self.categorical) + len(self.numeric)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ModelInputs:
        """Reads a ``value`` of ``to_dict``.

        Returns:
          Equal inputs.
        """
        return cls(
            categorical=tuple(CategoricalInput(**entry) for entry in value["categorical"]),
            numeric=tuple(value["numeric"]),
            groups=tuple(GroupInput(entry["name"], tuple(entry["labels"])) for entry in value["groups"]),
            user_features=tuple(value["user_features"]),
        )


@dataclasses.dataclass(frozen=True)
class NumericStatistics:
    """Moments of a numeric feature over the training rows that have it, after log1p where the spec asks for it.

    ``boundaries`` are the inner quantiles, only filled for ``scaling: quantile_buckets``.
    """

    count: int
    mean: float
    std: float
    minimum: float
    maximum: float
    boundaries: tuple[float, ...] = ()

    @property
    def scale(self) -> float:
        """``std``, or 1 for a constant column, whose computed std is rounding error."""
        return self.std if self.std > 1e-6 * max(1.0, abs(self.mean)) else 1.0


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Everything the transform learns from data, except the vocabulary files themselves."""

    vocabulary_lengths: Mapping[str, int]
    numeric: Mapping[str, NumericStatistics]

    def to_json(self) -> str:
        """The content of statistics.json."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Statistics:
        """Reads a ``text`` of ``to_json``.

        Returns:
          Equal statistics.
        """
        value = json.loads(text)
        numeric = {
            name: NumericStatistics(**{**entry, "boundaries": tuple(entry["boundaries"])})
            for name, entry in value["numeric"].items()
        }
        return cls(value["vocabulary_lengths"], numeric)
