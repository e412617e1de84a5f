"""Scored rows: what every metric is computed from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ScoredRows:
    """Rows of a split with their predictions, as columns.

    Attributes:
      label: 1 for a click, else 0, [num_rows].
      ctr: predictions by which the rows are measured, in [0, 1], [num_rows].
      uncalibrated: predictions before the calibration, [num_rows]; those of ``ctr`` where there is none.
      sample_weight: above 0, [num_rows].
      user_hash: int64 [num_rows].
      row_id: int64 [num_rows].
      intensity_label: 1 for strong interest, which training never saw, else 0, [num_rows]; None if the spec declares
        none.
      genuine: the ground truth of a simulated log: 1 where interest alone would have drawn a click, else 0, [num_rows];
        None where it is not known.
      group_ids: user group -> ids, [num_rows] each.
    """

    label: Array
    ctr: Array
    uncalibrated: Array
    sample_weight: Array
    user_hash: Array
    row_id: Array
    intensity_label: Array | None = None
    genuine: Array | None = None
    group_ids: Mapping[str, Array] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.label)

    def has(self, column: str) -> bool:
        """Tells whether an optional column is there.

        Args:
          column: one of the attributes.

        Returns:
          True if it is; of ``group_ids``, if any user group is.
        """
        return bool(self.group_ids) if column == "group_ids" else getattr(self, column) is not None

    def select(self, rows: Array) -> ScoredRows:
        """Picks rows.

        Args:
          rows: bool [num_rows], or indices.

        Returns:
          All columns of these rows, in their order.
        """
        columns: dict[str, Any] = {name: values[rows] for name, values in self._columns().items()}
        return dataclasses.replace(self, **columns, group_ids={name: ids[rows] for name, ids in self.group_ids.items()})

    def clicks(self) -> ScoredRows:
        """The clicked rows."""
        return self.select(self.label > 0.5)

    def judged_by(self, column: str) -> ScoredRows:
        """Replaces the label.

        Args:
          column: the column to take for it, such as ``intensity_label``; it must be there.

        Returns:
          All rows, by whose ``label`` the same metrics say how well predictions tell that column.
        """
        return dataclasses.replace(self, label=getattr(self, column))

    def without_calibration(self) -> ScoredRows:
        """All rows, with the predictions before the calibration."""
        return dataclasses.replace(self, ctr=self.uncalibrated)

    @classmethod
    def concatenated(cls, parts: Sequence[ScoredRows]) -> ScoredRows:
        """Joins rows of one dataset.

        Args:
          parts: one or more, with the same columns.

        Returns:
          All rows, in the order of the parts.
        """
        columns: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in parts[0]._columns()
        }
        group_ids = {name: np.concatenate([part.group_ids[name] for part in parts]) for name in parts[0].group_ids}
        return cls(**columns, group_ids=group_ids)

    def _columns(self) -> dict[str, Array]:
        names = (field.name for field in dataclasses.fields(self) if field.name != "group_ids")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
