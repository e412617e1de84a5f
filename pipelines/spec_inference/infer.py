"""Guesses a feature spec from samples of tables; every guess comes with its reason."""

from __future__ import annotations

import dataclasses
import datetime as dt
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import sklearn.metrics

from clsd_tf.spec.tables import Comparison
from pipelines.rows.joins import evaluate_comparison
from pipelines.spec_inference.features import (
    MAX_CATEGORIES,
    TIME_NAME,
    Entry,
    guess_feature,
    guess_user_groups,
    key_features,
)
from pipelines.spec_inference.profiles import ID_ENDING, ColumnProfile, TableProfile, unique_name

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
_MIN_ROWS_PER_VALUE = 10  # With fewer, the click rates of chance values rank the very rows that they come from.
_MIN_TELLING_ROWS, _MAX_CHANCE = 10, 1e-6


@dataclasses.dataclass(frozen=True)
class Choices:
    """Settings that the user already knows; None is guessed.

    Attributes:
      user_key, item_key, event_time: columns of the log.
      label: column of yes and no, or a comparison such as ``rating >= 4``.
    """

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
        """Decision about a column, in words.

        Args:
          role: of its table.
          column: by its name in the spec.

        Returns:
          Its uses, joined by commas, or the reason why it is left out.
        """
        uses = [key for key, (value, _) in self.settings.items() if column in _columns_of(value)]
        entries = (*self.features, *self.user_groups, *self.left_out)
        found = [entry for entry in entries if (entry.role, entry.column) == (role, column)]
        uses += [entry.content.get("type", "user group") for entry in found if entry.content]
        return ", ".join(uses) or f"left out: {found[0].reason}"


def _columns_of(value: Any) -> list[str]:
    """The columns that a setting's value names."""
    return [str(value.get("column"))] if isinstance(value, Mapping) else str(value).split()[:1]


def infer_spec(log: TableProfile, profiles: Mapping[str, TableProfile], choices: Choices) -> InferredSpec:
    """Guesses how a log and its profile tables become a data set.

    Args:
      log: one row an event.
      profiles: tables of the roles ``user`` and ``item``; none, one or both.
      choices: what is not guessed.

    Returns:
      The spec; every guess has its reason.

    Raises:
      ValueError: no column looks like a key, the event time or the label; names the flag to pass.
    """
    keys = {
        "user": _key(log, profiles.get("user"), choices.user_key, _USER_NAMES, "user"),
        "item": _key(log, profiles.get("item"), choices.item_key, _ITEM_NAMES, "item"),
    }
    tables = _aligned(log, profiles, keys)
    log = tables["log"]
    keys = {role: log.column(key.name) for role, key in keys.items()}
    time = _event_time(log, choices.event_time)
    label, why_label = _label(log, choices.label, {keys["user"].name, keys["item"].name, time.name})
    settings: dict[str, tuple[Any, str]] = {
        "user_key": (keys["user"].name, keys["user"].evidence()),
        "item_key": (keys["item"].name, keys["item"].evidence()),
        "event_time": (_event_time_content(time), time.evidence()),
        "label": (label, why_label),
    }
    used = {keys["user"].name, keys["item"].name, time.name, Comparison.parse(label).column}
    clicks = _clicks(log, label)
    after = {
        column.name: why for column in log.columns if column.name not in used and (why := _after_event(column, clicks))
    }
    settings |= _intensity(log, after)
    settings["split"] = _split(time)
    candidates = [
        (role, column)
        for role, table in tables.items()
        for column in table.columns
        if column.name not in {*used, *after}
    ]
    taken = {column.name for table in tables.values() for column in table.columns}
    guesses = [*key_features(keys, taken), *(guess_feature(role, column) for role, column in candidates)]
    left_out = [Entry("log", name, None, why) for name, why in after.items()]
    features = tuple(entry for entry in guesses if entry.content)
    taken |= {entry.content["name"] for entry in features}
    return InferredSpec(
        tables=tables,
        settings=settings,
        features=features,
        user_groups=tuple(guess_user_groups(tables, candidates, keys, taken)),
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
        return _given_label(log, Comparison.parse(choice))
    columns = [_named(log, choice, "label")] if choice else [x for x in log.columns if x.name not in taken]
    binary = [column for column in columns if column.is_binary]
    for pattern in _CLICK_NAMES if not choice else ("",):
        for column in binary:
            if re.search(pattern, column.name.lower()):
                return column.yes_expression, f"yes or no; {_yes_share(column)}"
    for column in columns:
        if column.is_number and column.num_distinct > 1 and (choice or _RATING_NAME.search(column.name.lower())):
            return _rating_label(column)
    if len(binary) == 1:
        return binary[0].yes_expression, f"the only column of yes and no; {_yes_share(binary[0])}"
    received = f"columns of yes and no: {', '.join(column.name for column in binary) or 'none'}"
    raise ValueError(
        f"no column of the log looks like the label. Received: {_names(log)}; {received}. "
        "Pass --label=<column of yes and no>, or --label='<column> >= <number>'"
    )


def _yes_share(column: ColumnProfile) -> str:
    return f"{column.yes_share:.1%} of the rows are {column.yes}"


def _given_label(log: TableProfile, given: Comparison) -> tuple[str, str]:
    column = _named(log, given.column, "label")
    is_text = isinstance(given.value, str)
    if is_text == column.is_number or (is_text and given.operator not in ("==", "!=")):
        allowed = f"'{column.name} == <number>'" if column.is_number else f"\"{column.name} == '<text>'\""
        raise ValueError(
            f"--label must compare a column with a value of its type, text by == or !=. Received: {given.operator} "
            f"with {'text' if is_text else 'a number'} for the {column.type} column {column.name}. Allowed: {allowed}"
        )
    value = f"'{given.value}'" if is_text else _as_written(given.value)
    return f"{column.name} {given.operator} {value}", f"as given; {column.evidence()}"


def _as_written(number: float) -> str:
    """A number as a label may contain it: without an exponent."""
    return np.format_float_positional(number, trim="-")


def _rating_label(column: ColumnProfile) -> tuple[str, str]:
    """Calls the upper part of a rating's values clicks: the lowest threshold that at most 60 % of the rows reach."""
    numbers = column.numbers
    distinct = np.unique(numbers)[1:]
    threshold = next((value for value in distinct if (numbers >= value).mean() <= 0.6), distinct[-1])
    return (
        f"{column.name} >= {_as_written(threshold)}",
        f"no column of 0 and 1 is named click or label; {(numbers >= threshold).mean():.1%} of the rows are rated so",
    )


def _clicks(log: TableProfile, label: str) -> np.ndarray:
    """True for each row of the log that is a click, bool [num_rows]."""
    comparison = Comparison.parse(label)
    column = pa.table({comparison.column: log.column(comparison.column).values})
    return evaluate_comparison(comparison, column) > 0


def _after_event(column: ColumnProfile, clicks: np.ndarray) -> str | None:
    """Reason why a column of the log seems to be known only after the event; None if it does not."""
    word = _AFTER_EVENT.search(column.name.lower())
    if word and (column.is_number or column.yes is not None):
        return f"its name ({word[1]}...) says that it is known only after the event"
    known = column.values.is_valid().to_numpy(zero_copy_only=False)
    # The rarer clicks are, the fewer filled rows chance explains.
    if known.sum() >= _MIN_TELLING_ROWS and clicks[known].all() and clicks.mean() ** known.sum() < _MAX_CHANCE:
        return f"only clicked rows have a value ({known.sum():,} of {clicks.sum():,}), as of what follows the event"
    auc = max((_auc(scores, clicks[rows]) for scores, rows in _rankings(column, known, clicks)), default=0.5)
    if auc < _TELLING_AUC:
        return None
    return f"alone it ranks clicks with an AUC of {auc:.2f}, as only what follows the event does"


def _rankings(
    column: ColumnProfile, known: np.ndarray, clicks: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray | slice]]:
    """(scores, their rows): by which the column could rank clicks.

    By whether it has a value, by its numbers, and by the click rate of each of its values if they are few.
    """
    yield known, slice(None)
    if column.is_number:
        yield column.numbers, known
    if column.num_distinct <= min(MAX_CATEGORIES, len(clicks) / _MIN_ROWS_PER_VALUE):
        values = column.values.dictionary_encode().indices.fill_null(column.num_distinct).to_numpy()
        rates = np.bincount(values, clicks) / np.maximum(np.bincount(values), 1)
        yield rates[values], slice(None)


def _auc(scores: np.ndarray, clicks: np.ndarray) -> float:
    """Area under the ROC curve of the better direction, in [0.5, 1]; 0.5 without clicks or without others."""
    if clicks.all() or not clicks.any():
        return 0.5
    auc = sklearn.metrics.roc_auc_score(clicks, scores)
    return max(auc, 1 - auc)


def _intensity(log: TableProfile, after: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    """Signals that follow the event, held out to judge confidence with: an amount, else a rarer yes."""
    columns = [column for column in log.columns if column.name in after and column.missing == 0]
    for column in columns:
        if column.is_number and not column.is_binary and column.numbers.min() >= 0:
            return {"intensity_value": (column.name, f"known after the event; {column.evidence()}")}
    for column in columns:
        if column.is_binary:
            return {"intensity_label": (column.yes_expression, f"known after the event; {_yes_share(column)}")}
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
    """Gives keys one name and one type in all tables, and renames columns whose name another table has."""
    joins = {role: _join_column(table, keys[role], role) for role, table in profiles.items()}
    types = {role: _key_type(key, joins.get(role)) for role, key in keys.items()}
    columns = [_as_key(x, x.name, role, types[role]) if (role := _role(x, keys)) else x for x in log.columns]
    tables = {"log": dataclasses.replace(log, columns=tuple(columns))}
    taken = {column.name for column in columns}
    for role, table in profiles.items():
        key = _as_key(joins[role], keys[role].name, role, types[role])
        columns = [key if x is joins[role] else x for x in table.columns]
        names = {x.name for x in columns} | taken
        for place, column in enumerate(columns):
            if column is not key and column.name in taken:
                columns[place] = dataclasses.replace(column, name=unique_name(f"{role}_{column.name}", names))
                names.add(columns[place].name)
        tables[role] = dataclasses.replace(table, columns=tuple(columns))
        taken |= names
    return tables


def _role(column: ColumnProfile, keys: Mapping[str, ColumnProfile]) -> str | None:
    return next((role for role, key in keys.items() if key is column), None)


def _key_type(*columns: ColumnProfile | None) -> str:
    """Ids are never floats, and text in all tables if they are in one."""
    return "int64" if all(column.type == "int64" for column in columns if column) else "string"


def _as_key(column: ColumnProfile, name: str, role: str, kind: str) -> ColumnProfile:
    column = column if column.type == kind else column.as_text()
    return dataclasses.replace(column, name=name, is_personal=column.is_personal or role == "user")


def _join_column(table: TableProfile, key: ColumnProfile, role: str) -> ColumnProfile:
    return table.column(key.source_name) or table.column(key.name) or _other_key(table, role)


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
