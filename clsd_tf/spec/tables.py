"""The log's side of a feature spec: tables, columns, event time, label expressions and the split."""

from __future__ import annotations

import dataclasses
import datetime as dt
import operator
import re
from typing import Annotated, Literal

import numpy as np
import pydantic

from clsd_tf.spec.expectations import Expectation
from clsd_tf.spec.validation import StrictModel

ColumnType = Literal["string", "int64", "float"]
Name = Annotated[str, pydantic.Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]


def _parse_moment(value: object) -> object:
    """ISO text -> datetime (a date means its midnight); anything else as it is."""
    # Python 3.10 does not read the Z that stands for UTC.
    return dt.datetime.fromisoformat(value.replace("Z", "+00:00")) if isinstance(value, str) else value


def _in_utc(value: dt.datetime) -> dt.datetime:
    return value if value.tzinfo else value.replace(tzinfo=dt.timezone.utc)


# A date (its midnight) or a time, UTC unless it names its zone.
Moment = Annotated[dt.datetime, pydantic.BeforeValidator(_parse_moment), pydantic.AfterValidator(_in_utc)]
_OPERATORS = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt
}  # fmt: skip
_COMPARISON = re.compile(rf"^\s*([A-Za-z]\w*)\s*({'|'.join(_OPERATORS)})\s*(-?\d+(?:\.\d+)?|'[^']*')\s*$")


class Column(StrictModel):
    """One column of a source table.

    Attributes:
      name: the name used in the rest of the spec and in serving requests.
      type: how the text is read. Unparsable values make the row a bad row.
      source_name: the column's name in the file, when it differs.
      expect: what ``pipelines.validate_data`` checks the values by.
      sensitive: its values never stand in dead letters, statistics or logs, and no feature or user group may use it. A
        key, ``valid_from`` or a label's column may be sensitive (records hold only whether the label's comparison
        holds); a user key then needs ``user_id_salt_env``.
    """

    name: Name
    type: ColumnType
    source_name: str | None = None
    expect: Expectation | None = None
    sensitive: bool = False

    @pydantic.model_validator(mode="after")
    def _check_expect(self) -> Column:
        if self.expect and self.expect.has_range and self.type == "string":
            raise ValueError(f"expect.min and expect.max are for numbers. Received: the string column {self.name!r}")
        if self.expect and self.expect.values and self.type == "float":
            raise ValueError(f"expect.values is for string and int64. Received: the float column {self.name!r}")
        return self

    @property
    def name_in_file(self) -> str:
        """``source_name``, or the name itself."""
        return self.name if self.source_name is None else self.source_name


class EventTime(StrictModel):
    """The column of a time: an event's, or that a profile row is valid from.

    Rows outside [earliest, latest) are bad rows: mostly a wrong ``unit``.
    """

    column: Name
    unit: Literal["seconds", "milliseconds", "microseconds"]
    earliest: dt.date = dt.date(1990, 1, 1)
    latest: dt.date = dt.date(2100, 1, 1)

    @pydantic.model_validator(mode="after")
    def _check(self) -> EventTime:
        if self.earliest >= self.latest:
            raise ValueError(f"earliest must be before latest. Received: {self.earliest} and {self.latest}")
        return self

    @property
    def microseconds_per_unit(self) -> int:
        """Factor from the column's numbers to microseconds."""
        return {"seconds": 1_000_000, "milliseconds": 1_000, "microseconds": 1}[self.unit]


class Table(StrictModel):
    """A source table: ``path`` is relative to the input directory and may be a glob pattern.

    ``key`` joins a user or item table to the log; the log has none. It is unique, unless the table has
    ``valid_from``: then (key, valid_from) is, and each event gets the latest row with valid_from <= the event's time,
    never a later one. A row that is valid from the very time of an event counts as known by then, since ``valid_from``
    says when it can be read; so a row that sums up events until and including time t is valid from the next
    microsecond on at the earliest.

    ``delimiter`` stands between the values of a CSV file, when that is no comma.
    """

    path: str
    format: Literal["csv", "tsv", "jsonl", "parquet", "avro", "tfrecord", "tfds"]
    delimiter: str | None = pydantic.Field(default=None, pattern=r"^[!-/:-@\[-`{-~ ]$")
    columns: tuple[Column, ...] = pydantic.Field(min_length=1)
    key: Name | None = None
    valid_from: EventTime | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> Table:
        # A file's column under two names would let the label in as a feature.
        in_file = [column.name_in_file for column in self.columns]
        repeated = sorted({name for name in in_file if in_file.count(name) > 1})
        if repeated:
            raise ValueError(f"each column of a file may be declared once. Received: {repeated[0]!r} twice")
        if self.delimiter and (self.format != "csv" or self.delimiter == '"'):
            raise ValueError(
                f"only a csv table has a delimiter, and no quote. Received: {self.format}, {self.delimiter!r}"
            )
        return self

    @property
    def column_names(self) -> list[str]:
        """Names of the columns as declared."""
        return [column.name for column in self.columns]

    def column(self, name: str) -> Column:
        """Finds a column by its ``name``, which must be one of ``column_names``.

        Returns:
          Its declaration.
        """
        return next(column for column in self.columns if column.name == name)


class Tables(StrictModel):
    """The log, and what is known of users and items.

    ``user_state`` and ``item_state`` hold what changes, beside a static profile in ``user`` and ``item``: they must
    have ``valid_from``, which the other two may have.
    """

    log: Table
    user: Table | None = None
    item: Table | None = None
    user_state: Table | None = None
    item_state: Table | None = None

    def items(self) -> list[tuple[str, Table]]:
        """The declared tables as (role, table)."""
        roles = ("log", "user", "item", "user_state", "item_state")
        return [(role, getattr(self, role)) for role in roles if getattr(self, role) is not None]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """``column operator value``, for example ``rating >= 4``."""

    column: str
    operator: str
    value: int | float | str

    @classmethod
    def parse(cls, expression: str) -> Comparison:
        """Reads a comparison.

        Args:
          expression: a column, an operator, and a number or text in single quotes.

        Returns:
          The comparison; a number without a point is an int.

        Raises:
          ValueError: it is no comparison.
        """
        match = _COMPARISON.match(expression)
        if match is None:
            raise ValueError(
                f"a label is `column operator value`. Received: {expression!r}. Allowed operators: "
                f"{' '.join(_OPERATORS)}; "
                "allowed values: a number or 'text' in single quotes, for example `rating >= 4`"
            )
        column, operator, value = match.groups()
        if value.startswith("'"):
            return cls(column, operator, value[1:-1])
        return cls(column, operator, float(value) if "." in value else int(value))  # Large integers are no floats.

    def holds(self, values: np.ndarray) -> np.ndarray:
        """Compares values of the column.

        Args:
          values: numbers, or text as Python objects; none of them missing.

        Returns:
          ``values operator value``, bool in the shape of ``values``.
        """
        return _OPERATORS[self.operator](values, self.value)


class Split(StrictModel):
    """The rule by which rows become train, validation and test.

    - ``rule: time`` cuts the event-time axis, either at quantiles (``train``, ``validation``, ``test`` fractions) or at
      the given dates; a row never trains a model that is tested on an earlier one. Events from ``until`` on are left
      out, which keeps days back while hyper-parameters are chosen; so are events of the ``gap_days`` before validation
      and before test, so that labels which arrive late cannot reach over the border.
    - ``rule: user`` draws each user independently, by the fractions: tested users were never seen in training.
    - ``rule: last_n_per_user`` tests on the last ``test_events`` of each user, validates on the ``validation_events``
      before them and trains on the rest; users with nothing left to train on are in training as a whole. Other users'
      later events are in training: for comparison with sequence models' published numbers.
    - ``rule: random`` draws each row independently; it flatters every model (the future leaks into training) and exists
      for comparison only.
    """

    rule: Literal["time", "random", "user", "last_n_per_user"] = "time"
    train: float = pydantic.Field(default=0.8, gt=0, lt=1)
    validation: float = pydantic.Field(default=0.1, gt=0, lt=1)
    test: float = pydantic.Field(default=0.1, gt=0, lt=1)
    validation_from: Moment | None = None
    test_from: Moment | None = None
    until: Moment | None = None
    gap_days: float = pydantic.Field(default=0, ge=0, le=36_500)
    validation_events: int = pydantic.Field(default=1, ge=1)
    test_events: int = pydantic.Field(default=1, ge=1)
    seed: int = pydantic.Field(default=0, ge=0)

    @pydantic.model_validator(mode="after")
    def _check(self) -> Split:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-9:
            raise ValueError(f"train + validation + test must be 1. Received: {total:g}")
        if (self.validation_from is None) != (self.test_from is None):
            raise ValueError("validation_from and test_from go together. Received: one of them")
        if self.validation_from and self.rule != "time":
            raise ValueError(f"cut-off dates need rule: time. Received: rule: {self.rule}")
        if self.gap_days and self.rule != "time":
            raise ValueError(f"gap_days needs rule: time. Received: rule: {self.rule}")
        if self.validation_from and self.test_from and self.test_from <= self.validation_from:
            raise ValueError(
                f"test_from must be after validation_from. Received: {self.test_from} <= {self.validation_from}"
            )
        if self.until and not (self.test_from and self.until > self.test_from):
            raise ValueError(f"until must come after test_from. Received: {self.until} and {self.test_from}")
        return self
