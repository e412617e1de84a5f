"""Config -> model: what each setting builds, and what is loaded from a finished run."""

import json
import shutil

import numpy as np
import pytest
import tensorflow as tf
from scipy.special import expit

from clsd_tf.data import input_pipeline
from clsd_tf.layers.calibration import Calibration
from clsd_tf.metrics import pointwise
from clsd_tf.storage.dataset_dir import DatasetDir, DatasetLayout
from clsd_tf.storage.files import ArtifactError, read_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import build_model, load_model, predict, predict_logits

pytestmark = pytest.mark.usefixtures("deterministic")


@pytest.fixture(scope="module")
def validation(feed_dataset):
    columns = input_pipeline.read_columns(feed_dataset, "validation", ["label", "sample_weight", "age_group"])
    return columns["label"], columns["sample_weight"], columns["age_group"]


# Building.


def test_methods_share_initial_weights_and_seeds_do_not(feed_dataset, tiny):
    def initial(*assignments):
        return build_model(tiny(*assignments), feed_dataset.inputs).backbone.get_weights()

    clsd, bce, ema, other_seed = initial(), initial("method=bce"), initial("method.teacher=ema"), initial("seed=2")
    for one, *others in zip(clsd, bce, ema, strict=True):
        for other in others:
            np.testing.assert_array_equal(one, other)
    assert any((one != other).any() for one, other in zip(clsd, other_seed, strict=True))


def test_only_local_confidence_brings_an_ad_gate(feed_dataset, tiny):
    assert build_model(tiny("method=bce"), feed_dataset.inputs).parts.keys() == {"backbone"}
    assert build_model(tiny("method.mu=0.0"), feed_dataset.inputs).ad_gate is None
    gate = build_model(tiny("method.ad_gate.features=[gender_group, user_age]"), feed_dataset.inputs).ad_gate
    assert gate.features == ("gender_group", "user_age")


def test_an_ad_gate_without_user_groups_or_of_an_item_feature_is_refused(feed_dataset, tiny):
    inputs = type(feed_dataset.inputs)(feed_dataset.inputs.categorical, feed_dataset.inputs.numeric, ())
    with pytest.raises(ValueError, match=r"at least one user group\. Received: none"):
        build_model(tiny(), inputs)
    assert build_model(tiny("method.mu=0.0"), inputs).ad_gate is None
    with pytest.raises(ValueError, match=r"Received: item_category\. Allowed: age_group, gender_group, user_age"):
        build_model(tiny("method.ad_gate.features=[item_category]"), feed_dataset.inputs)


def bce(target, ctr):
    return -(target * np.log(ctr) + (1 - target) * np.log1p(-ctr))


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        ([], bce),
        # Smoothing .2: the target is .9 for a click and .1 for none.
        (
            ["method.loss=label_smoothing", "method.label_smoothing=0.2"],
            lambda label, ctr: bce(0.1 + 0.8 * label, ctr),
        ),
        # Gamma 2: a row counts by the square of what the model missed.
        (["method.loss=focal", "method.focal_gamma=2.0"], lambda label, ctr: (label - ctr) ** 2 * bce(label, ctr)),
    ],
)
def test_the_loss_is_that_of_the_config(feed_dataset, tiny, assignments, expected):
    model = build_model(tiny("method=bce", "backbone=lr", *assignments), feed_dataset.inputs)
    batch = next(iter(input_pipeline.batches(feed_dataset, "train", batch_size=256)))
    features, label, _ = batch
    # An untrained model predicts about .5 everywhere: moved, so that rows differ in what it misses.
    model.backbone.set_weights([10 * weight - 0.1 for weight in model.backbone.get_weights()])
    ctr = expit(model.logits(features).numpy().astype(np.float64))
    assert ctr.std() > 0.02
    received = float(model.train_step(batch)["loss"])
    assert received == pytest.approx(expected(label.numpy(), ctr).mean(), rel=1e-5)


def test_backbone_settings_reach_the_backbone(feed_dataset, tiny):
    def num_weights(*assignments):
        return build_model(tiny("method=bce", *assignments), feed_dataset.inputs).backbone.count_params()

    # 7 ids and a number, each an embedding of 4 and a first-order weight: hidden layers read 8 fields x 4 = 32.
    base, wider = num_weights("hidden_units=[8]"), num_weights("hidden_units=[9]")
    assert wider - base == 32 + 1 + 1  # Its inputs, its bias and its way to the logit.
    three, one = (num_weights("backbone=dcnv2", f"backbone_arguments.num_cross_layers={number}") for number in (3, 1))
    assert three - one == 2 * (32 * 32 + 32)  # A matrix and a bias each.
    dropout = build_model(tiny("method=bce", "dropout=0.5"), feed_dataset.inputs).backbone
    assert [layer.rate for layer in dropout.submodules if type(layer).__name__ == "Dropout"] == [0.5]


@pytest.mark.parametrize("backbone", ["deepfm", "masknet"])  # MaskNet makes layers when it is first called.
def test_bfloat16_computes_in_half_precision_and_keeps_float32(feed_dataset, tiny, backbone):
    batch = next(iter(input_pipeline.batches(feed_dataset, "train", batch_size=256)))
    settings = ("method.teacher=ema", "method.loss_warmup_steps=0", f"backbone={backbone}", "embeddings.l2=1e-6")
    # Adagrad's first steps are as long for gradients that are nothing but rounding as for others.
    settings += ("embeddings.l2_rows=touched", "optimizer.embeddings.learning_rate=0.002")
    exact, half = (build_model(tiny(*settings, f"precision={x}"), feed_dataset.inputs) for x in ("float32", "bfloat16"))
    dense = [layer for layer in half.backbone.submodules if isinstance(layer, tf.keras.layers.Dense)]
    assert {layer.compute_dtype for layer in dense} == {"bfloat16", "float32"}  # float32: the one that gives logits.
    assert {layer.compute_dtype for layer in half.ad_gate.submodules if hasattr(layer, "compute_dtype")} == {"float32"}
    for one, other in zip(exact.get_weights(), half.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    losses = [[float(model.train_step(batch)["loss"]) for _ in range(5)] for model in (exact, half)]
    np.testing.assert_allclose(*losses, rtol=2e-3)
    assert losses[0] != losses[1]
    assert {variable.dtype for variable in (*half.variables, *half.optimizer.variables)} <= {tf.float32, tf.int64}
    assert half.logits(batch[0]).dtype == tf.float32
    assert tf.keras.mixed_precision.global_policy().name == "float32"


def test_embedding_settings_reach_the_tables(feed_dataset, tiny):
    def table(*assignments):
        model = build_model(tiny("method=bce", "backbone=fm", *assignments), feed_dataset.inputs)
        return model.backbone.get_weights()[0]

    assert table("embeddings.unified_buckets=31").shape == (31, 5)
    uniform = table("embeddings.initializer=uniform", "embeddings.init_scale=0.5")
    assert 0.45 < np.abs(uniform).max() <= 0.5


def test_unknown_backbones_and_arguments_are_refused_with_the_known_ones(feed_dataset, tiny):
    with pytest.raises(ValueError, match=r"unknown backbone\. Received: 'deep_fm'\. Allowed: .*deepfm"):
        build_model(tiny("backbone=deep_fm"), feed_dataset.inputs)
    with pytest.raises(
        ValueError, match=r"'dcnv2' takes no such argument\. Received: depth\. Allowed: .*num_cross_layers"
    ):
        build_model(tiny("backbone=dcnv2", "backbone_arguments.depth=3"), feed_dataset.inputs)


# Loading.


def test_a_loaded_model_has_the_best_weights(clsd_run, feed_dataset, validation):
    label, weight, _ = validation
    logits = predict_logits(load_model(clsd_run.work_dir, feed_dataset), feed_dataset, "validation")
    best = max(entry["val_auc"] for entry in clsd_run.history if entry["competes"])
    assert pointwise.auc(label, logits, weight) == pytest.approx(best, abs=1e-5)


def test_a_loaded_model_predicts_with_the_calibration_of_its_run(clsd_run, feed_dataset, validation):
    _, _, age_group = validation
    model = load_model(clsd_run.work_dir, feed_dataset)
    logits, ctr = (function(model, feed_dataset, "validation") for function in (predict_logits, predict))
    stored = Calibration.from_dict(read_json(clsd_run.work_dir.calibration))
    assert stored.group.name == "age_group"
    np.testing.assert_allclose(ctr, stored.apply(logits, age_group), rtol=0, atol=1e-6)
    assert np.abs(ctr - expit(logits)).max() > 0.01


def test_predictions_are_in_file_order_without_dropout(feed_dataset, tiny):
    model = build_model(tiny("dropout=0.9"), feed_dataset.inputs)
    features, _, _ = next(iter(input_pipeline.batches(feed_dataset, "test", batch_size=400)))
    logits = predict_logits(model, feed_dataset, "test")
    np.testing.assert_allclose(logits, model.logits(features), rtol=0, atol=1e-6)
    np.testing.assert_allclose(predict(model, feed_dataset, "test"), expit(logits), rtol=0, atol=1e-6)


def test_a_model_is_not_loaded_for_another_dataset(clsd_run, feed_dataset, tmp_path):
    shutil.copytree(feed_dataset.path, tmp_path / "dataset")
    layout = DatasetLayout(tmp_path / "dataset")
    layout.counts.write_text(json.dumps({**read_json(layout.counts), "note": "another"}), encoding="utf-8")
    layout.mark_complete(feed_dataset.spec)
    other = DatasetDir(layout.root)
    with pytest.raises(ArtifactError) as error:
        load_model(clsd_run.work_dir, other)
    assert f"Received: {other.path} with fingerprint {other.fingerprint}" in str(error.value)
    assert f"Allowed: {feed_dataset.fingerprint}" in str(error.value)


def test_a_model_is_not_loaded_from_an_unfinished_or_absent_run(clsd_run, feed_dataset, tmp_path):
    unfinished = WorkDir(tmp_path / "unfinished")
    shutil.copytree(clsd_run.work_dir.path, unfinished.path)
    unfinished.success.unlink()
    with pytest.raises(ArtifactError, match=r"unfinished, which has none\. Run `python -m pipelines.train`"):
        load_model(unfinished, feed_dataset)
    with pytest.raises(ArtifactError, match="absent, which does not exist"):
        load_model(WorkDir(tmp_path / "absent"), feed_dataset)
