"""Features that are made of what the user did strictly before the event."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import pydantic

from clsd_tf.spec.feature_base import BaseFeature
from clsd_tf.spec.model_inputs import CategoricalInput, RawInput
from clsd_tf.spec.number_features import NumberFeature
from clsd_tf.spec.tables import ColumnType, Comparison, Name


class FromPastEvents(BaseFeature):
    """A feature of the user's own past: of events strictly before the one that it describes.

    Attributes:
      where: only events for which this comparison of a log column holds, for example ``is_like == 1``. It may read
        labels and other held-out columns, which are known of past events; where the column is missing it does not hold.
      within_seconds: only events at most this old.
      delay_seconds: an event is seen once it is older than this: labels arrive late in production.
    """

    reads_column: ClassVar[bool] = False

    where: str | None = None
    within_seconds: float | None = pydantic.Field(default=None, gt=0, le=1e10)
    delay_seconds: float = pydantic.Field(default=0, ge=0, le=1e10)

    @pydantic.model_validator(mode="after")
    def _window_is_not_empty(self) -> FromPastEvents:
        if self.within_seconds is not None and self.within_seconds <= self.delay_seconds:
            raise ValueError(
                f"within_seconds must be more than delay_seconds. Received: {self.within_seconds:g} and "
                f"{self.delay_seconds:g}"
            )
        return self

    @property
    def raw_name(self) -> str:
        return self.name

    @property
    def where_comparison(self) -> Comparison | None:
        """By which an event counts; None where all do."""
        return Comparison.parse(self.where) if self.where else None

    @abc.abstractmethod
    def event_column(self, feature: Callable[[str], BaseFeature]) -> str | None:
        """Names the column of past events that it is made of.

        Args:
          feature: finds another feature of the spec by its name.

        Returns:
          Its name; None where events are only counted.
        """


class HistoryFeature(FromPastEvents):
    """The user's last ``max_length`` values of the categorical feature ``of`` strictly before the event, oldest first.

    ``of`` is a feature of the log or of an item table; the history shares its vocabulary, and so its embedding table.
    In a serving request it is a list of values.
    """

    is_list: ClassVar[bool] = True

    type: Literal["history"]
    of: Name
    max_length: int = pydantic.Field(default=20, ge=1)

    @property
    def counted_as(self) -> Literal["lists"]:
        return "lists"

    @property
    def values_per_row(self) -> int:
        return self.max_length

    def raw_input(self, column_types: Mapping[str, ColumnType]) -> RawInput:
        return RawInput(self.name, "string", self.is_list)

    def event_column(self, feature: Callable[[str], BaseFeature]) -> str:
        return feature(self.of).raw_name

    def categorical_input(
        self, feature: Callable[[str], BaseFeature], vocabulary_lengths: Mapping[str, int]
    ) -> CategoricalInput | None:
        of = feature(self.of).categorical_input(feature, vocabulary_lengths)
        return of and dataclasses.replace(of, name=self.name, max_values=self.max_length, history_of=self.of)

    def meaning(self) -> dict[str, Any]:
        return {"type": self.type, "of": self.of}


class WindowFeature(NumberFeature, FromPastEvents):
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
    min_count: int = pydantic.Field(default=1, ge=1)

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

    @property
    def number_column(self) -> str | None:
        return self.value

    def raw_input(self, column_types: Mapping[str, ColumnType]) -> RawInput:
        return RawInput(self.name, "float")

    def event_column(self, feature: Callable[[str], BaseFeature]) -> str | None:
        return self.value
