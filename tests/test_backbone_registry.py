"""The registry of backbones, and arguments that are refused."""

import re
import warnings

import numpy as np
import pytest
import tensorflow as tf
from backbone_inputs import (
    ARGUMENTS,
    EXTRAS,
    FEATURES,
    INPUTS,
    every_backbone,
    registry,  # noqa: F401  An autouse fixture acts on the modules that import it.
)

from clsd_tf.backbones import BACKBONES, build_backbone, register_backbone
from clsd_tf.backbones.base import declared_features, example_features, feature_inputs
from clsd_tf.layers.embedding_config import EmbeddingConfig
from clsd_tf.methods.clsd.ad_gate import AdGate
from clsd_tf.methods.clsd.model import ClsdModel
from clsd_tf.spec.model_inputs import ModelInputs
from clsd_tf.training.assembly import build_model
from clsd_tf.training.config import TrainConfig, load_config


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"Received: 'deep_fm'. Allowed: afm, autoint, dcn, dcnv2, dcnv2_mix, deepfm, "
    ):
        build_backbone("deep_fm", INPUTS)


def test_an_unknown_argument_lists_the_known_ones():
    allowed = "dropout, embeddings, hidden_units, num_cross_layers"
    with pytest.raises(ValueError, match=rf"'dcn'.*Received: cross_layers. Allowed: {allowed}$"):
        build_backbone("dcn", INPUTS, cross_layers=3)
    with pytest.raises(ValueError, match=r"Received: gelu. Allowed: activation, dropout, embeddings, hidden_units$"):
        build_backbone("two_layers", INPUTS, **ARGUMENTS, gelu=True)


def test_a_factory_of_any_keyword_arguments_gets_them_all():
    received = {}

    @register_backbone("mine")
    def mine(inputs, **arguments):
        received.update(arguments)
        return build_backbone("dnn", inputs)

    build_backbone("mine", INPUTS, anything=1)
    assert received == {"anything": 1}


def test_a_factory_of_version_0_1_is_told_what_to_take():
    @register_backbone("old")
    def old(inputs, *, embedding_dim, hidden_units, dropout):
        raise AssertionError

    message = (
        r"'old' takes no such argument. Received: embeddings. Allowed: dropout, embedding_dim, hidden_units. "
        r"Since version 0.2 a factory takes embeddings, .*EmbeddingConfig, in place of embedding_dim"
    )
    with pytest.raises(ValueError, match=message):
        build_model(TrainConfig(backbone="old"), INPUTS)


@pytest.mark.parametrize("assignments", [[], ["embeddings.dim=10", "embeddings.initializer=normal"]])
def test_settings_reach_a_factory_of_other_defaults_also_where_they_are_the_configs_own(assignments):
    received = []

    @register_backbone("mine")
    def mine(inputs, *, embeddings=EmbeddingConfig(dim=3, initializer="uniform"), hidden_units=(2,), dropout=0.5):  # noqa: B008
        received.append((embeddings, hidden_units, dropout))
        return build_backbone("dnn", inputs, embeddings=embeddings, hidden_units=hidden_units, dropout=dropout)

    config = load_config(None, ["backbone=mine", "method=bce", *assignments])
    model = build_model(config, INPUTS)
    assert received == [(EmbeddingConfig(), (128, 64), 0.0)]
    assert {tuple(variable.shape[1:]) for variable in model.variables if "tables" in variable.name} == {(10,)}


def test_a_subclass_of_backbone_takes_the_arguments_of_its_parents():
    @register_backbone("mine")
    class Mine(BACKBONES["dcn"]):
        def __init__(self, inputs, *, temperature=1.0, **kwargs):
            super().__init__(inputs, **kwargs)

    assert Mine.argument_names() == {"temperature", *BACKBONES["dcn"].argument_names()}
    assert {"num_cross_layers", "embeddings", "hidden_units"} < Mine.argument_names()
    assert isinstance(build_backbone("mine", INPUTS, temperature=2.0, num_cross_layers=1), Mine)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match=r"already. Received: 'dnn'.*del BACKBONES\['dnn'\]"):
        register_backbone("dnn")(lambda inputs: None)
    del BACKBONES["dnn"]
    register_backbone("dnn")(BACKBONES["fm"])
    assert BACKBONES["dnn"] is BACKBONES["fm"]


@pytest.mark.filterwarnings("error:Input dict contained keys")
def test_the_documented_example_trains_as_any_backbone():
    model = ClsdModel(build_backbone("two_layers", INPUTS, **ARGUMENTS))
    model.compile("sgd")
    before = model.backbone.get_weights()
    history = model.fit(tf.data.Dataset.from_tensors(({**FEATURES, **EXTRAS}, tf.range(7) % 2)), verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert all((old != new).any() for old, new in zip(before, model.backbone.get_weights(), strict=True))
    assert model(FEATURES | EXTRAS).shape == [7]


@pytest.mark.parametrize("name", ["deepfm", "two_layers"])
def test_a_model_has_the_same_summary_before_and_after_it_has_seen_rows(name):
    model = ClsdModel(build_backbone(name, INPUTS, **ARGUMENTS), AdGate(INPUTS))
    model.compile("sgd")
    before, after = [], []
    model.summary(print_fn=before.append)
    model.fit(tf.data.Dataset.from_tensors(({**FEATURES, **EXTRAS}, tf.range(7) % 2)), verbose=0)
    model.summary(print_fn=after.append)
    assert before == after
    text = "\n".join(before)
    for part in (model.backbone, model.ad_gate):
        assert re.search(rf"{part.name} .* {part.count_params()} ", text), text


def test_a_functional_backbone_is_given_the_features_that_it_declares():
    backbone = build_backbone("two_layers", INPUTS, **ARGUMENTS)
    received = declared_features(backbone, FEATURES | EXTRAS)
    assert received.keys() == FEATURES.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(backbone(received), backbone(FEATURES))


def test_a_functional_backbone_of_named_inputs_is_given_those():
    price, age = tf.keras.Input([], name="price"), tf.keras.Input([], name="age")
    backbone = tf.keras.Model([price, age], price - age)
    received = declared_features(backbone, FEATURES | EXTRAS)
    assert received.keys() == {"price", "age"}
    np.testing.assert_array_equal(backbone(received), FEATURES["price"] - FEATURES["age"])


def test_a_subclassed_backbone_is_given_all_features():
    backbone = build_backbone("dnn", INPUTS)
    backbone(FEATURES)
    assert declared_features(backbone, FEATURES | EXTRAS) == FEATURES | EXTRAS


def test_a_missing_feature_of_a_functional_backbone_is_named():
    backbone = build_backbone("two_layers", INPUTS, **ARGUMENTS)
    with pytest.raises(ValueError, match="price"):
        backbone(declared_features(backbone, {name: FEATURES[name] for name in FEATURES if name != "price"}))


def test_example_features_are_named_and_shaped_as_a_row_of_a_batch():
    received = example_features(build_backbone("dnn", INPUTS).model_inputs)
    row = {name: values[:1] for name, values in {**FEATURES, "age_group": EXTRAS["age_group"]}.items()}
    assert {name: (value.shape, value.dtype) for name, value in received.items()} == {
        name: (value.shape, value.dtype) for name, value in row.items()
    }


def test_feature_inputs_are_named_and_shaped_as_the_batches():
    received = feature_inputs(INPUTS)
    assert {name: (value.shape.as_list(), value.dtype) for name, value in received.items()} == {
        name: ([None, *value.shape[1:]], value.dtype) for name, value in FEATURES.items()
    }


@every_backbone
@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_out_of_range_is_refused(name, dropout):
    with pytest.raises(ValueError, match=rf"dropout must be in \[0, 1\). Received: {dropout}"):
        build_backbone(name, INPUTS, dropout=dropout)


_NOT_A_SIZE = r"must be a whole number of at least 1. Received: "


@pytest.mark.parametrize(
    ("name", "argument", "value", "message"),
    [
        ("dnn", "hidden_units", (8, 0), rf"hidden_units\[1\] {_NOT_A_SIZE}0"),
        ("dnn", "hidden_units", 8, r"hidden_units must be a list of 0 or more layer sizes. Received: 8"),
        ("dcn", "num_cross_layers", 0, rf"num_cross_layers {_NOT_A_SIZE}0"),
        ("dcnv2", "num_cross_layers", 0, rf"num_cross_layers {_NOT_A_SIZE}0"),
        ("dcnv2_mix", "num_cross_layers", 0, rf"num_cross_layers {_NOT_A_SIZE}0"),
        ("dcnv2_mix", "num_experts", 0, rf"num_experts {_NOT_A_SIZE}0"),
        ("dcnv2_mix", "low_rank", "8", rf"low_rank {_NOT_A_SIZE}'8'"),
        ("xdeepfm", "cin_units", (), r"cin_units must be a list of 1 or more layer sizes. Received: \(\)"),
        ("autoint", "num_attention_layers", 0, rf"num_attention_layers {_NOT_A_SIZE}0"),
        ("autoint", "num_heads", 0, rf"num_heads {_NOT_A_SIZE}0"),
        ("autoint", "head_dim", 0, rf"head_dim {_NOT_A_SIZE}0"),
        ("afm", "attention_units", 0, rf"attention_units {_NOT_A_SIZE}0"),
        ("fibinet", "reduction_ratio", 0, rf"reduction_ratio {_NOT_A_SIZE}0"),
        ("masknet", "structure", "both", r"structure must be one of parallel, serial. Received: 'both'"),
        ("masknet", "num_blocks", 0, rf"num_blocks {_NOT_A_SIZE}0"),
        ("masknet", "block_units", 0, rf"block_units {_NOT_A_SIZE}0"),
        ("masknet", "reduction_ratio", 0.5, rf"reduction_ratio {_NOT_A_SIZE}0.5"),
        ("masknet", "embeddings", EmbeddingConfig(dim=1), r"embeddings.dim must be at least 2. Received: 1"),
        ("finalmlp", "num_heads", 4, r"num_heads=4, hidden_units=\[8, 6\]. num_heads=1 always does"),
        ("finalmlp", "gate_units", 0, rf"gate_units {_NOT_A_SIZE}0"),
        ("finalmlp", "hidden_units", (), r"hidden_units must be a list of 1 or more layer sizes. Received: \[\]"),
        ("din", "attention_units", "32", r"attention_units must be a list of 0 or more layer sizes. Received: '32'"),
        ("din", "activation", "prelu", r"activation must be one of relu, dice. Received: 'prelu'"),
    ],
)
def test_arguments_out_of_range_are_refused(name, argument, value, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(name, INPUTS, **{**ARGUMENTS, argument: value})


@pytest.mark.parametrize("name", ["afm", "fibinet"])
def test_models_of_pairs_refuse_a_single_input(name):
    with pytest.raises(ValueError, match=r"needs 2 or more inputs. Received: price. Declare more"):
        build_backbone(name, ModelInputs(categorical=(), numeric=("price",), groups=()))


def test_no_input_at_all_is_refused():
    with pytest.raises(ValueError, match=r"Dnn needs 1 or more inputs. Received: none"):
        build_backbone("dnn", ModelInputs(categorical=(), numeric=(), groups=()))


def test_din_does_not_take_an_input_of_several_values_for_a_history():
    tags = ModelInputs(categorical=(INPUTS.categorical[0], INPUTS.categorical[3]), numeric=(), groups=())
    with pytest.raises(ValueError, match=r"Din needs a history.*Received categorical inputs: item, tags"):
        build_backbone("din", tags)
