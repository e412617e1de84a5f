"""Fixtures that the rooms' tests share: a small feature spec, a simulated feed and the dataset built from it."""

# isort: off
import clsd_tf  # noqa: F401  First: it selects the Keras that tensorflow-recommenders supports.

# isort: on
import dataclasses
import shutil

import pytest
import tensorflow as tf
import yaml
from shop import build, events, items, write_shop
from shop_days import build_days

import feature_specs
from clsd_tf.data.examples import encode_examples, parse_records, record_tensors
from clsd_tf.methods.pointwise.config import BceConfig
from clsd_tf.spec.feature_spec import parse_spec
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import make_deterministic
from clsd_tf.training.config import TrainConfig, load_config
from clsd_tf.training.run import train
from pipelines.beam.dataset import BuildConfig, build_dataset
from pipelines.public_data.feed import FeedConfig, simulate_feed


def pytest_terminal_summary(terminalreporter):
    left_out = [item for item in terminalreporter.stats.get("deselected", []) if item.get_closest_marker("long")]
    if left_out:
        terminalreporter.write_line(f"{len(left_out)} long tests were left out: make test-all runs them")


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


@pytest.fixture(scope="session")
def shop_dir(tmp_path_factory):
    """The shop with planted rows.

    Events 185 and 190, in the test period, show the item "late"; event 100 (of user u0) shows the item "once"; lines
    14 and 25 (events 12 and 23) are bad.
    """
    rows = events()
    rows[185]["item_id"] = rows[190]["item_id"] = "late"
    rows[100]["item_id"] = "once"
    rows[12] = "u2,i5"
    rows[23]["clicked"] = "maybe"
    extra = [{"item_id": "once", "tags": "c", "price": 2.0}, {"item_id": "late", "tags": "rare", "price": 2.0}]
    return write_shop(tmp_path_factory.mktemp("shop") / "raw", rows, item_rows=[*items(), *extra])


@pytest.fixture(scope="session")
def shop_dataset(shop_dir, shop_spec, tmp_path_factory):
    """Built from ``shop_dir`` in compressed shards of 30 rows."""
    path = tmp_path_factory.mktemp("shop_dataset") / "dataset"
    return build(shop_spec, shop_dir, path, max_bad_fraction=0.01, rows_per_shard=30, compressed=True)


@pytest.fixture(scope="session")
def shop_days(shop_spec, tmp_path_factory):
    """The datasets of three days, each grown from the one before; read-only."""
    return build_days(shop_spec, tmp_path_factory.mktemp("shop_days"))


@pytest.fixture(scope="session")
def deterministic():
    """As commands that train do: histories, scores and weights are compared bit for bit."""
    make_deterministic()


_TINY = [
    "embeddings.dim=4",
    "hidden_units=[8]",
    "batch_size=256",
    "max_epochs=2",
    "method.teacher=self",
    "method.loss_warmup_steps=5",
    "method.num_folds=2",
    "method.lambda=0.5",
    "method.mu=0.5",
]


def _is_of_bce(assignment):
    return assignment.removeprefix("method.").partition("=")[0] in BceConfig.model_fields


@pytest.fixture(scope="session")
def tiny():
    """Assignments -> config: two epochs of 13 steps on ``feed_dataset``, of which 5 steps are loss warm-up."""

    def config(*assignments):
        settings = [*_TINY, *assignments]
        if "method=bce" in assignments:  # Settings of clsd are none of its own.
            settings = [entry for entry in settings if not entry.startswith("method.") or _is_of_bce(entry)]
        return load_config(None, settings)

    return config


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its directory, its config and the history that ``train`` returned."""

    work_dir: WorkDir
    config: TrainConfig
    history: list


@pytest.fixture(scope="session")
def run_of(feed_dataset, tmp_path_factory):
    """Config -> finished ``Run`` on ``feed_dataset``."""

    def run(config, name):
        work_dir = WorkDir(tmp_path_factory.mktemp("runs") / name)
        return Run(work_dir, config, train(feed_dataset, config, work_dir, title=None))

    return run


@pytest.fixture(scope="session")
def clsd_run(run_of, tiny, deterministic):
    """With AdGate, global and local confidence; calibrated in each age group. Read-only."""
    return run_of(tiny("calibration.user_group=age_group"), "clsd")


@pytest.fixture(scope="session")
def with_changed_records():
    """(dataset, path, change) -> a copy of the dataset after ``change(feature)`` of each training record.

    ``feature`` is the feature map of a tf.Example that holds the record's values by name. Stored teacher scores stay
    behind.
    """

    def changed(dataset, path, change):
        shutil.copytree(dataset.path, path, ignore=shutil.ignore_patterns("teacher_scores"))
        copy = DatasetDir(path)
        for file in copy.record_files("train"):
            serialized = list(tf.data.TFRecordDataset(file).as_numpy_iterator())
            rows = parse_records(tf.constant(serialized), copy.inputs, copy.spec.record_layout)
            named = encode_examples({name: tf.convert_to_tensor(values) for name, values in rows.items()}).numpy()
            examples = [tf.train.Example.FromString(text) for text in named]
            for example in examples:
                change(example.features.feature)
            texts = tf.constant([example.SerializeToString() for example in examples])
            again = parse_records(texts, copy.inputs, "named")
            written = encode_examples(record_tensors(again, copy.inputs, copy.spec.record_layout)).numpy()
            with tf.io.TFRecordWriter(file) as writer:
                for text in written:
                    writer.write(text)
        return copy

    return changed
