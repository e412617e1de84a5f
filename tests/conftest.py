"""Fixtures that the rooms' tests share: a small feature spec, a simulated feed and the dataset built from it."""

# isort: off
import clsd_tf  # noqa: F401  First: it selects the Keras that tensorflow-recommenders supports.

# isort: on
import pytest
import yaml

import feature_specs
from clsd_tf.artifacts import DatasetDir
from clsd_tf.features import parse_spec
from pipelines.build import BuildConfig, build_dataset
from pipelines.feed import FeedConfig, simulate_feed

_SHOP = """
name: shop
tables:
  log:
    path: log.csv
    format: csv
    columns:
      - {name: user_id, type: string}
      - {name: item_id, type: string}
      - {name: time, type: int64}
      - {name: clicked, type: int64}
      - {name: seconds, type: float}
      - {name: weight, type: float}
  user:
    path: users.csv
    format: csv
    key: user_id
    columns:
      - {name: user_id, type: string}
      - {name: age, type: int64}
      - {name: city, type: string}
  item:
    path: items.csv
    format: csv
    key: item_id
    columns:
      - {name: item_id, type: string}
      - {name: tags, type: string}
      - {name: price, type: float}
user_key: user_id
item_key: item_id
event_time: {column: time, unit: seconds, earliest: 2020-01-01, latest: 2030-01-01}
label: clicked == 1
intensity_label: seconds >= 20
sample_weight: weight
features:
  - {name: user, type: categorical, column: user_id, hash_buckets: 10}
  - {name: item, type: categorical, column: item_id, vocabulary: {num_oov_indices: 2}}
  - {name: user_city, type: categorical, column: city}
  - {name: item_tags, type: multi_valued, column: tags, separator: "|", max_values: 3}
  - {name: item_price, type: numeric, column: price, log1p: true}
  - {name: user_age, type: numeric, column: age, scaling: quantile_buckets, num_buckets: 4}
  - {name: recent_items, type: history, of: item, max_length: 3}
user_groups:
  - {name: age_group, column: age, boundaries: [18, 30.5, 60]}
  - {name: city_group, column: city, values: [Rome, Oslo]}
"""


@pytest.fixture
def shop_content():
    """Content of a small, valid feature spec: a fresh copy that the test may change."""
    return yaml.safe_load(_SHOP)


@pytest.fixture(scope="session")
def shop_spec():
    """The spec of ``shop_content``, unchanged."""
    return parse_spec(yaml.safe_load(_SHOP), "shop")


@pytest.fixture(scope="session")
def feed_dir(tmp_path_factory):
    """Raw files of a feed of 4,000 impressions; read-only."""
    path = tmp_path_factory.mktemp("feed") / "raw"
    simulate_feed(FeedConfig(num_rows=4000, num_users=120, num_items=60, seed=3), path)
    return path


@pytest.fixture(scope="session")
def feed_dataset(feed_dir, tmp_path_factory):
    """The dataset directory built from ``feed_dir``; read-only."""
    path = tmp_path_factory.mktemp("dataset") / "dataset"
    build_dataset(feature_specs.get_spec("simulated_feed"), BuildConfig(input_dir=str(feed_dir)), path)
    return DatasetDir(path)
