"""A simulated feed with its ground truth: which clicks are genuine, which are slips, which were drawn by a title."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pydantic

from clsd_tf.spec.user_groups import UserGroup
from clsd_tf.spec.validation import SpecError, StrictModel, explain_validation_error
from clsd_tf.storage.files import staged_directory, write_json

# The user group of feature_specs/simulated_feed.yaml. Every user has an age: the label of unknown ones is left out.
AGE_BOUNDARIES = (18.0, 30.0, 45.0, 60.0)
AGE_GROUPS = UserGroup(name="age_group", column="age", boundaries=AGE_BOUNDARIES).labels[1:]

_ROWS_PER_CHUNK = 100_000
_FIRST_ROW_ID = 2  # pipelines.sources numbers the rows of a CSV file, and its header is row 1.
_START_MILLISECONDS = 1_700_000_000_000  # 2023-11-14
_DAYS = 10
_AGES = (13, 75)  # Years: from the first, below the second.
_ITEM_BIAS_STD = 0.5
_LIKE_RATE = 0.05  # Of genuine clicks: an explicit sign of interest is sparse.
_CATEGORIES = ("news", "sports", "music", "food", "travel", "games", "science", "fashion")
_TAGS = ("live", "short", "long", "viral", "local", "archive")
_DEVICES = ("phone", "tablet", "desktop")
_GENDERS = ("F", "M", "X")

_Number = Annotated[float, pydantic.Field(allow_inf_nan=False)]
_Rate = Annotated[float, pydantic.Field(ge=0, le=1)]


def _as_tuple(value: object) -> object:
    """A single value -> a tuple of it; a list, which is what YAML and JSON have -> a tuple."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _one_per_age_group(values: tuple[float, ...]) -> tuple[float, ...]:
    if len(values) not in (1, len(AGE_GROUPS)):
        raise ValueError(
            f"must be one value, or one for each of the {len(AGE_GROUPS)} age groups {', '.join(AGE_GROUPS)}. "
            f"Received: {len(values)} values"
        )
    return values if len(values) > 1 else values * len(AGE_GROUPS)


_LISTED = pydantic.BeforeValidator(_as_tuple)
_PER_AGE_GROUP = pydantic.AfterValidator(_one_per_age_group)


class FeedConfig(StrictModel):
    """A simulated feed; see ``simulate_feed`` for the equations.

    What is per age group takes one value for all, or five: for users below 18, from 18, 30 and 45, and from 60 years.

    Attributes:
      num_rows: impressions in the log, 1 to 10^10.
      num_users: users, each with a profile, >= 1.
      num_items: items, >= 1.
      rank: dimensions of interest, >= 1.
      interest_scale: how much the match of user and item counts, in logits, >= 0; 0 leaves only the item bias.
      base_logit: of genuine interest, per age group.
      accidental_click_rate: probability that an impression is clicked by a slip, per age group, in [0, 1].
      click_bait_share: share of items with a misleading title, in [0, 1].
      click_bait_rate: probability that such a title alone draws a click, in [0, 1].
      popularity_exponent: the k-th item gets impressions in proportion to k ** -popularity_exponent (Zipf), >= 0;
        0 gives every item the same.
      seed: the same seed gives the same files. Feeds that differ in rates, shares, base logits or scale alone have
        the same users, items, impressions and random draws: what differs between them is due to the setting.
    """

    num_rows: int = pydantic.Field(20_000, ge=1, le=10**10)
    num_users: int = pydantic.Field(500, ge=1)
    num_items: int = pydantic.Field(200, ge=1)
    rank: int = pydantic.Field(3, ge=1)
    interest_scale: _Number = pydantic.Field(1.3, ge=0)
    base_logit: Annotated[tuple[_Number, ...], _LISTED, _PER_AGE_GROUP] = (-2.0, -2.0, -2.0, -2.0, -2.0)
    accidental_click_rate: Annotated[tuple[_Rate, ...], _LISTED, _PER_AGE_GROUP] = (0.25, 0.08, 0.08, 0.08, 0.25)
    click_bait_share: _Rate = 0.0
    click_bait_rate: _Rate = 0.3
    popularity_exponent: _Number = pydantic.Field(1.0, ge=0)
    seed: int = pydantic.Field(0, ge=0)


def parse_feed_config(content: dict[str, Any], source: str) -> FeedConfig:
    """Checks the settings of a feed.

    Args:
      content: key -> value, as YAML or JSON has them.
      source: to be named in errors.

    Returns:
      The settings, defaults filled in.

    Raises:
      SpecError: unknown key or value out of range; says what is allowed.
    """
    try:
        return FeedConfig.model_validate_json(json.dumps(content))
    except pydantic.ValidationError as error:
        raise SpecError(explain_validation_error(error, FeedConfig, source)) from error


def simulate_feed(
    config: FeedConfig, raw_dir: pathlib.Path, on_chunk: Callable[[int], object] = lambda num_rows: None
) -> None:
    """Writes the tables that ``feature_specs/simulated_feed.yaml`` describes, and the ground truth behind them.

    For user u of age group g and item i, independently for each impression:

      logit = base_logit[g] + interest_scale * (P[u] . Q[i]) / sqrt(rank) + b[i]
      genuine ~ Bernoulli(sigmoid(logit)),  slip ~ Bernoulli(accidental_click_rate[g])
      bait ~ Bernoulli(click_bait_rate) if the title of i misleads, else 0
      click = genuine or slip or bait

    with P [num_users, rank] and Q [num_items, rank] standard normal and b [num_items] normal with standard deviation
    0.5. Genuine clicks are read for a median of exp(3.5) = 33 seconds and a few are liked; other clicks are read for
    a median of exp(1.2) = 3 seconds.

    ``log.csv``, ``users.csv`` and ``items.csv`` are what a model may learn from. ``truth.parquet`` has a row for each
    row of the log, in its order: ``row_id`` (as in a dataset built from it), ``genuine_probability`` = sigmoid(logit),
    and the one cause of a click: ``is_genuine``, else ``is_accidental_click`` (slip), else ``is_click_bait_click``
    (bait). ``truth.json`` has the parameters. Rows are written chunk by chunk in time order: memory holds the
    users, the items and one chunk.

    Args:
      config: size and parameters.
      raw_dir: directory to write.
      on_chunk: called with the number of rows after each chunk is written.

    Raises:
      FileExistsError: ``raw_dir`` is there already.
    """
    with staged_directory(raw_dir) as staging:
        world = _World(config)
        pa.csv.write_csv(world.users, staging / "users.csv")
        pa.csv.write_csv(world.items, staging / "items.csv")
        write_json(staging / "truth.json", world.parameters)
        with (
            pa.csv.CSVWriter(staging / "log.csv", _LOG_SCHEMA) as log_file,
            pa.parquet.ParquetWriter(staging / "truth.parquet", _TRUTH_SCHEMA) as truth_file,
        ):
            for log, truth in world.impressions():
                log_file.write_table(log)
                truth_file.write_table(truth)
                on_chunk(log.num_rows)


_LOG_SCHEMA = pa.schema(
    {
        "user_id": pa.string(),
        "item_id": pa.string(),
        "time_ms": pa.int64(),
        "device": pa.string(),
        "click": pa.int64(),
        "read_seconds": pa.float64(),
        "liked": pa.int64(),
    }
)
_CAUSES = ("is_genuine", "is_accidental_click", "is_click_bait_click")  # Of a click: at most one is true.
_TRUTH_SCHEMA = pa.schema(
    {"row_id": pa.int64(), "genuine_probability": pa.float64(), **{cause: pa.bool_() for cause in _CAUSES}}
)


class _World:
    """Users and items with their true interests, and the impressions drawn from them.

    How much is drawn depends on no rate, share, base logit or scale, so that feeds of one seed are comparable.
    """

    def __init__(self, config: FeedConfig):
        self._config = config
        # Streams of their own: other items leave the users as they are.
        of_users, of_items, self._random = np.random.default_rng(config.seed).spawn(3)
        ages = of_users.integers(*_AGES, config.num_users)
        self._age_groups = np.digitize(ages, AGE_BOUNDARIES)
        self._user_interests = of_users.normal(size=[config.num_users, config.rank])
        self._item_interests = of_items.normal(size=[config.num_items, config.rank])
        self._item_biases = of_items.normal(0.0, _ITEM_BIAS_STD, config.num_items)
        num_click_bait = round(config.click_bait_share * config.num_items)
        self._is_click_bait = of_items.permutation(config.num_items) < num_click_bait
        popularity = np.arange(1, config.num_items + 1) ** -config.popularity_exponent
        self._popularity = popularity / popularity.sum()
        self.users = _users_table(ages, of_users)
        self.items = _items_table(config.num_items, of_items)

    @property
    def parameters(self) -> dict[str, Any]:
        """True parameters, the content of ``truth.json``."""
        config, num_users = self._config, np.bincount(self._age_groups, minlength=len(AGE_GROUPS))
        return {
            "config": config.model_dump(mode="json"),
            "age_groups": {
                label: {
                    "num_users": int(num_users[group]),
                    "base_logit": config.base_logit[group],
                    "accidental_click_rate": config.accidental_click_rate[group],
                }
                for group, label in enumerate(AGE_GROUPS)
            },
            "item_bias_std": _ITEM_BIAS_STD,
            "num_click_bait_items": int(self._is_click_bait.sum()),
            "like_rate": _LIKE_RATE,
        }

    def impressions(self) -> Iterator[tuple[pa.Table, pa.Table]]:
        """Chunks of the log and of its ground truth."""
        config = self._config
        for start in range(0, config.num_rows, _ROWS_PER_CHUNK):
            rows = np.arange(start, min(start + _ROWS_PER_CHUNK, config.num_rows))
            users = self._random.integers(0, config.num_users, len(rows))
            items = self._random.choice(config.num_items, len(rows), p=self._popularity)
            truth = self._truth(rows, users, items)
            yield self._log(rows, users, items, truth), truth

    def _truth(self, rows: np.ndarray, users: np.ndarray, items: np.ndarray) -> pa.Table:
        config, random, groups = self._config, self._random, self._age_groups[users]
        match = np.einsum("nr,nr->n", self._user_interests[users], self._item_interests[items]) / np.sqrt(config.rank)
        logits = np.take(config.base_logit, groups) + config.interest_scale * match + self._item_biases[items]
        genuine_probability = 0.5 * (1.0 + np.tanh(0.5 * logits))  # The sigmoid, without overflow.
        genuine = random.random(len(rows)) < genuine_probability
        slip = random.random(len(rows)) < np.take(config.accidental_click_rate, groups)
        bait = self._is_click_bait[items] & (random.random(len(rows)) < config.click_bait_rate)
        columns = [rows + _FIRST_ROW_ID, genuine_probability, genuine, slip & ~genuine, bait & ~genuine & ~slip]
        return pa.table(columns, schema=_TRUTH_SCHEMA)

    def _log(self, rows: np.ndarray, users: np.ndarray, items: np.ndarray, truth: pa.Table) -> pa.Table:
        random, count = self._random, len(rows)
        causes = [truth.column(name).to_numpy() for name in _CAUSES]
        genuine, clicked = causes[0], np.logical_or.reduce(causes)
        seconds = np.where(genuine, random.lognormal(3.5, 0.8, count), random.lognormal(1.2, 0.8, count))
        return pa.table(
            {
                "user_id": self.users.column("user_id").take(users),
                "item_id": self.items.column("item_id").take(items),
                "time_ms": _START_MILLISECONDS + rows * (_DAYS * 86_400_000) // self._config.num_rows,
                "device": random.choice(_DEVICES, count, p=[0.7, 0.1, 0.2]),
                "click": clicked.astype(np.int64),
                # A click is read for some time, however short: 0 means that there was none.
                "read_seconds": np.where(clicked, np.maximum(np.round(seconds, 1), 0.1), 0.0),
                "liked": (genuine & (random.random(count) < _LIKE_RATE)).astype(np.int64),
            },
            schema=_LOG_SCHEMA,
        )


def _users_table(ages: np.ndarray, random: np.random.Generator) -> pa.Table:
    count = len(ages)
    genders = random.choice(_GENDERS, count, p=[0.48, 0.48, 0.04])
    return pa.table({"user_id": [f"u{user}" for user in range(count)], "age": ages, "gender": genders})


def _items_table(count: int, random: np.random.Generator) -> pa.Table:
    return pa.table(
        {
            "item_id": [f"i{item}" for item in range(count)],
            "category": random.choice(_CATEGORIES, count),
            "tags": ["|".join(random.choice(_TAGS, random.integers(1, 4), replace=False)) for _ in range(count)],
            "duration_seconds": np.round(random.lognormal(3.5, 1.0, count), 1),
        }
    )
