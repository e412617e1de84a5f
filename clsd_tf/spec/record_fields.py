"""Fields of a training record beside the model inputs, declared once for all who write or read records."""

from __future__ import annotations

import dataclasses
from typing import Literal

Purpose = Literal["label", "weight", "row_id", "held_out"]


@dataclasses.dataclass(frozen=True)
class RecordField:
    """One value per row, never a model input.

    Attributes:
      name: in records, and the column of joined rows.
      dtype: integers are packed with ids, floats with numbers.
      purpose: a ``label`` and the ``weight`` go to the loss; scores and fold masks find their row by the ``row_id``;
        what is ``held_out`` reaches no training step.
    """

    name: str
    dtype: Literal["int64", "float"]
    purpose: Purpose


# In the order in which they are packed, each dtype by itself.
RECORD_FIELDS = (
    RecordField("label", "float", "label"),
    RecordField("intensity_label", "float", "held_out"),
    RecordField("intensity_value", "float", "held_out"),  # NaN if missing.
    RecordField("sample_weight", "float", "weight"),
    RecordField("user_hash", "int64", "held_out"),
    RecordField("row_id", "int64", "row_id"),
    RecordField("event_time", "int64", "held_out"),  # Microseconds since 1970.
)
TEACHER_SCORE = "teacher_score"  # Joins a batch by row id; no record holds it.
RESERVED_NAMES = (*(field.name for field in RECORD_FIELDS), TEACHER_SCORE)  # Of no feature or user group.
RESERVED_RAW_NAMES = (*RESERVED_NAMES, "ctr")  # Of no raw input: joined rows and scored rows hold both.


def names_of(*purposes: Purpose) -> list[str]:
    """Finds the fields with a purpose.

    Args:
      purposes: one or more.

    Returns:
      Their names, in the order of records.
    """
    return [field.name for field in RECORD_FIELDS if field.purpose in purposes]
