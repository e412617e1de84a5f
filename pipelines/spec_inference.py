"""Guesses a feature spec from samples of tables; every guess comes with its reason."""

from __future__ import annotations

import dataclasses
import datetime as dt
import operator
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc
import sklearn.metrics

from clsd_tf.tables import Comparison
from pipelines.column_profiles import ColumnProfile, TableProfile
from pipelines.feature_inference import (
    ID_ENDING,
    TIME_NAME,
    Entry,
    guess_feature,
    guess_user_groups,
    key_features,
)

_USER_NAMES = (
    rf"^(user|uid|visitor|customer|member|account|reader|viewer|reviewer|person){ID_ENDING}?$",
    rf"^(device|cookie|client|session){ID_ENDING}$",
)
_ITEM_NAMES = (
    rf"^(item|iid|video|article|news|product|ad|creative|doc|document|content|movie|film|song|track|post|photo){ID_ENDING}?$",
    rf"^(sku|asin|isbn|book|app|game|note|story|campaign|offer|listing|merchant|shop|business){ID_ENDING}?$",
)
_CLICK_NAMES = (r"^(is_?)?(click|clicked|clk)$", r"^(label|target|y|ctr_label)$", r"click|clk", r"label|target")
_RATING_NAME = re.compile(r"(^|_)(rating|stars?|score)(_|$)")
# Beginnings of words that stand for what a user does after the impression.
_AFTER_EVENT = re.compile(
    r"(?:^|_)(play|watch|dwell|read|stay|listen|engag|conver|purchas|bought|buy|paid|pay|cart|like|share|follow|comment|"
    r"favo|forward|subscri|skip|hate|finish|complet|click|clk|rating|long_view|stars?$)"
)
_TELLING_AUC = 0.9  # No single feature known beforehand ranks clicks as well.
_OPERATORS = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the user already knows; None is guessed. ``label`` is a column or an expression."""

    user_key: str | None = None
    item_key: str | None = None
    event_time: str | None = None
    label: str | None = None


@dataclasses.dataclass(frozen=True)
class InferredSpec:
    """A spec with a reason for every guess.

    Attributes:
      tables: with the keys renamed to what the log calls them and no other name twice.
      settings: key of the spec (``user_key``, ``label``, ...) -> (its value, the reason).
      features, user_groups, left_out: in the order of the columns.
    """

    tables: Mapping[str, TableProfile]
    settings: Mapping[str, tuple[Any, str]]
    features: tuple[Entry, ...]
    user_groups: tuple[Entry, ...]
    left_out: tuple[Entry, ...]

    def use_of(self, role: str, column: str) -> str:
        """What was decided about a column, in words."""
        uses = [key for key, (value, _) in self.settings.items() if column in _columns_of(value)]
        entries = (*self.features, *self.user_groups, *self.left_out)
        found = [entry for entry in entries if (entry.role, entry.column) == (role, column)]
        uses += [entry.content.get("type", "user group") for entry in found if entry.content]
        return ", ".join(uses) or f"left out: {found[0].reason}"


def _columns_of(value: Any) -> list[str]:
    """The columns that a setting's value names."""
    return [str(value.get("column"))] if isinstance(value, Mapping) else str(value).split()[:1]


def infer_spec(log: TableProfile, profiles: Mapping[str, TableProfile], choices: Choices) -> InferredSpec:
    """Guesses how a log and its profile tables (``user``, ``item``) become a data set.

    Raises:
      ValueError: no column looks like a key, the event time or the label; names the flag to pass.
    """
    keys = {
        "user": _key(log, profiles.get("user"), choices.user_key, _USER_NAMES, "user"),
        "item": _key(log, profiles.get("item"), choices.item_key, _ITEM_NAMES, "item"),
    }
    tables = _aligned(log, profiles, keys)
    time = _event_time(log, choices.event_time)
    label, why_label = _label(log, choices.label, {keys["user"].name, keys["item"].name, time.name})
    settings: dict[str, tuple[Any, str]] = {
        "user_key": (keys["user"].name, keys["user"].evidence()),
        "item_key": (keys["item"].name, keys["item"].evidence()),
        "event_time": (_event_time_content(time), time.evidence()),
        "label": (label, why_label),
    }
    used = {keys["user"].name, keys["item"].name, time.name, Comparison.parse(label).column}
    after = {
        column.name: why
        for column in log.columns
        if (why := _after_event(column, log, label)) and column.name not in used
    }
    settings |= _intensity(log, after)
    settings["split"] = _split(time)
    candidates = [
        (role, column)
        for role, table in tables.items()
        for column in table.columns
        if column.name not in {*used, *after}
    ]
    guesses = [*key_features(keys), *(guess_feature(role, column) for role, column in candidates)]
    left_out = [Entry("log", name, None, why) for name, why in after.items()]
    return InferredSpec(
        tables=tables,
        settings=settings,
        features=tuple(entry for entry in guesses if entry.content),
        user_groups=tuple(guess_user_groups(tables, candidates, keys)),
        left_out=(*left_out, *(entry for entry in guesses if not entry.content)),
    )


# --- Keys, time, label -----------------------------------------------------------------------------------------------


def _named(table: TableProfile, name: str, flag: str) -> ColumnProfile:
    column = table.column(name)
    if column is None:
        raise ValueError(f"--{flag} must be a column of the log. Received: {name!r}. Allowed: {_names(table)}")
    return column


def _names(table: TableProfile) -> str:
    return ", ".join(column.name for column in table.columns)


def _key(
    log: TableProfile, profile: TableProfile | None, choice: str | None, patterns: tuple[str, ...], role: str
) -> ColumnProfile:
    if choice:
        return _named(log, choice, f"{role}_key")
    for pattern in patterns:
        for column in log.columns:
            if re.search(pattern, column.name.lower()):
                return column
    shared = [column for column in log.columns if profile and _is_unique(profile.column(column.source_name))]
    if shared:
        return shared[0]
    raise ValueError(
        f"no column of the log looks like the id of the {role}. Received: {_names(log)}. Pass --{role}_key=<column>"
    )


def _is_unique(column: ColumnProfile | None) -> bool:
    return column is not None and column.num_distinct == column.num_rows


def _event_time(log: TableProfile, choice: str | None) -> ColumnProfile:
    if choice:
        column = _named(log, choice, "event_time")
        if column.unit is None:
            raise ValueError(
                "the event time must be a number of seconds, milliseconds or microseconds since 1970. "
                f"Received: --event_time={choice}, a {column.type} column; {column.evidence()}. Convert it"
            )
        return column
    candidates = [column for column in log.columns if column.unit and TIME_NAME.search(column.name.lower())]
    if candidates:
        return max(candidates, key=lambda column: column.num_distinct)
    written = [column.name for column in log.columns if _is_written_date(column)]
    hint = f"{', '.join(written)} has dates as text: convert them. " if written else ""
    raise ValueError(
        "no column of the log looks like the time of the event (a number of seconds, milliseconds or microseconds "
        f"since 1970, named time, timestamp, ...). Received: {_names(log)}. {hint}Pass --event_time=<column>"
    )


def _is_written_date(column: ColumnProfile) -> bool:
    is_text = column.type == "string" and column.missing < 1
    return is_text and pc.all(pc.match_substring_regex(column.values, r"^\d{4}-\d\d-\d\d")).as_py()


def _event_time_content(time: ColumnProfile) -> dict[str, Any]:
    per_second = {"seconds": 1, "milliseconds": 1e3, "microseconds": 1e6}[time.unit]
    years = [
        dt.datetime.fromtimestamp(value / per_second, dt.timezone.utc).year
        for value in (time.numbers.min(), time.numbers.max())
    ]
    # Wide enough for rows beyond the sample, narrow enough to catch another unit.
    return {
        "column": time.name,
        "unit": time.unit,
        "earliest": f"{years[0] - 5}-01-01",
        "latest": f"{years[1] + 10}-01-01",
    }


def _label(log: TableProfile, choice: str | None, taken: set[str]) -> tuple[str, str]:
    if choice and re.search(r"[<>=!]", choice):
        name = Comparison.parse(choice).column
        return choice, f"as given; {_named(log, name, 'label').evidence()}"
    columns = [_named(log, choice, "label")] if choice else [x for x in log.columns if x.name not in taken]
    binary = [column for column in columns if column.is_binary]
    for pattern in _CLICK_NAMES if not choice else ("",):
        for column in binary:
            if re.search(pattern, column.name.lower()):
                return f"{column.name} == 1", f"0 or 1; {column.numbers.mean():.1%} of the rows are 1"
    for column in columns:
        if column.is_number and column.num_distinct > 1 and (choice or _RATING_NAME.search(column.name.lower())):
            return _rating_label(column)
    if len(binary) == 1:
        return f"{binary[0].name} == 1", f"the only column of 0 and 1; {binary[0].numbers.mean():.1%} of the rows are 1"
    received = f"columns of 0 and 1: {', '.join(column.name for column in binary) or 'none'}"
    raise ValueError(
        f"no column of the log looks like the label. Received: {_names(log)}; {received}. "
        "Pass --label=<column of 0 and 1>, or --label='<column> >= <number>'"
    )


def _rating_label(column: ColumnProfile) -> tuple[str, str]:
    """Calls the upper part of a rating's values clicks: the lowest threshold that at most 60 % of the rows reach."""
    numbers = column.numbers
    distinct = np.unique(numbers)[1:]
    threshold = next((value for value in distinct if (numbers >= value).mean() <= 0.6), distinct[-1])
    return (
        f"{column.name} >= {threshold:.15g}",
        f"no column of 0 and 1 is named click or label; {(numbers >= threshold).mean():.1%} of the rows are rated so",
    )


def _clicks(log: TableProfile, label: str) -> np.ndarray:
    comparison = Comparison.parse(label)
    values = log.column(comparison.column).values.to_numpy(zero_copy_only=False)
    return np.asarray(_OPERATORS[comparison.operator](values, comparison.value), bool)


def _after_event(column: ColumnProfile, log: TableProfile, label: str) -> str | None:
    """Why a column of the log seems to be known only after the event; None if it does not."""
    word = _AFTER_EVENT.search(column.name.lower())
    if word and column.is_number:
        return f"its name ({word[1]}...) says that it is known only after the event"
    if not column.is_number or column.num_distinct < 2:
        return None
    known = column.values.is_valid().to_numpy(zero_copy_only=False)
    clicks = _clicks(log, label)[known]
    if clicks.all() or not clicks.any():
        return None
    auc = sklearn.metrics.roc_auc_score(clicks, column.numbers)
    if max(auc, 1 - auc) < _TELLING_AUC:
        return None
    return f"alone it ranks clicks with an AUC of {max(auc, 1 - auc):.2f}, as only what follows the event does"


def _intensity(log: TableProfile, after: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    """Signals that follow the event, held out to judge confidence with: an amount, else a rarer yes."""
    columns = [column for column in log.columns if column.name in after and column.missing == 0]
    for column in columns:
        if not column.is_binary and column.numbers.min() >= 0:
            return {"intensity_value": (column.name, f"known after the event; {column.evidence()}")}
    for column in columns:
        if column.is_binary:
            return {
                "intensity_label": (f"{column.name} == 1", f"known after the event; {column.numbers.mean():.1%} are 1")
            }
    return {}


def _split(time: ColumnProfile) -> tuple[Any, str]:
    if time.num_distinct < 10:
        return {"rule": "random"}, f"only {time.num_distinct} different times: too few to cut by time, which is better"
    return {
        "rule": "time",
        "train": 0.8,
        "validation": 0.1,
        "test": 0.1,
    }, "by time: a model is tested on what comes later"


# --- Tables ----------------------------------------------------------------------------------------------------------


def _aligned(
    log: TableProfile, profiles: Mapping[str, TableProfile], keys: Mapping[str, ColumnProfile]
) -> dict[str, TableProfile]:
    """Gives keys the log's name and type, and renames columns whose name another table has."""
    tables, taken = {"log": log}, {column.name for column in log.columns}
    for role, table in profiles.items():
        join = table.column(keys[role].source_name) or table.column(keys[role].name) or _other_key(table, role)
        columns = []
        for column in table.columns:
            name = keys[role].name if column is join else column.name
            if column is not join and name in taken:
                name = f"{role}_{name}"
            columns.append(
                dataclasses.replace(column, name=name, type=keys[role].type if column is join else column.type)
            )
        tables[role] = dataclasses.replace(table, columns=tuple(columns))
        taken |= {column.name for column in columns}
    return tables


def _other_key(table: TableProfile, role: str) -> ColumnProfile:
    """The key of a profile table that calls it otherwise than the log."""
    patterns = {"user": _USER_NAMES, "item": _ITEM_NAMES}[role]
    for pattern in (*patterns, rf"^{ID_ENDING}$"):
        for column in table.columns:
            if re.search(pattern, column.name.lower()) and _is_unique(column):
                return column
    raise ValueError(
        f"no column of the {role} table joins it to the log. Received: {_names(table)}. "
        "Give the key one name in both files, or write source_name into the spec by hand"
    )
