"""Inputs, batches and built backbones that the tests of backbones share, and their fixture for the registry."""

import inspect
import re

import numpy as np
import pytest
import tensorflow as tf

from clsd_tf import backbones
from clsd_tf.backbones import BACKBONES, build_backbone, register_backbone
from clsd_tf.layers.embedding_config import EmbeddingConfig
from clsd_tf.spec.model_inputs import CategoricalInput, GroupInput, ModelInputs

INPUTS = ModelInputs(
    categorical=(
        CategoricalInput("item", "item", 7),
        CategoricalInput("city", "city", 4),
        CategoricalInput("recent_items", "item", 7, max_values=3, history_of="item"),
        CategoricalInput("tags", "tags", 5, max_values=2),
    ),
    numeric=("price", "age"),
    groups=(GroupInput("age_group", ("unknown", "young")),),
    user_features=("city", "age"),
)
FEATURES = {
    "item": tf.constant([1, 2, 6, 0, 3, 5, 4], tf.int64),
    "city": tf.constant([0, 1, 2, 3, 1, 2, 0], tf.int64),
    "recent_items": tf.constant(
        [[0, 0, 0], [1, 0, 0], [1, 2, 3], [6, 5, 0], [4, 4, 4], [0, 2, 0], [5, 6, 1]], tf.int64
    ),
    "tags": tf.constant([[1, 2], [0, 0], [3, 0], [4, 1], [2, 2], [1, 0], [3, 4]], tf.int64),
    "price": tf.constant([0.0, 1.5, -2.0, 0.5, 3.0, 1.0, -1.0]),
    "age": tf.constant([1.0, -1.0, 0.0, 2.0, -0.5, 0.5, 1.5]),
}
EXTRAS = {
    "age_group": tf.constant([0, 1, 1, 0, 1, 0, 1], tf.int64),
    "row_id": tf.range(7, dtype=tf.int64),
    "teacher_score": tf.linspace(0.1, 0.7, 7),
}
ARGUMENTS = {"embeddings": EmbeddingConfig(dim=4), "hidden_units": (8, 6), "dropout": 0.0}
NAMES = sorted(BACKBONES)
every_backbone = pytest.mark.parametrize("name", NAMES)


def _documented_example():
    return inspect.cleandoc(re.search(r"::\n\n((?:    .*\n|\n)+)", backbones.__doc__).group(1))


@pytest.fixture(autouse=True)
def registry():
    """Registers the model of the package docstring for one test, and forgets what the test registers."""
    own = dict(BACKBONES)
    exec(compile(_documented_example(), "docstring", "exec"), {})
    yield
    for name in [name for name in BACKBONES if BACKBONES[name] is not own.get(name)]:
        del BACKBONES[name]
    for name in own.keys() - BACKBONES.keys():
        register_backbone(name)(own[name])


def randomise(backbone, scale):
    """Weights large enough for every part to matter; variances of batch statistics stay positive."""
    random = np.random.default_rng(3)
    weights = [random.normal(0, scale, weight.shape) for weight in backbone.get_weights()]
    names = [weight.name for weight in backbone.weights]
    backbone.set_weights([abs(w) if "variance" in name else w for w, name in zip(weights, names, strict=True)])
    return backbone


def built(name, scale=0.5, **arguments):
    """A backbone with all its variables, and random weights."""
    backbone = build_backbone(name, INPUTS, **{**ARGUMENTS, **arguments})
    backbone(FEATURES)
    return randomise(backbone, scale)


def rows(features, index):
    return {name: values[index] for name, values in features.items()}
