"""An inferred spec as YAML, with a comment behind every guess."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.spec_inference.infer import InferredSpec
from pipelines.spec_inference.profiles import ColumnProfile

_COMMENT_COLUMN = 80


def to_yaml(inferred: InferredSpec, name: str, max_rows: int) -> str:
    """Writes an inferred spec as text that loads and builds as it is.

    Args:
      inferred: the spec.
      name: of the spec.
      max_rows: of the sample, for the first comment.

    Returns:
      YAML; the comments say what each guess rests on.
    """
    lines = [
        f"# Inferred from up to {max_rows:,} rows of each table. Read the comments: every line is a guess to check.",
        f"name: {name}",
        "",
        "tables:",
        *_tables(inferred),
        "",
        *(_with_comment(f"{key}: {flow(value)}", why) for key, (value, why) in inferred.settings.items()),
        "",
        "features:",
        *(_with_comment(f"  - {flow(entry.content)}", entry.reason) for entry in inferred.features),
    ]
    if inferred.user_groups:
        lines += ["", "user_groups:"]
        lines += [_with_comment(f"  - {flow(entry.content)}", entry.reason) for entry in inferred.user_groups]
    return "\n".join(lines) + "\n"


def _tables(inferred: InferredSpec) -> Iterator[str]:
    left_out = {entry.column: entry for entry in inferred.left_out}
    declared = set(_used_columns(inferred))
    for role, profile in inferred.tables.items():
        table = profile.table
        yield f"  {role}:"
        yield f"    path: {flow(table.path)}"
        yield f"    format: {table.format}"
        if table.delimiter:
            yield f"    delimiter: {flow(table.delimiter)}"
        if role != "log":
            yield f"    key: {inferred.settings[f'{role}_key'][0]}"
        yield "    columns:"
        for column in profile.columns:
            line = f"- {flow(_column(column))}"
            if column.name in declared:
                yield _with_comment(f"      {line}", column.evidence())
            else:
                yield _with_comment(f"      # {line}", f"left out: {left_out[column.name].reason}")


def _used_columns(inferred: InferredSpec) -> Iterator[str]:
    settings = inferred.settings
    yield from (settings["user_key"][0], settings["item_key"][0], settings["event_time"][0]["column"])
    for key in ("label", "intensity_label", "intensity_value"):
        if key in settings:
            yield settings[key][0].split()[0]
    for entry in (*inferred.features, *inferred.user_groups):
        yield entry.column


def _column(column: ColumnProfile) -> dict[str, Any]:
    renamed = {} if column.name == column.source_name else {"source_name": column.source_name}
    return {"name": column.name, "type": column.type, **renamed}


def _with_comment(line: str, comment: str) -> str:
    return f"{line.ljust(_COMMENT_COLUMN)}  # {' '.join(comment.split())}"


def flow(value: Any) -> str:
    """Writes a ``value`` in YAML's flow style; text in double quotes unless it is a plain word.

    Returns:
      One line.

    >>> flow({"name": "age", "values": ["18-30", 2.5]})
    '{name: age, values: ["18-30", 2.5]}'
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {flow(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(flow(entry) for entry in value) + "]"
    if isinstance(value, str) and value.isidentifier() and value.isascii() and value.lower() not in _YAML_WORDS:
        return value
    return re.sub(r"[^ -~]", _escaped, json.dumps(value, ensure_ascii=False))


def _escaped(found: re.Match[str]) -> str:
    """A character as it is, or as YAML's escape when YAML would not read it or nobody could see it."""
    return found[0] if found[0].isprintable() else f"\\U{ord(found[0]):08x}"


_YAML_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n", "nan", "inf"}
