"""The facts that the stages of a build ask of a feature or a user group, whatever kind it is.

No stage but the transform needs to know the kinds: each kind answers for itself.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from clsd_tf.spec.model_inputs import CategoricalInput, RawInput
from clsd_tf.spec.tables import ColumnType, Name
from clsd_tf.spec.validation import StrictModel


class SpecEntry(StrictModel, abc.ABC):
    """A feature or a user group.

    Attributes:
      reads_column: its raw input is a column of a table; if not, it is made of the user's past events.
      is_list: its raw input is a list of values.
      name: unique in the spec.
    """

    reads_column: ClassVar[bool] = True
    is_list: ClassVar[bool] = False

    name: Name

    @property
    @abc.abstractmethod
    def raw_name(self) -> str:
        """Name of the raw input that it is made of: a column's, or its own."""

    @property
    def values_per_row(self) -> int | None:
        """The most values that a row has, padded where it has fewer; None for a single one."""
        return None

    @property
    @abc.abstractmethod
    def counted_as(self) -> Literal["numbers", "values", "lists"]:
        """Kind of data statistics of its raw input; of lists they know the lengths alone."""

    @abc.abstractmethod
    def meaning(self) -> dict[str, Any]:
        """The settings that give its ids or numbers their meaning: they stay where a dataset grows from another."""

    def raw_input(self, column_types: Mapping[str, ColumnType]) -> RawInput:
        """Describes the value that a serving request carries for it.

        Args:
          column_types: of the columns of all tables.

        Returns:
          Name and type: of its column, or of what is made of past events.
        """
        return RawInput(self.raw_name, column_types[self.raw_name], self.is_list)


class BaseFeature(SpecEntry):
    """A feature: it becomes ids or a number that a model sees.

    Attributes:
      column_types: types that its column may have; of a feature that reads one.
    """

    column_types: ClassVar[tuple[ColumnType, ...]] = ()

    @property
    def value_separator(self) -> str | None:
        """Text between the values in its column; None where the column holds single ones."""
        return None

    @abc.abstractmethod
    def categorical_input(
        self, feature: Callable[[str], BaseFeature], vocabulary_lengths: Mapping[str, int]
    ) -> CategoricalInput | None:
        """Describes the ids that it becomes.

        Args:
          feature: finds another feature of the spec by its name.
          vocabulary_lengths: number of values of each vocabulary, by the name of its feature.

        Returns:
          Names and sizes; None if it becomes a number.
        """
