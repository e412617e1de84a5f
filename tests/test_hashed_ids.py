"""Hashed ids: which ids values get, how often they collide, what they are embedded to, and that models learn them."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from shop import build, write_shop

from clsd_tf.backbones import build_backbone
from clsd_tf.backbones.base import feature_inputs
from clsd_tf.data.input_pipeline import read_columns
from clsd_tf.data.transform import FeatureTransform, HashLookup
from clsd_tf.layers.embedding_config import EmbeddingConfig
from clsd_tf.layers.embeddings import FieldEmbeddings
from clsd_tf.spec.feature_spec import parse_spec
from clsd_tf.spec.id_features import Hashing
from clsd_tf.spec.model_inputs import CategoricalInput, ModelInputs, Statistics
from clsd_tf.spec.validation import SpecError
from clsd_tf.training.assembly import build_model
from clsd_tf.training.config import load_config

SINGLE = {"buckets": 50}
DIVIDED = {"buckets": 50, "method": "quotient_remainder"}
MULTI = {"buckets": 50, "method": "multi", "num_hashes": 3}
every_rule = pytest.mark.parametrize("rule", [SINGLE, DIVIDED, MULTI], ids=["single", "quotient_remainder", "multi"])
VALUES = [f"value {index}" for index in range(100_000)]


def lookup(values, **rule):
    return HashLookup(Hashing(**rule))(tf.constant(values)).numpy()


def feed_content(rule):
    columns = [
        ("user_id", "string"),
        ("item_id", "string"),
        ("tags", "string"),
        ("time", "int64"),
        ("clicked", "int64"),
    ]
    return {
        "name": "feed",
        "tables": {
            "log": {"path": "x", "format": "csv", "columns": [{"name": name, "type": kind} for name, kind in columns]},
            "user": {
                "path": "y",
                "format": "csv",
                "key": "user_id",
                "columns": [{"name": "user_id", "type": "string"}, {"name": "city", "type": "string"}],
            },
        },
        "user_key": "user_id",
        "item_key": "item_id",
        "event_time": {"column": "time", "unit": "seconds"},
        "label": "clicked == 1",
        "user_groups": [{"name": "city_group", "column": "city", "values": ["Rome"]}],
        "features": [
            {"name": "item", "type": "categorical", "column": "item_id", "hash": rule},
            {"name": "tags", "type": "multi_valued", "column": "tags", "separator": "|", "max_values": 2, "hash": rule},
            {"name": "past_items", "type": "history", "of": "item", "max_length": 3},
            {"name": "city", "type": "categorical", "column": "city", "hash": rule},
        ],
    }


def feed(rule):
    """Spec and transform of a feed whose features are all hashed."""
    spec = parse_spec(feed_content(rule), "feed")
    return spec, FeatureTransform(spec, Statistics({}, {}), None)


# --- Ids -------------------------------------------------------------------------------------------------------------


def test_one_hash_gives_the_ids_of_hash_buckets():
    assert lookup(VALUES[:1000], buckets=10).tolist() == [
        1 + int(bucket) for bucket in tf.strings.to_hash_bucket_fast(VALUES[:1000], 10)
    ]


def test_quotient_and_remainder_are_those_of_one_hash():
    # 7 buckets: remainders by 3 are ids 1-3, the 4 quotients 4-7; hashes lie in [0, 12).
    hashes = tf.strings.to_hash_bucket_fast(VALUES[:1000], 12).numpy()
    expected = [[1 + value % 3, 4 + value // 3] for value in hashes.tolist()]
    assert lookup(VALUES[:1000], buckets=7, method="quotient_remainder").tolist() == expected
    assert {tuple(ids) for ids in expected} == {(low, high) for low in (1, 2, 3) for high in (4, 5, 6, 7)}


def test_ids_are_the_same_in_every_process():
    # FarmHash64 first, then SipHash-2-4 with the key (seed, number): the latter by an independent implementation.
    assert lookup(["Hello", "ü"], **MULTI).tolist() == [[2, 22, 20], [42, 21, 43]]
    assert lookup(["Hello", "ü"], buckets=50, seed=7).tolist() == [1, 38]


@every_rule
def test_a_missing_value_has_zeros_and_no_other_value_has_any(rule):
    ids = lookup(["", *VALUES[:5000]], **rule).reshape([5001, -1])
    assert not ids[0].any()
    assert ids[1:].min() == 1
    assert ids.max() == 50


def test_ids_of_values_of_any_shape_stand_on_a_last_axis():
    ids = lookup([["a", ""], ["b", "a"]], **MULTI)
    assert ids.shape == (2, 2, 3)
    assert ids[0, 0].tolist() == ids[1, 1].tolist()
    assert not ids[0, 1].any()


@every_rule
def test_another_seed_gives_other_ids(rule):
    first, second = lookup(VALUES[:1000], **rule), lookup(VALUES[:1000], **rule, seed=1)
    # Equal by chance alone: at most one in 25.
    assert np.mean(first == second) < 0.08


# --- Collisions ------------------------------------------------------------------------------------------------------


def colliding_pairs(ids):
    """Number of pairs of values with the same ids."""
    _, counts = np.unique(ids, axis=0, return_counts=True)
    return int((counts * (counts - 1) // 2).sum())


def test_quotient_remainder_collides_as_one_hash_of_a_quarter_of_the_square():
    ids = lookup(VALUES, buckets=2000, method="quotient_remainder")
    # 100,000 values in 1,000 * 1,000 pairs of ids: 5,000 colliding pairs are expected, standard deviation 71.
    assert colliding_pairs(ids) == pytest.approx(1e5 * (1e5 - 1) / 2 / 1e6, abs=5 * 71)
    # Each part alone: a thousand ids, 5 million colliding pairs.
    for part in (ids[:, :1], ids[:, 1:]):
        assert colliding_pairs(part) == pytest.approx(1e5 * (1e5 - 1) / 2 / 1e3, rel=0.01)


def test_several_hashes_collide_only_together():
    ids = lookup(VALUES, buckets=1000, method="multi", num_hashes=2)
    # Independent hashes: as one hash into 1,000 * 1,000.
    assert colliding_pairs(ids) == pytest.approx(1e5 * (1e5 - 1) / 2 / 1e6, abs=5 * 71)


# --- Rows of ids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [DIVIDED, MULTI], ids=["quotient_remainder", "multi"])
def test_ids_of_one_value_stand_side_by_side(rule):
    spec, transform = feed(rule)
    count = Hashing(**rule).ids_per_value
    raw = {
        "item_id": tf.constant(["i1", ""]),
        "tags": tf.constant(["|a||b|c", ""]),
        "past_items": tf.constant([["i2", "", "i1", ""], ["", "", "", ""]]),
        "city": tf.constant(["Rome", ""]),
    }
    outputs = {name: values.numpy().tolist() for name, values in transform(raw).items()}
    [i1, i2, a, b, rome] = lookup(["i1", "i2", "a", "b", "Rome"], **rule).tolist()
    nothing = [0] * count
    assert outputs == {
        "item": [i1, nothing],
        "tags": [a + b, nothing * 2],
        "past_items": [i2 + i1 + nothing, nothing * 3],
        "city": [rome, nothing],
        "city_group": [1, 0],
    }
    widths = {entry.name: entry.num_ids for entry in spec.model_inputs({}).categorical}
    assert widths == {"item": count, "tags": 2 * count, "past_items": 3 * count, "city": count}


@every_rule
def test_model_inputs_know_how_ids_are_combined(rule):
    spec, _ = feed(rule)
    inputs = spec.model_inputs({})
    hashing = Hashing(**rule)
    combiner = "product" if hashing.method == "quotient_remainder" else "sum"
    expected = CategoricalInput("item", "item", 51, None, hashing.ids_per_value, combiner)
    assert inputs.categorical[0] == expected
    assert inputs.categorical[2] == dataclasses.replace(expected, name="past_items", max_values=3, history_of="item")
    assert ModelInputs.from_dict(inputs.to_dict()) == inputs
    shapes = {name: tuple(tensor.shape) for name, tensor in feature_inputs(inputs).items()}
    assert shapes["past_items"] == (None, 3 * hashing.ids_per_value)
    assert shapes["item"] == ((None,) if hashing.method == "single" else (None, hashing.ids_per_value))
    # AdGate reads features of one id.
    assert inputs.user_features == (("city",) if hashing.method == "single" else ())


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"buckets": 0}, "features.0.categorical.hash.buckets: Input should be greater than or equal to 1"),
        ({"buckets": 1, "method": "quotient_remainder"}, "quotient_remainder needs 2 or more buckets. Received: 1"),
        ({"buckets": 9, "num_hashes": 3}, "num_hashes is for method multi. Received: 3 for single"),
        ({"buckets": 9, "method": "multi", "num_hashes": 1}, "hash.num_hashes: Input should be greater than or equal"),
        ({"buckets": 9, "salt": 1}, "unknown key. Received: 'salt'. Allowed: buckets, method, num_hashes, seed"),
    ],
)
def test_rules_that_make_no_sense_are_refused(rule, message):
    with pytest.raises(SpecError) as error:
        parse_spec(feed_content(rule), "feed")
    assert message in str(error.value)


def test_a_hash_beside_a_vocabulary_is_refused():
    content = feed_content(SINGLE)
    content["features"][0]["vocabulary"] = {}
    with pytest.raises(SpecError, match=r"give one of .* and shares. Received: vocabulary, hash"):
        parse_spec(content, "feed")


# --- Embeddings ------------------------------------------------------------------------------------------------------


def embedded(combiner, item_ids, tag_ids):
    """Fields [num_fields, 1] of one row under a table whose row i is [i / 10], row 0 [.5]."""
    inputs = ModelInputs(
        categorical=(
            CategoricalInput("item", "item", 5, None, 2, combiner),
            CategoricalInput("tags", "item", 5, 2, 2, combiner),
            CategoricalInput("plain", "plain", 2),
        ),
        numeric=(),
        groups=(),
    )
    layer = FieldEmbeddings(inputs, EmbeddingConfig(dim=1))
    ids = {"item": item_ids, "tags": tag_ids, "plain": 1}
    features = {name: tf.constant([values], tf.int64) for name, values in ids.items()}
    layer(features)
    layer.set_weights([np.array([5, 1, 2, 3, 4, 5, 6])[:, np.newaxis] / 10])
    return layer, layer(features).numpy()[0, :, 0].tolist()


def test_embeddings_of_the_ids_of_a_value_are_summed_and_values_averaged():
    # item .1 + .3; tags (.2 + .4) and (.1 + .1), mean .4; the plain table starts at row 5, its id 1 is row 6.
    assert embedded("sum", [1, 3], [2, 4, 1, 1])[1] == pytest.approx([0.4, 0.4, 0.6])
    assert embedded("sum", [1, 3], [2, 4, 0, 0])[1] == pytest.approx([0.4, 0.6, 0.6])


def test_the_product_measures_all_but_the_first_from_one():
    # item .1 * 1.3; tags .2 * 1.4 and .1 * 1.1, mean .195.
    assert embedded("product", [1, 3], [2, 4, 1, 1])[1] == pytest.approx([0.13, 0.195, 0.6])
    assert embedded("product", [1, 3], [0, 0, 0, 0])[1] == pytest.approx([0.13, 0.0, 0.6])


def test_a_missing_single_value_has_an_embedding_of_its_own():
    # As where one id stands for a value: .5 + .5, and .5 * 1.5.
    assert embedded("sum", [0, 0], [0, 0, 0, 0])[1] == pytest.approx([1.0, 0.0, 0.6])
    assert embedded("product", [0, 0], [0, 0, 0, 0])[1] == pytest.approx([0.75, 0.0, 0.6])


def test_lookup_and_presence_are_those_of_values():
    layer, _ = embedded("sum", [1, 3], [0, 0, 0, 0])
    ids = tf.constant([[1, 3, 0, 0], [2, 2, 4, 1]], tf.int64)
    assert layer.lookup("item", ids).numpy()[..., 0] == pytest.approx(np.array([[0.4, 1.0], [0.4, 0.5]]))
    assert layer.present("item", ids).numpy().tolist() == [[True, False], [True, True]]
    assert layer.lookup("plain", tf.constant([1, 0], tf.int64)).numpy()[:, 0] == pytest.approx([0.6, 0.5])


# --- Models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(SINGLE, marks=pytest.mark.long, id="single"),
        pytest.param(DIVIDED, marks=pytest.mark.long, id="quotient_remainder"),
        pytest.param(MULTI, id="multi"),
    ],
)
def test_a_model_learns_a_click_that_depends_on_hashed_values(rule):
    spec, transform = feed(rule)
    random = np.random.default_rng(0)
    items = random.integers(0, 12, 2048)
    raw = {
        "item_id": tf.constant([f"i{item}" if item else "" for item in items]),
        "tags": tf.constant(random.choice(["a|b", "b", ""], 2048)),
        "past_items": tf.constant(random.choice(["i1", "i2", ""], [2048, 3])),
        "city": tf.constant(random.choice(["Rome", "Oslo", ""], 2048)),
    }
    features = transform(raw)
    labels = (items % 3 == 0).astype(np.float32)  # The missing item among the clicked ones.
    tf.keras.utils.set_random_seed(1)
    model = build_backbone("din", spec.model_inputs({}), embeddings=EmbeddingConfig(dim=8), hidden_units=(16,))
    model.compile(tf.keras.optimizers.Adam(0.02), tf.keras.losses.BinaryCrossentropy(from_logits=True))
    model.fit(features, labels, batch_size=256, epochs=8, verbose=0)
    scores = tf.sigmoid(model(features)).numpy()
    assert np.mean((scores > 0.5) == labels) > 0.95


@every_rule
def test_the_whole_model_with_ad_gate_takes_hashed_values(rule):
    spec, transform = feed(rule)
    config = load_config(None, ["method.teacher=self", "method.lambda=0.5", "method.mu=0.5", "hidden_units=[4]"])
    model = build_model(config, spec.model_inputs({}))
    raw = {name: tf.constant(["a", ""]) for name in ("item_id", "tags", "city")}
    raw["past_items"] = tf.constant([["a", "b"], ["", ""]])
    assert model.ad_gate.features == ("city_group",)
    assert model.predict(transform(raw), verbose=0).shape == (2,)


# --- Datasets --------------------------------------------------------------------------------------------------------


def test_a_dataset_holds_every_id_of_a_hashed_value(shop_content, tmp_path):
    shop_content["features"][1] = {"name": "item", "type": "categorical", "column": "item_id", "hash": MULTI}
    shop_content["features"][3]["hash"] = DIVIDED
    dataset = build(parse_spec(shop_content, "shop"), write_shop(tmp_path / "raw"), tmp_path / "dataset")
    columns = read_columns(dataset, "train", ["item", "item_tags", "recent_items"])
    widths = {name: values.shape[1] for name, values in columns.items()}
    assert widths == {"item": 3, "item_tags": 3 * 2, "recent_items": 3 * 3}
    # Items i0 to i6 in the shop's log; those of tags "a|b", "b" and "".
    items = {tuple(ids) for ids in lookup([f"i{index}" for index in range(7)], **MULTI).tolist()}
    assert {tuple(ids) for ids in columns["item"].tolist()} == items
    [a, b] = lookup(["a", "b"], **DIVIDED).tolist()
    expected = {(*a, *b, 0, 0), (*b, 0, 0, 0, 0), (0,) * 6}
    assert {tuple(ids) for ids in columns["item_tags"].tolist()} == expected
    past = {tuple(ids) for row in columns["recent_items"].reshape([-1, 3, 3]).tolist() for ids in row}
    assert past == items | {(0, 0, 0)}
