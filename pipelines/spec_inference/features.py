"""Guesses what a column becomes: a kind of feature, a user group, or nothing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc

from clsd_tf.spec.model_inputs import OTHER_GROUP, UNKNOWN_GROUP
from pipelines.spec_inference.profiles import ID_ENDING, ColumnProfile, TableProfile, unique_name

TIME_NAME = re.compile(r"(^|_)(time|timestamp|ts|date|datetime|day|hour|at|when)(_|$)|time(stamp)?(_?(ms|us|s))?$")
_AGE_NAME = re.compile(r"(^|_)age(_|$)")
_ID_NAME = re.compile(rf".{ID_ENDING}$")
_AGE_BOUNDARIES = (18, 25, 35, 45, 60)
MAX_CATEGORIES = 50  # More different integers than that are amounts, not codes.
_MAX_VOCABULARY = 100_000  # A sample with more different ids than that gets hashes.
_MAX_GROUPS, _MAX_GROUP_VALUES = 3, 20


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of the spec and why it is there.

    Attributes:
      role: of the table.
      column: that it is made from, by its name in the spec.
      content: of the entry as YAML has it; None if the column is left out.
      reason: for the comment behind it.
    """

    role: str
    column: str
    content: dict[str, Any] | None
    reason: str


def key_features(keys: Mapping[str, ColumnProfile], taken: Collection[str]) -> Iterator[Entry]:
    """Makes features of the keys: the ids themselves and the user's last items.

    Args:
      keys: columns of the log, for ``user`` and ``item``.
      taken: names that no feature may have.

    Yields:
      The ids of user and item, and a history of items.
    """
    user, item = keys["user"], keys["item"]
    for column in (user, item):
        yield _id_feature("log", column)
    content = {"name": unique_name(f"recent_{item.name}", taken), "type": "history", "of": item.name, "max_length": 20}
    yield Entry("log", item.name, content, "the user's last items before the event")


def guess_feature(role: str, column: ColumnProfile) -> Entry:
    """Guesses which type of feature a column becomes.

    Args:
      role: of its table.
      column: neither key nor label, and known before the event.

    Returns:
      A feature, or an entry without content whose reason says why the column is left out.
    """
    if column.num_distinct <= 1:
        return Entry(role, column.name, None, f"it tells nothing: {column.evidence()}")
    if column.unit and TIME_NAME.search(column.name.lower()):
        return Entry(role, column.name, None, f"a moment, which the future never repeats: {column.evidence()}")
    if column.separator:
        return _multi_valued(role, column)
    if column.type == "string":
        return _text_feature(role, column)
    is_code = (
        column.type == "int64" and column.num_distinct <= MAX_CATEGORIES and not _AGE_NAME.search(column.name.lower())
    )
    if is_code or (column.type == "int64" and _ID_NAME.search(column.name.lower())):
        return _id_feature(role, column)
    return _numeric(role, column)


def _text_feature(role: str, column: ColumnProfile) -> Entry:
    mean_length = pc.mean(pc.utf8_length(column.values)).as_py()
    mostly_unique = column.num_distinct > 0.9 * (column.num_rows - column.values.null_count)
    if mostly_unique and column.num_distinct > 20 and not _ID_NAME.search(column.name.lower()):
        return Entry(
            role, column.name, None, f"nearly every value is another, so ids cannot be learned: {column.evidence()}"
        )
    if mean_length > 60:
        return Entry(
            role, column.name, None, f"free text of {mean_length:.0f} characters on average: {column.evidence()}"
        )
    return _id_feature(role, column)


def _id_feature(role: str, column: ColumnProfile) -> Entry:
    content: dict[str, Any] = {"name": column.name, "type": "categorical", "column": column.name}
    repeated = sum(count > 1 for _, count in column.most_frequent())
    if column.num_distinct > _MAX_VOCABULARY or repeated < 0.1 * column.num_distinct:
        # About two buckets a value of the sample: few values share one.
        content["hash_buckets"] = 1 << int(np.ceil(np.log2(2 * column.num_distinct)))
        return Entry(role, column.name, content, f"very many values, hashed: {column.evidence()}")
    if column.num_distinct > 1000:
        content["vocabulary"] = {"min_count": 2}
        return Entry(role, column.name, content, f"many values, those seen once share an id: {column.evidence()}")
    return Entry(role, column.name, content, column.evidence())


def _multi_valued(role: str, column: ColumnProfile) -> Entry:
    lengths = pc.list_value_length(pc.split_pattern(column.values.drop_null(), column.separator))
    max_values = max(2, int(np.ceil(np.quantile(lengths.to_numpy(), 0.95))))
    content = {
        "name": column.name, "type": "multi_valued", "column": column.name,
        "separator": column.separator, "max_values": max_values,
    }  # fmt: skip
    several = pc.mean(pc.greater(lengths, 1)).as_py()
    return Entry(role, column.name, content, f"{several:.0%} of the rows hold several values; {column.evidence()}")


def _numeric(role: str, column: ColumnProfile) -> Entry:
    content: dict[str, Any] = {"name": column.name, "type": "numeric", "column": column.name}
    numbers = column.numbers
    skewness = float(((numbers - numbers.mean()) ** 3).mean() / max(numbers.std() ** 3, 1e-30))
    if numbers.min() >= 0 and skewness > 2:
        return Entry(role, column.name, {**content, "log1p": True}, f"never negative, a long tail; {column.evidence()}")
    if abs(skewness) <= 1:
        return Entry(role, column.name, content, f"no long tail; {column.evidence()}")
    content |= {"scaling": "quantile_buckets", "num_buckets": 10}
    return Entry(role, column.name, content, f"skewed (skewness {skewness:.1f}); {column.evidence()}")


# --- User groups -----------------------------------------------------------------------------------------------------


def guess_user_groups(
    tables: Mapping[str, TableProfile],
    candidates: list[tuple[str, ColumnProfile]],
    keys: Mapping[str, ColumnProfile],
    taken: Collection[str],
) -> list[Entry]:
    """Makes user groups of an age and of text columns with few values.

    Args:
      tables: by role.
      candidates: (role, column) known before the event.
      keys: columns of the log, for ``user`` and ``item``.
      taken: names that no group may have.

    Returns:
      Up to three groups: age first, then those with fewer values.
    """
    profile = "user" if "user" in tables else "log"
    # A group's values stand in the spec.
    columns = [column for role, column in candidates if role == profile and not column.is_personal]
    if profile == "log":
        columns = [column for column in columns if _describes_user(column, keys["user"])]
    found = [
        _age_group(profile, column) for column in columns if column.is_number and _AGE_NAME.search(column.name.lower())
    ]
    for column in sorted(columns, key=lambda column: column.num_distinct):
        if column.type == "string" and not column.separator and 2 <= column.num_distinct <= _MAX_GROUP_VALUES:
            found.append(_text_group(profile, column))
    return list(_named_apart(found[:_MAX_GROUPS], taken))


def _named_apart(groups: list[Entry], taken: Collection[str]) -> Iterator[Entry]:
    names = set(taken)
    for group in groups:
        name = unique_name(group.content["name"], names)
        names.add(name)
        yield dataclasses.replace(group, content={**group.content, "name": name})


def _describes_user(column: ColumnProfile, user: ColumnProfile) -> bool:
    """True if (nearly) every user of the sample has one value."""
    pairs = {*zip(user.values.to_pylist(), column.values.to_pylist(), strict=True)}
    return len(pairs) <= 1.01 * user.num_distinct


def _age_group(role: str, column: ColumnProfile) -> Entry:
    low, high = column.numbers.min(), column.numbers.max()
    boundaries = [edge for edge in _AGE_BOUNDARIES if low < edge <= high] or [float(np.median(column.numbers))]
    content = {"name": f"{column.name}_group", "column": column.name, "boundaries": boundaries}
    return Entry(role, column.name, content, column.evidence())


def _text_group(role: str, column: ColumnProfile) -> Entry:
    values = [value for value, _ in column.most_frequent() if value not in (UNKNOWN_GROUP, OTHER_GROUP)]
    return Entry(
        role, column.name, {"name": f"{column.name}_group", "column": column.name, "values": values}, column.evidence()
    )
