"""The signature `rank`: many items for one user in one call."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import input_pb2

from clsd_tf.backbones.base import feature_inputs
from clsd_tf.data.transform import FeatureTransform
from clsd_tf.layers.embedding_config import EmbeddingConfig
from clsd_tf.layers.embeddings import FieldEmbeddings
from clsd_tf.methods.clsd.config import ClsdConfig
from clsd_tf.methods.clsd.model import ClsdModel
from clsd_tf.spec.feature_spec import parse_spec
from clsd_tf.training.assembly import load_model
from export.servable.profile import ExportProfile
from export.servable.ranking import rank_function, sides_of
from export.servable.signatures import serving_signatures


@pytest.fixture(scope="module")
def parts(feed_dataset, clsd_run):
    """Model (calibrated in each age group) and transform of a run."""
    transform = FeatureTransform(feed_dataset.spec, feed_dataset.statistics, feed_dataset.layout.vocabularies)
    return load_model(clsd_run.work_dir, feed_dataset), transform


@pytest.fixture(scope="module")
def signatures(parts, feed_dataset):
    model, transform = parts
    return serving_signatures(feed_dataset.spec, transform, model, ExportProfile())


def example(**features):
    message = tf.train.Example()
    for name, values in features.items():
        feature = message.features.feature[name]
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, str):
                feature.bytes_list.value.append(value.encode())
            elif isinstance(value, int):
                feature.int64_list.value.append(value)
            else:
                feature.float_list.value.append(value)
    return message


def request(user, items):
    message = input_pb2.ExampleListWithContext(examples=items)
    if user is not None:
        message.context.CopyFrom(user)
    return message.SerializeToString()


def pair(user, item):
    both = tf.train.Example()
    both.MergeFrom(user)
    both.MergeFrom(item)
    return both.SerializeToString()


USERS = [
    example(user_id="u3", age=22, gender="F", recent_items=["i1", "i2", "i3"]),
    example(user_id="u9", age=50, recent_items=["i7"]),
]
ITEMS = [
    example(item_id=f"i{number}", duration_seconds=float(5 + number), category=f"c{number % 4}") for number in range(12)
]


def rank(signatures, *requests):
    found = signatures["rank"](requests=tf.constant(list(requests)))
    return found["item_ids"].numpy().tolist(), found["ctr"].numpy()


def test_ranks_as_an_example_per_pair_scores(signatures):
    for user in USERS:
        pairs = tf.constant([pair(user, item) for item in ITEMS])
        ctr = signatures["serving_default"](examples=pairs)["ctr"].numpy()
        order = np.argsort(-ctr, kind="stable")
        ids, ranked = rank(signatures, request(user, ITEMS))
        np.testing.assert_allclose(ranked[0], ctr[order], rtol=0, atol=1e-6)
        assert ids[0] == [f"i{number}".encode() for number in order]
        assert len(set(ranked[0].tolist())) > 6


def test_requests_of_several_users_do_not_mix(signatures):
    alone = [rank(signatures, request(user, items)) for user, items in zip(USERS, (ITEMS, ITEMS[:3]), strict=True)]
    ids, ctr = rank(signatures, request(USERS[0], ITEMS), request(USERS[1], ITEMS[:3]))
    assert ids[0] == alone[0][0][0]
    assert ids[1] == alone[1][0][0] + [b""] * 9
    np.testing.assert_allclose(ctr[0], alone[0][1][0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(ctr[1, :3], alone[1][1][0], rtol=0, atol=1e-6)
    assert (ctr[1, 3:] == -1).all()


def test_users_and_items_of_whom_nothing_is_known(signatures):
    nothing = signatures["serving_default"](examples=tf.constant([b""]))["ctr"].numpy()[0]
    for user in (None, example()):
        ids, ctr = rank(signatures, request(user, [example()]))
        assert ids == [[b""]]
        assert ctr[0, 0] == pytest.approx(nothing, abs=1e-6)


def test_no_items_and_no_requests(signatures):
    assert rank(signatures, request(USERS[0], []))[1].shape == (1, 0)
    empty = signatures["rank"](requests=tf.constant([], tf.string))
    assert empty["ctr"].shape == empty["item_ids"].shape == [0, 0]


def test_what_an_item_says_of_the_user_does_not_count(signatures):
    lying = [example(item_id="i1", user_id="u9", age=50)]
    honest = [example(item_id="i1")]
    np.testing.assert_array_equal(
        rank(signatures, request(USERS[0], lying))[1], rank(signatures, request(USERS[0], honest))[1]
    )


def test_top_k_gives_the_best(parts, feed_dataset, signatures):
    model, transform = parts
    spec = feed_dataset.spec
    best = tf.function(rank_function(spec, transform, model, 4), autograph=False)
    found = best(tf.constant([request(USERS[0], ITEMS)]))
    ids, ctr = rank(signatures, request(USERS[0], ITEMS))
    assert found["item_ids"].numpy().tolist()[0] == ids[0][:4]
    np.testing.assert_allclose(found["ctr"][0], ctr[0, :4], rtol=0, atol=1e-6)


def test_the_users_part_is_looked_up_once(signatures):
    """Of the two lookups in the tables one is fed by the number of users, the other by that of items."""
    gathers = [
        operation for operation in signatures["rank"].graph.get_operations() if operation.type == "ResourceGather"
    ]
    fields = {operation.inputs[1].shape.as_list()[1] for operation in gathers}
    whole = [
        operation
        for operation in signatures["serving_default"].graph.get_operations()
        if operation.type == "ResourceGather"
    ]
    assert len(gathers) == 2
    assert len(whole) == 1
    assert sum(fields) == whole[0].inputs[1].shape.as_list()[1]


def test_tables_say_where_inputs_are_read(feed_dataset, shop_content):
    def names(entries):
        return [entry.name for entry in entries]

    feed = sides_of(feed_dataset.spec)
    assert names(feed.item) == ["item_id", "device", "category", "tags", "duration_seconds"]
    assert names(feed.user) == ["user_id", "age", "recent_items", "gender"]
    shop = sides_of(parse_spec(shop_content, "shop"))
    assert names(shop.item) == ["item_id", "tags", "price"]


def test_columns_of_the_log_are_read_from_the_item_or_else_from_the_user(signatures):
    def ctr_of(device):
        both = pair(USERS[0], example(item_id="i1", category="c1", device=device))
        return signatures["serving_default"](examples=tf.constant([both]))["ctr"].numpy()[0]

    assert ctr_of("phone") != ctr_of("tv")
    on_phone = tf.train.Example.FromString(pair(USERS[0], example(device="phone")))
    items = [example(item_id="i1", category="c1"), example(item_id="i1", category="c1", device="tv")]
    for item, device in zip(items, ("phone", "tv"), strict=True):
        assert rank(signatures, request(on_phone, [item]))[1][0, 0] == pytest.approx(ctr_of(device), abs=1e-6)


def test_other_keras_models_rank_as_well(feed_dataset, parts):
    """A functional model takes no shared rows: its features are repeated, its ranking is the same."""
    features = feature_inputs(feed_dataset.inputs)
    flat = tf.keras.layers.Flatten()(FieldEmbeddings(feed_dataset.inputs, EmbeddingConfig(dim=3))(features))
    backbone = tf.keras.Model(features, tf.keras.layers.Dense(1, kernel_initializer="ones")(flat))
    model = ClsdModel(backbone, None, ClsdConfig(teacher="self", **{"lambda": 0.0, "mu": 0.0}))
    own = serving_signatures(feed_dataset.spec, parts[1], model, ExportProfile())
    pairs = tf.constant([pair(USERS[0], item) for item in ITEMS])
    ctr = own["serving_default"](examples=pairs)["ctr"].numpy()
    np.testing.assert_allclose(rank(own, request(USERS[0], ITEMS))[1][0], np.sort(ctr)[::-1], rtol=0, atol=1e-6)
