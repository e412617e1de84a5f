"""Checks of rows: text -> the declared types, and the rules that make a row a bad one."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clsd_tf.data.columns import ARROW_TYPES, convert_column, true_mask
from clsd_tf.data.hashing import hash_user_ids
from clsd_tf.spec.feature_spec import FeatureSpec
from clsd_tf.spec.number_features import NumberFeature
from clsd_tf.spec.tables import Column, Table
from pipelines.sources import ROW_ID, BadRow, RawBatch, row_number
from pipelines.sources.delimited import num_lines

WITHHELD = "<withheld>"
_MIN_SALT_CHARACTERS = 16
_MAX_WEIGHT = 1_000_000


def user_id_salt(spec: FeatureSpec) -> bytes | None:
    """Reads the secret salt of user ids from the environment variable that the spec names.

    Args:
      spec: ``user_id_salt_env`` is the variable.

    Returns:
      The salt; None if the spec names no variable.

    Raises:
      ValueError: the variable is not set, or too short to be a secret.
    """
    if spec.user_id_salt_env is None:
        return None
    salt = os.environ.get(spec.user_id_salt_env, "")
    if len(salt) < _MIN_SALT_CHARACTERS:
        raise ValueError(
            f"the environment variable {spec.user_id_salt_env} must hold the salt of user ids. Received: "
            f"{len(salt)} characters. Allowed: at least {_MIN_SALT_CHARACTERS}, the same in every build and for serving"
        )
    return salt.encode()


def parse_rows(batch: RawBatch, spec: FeatureSpec, salt: bytes | None = None) -> tuple[pa.Table, list[BadRow]]:
    """Converts text to the declared types and takes out the rows that break a rule.

    Args:
      batch: rows of one file of the log, user or item table.
      spec: declares types and which columns must have a value (keys, event time, label, intensity, weight).
      salt: from ``user_id_salt``; replaces the user key by its salted hash.

    Returns:
      The good rows, typed; and the bad rows with their reasons, those of the reader included. Raw values of sensitive
      columns, and of a user key that is hashed, are withheld.
    """
    table = dict(spec.tables.items())[batch.file.role]
    columns: dict[str, pa.Array] = {}
    failures: dict[str, np.ndarray] = {}  # In the order of the rules: a row is bad by the first it breaks.
    for column in table.columns:
        values, failed = convert_column(batch.table.column(column.name).combine_chunks(), column)
        if table.format == "csv" and column.type == "string":
            # Mostly a stray quote that swallowed the rows behind it.
            failed[f"line_break:{column.name}"] = true_mask(pc.match_substring(values, "\n"))
        failures |= {**failed, **_rule_failures(values, column, spec)}
        columns[column.name] = values
    parsed = pa.table({**columns, ROW_ID: batch.table.column(ROW_ID)})
    failures = {reason: mask for reason, mask in failures.items() if mask.any()}
    hidden = {name for name in columns if name in spec.sensitive_columns or (salt and name == spec.user_key)}
    bad_rows = [dataclasses.replace(row, raw=WITHHELD) for row in batch.bad_rows] if hidden else batch.bad_rows
    if failures:
        parsed = parsed.filter(pa.array(~np.logical_or.reduce(list(failures.values()))))
        bad_rows = bad_rows + _bad_rows(batch, table, failures, hidden)
    return _with_hashed_users(parsed, spec.user_key, salt), bad_rows


def parsed_schema(table: Table) -> pa.Schema:
    """Describes what ``parse_rows`` makes of a table.

    Args:
      table: of any role.

    Returns:
      The declared columns and ``row_id``.
    """
    return pa.schema([*((column.name, ARROW_TYPES[column.type]) for column in table.columns), (ROW_ID, pa.int64())])


def _with_hashed_users(rows: pa.Table, user_key: str, salt: bytes | None) -> pa.Table:
    if salt is None or user_key not in rows.column_names:
        return rows
    hashed = hash_user_ids(rows.column(user_key).combine_chunks(), salt)
    return rows.set_column(rows.column_names.index(user_key), user_key, hashed)


def _bad_rows(batch: RawBatch, table: Table, failures: dict[str, np.ndarray], hidden: set[str]) -> list[BadRow]:
    bad = np.flatnonzero(np.logical_or.reduce(list(failures.values())))
    names, masks = list(failures), np.stack(list(failures.values()))
    reasons = np.argmax(masks[:, bad], axis=0)  # The first that is true.
    rows = batch.table.take(pa.array(bad))
    return [
        BadRow(
            role=batch.file.role,
            file=batch.file.name,
            row=row_number(row.pop(ROW_ID)),
            reason=names[reason],
            raw=json.dumps({**row, **dict.fromkeys(hidden, WITHHELD)}, default=_readable, sort_keys=True),
            lines=int(lines),
        )
        for reason, row, lines in zip(reasons, rows.to_pylist(), num_lines(rows, table), strict=True)
    ]


def _readable(value: object) -> str:
    """Text for values that JSON has no type for: bytes that are not text, times, decimals."""
    return value.decode("utf-8", errors="backslashreplace") if isinstance(value, bytes) else str(value)


def _rule_failures(values: pa.Array, column: Column, spec: FeatureSpec) -> dict[str, np.ndarray]:
    """Rules beyond the type: required values, the event-time range, weights and log1p inputs >= 0."""
    failures = {}
    if column.name in _required_columns(spec):
        failures[f"missing:{column.name}"] = true_mask(pc.is_null(values))
    if time := spec.time_columns.get(column.name):
        scale = 1_000_000 / time.microseconds_per_unit
        low, high = (_epoch_seconds(day) * scale for day in (time.earliest, time.latest))
        moments = values.cast(pa.float64(), safe=False)
        outside = pc.or_(pc.less(moments, low), pc.greater_equal(moments, high))
        use = "event_time" if column.name == spec.event_time.column else "valid_from"
        failures[f"{use}_outside_{time.earliest}_to_{time.latest}_in_{time.unit}"] = true_mask(outside)
    if column.name == spec.sample_weight:  # Sums of weights are exact, as whole millionths in 63 bits.
        failures[f"above_{_MAX_WEIGHT:g}:{column.name}"] = true_mask(pc.greater(values, _MAX_WEIGHT))
    if column.name in _non_negative_columns(spec):
        failures[f"negative:{column.name}"] = true_mask(pc.less(values, 0))
    return failures


def _epoch_seconds(day: dt.date) -> float:
    return (day - dt.date(1970, 1, 1)).total_seconds()


def _required_columns(spec: FeatureSpec) -> set[str | None]:
    comparisons = [spec.label_comparison, spec.intensity_comparison]
    required = {spec.user_key, spec.item_key, spec.sample_weight, *spec.time_columns}
    return required | {comparison.column for comparison in comparisons if comparison}


def _non_negative_columns(spec: FeatureSpec) -> set[str | None]:
    columns: set[str | None] = {feature.number_column for feature in spec.features_of(NumberFeature) if feature.log1p}
    return columns | {spec.sample_weight}
