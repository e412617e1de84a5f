"""A log as wide as a team's: ids of users and items, a click, and categorical and float columns beside them."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import yaml

from clsd_tf.spec.feature_spec import FeatureSpec, parse_spec
from clsd_tf.storage.files import staged_directory

LOG = "log.csv"
SPEC = "feature_spec.yaml"
MIN_COLUMNS = 8
_KEYS = {"user_id": "int64", "item_id": "string", "time_ms": "int64", "click": "int64"}
_USERS = _ITEMS = 100_000  # Do not grow with the rows, so that memory that does is seen.
_COLUMNS_PER_FLOAT = 7
_START_MS = 1_704_067_200_000  # 2024-01-01, UTC
_DAYS = 10
_CLICK_RATE = 0.1
_ROWS_PER_CHUNK = 50_000


def cached_log(directory: pathlib.Path, *, num_rows: int, num_columns: int) -> pathlib.Path:
    """The directory of a log and its spec below ``directory``; made if it is not there yet.

    Args:
      directory: where logs are kept.
      num_rows: at least 1.
      num_columns: at least ``MIN_COLUMNS``.
    """
    path = directory / f"log-{num_rows}x{num_columns}"
    if not path.exists():
        with staged_directory(path) as staging:
            write_log(staging / LOG, num_rows, num_columns)
            content = wide_spec(num_columns).model_dump(mode="json", exclude_unset=True)
            (staging / SPEC).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def wide_spec(num_columns: int) -> FeatureSpec:
    """The spec of a log of ``num_columns`` columns: days 1 to 8 train, day 9 validates, day 10 tests."""
    types = {**_KEYS, **{name: type_ for name, type_, _ in _feature_columns(num_columns)}}
    content: dict[str, Any] = {
        "name": "wide_log",
        "tables": {"log": {"path": LOG, "format": "csv", "columns": _named_types(types)}},
        "user_key": "user_id",
        "item_key": "item_id",
        "event_time": {"column": "time_ms", "unit": "milliseconds"},
        "label": "click == 1",
        "split": {"validation_from": "2024-01-09", "test_from": "2024-01-10"},
        "features": [_feature(name, type_) for name, type_ in types.items() if name not in ("time_ms", "click")],
    }
    return parse_spec(content, "wide_log")


def _named_types(types: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "type": type_} for name, type_ in types.items()]


def _feature(column: str, type_: str) -> dict[str, str]:
    kind = {"type": "numeric", "scaling": "standardise"} if type_ == "float" else {"type": "categorical"}
    return {"name": f"{column}_input", "column": column, **kind}


def write_log(path: pathlib.Path, num_rows: int, num_columns: int) -> None:
    """Writes the CSV, chunk by chunk: the same bytes for the same arguments."""
    columns = _feature_columns(num_columns)
    texts = {name: _texts(name, size) for name, type_, size in columns if type_ == "string"}
    texts["item_id"] = _texts("item", _ITEMS)
    writer = None
    for chunk in _chunks(num_rows, columns, texts):
        writer = writer or pa.csv.CSVWriter(path, chunk.schema, write_options=pa.csv.WriteOptions(quoting_style="none"))
        writer.write_table(chunk)
    writer.close()


def _feature_columns(num_columns: int) -> list[tuple[str, str, int]]:
    """(name, type, number of values) of the columns beside the keys: 10 to 100,000 values, in equal ratios."""
    if num_columns < MIN_COLUMNS:
        raise ValueError(f"a wide log has at least {MIN_COLUMNS} columns. Received: {num_columns}")
    sizes = np.geomspace(10, 100_000, num_columns - len(_KEYS)).astype(int).tolist()
    columns = []
    for index, size in enumerate(sizes):
        is_float = index % _COLUMNS_PER_FLOAT == _COLUMNS_PER_FLOAT // 2
        type_ = "float" if is_float else ("int64", "string")[index % 2]
        columns.append((f"column_{index}", type_, size))
    return columns


def _texts(name: str, size: int) -> pa.Array:
    return pa.array([f"{name}_{value:x}" for value in range(size)])


def _chunks(num_rows: int, columns: list[tuple[str, str, int]], texts: dict[str, pa.Array]) -> Iterator[pa.Table]:
    for index, start in enumerate(range(0, num_rows, _ROWS_PER_CHUNK)):
        random = np.random.default_rng(index)
        size = min(_ROWS_PER_CHUNK, num_rows - start)
        # In time order, as logs are. Few users have many events, but no one has a noticeable part of them.
        moments = _START_MS + (np.arange(start, start + size) * (_DAYS * 86_400_000 / num_rows)).astype(np.int64)
        chunk = {
            "user_id": 1 + (_USERS * random.random(size) ** 2).astype(np.int64),
            "item_id": texts["item_id"].take(pa.array(_zipf(random, _ITEMS, size))),
            "time_ms": moments,
            "click": (random.random(size) < _CLICK_RATE).astype(np.int64),
        }
        for name, type_, values in columns:
            if type_ == "float":
                chunk[name] = np.round(random.lognormal(0.0, 1.0, size), 4)
            else:
                ids = _zipf(random, values, size)
                chunk[name] = texts[name].take(pa.array(ids)) if type_ == "string" else 1000 + ids
        yield pa.table(chunk)


def _zipf(random: np.random.Generator, num_values: int, size: int) -> np.ndarray:
    """Values from 0 whose frequency falls as 1 / rank."""
    return ((num_values + 1.0) ** random.random(size)).astype(np.int64) - 1
