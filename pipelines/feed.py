"""A small simulated feed: users with profiles, items, and a log of impressions with genuine and accidental clicks."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.csv

from clsd_tf.artifacts import staged_directory

_ROWS_PER_CHUNK = 100_000
_START_MILLISECONDS = 1_700_000_000_000  # 2023-11-14
_DAYS = 10
_TASTE_DIM = 4
_CATEGORIES = ("news", "sports", "music", "food", "travel", "games", "science", "fashion")
_TAGS = ("live", "short", "long", "viral", "local", "archive")
_DEVICES = ("phone", "tablet", "desktop")
_GENDERS = ("F", "M", "X")


@dataclasses.dataclass(frozen=True)
class FeedConfig:
    """Size and seed of a simulated feed.

    Attributes:
      num_rows: impressions in the log, >= 1.
      num_users: users, each with a profile, >= 1.
      num_items: items, >= 1.
      seed: the same seed gives the same files.
    """

    num_rows: int = 20_000
    num_users: int = 500
    num_items: int = 200
    seed: int = 0

    def __post_init__(self):
        for name in ("num_rows", "num_users", "num_items"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1. Received: {getattr(self, name)}")


def simulate_feed(config: FeedConfig, raw_dir: pathlib.Path) -> None:
    """Writes ``log.csv``, ``users.csv`` and ``items.csv``, which ``feature_specs/simulated_feed.yaml`` describes.

    A click is genuine with probability sigmoid(taste . item + item bias - 1), else accidental with a probability that
    depends on the user's age: the young and the old slip more. Genuine clicks are read longer. Rows come in time
    order and are written chunk by chunk, so any number fits in memory.
    """
    with staged_directory(raw_dir) as staging:
        world = _World(config)
        pa.csv.write_csv(world.users(), staging / "users.csv")
        pa.csv.write_csv(world.items(), staging / "items.csv")
        with pa.csv.CSVWriter(staging / "log.csv", _LOG_SCHEMA) as writer:
            for chunk in world.log():
                writer.write_table(chunk)


_LOG_SCHEMA = pa.schema(
    {
        "user_id": pa.string(),
        "item_id": pa.string(),
        "time_ms": pa.int64(),
        "device": pa.string(),
        "click": pa.int64(),
        "read_seconds": pa.float64(),
    }
)


class _World:
    def __init__(self, config: FeedConfig):
        self._config = config
        self._random = random = np.random.default_rng(config.seed)
        self._ages = random.integers(13, 75, config.num_users)
        self._tastes = random.normal(size=[config.num_users, _TASTE_DIM])
        self._qualities = random.normal(size=[config.num_items, _TASTE_DIM]) * 0.8
        self._biases = random.normal(size=config.num_items) * 0.5
        # A few items get most impressions.
        popularity = 1.0 / np.arange(1, config.num_items + 1)
        self._popularity = popularity / popularity.sum()

    def users(self) -> pa.Table:
        count = self._config.num_users
        return pa.table(
            {
                "user_id": [f"u{user}" for user in range(count)],
                "age": self._ages,
                "gender": self._random.choice(_GENDERS, count, p=[0.48, 0.48, 0.04]),
            }
        )

    def items(self) -> pa.Table:
        count = self._config.num_items
        tags = ["|".join(self._random.choice(_TAGS, self._random.integers(1, 4), replace=False)) for _ in range(count)]
        return pa.table(
            {
                "item_id": [f"i{item}" for item in range(count)],
                "category": self._random.choice(_CATEGORIES, count),
                "tags": tags,
                "duration_seconds": np.round(self._random.lognormal(3.5, 1.0, count), 1),
            }
        )

    def log(self) -> Iterator[pa.Table]:
        num_rows, span = self._config.num_rows, _DAYS * 86_400_000
        for start in range(0, num_rows, _ROWS_PER_CHUNK):
            rows = np.arange(start, min(start + _ROWS_PER_CHUNK, num_rows))
            yield self._impressions(_START_MILLISECONDS + rows * span // num_rows)

    def _impressions(self, times: np.ndarray) -> pa.Table:
        random, count = self._random, len(times)
        users = random.integers(0, self._config.num_users, count)
        items = random.choice(self._config.num_items, count, p=self._popularity)
        logits = (self._tastes[users] * self._qualities[items]).sum(axis=1) + self._biases[items] - 1.0
        genuine = random.random(count) < 1 / (1 + np.exp(-logits))
        slip_rate = np.where((self._ages[users] < 18) | (self._ages[users] >= 60), 0.25, 0.08)
        clicked = genuine | (random.random(count) < slip_rate)
        seconds = np.where(genuine, random.lognormal(3.5, 0.8, count), random.lognormal(1.2, 0.8, count))
        return pa.table(
            {
                "user_id": [f"u{user}" for user in users],
                "item_id": [f"i{item}" for item in items],
                "time_ms": times,
                "device": random.choice(_DEVICES, count, p=[0.7, 0.1, 0.2]),
                "click": clicked.astype(np.int64),
                "read_seconds": np.where(clicked, np.round(seconds, 1), 0.0),
            },
            schema=_LOG_SCHEMA,
        )
