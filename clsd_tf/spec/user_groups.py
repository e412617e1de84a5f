"""User groups, declared beside the features."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import pydantic

from clsd_tf.spec.feature_base import SpecEntry
from clsd_tf.spec.model_inputs import OTHER_GROUP, UNKNOWN_GROUP
from clsd_tf.spec.tables import Name


class UserGroup(SpecEntry):
    """A user-profile attribute that a method may read and every report is sliced by.

    Ids: 0 unknown; then one id per interval of ``boundaries`` ([b0, b1), ...) or per entry of ``values``, then other.
    """

    column: Name
    boundaries: tuple[float, ...] | None = pydantic.Field(default=None, min_length=1)
    values: tuple[str, ...] | None = pydantic.Field(default=None, min_length=1)

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
    def raw_name(self) -> str:
        return self.column

    @property
    def counted_as(self) -> Literal["numbers", "values"]:
        return "numbers" if self.boundaries else "values"

    @property
    def labels(self) -> tuple[str, ...]:
        """A readable label per id."""
        if self.boundaries is None:
            return (UNKNOWN_GROUP, *(self.values or ()), OTHER_GROUP)
        edges = [str(int(edge)) if edge.is_integer() else str(edge) for edge in self.boundaries]
        between = [f"{low}-{high}" for low, high in itertools.pairwise(edges)]
        return (UNKNOWN_GROUP, f"<{edges[0]}", *between, f">={edges[-1]}")

    def meaning(self) -> dict[str, Any]:
        return self.model_dump(exclude={"name"})
