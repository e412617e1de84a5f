"""Features that become a number, or the id of the bucket that it falls in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import pydantic

from clsd_tf.spec.feature_base import BaseFeature
from clsd_tf.spec.model_inputs import CategoricalInput
from clsd_tf.spec.tables import ColumnType, Name


class NumberFeature(BaseFeature):
    """A feature that becomes a number, scaled by statistics of the training split, or the id of a bucket."""

    column_types: ClassVar[tuple[ColumnType, ...]] = ("int64", "float")

    column: Name
    log1p: bool = False
    scaling: Literal["none", "standardise", "min_max", "quantile_buckets"] = "standardise"
    num_buckets: int = pydantic.Field(default=10, ge=2)

    @property
    def raw_name(self) -> str:
        return self.column

    @property
    def counted_as(self) -> Literal["numbers"]:
        return "numbers"

    @property
    def number_column(self) -> str | None:
        """The column that its numbers come from, none of them negative with ``log1p``; None for counts and times."""
        return self.column

    def categorical_input(
        self, feature: Callable[[str], BaseFeature], vocabulary_lengths: Mapping[str, int]
    ) -> CategoricalInput | None:
        if self.scaling != "quantile_buckets":
            return None
        return CategoricalInput(self.name, self.name, 1 + self.num_buckets)

    def meaning(self) -> dict[str, Any]:
        return self.model_dump(exclude={"name"})


class NumericFeature(NumberFeature):
    """A number: ``log1p`` first, then ``scaling`` by statistics of the training split; missing = training mean.

    ``quantile_buckets`` turns the number into an id (0 = missing) with ``num_buckets`` buckets of equal mass.
    """

    type: Literal["numeric"]
