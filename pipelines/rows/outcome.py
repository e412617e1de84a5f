"""Counts of what the pipelines of a build found, and the rules by which a build is refused."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any

from clsd_tf.spec.feature_spec import FeatureSpec
from clsd_tf.storage.dataset_dir import SPLITS
from pipelines.sources import file_index, row_number


class BadInputError(ValueError):
    """Source data that breaks a rule; nothing was published."""


# --- Tables ----------------------------------------------------------------------------------------------------------


def table_counts(found: Mapping[str, int], roles: Sequence[str]) -> dict[str, Any]:
    """Sorts counts by table.

    Args:
      found: ``<role>/rows``, ``<role>/bad/<reason>`` and ``<role>/unreadable/<file and reason>``.
      roles: of the declared tables.

    Returns:
      Role -> ``rows``, and ``bad`` ones by reason.

    Raises:
      BadInputError: a file could not be read to its end.
    """
    tables: dict[str, Any] = {role: {"rows": found.get(f"{role}/rows", 0), "bad": {}} for role in roles}
    for name, count in sorted(found.items()):
        role, kind, *rest = name.split("/", 2)
        if kind == "unreadable":
            raise BadInputError(f"a file must be readable to its end. Received: tables.{role}, {rest[0]}")
        if kind == "bad":
            tables[role]["bad"][rest[0]] = count
    return tables


def require_good_tables(tables: Mapping[str, Any], max_bad_fraction: float) -> None:
    """Refuses tables without rows, with too many bad rows, or with bad rows only.

    Args:
      tables: from ``table_counts``.
      max_bad_fraction: the largest share of bad rows, in [0, 1].

    Raises:
      BadInputError: names the table, the counts and the reasons.
    """
    for role, entry in tables.items():
        rows, bad = entry["rows"], sum(entry["bad"].values())
        if not rows:
            raise BadInputError(f"a table must have rows. Received: tables.{role} with 0 rows. Allowed: at least 1")
        if bad > max_bad_fraction * rows:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(entry["bad"].items()))
            raise BadInputError(
                f"too many bad rows in tables.{role}. Received: {bad:,} of {rows:,} ({reasons}). "
                f"Allowed: max_bad_fraction={max_bad_fraction:g}"
            )
        if bad == rows:
            raise BadInputError(f"a table must have good rows. Received: tables.{role} with {bad:,} bad rows only")


def require_unique_keys(found: Mapping[str, int], spec: FeatureSpec, file_names: Mapping[tuple[str, int], str]) -> None:
    """Refuses keys that occur twice, by the places of a pair: the key itself may be a user's id.

    Args:
      found: ``<role>/duplicates/<row id>/<row id>`` -> number of rows too many.
      spec: names the keys.
      file_names: (role, file index) -> name.

    Raises:
      BadInputError: names both rows.
    """
    for role, table in spec.tables.items():
        prefix = f"{role}/duplicates/"
        pairs = {name.removeprefix(prefix): count for name, count in found.items() if name.startswith(prefix)}
        if not pairs:
            continue
        first = min(tuple(map(int, pair.split("/"))) for pair in pairs)
        places = " and ".join(f"row {row_number(row_id)} of {file_names[role, file_index(row_id)]}" for row_id in first)
        key = f"{spec.user_key}, {spec.item_key} and event time" if role == "log" else table.key
        raise BadInputError(
            f"a key of tables.{role} must be unique. Received: {places} with the same {key} "
            f"({sum(pairs.values()):,} such row(s)). Remove the duplicates"
        )


# --- Splits ----------------------------------------------------------------------------------------------------------


def split_counts(summary: Mapping[str, Any], spec: FeatureSpec, cut_offs: Sequence[int]) -> dict[str, Any]:
    """Makes counts.json's part on the splits, on rows without a profile and on duplicates.

    Args:
      summary: ``FitSummary.to_dict``.
      spec: of the dataset.
      cut_offs: event times in microseconds, see ``pipelines.rows.splits.split_cut_offs``.

    Returns:
      Ready for JSON.
    """
    moments = zip(("validation_from", "test_from", "until"), map(_iso_time, cut_offs), strict=False)
    missing = {name: count for name, count in summary["counts"].items() if name.endswith("_profile_missing")}
    return {
        "splits": {split: _split_entry(summary["splits"].get(split), spec) for split in SPLITS},
        "split_rule": spec.split.rule,
        "duplicates": summary["counts"].get("duplicates", 0),
        **dict(moments),
        **missing,
    }


def _split_entry(found: Mapping[str, Any] | None, spec: FeatureSpec) -> dict[str, Any]:
    if found is None:
        groups = {group.name: {label: {"rows": 0, "clicks": 0} for label in group.labels} for group in spec.user_groups}
        return {"rows": 0, "clicks": 0, "intense": 0, "groups": groups}
    groups = {
        name: {label: {"rows": rows, "clicks": clicks} for label, (rows, clicks) in labels.items()}
        for name, labels in found["groups"].items()
    }
    return {
        "rows": found["rows"],
        "clicks": found["clicks"],
        "intense": found["intense"],
        "first_event": _iso_time(found["first"]),
        "last_event": _iso_time(found["last"]),
        "groups": groups,
    }


def require_usable_splits(counts: Mapping[str, Any], spec: FeatureSpec) -> None:
    """Refuses a split without rows, or with one value of the label.

    Args:
      counts: from ``split_counts``.
      spec: of the dataset.

    Raises:
      BadInputError: names the split and the counts.
    """
    splits = counts["splits"]
    for name, entry in splits.items():
        if not entry["rows"]:
            sizes = ", ".join(f"{split} {found['rows']:,}" for split, found in splits.items())
            cut_offs = [counts[name] for name in ("validation_from", "test_from", "until") if name in counts]
            raise BadInputError(
                f"every split must have rows. Received: {sizes}, with rule {spec.split.rule} and cut-offs {cut_offs}. "
                "Change the spec's split"
            )
        if entry["clicks"] in (0, entry["rows"]):
            raise BadInputError(
                f"the label must not be constant. Received: {entry['clicks']:,} clicks in {entry['rows']:,} rows "
                f"of {name}, by label `{spec.label}`. Allowed: both values"
            )


def account(counts: Mapping[str, Any], found: Mapping[str, int]) -> dict[str, int]:
    """Accounts for every row of the log.

    Args:
      counts: with ``tables`` and ``splits``.
      found: ``duplicates_dropped`` and ``left_out`` rows.

    Returns:
      The rows that were read, and how many of them were written, dead-lettered, dropped or left out.

    Raises:
      RuntimeError: rows are unaccounted for.
    """
    log = counts["tables"]["log"]
    became = {
        "written": sum(entry["rows"] for entry in counts["splits"].values()),
        "dead_lettered": sum(log["bad"].values()),
        "duplicates_dropped": found.get("duplicates_dropped", 0),
        "left_out": found.get("left_out", 0),
    }
    if log["rows"] != sum(became.values()):
        raise RuntimeError(f"rows were lost. Received: {log['rows']} rows read, {became}. Expected: the sum of these")
    return {"read": log["rows"], **became}


def _iso_time(microseconds: int) -> str:
    return dt.datetime.fromtimestamp(microseconds / 1e6, dt.timezone.utc).isoformat()
