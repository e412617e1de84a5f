"""ClsdModel with a backbone of the user's own and plain compile / fit on data in memory."""

import numpy as np
import pytest
import sklearn.metrics
import tensorflow as tf

from clsd_tf.clsd import AdGate, ClsdConfig, ClsdModel
from clsd_tf.clsd.monitors import Extremum, MeanPerGroup
from clsd_tf.model_inputs import GroupInput

GROUP = GroupInput("tier", ("unknown", "low", "high"))
BATCH = 16
WARMUP = 6


class TinyBackbone(tf.keras.Model):
    """logits = w . tanh(W x) + b."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._hidden = tf.keras.layers.Dense(4, activation="tanh")
        self._logits = tf.keras.layers.Dense(1)

    def call(self, features, training=False):
        return tf.squeeze(self._logits(self._hidden(features["x"])), axis=1)


@pytest.fixture(scope="module")
def data():
    """Ten batches of rows whose click rate depends on x and on the group."""
    random = np.random.default_rng(0)
    rows = 10 * BATCH
    x = random.normal(size=[rows, 3]).astype(np.float32)
    tier = random.integers(0, 3, rows)
    labels = (random.random(rows) < 1 / (1 + np.exp(-x[:, 0] - tier + 1.5))).astype(np.float32)
    teacher = random.uniform(0.05, 0.95, rows).astype(np.float32)
    return {"x": x, "tier": tier, "teacher_score": teacher}, labels


def head(data, num_batches):
    features, labels = data
    rows = num_batches * BATCH
    return {name: values[:rows] for name, values in features.items()}, labels[:rows]


def new_model(config, *, with_gate=True, optimizer=None, gate_optimizer=None, **compile_arguments):
    """A model whose initial weights do not depend on ``config``; eager, since tracing takes longer than a few steps."""
    compile_arguments = {"run_eagerly": True, **compile_arguments}
    tf.keras.utils.set_random_seed(7)
    model = ClsdModel(TinyBackbone(), AdGate([GROUP]) if with_gate else None, config)
    model.compile(
        optimizer or tf.keras.optimizers.Adam(0.02),
        ad_gate_optimizer=gate_optimizer or tf.keras.optimizers.Adam(0.02),
        **compile_arguments,
    )
    features = {"x": tf.zeros([1, 3]), "tier": tf.zeros([1], tf.int64)}
    model(features)
    model.debug_outputs(features)
    return model


def fit(model, data, **arguments):
    features, labels = data
    return model.fit(features, labels, batch_size=BATCH, shuffle=False, verbose=0, **arguments).history


def weights_of(part):
    return [weight.copy() for weight in part.get_weights()]


def assert_same(received, expected):
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def assert_differ(received, expected):
    assert any((one != other).any() for one, other in zip(received, expected, strict=True))


def clsd(**changes):
    return ClsdConfig(**{"teacher": "self", "lambda_": 0.5, "mu": 0.5, "loss_warmup_steps": 0, **changes})


BCE = clsd(lambda_=0.0, mu=0.0)


# Loss warm-up.


def test_loss_warmup_is_bce_bit_for_bit_and_ends_after_exactly_its_steps(data):
    model, bce = (
        new_model(config, with_gate=False, run_eagerly=False, steps_per_execution=4)
        for config in (clsd(loss_warmup_steps=WARMUP, mu=0.0), BCE)
    )
    for each in (model, bce):
        fit(each, head(data, WARMUP))
        assert int(each.optimizer.iterations) == WARMUP
    # Steps 0 to WARMUP - 1 are BCE; step WARMUP, the next one, is the first with confidence.
    assert_same(weights_of(model.backbone), weights_of(bce.backbone))
    for each in (model, bce):
        fit(each, head(data, 1))
    assert_differ(weights_of(model.backbone), weights_of(bce.backbone))


def test_loss_warmup_ends_inside_a_loop_that_is_traced_once(data):
    features, labels = head(data, 1)

    def looping(config):
        model = new_model(config)
        model.optimizer.build(model.backbone.trainable_variables)
        model.ad_gate_optimizer.build(model.ad_gate.trainable_variables)

        @tf.function
        def run(steps):
            for _ in tf.range(steps):
                model.train_step((features, labels))

        def weights_after(steps):
            run(tf.constant(steps))
            assert run.experimental_get_tracing_count() == 1
            return weights_of(model.backbone)

        return weights_after

    with_warmup, bce = looping(clsd(loss_warmup_steps=WARMUP)), looping(BCE)
    assert_same(with_warmup(WARMUP), bce(WARMUP))
    assert_differ(with_warmup(1), bce(1))


def test_loss_warmup_goes_on_counting_over_epochs_and_calls_of_fit(data):
    model, bce = (
        new_model(config, with_gate=False, run_eagerly=False)
        for config in (clsd(loss_warmup_steps=WARMUP, mu=0.0), BCE)
    )
    for each in (model, bce):
        fit(each, head(data, 2), epochs=2)
        fit(each, head(data, 2))
    assert_same(weights_of(model.backbone), weights_of(bce.backbone))
    for each in (model, bce):
        fit(each, head(data, 1))
    assert_differ(weights_of(model.backbone), weights_of(bce.backbone))


def test_lambda_and_mu_of_0_train_as_keras_does_with_binary_cross_entropy(data):
    model = new_model(BCE, run_eagerly=False)
    tf.keras.utils.set_random_seed(7)
    plain = TinyBackbone()
    plain.compile(tf.keras.optimizers.Adam(0.02), tf.keras.losses.BinaryCrossentropy(from_logits=True))
    features, labels = data
    plain({name: values[:1] for name, values in features.items()})
    plain.set_weights(model.backbone.get_weights())
    received = fit(model, data, epochs=2)
    expected = plain.fit(features, labels, batch_size=BATCH, shuffle=False, verbose=0, epochs=2).history
    assert received["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for one, other in zip(weights_of(model.backbone), weights_of(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_after_warmup_the_loss_is_the_weighted_one_and_bce_is_reported_beside_it(data):
    # One step from known logits, with correction 0: global = local = teacher score / its mean over clicks (no clip).
    features, labels = head(data, 1)
    features = {**features, "teacher_score": np.where(np.arange(BATCH) % 2, 0.2, 0.4).astype(np.float32)}
    model = new_model(clsd(teacher="cross_fit"))
    logits = model.debug_outputs(features)["logit"].numpy().astype(np.float64)
    bce = np.log1p(np.exp(logits)) - labels * logits
    mean_teacher = features["teacher_score"][labels == 1].mean()
    confidence = np.where(labels == 1, features["teacher_score"] / mean_teacher, 1.0)
    history = fit(model, (features, labels))
    assert history["bce"] == [pytest.approx(bce.mean(), rel=1e-5)]
    assert history["loss"] == [pytest.approx((confidence * bce).mean(), rel=1e-5)]
    assert history["loss"][0] != pytest.approx(history["bce"][0], rel=1e-3)
    assert history["min_click_confidence"] == [pytest.approx(0.2 / mean_teacher)]
    assert history["max_click_confidence"] == [pytest.approx(0.4 / mean_teacher)]
    assert history["mean_pctr"] == [pytest.approx((1 / (1 + np.exp(-logits))).mean(), rel=1e-5)]
    assert np.isnan(history["click_confidence/tier/unknown"]).all()  # No click in this batch.
    for index, label in enumerate(GROUP.labels[1:], start=1):
        own = (features["tier"] == index) & (labels == 1)
        assert history[f"click_confidence/tier/{label}"] == [pytest.approx(confidence[own].mean(), rel=1e-5)]
        assert history[f"ad_gate/tier/{label}"] == [0.0]
    # AdGate's loss at correction 0: mean over clicks of (1 - teacher score)^2.
    expected = np.square(1 - features["teacher_score"][labels == 1]).mean()
    assert history["ad_gate_loss"] == [pytest.approx(expected, rel=1e-5)]


def test_the_self_teacher_is_the_models_own_prediction_from_before_the_step(data):
    features, labels = head(data, 1)
    own = new_model(clsd())
    scores = own.predict(features, verbose=0)
    given = new_model(clsd(teacher="cross_fit"))
    fit(own, (features, labels))
    fit(given, ({**features, "teacher_score": scores}, labels))
    for one, other in zip(weights_of(own.backbone), weights_of(given.backbone), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


# Sample weights and labels.


def test_rows_of_weight_0_have_no_influence(data):
    features, labels = head(data, 2)
    weights = np.where(np.arange(len(labels)) % 4 == 0, 0.0, 1.0).astype(np.float32)
    ignored = weights == 0
    other_features = {
        "x": np.where(ignored[:, None], 9.0, features["x"]).astype(np.float32),
        "tier": np.where(ignored, 0, features["tier"]),
    }
    other_labels = np.where(ignored, 1 - labels, labels).astype(np.float32)
    one, other = new_model(clsd()), new_model(clsd())
    history = fit(one, (features, labels), sample_weight=weights)
    of_other = fit(other, (other_features, other_labels), sample_weight=weights)
    np.testing.assert_equal(history, of_other)
    assert_same(weights_of(one.backbone), weights_of(other.backbone))
    assert_same(weights_of(one.ad_gate), weights_of(other.ad_gate))


def test_a_row_of_weight_2_counts_as_two_rows(data):
    features, labels = head(data, 1)
    twice = np.append(np.arange(BATCH), np.arange(4))
    one, other = new_model(clsd()), new_model(clsd())
    one.fit(features, labels, sample_weight=np.where(np.arange(BATCH) < 4, 2.0, 1.0), batch_size=64, verbose=0)
    other.fit({name: values[twice] for name, values in features.items()}, labels[twice], batch_size=64, verbose=0)
    for part in ("backbone", "ad_gate"):
        for left, right in zip(weights_of(getattr(one, part)), weights_of(getattr(other, part)), strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)


def test_labels_and_weights_may_be_integers_or_columns(data):
    features, labels = head(data, 2)
    flat, column = new_model(clsd()), new_model(clsd())
    fit(flat, (features, labels), sample_weight=np.ones(len(labels)))
    fit(column, (features, labels.astype(np.int64)[:, None]), sample_weight=np.ones([len(labels), 1]))
    assert_same(weights_of(flat.backbone), weights_of(column.backbone))


def test_a_batch_without_clicks_trains_without_nan(data):
    features, labels = head(data, 1)
    model = new_model(clsd())
    before, gate_before = weights_of(model.backbone), weights_of(model.ad_gate)
    history = fit(model, (features, np.zeros_like(labels)))
    assert np.isfinite(history["loss"][0])
    assert all(np.isfinite(weight).all() for weight in weights_of(model.backbone))
    assert_differ(weights_of(model.backbone), before)
    assert_same(weights_of(model.ad_gate), gate_before)


# What is refused.


def test_a_loss_given_to_compile_is_refused():
    model = ClsdModel(TinyBackbone())
    with pytest.raises(ValueError, match="Received: loss='binary_crossentropy'"):
        model.compile("adam", loss="binary_crossentropy")


def test_mu_without_an_ad_gate_is_refused():
    with pytest.raises(ValueError, match=r"mu > 0 needs an AdGate. Received: mu=0.5, ad_gate=None"):
        ClsdModel(TinyBackbone(), None, clsd())


def test_mu_of_0_needs_no_ad_gate(data):
    history = fit(new_model(clsd(lambda_=0.5, mu=0.0), with_gate=False), head(data, 2))
    assert np.isfinite(history["loss"]).all()
    assert not [name for name in history if "/" in name]


def test_the_default_config_asks_for_nothing_that_is_not_there(data):
    model = ClsdModel(TinyBackbone())
    model.compile()
    assert np.isfinite(fit(model, data)["loss"]).all()
    assert model.config.mu == 0.0
    assert ClsdModel(TinyBackbone(), AdGate([GROUP])).config.mu > 0


def test_cross_fit_without_teacher_scores_is_refused_with_the_keys_that_came(data):
    features, labels = head(data, 1)
    del features["teacher_score"]
    with pytest.raises(ValueError, match=r"needs features\['teacher_score'\]. Received: \['tier', 'x'\]"):
        fit(new_model(clsd(teacher="cross_fit"), run_eagerly=False), (features, labels))


# Backbone and AdGate learn apart.


def test_the_weighted_loss_never_changes_ad_gate(data):
    model = new_model(clsd(), gate_optimizer=tf.keras.optimizers.SGD(0.0))
    gate, backbone = weights_of(model.ad_gate), weights_of(model.backbone)
    fit(model, head(data, 2))
    assert_same(weights_of(model.ad_gate), gate)
    assert_differ(weights_of(model.backbone), backbone)


def test_the_loss_of_ad_gate_never_changes_the_backbone(data):
    model = new_model(clsd(), optimizer=tf.keras.optimizers.SGD(0.0))
    gate, backbone = weights_of(model.ad_gate), weights_of(model.backbone)
    fit(model, head(data, 2))
    assert_same(weights_of(model.backbone), backbone)
    assert_differ(weights_of(model.ad_gate), gate)


def test_ad_gate_learns_the_same_whatever_the_share_of_its_own_confidence(data):
    # Were there a path from the weighted loss to AdGate, mu would change it; the teacher is fixed.
    gates = []
    for mu in (0.0, 1.0):
        model = new_model(clsd(teacher="cross_fit", lambda_=0.0, mu=mu))
        fit(model, head(data, 2))
        gates.append((weights_of(model.ad_gate), weights_of(model.backbone)))
    assert_same(gates[0][0], gates[1][0])
    assert_differ(gates[0][1], gates[1][1])


def test_ad_gate_learns_during_loss_warmup(data):
    model = new_model(clsd(loss_warmup_steps=1000))
    gate = weights_of(model.ad_gate)
    fit(model, head(data, 2))
    assert_differ(weights_of(model.ad_gate), gate)


def test_losses_that_the_backbone_adds_enter_the_loss(data):
    class Regularised(TinyBackbone):
        def call(self, features, training=False):
            self.add_loss(0.25)
            return super().call(features, training=training)

    model = ClsdModel(Regularised(), None, clsd(mu=0.0, lambda_=0.0))
    model.compile("sgd", run_eagerly=True)
    history = fit(model, head(data, 2))
    assert history["loss"][0] - history["bce"][0] == pytest.approx(0.25, abs=1e-5)


# Evaluation, prediction, monitors.


def test_predict_gives_one_probability_per_row(data):
    features, labels = data
    model = new_model(clsd(), run_eagerly=False)
    fit(model, data, epochs=5)
    pctr = model.predict(features, batch_size=7, verbose=0)  # 160 rows: the last batch is smaller.
    assert pctr.shape == labels.shape
    assert pctr.dtype == np.float32
    assert ((pctr > 0) & (pctr < 1)).all()
    assert pctr == pytest.approx(1 / (1 + np.exp(-model.debug_outputs(features)["logit"].numpy())), rel=1e-5)
    assert sklearn.metrics.roc_auc_score(labels, pctr) > 0.6


def test_evaluate_reports_plain_bce_and_changes_nothing(data):
    features, labels = data
    model = new_model(clsd(), run_eagerly=False, metrics=[tf.keras.metrics.AUC(name="auc")])
    fit(model, data)
    before = weights_of(model)
    weights = np.random.default_rng(1).uniform(0, 2, len(labels)).astype(np.float32)
    result = model.evaluate(features, labels, sample_weight=weights, verbose=0, return_dict=True)
    pctr = model.predict(features, verbose=0)
    assert set(result) == {"loss", "mean_pctr", "auc"}
    expected = sklearn.metrics.log_loss(labels, pctr.astype(np.float64), sample_weight=weights)
    assert result["loss"] == pytest.approx(expected, rel=1e-4)
    assert result["mean_pctr"] == pytest.approx(np.average(pctr, weights=weights), rel=1e-4)
    # Keras' AUC is a sum over 200 thresholds.
    assert result["auc"] == pytest.approx(sklearn.metrics.roc_auc_score(labels, pctr), abs=0.02)
    trained = [before[i] for i, weight in enumerate(model.weights) if weight.trainable]
    assert_same([weight.numpy() for weight in model.weights if weight.trainable], trained)


def test_evaluate_needs_no_teacher_scores(data):
    features, labels = data
    model = new_model(clsd(teacher="cross_fit"))
    served = {name: features[name] for name in ("x", "tier")}
    assert np.isfinite(model.evaluate(served, labels, verbose=0, return_dict=True)["loss"])


def test_history_names_every_monitor(data):
    features, labels = head(data, 1)
    history = fit(new_model(clsd()), (features, labels), validation_data=(features, labels))
    per_group = {f"{name}/tier/{label}" for name in ("click_confidence", "ad_gate") for label in GROUP.labels}
    in_training = {"loss", "bce", "ad_gate_loss", "mean_pctr", "min_click_confidence", "max_click_confidence"}
    assert set(history) == per_group | in_training | {"val_loss", "val_mean_pctr"}


def test_monitors_start_afresh_in_each_epoch(data):
    # The first epoch's clicks have unequal teacher scores, the second's equal ones: confidence 1 throughout.
    features, labels = head(data, 1)
    unequal = np.where(np.arange(BATCH) % 2, 0.1, 0.9).astype(np.float32)
    batches = tf.data.Dataset.from_tensor_slices(
        (
            {
                "x": np.stack([features["x"]] * 2),
                "tier": np.stack([features["tier"]] * 2),
                "teacher_score": np.stack([unequal, np.full(BATCH, 0.5, np.float32)]),
            },
            np.stack([labels] * 2),
        )
    )
    model = new_model(clsd(teacher="cross_fit", lambda_=1.0, mu=0.0))
    history = model.fit(batches, epochs=2, steps_per_epoch=1, verbose=0).history
    assert history["min_click_confidence"][0] < 0.9 < 1.1 < history["max_click_confidence"][0]
    assert history["min_click_confidence"][1] == pytest.approx(1.0)
    assert history["max_click_confidence"][1] == pytest.approx(1.0)
    for label in GROUP.labels[1:]:  # The batch has no click of an unknown tier.
        assert history[f"click_confidence/tier/{label}"][1] == pytest.approx(1.0)


def test_mean_per_group_weighs_rows_and_is_nan_where_nothing_fell():
    metric = MeanPerGroup("value", GROUP)
    metric.update_state(tf.constant([1, 1, 2]), tf.constant([1.0, 4.0, 9.0]), tf.constant([2.0, 1.0, 0.0]))
    metric.update_state(tf.constant([1]), tf.constant([6.0]), tf.constant([1.0]))
    result = {name: float(value) for name, value in metric.result().items()}
    assert result.pop("value/tier/low") == pytest.approx((2 * 1 + 4 + 6) / 4)
    assert np.isnan(list(result.values())).all()
    assert set(result) == {"value/tier/unknown", "value/tier/high"}
    metric.reset_state()
    assert np.isnan([float(value) for value in metric.result().values()]).all()


@pytest.mark.parametrize(("largest", "expected"), [(True, 3.0), (False, -2.0)])
def test_extremum_looks_at_rows_with_weight_only(largest, expected):
    metric = Extremum("extremum", largest=largest)
    metric.update_state(tf.constant([1.0, 3.0, 99.0]), tf.constant([1.0, 0.5, 0.0]))
    metric.update_state(tf.constant([-2.0, -99.0]), tf.constant([1.0, 0.0]))
    assert float(metric.result()) == expected
    metric.reset_state()
    metric.update_state(tf.constant([0.5]), tf.constant([1.0]))
    assert float(metric.result()) == 0.5


def test_self_distillation_does_not_collapse_the_mean_prediction(data):
    # A click rate near .4; raw self-weighting would sink it (see test_confidence).
    features, labels = data
    model = new_model(clsd(), run_eagerly=False)
    model.fit(tf.data.Dataset.from_tensor_slices(data).batch(BATCH).repeat(60), verbose=0)
    assert labels.mean() < 0.5
    assert model.predict(features, verbose=0).mean() == pytest.approx(labels.mean(), abs=0.05)


@pytest.mark.parametrize("shape", [[-1], [-1, 1]])
def test_a_backbone_may_give_logits_with_or_without_a_last_dimension(shape):
    class Own(tf.keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = tf.keras.layers.Dense(1)

        def call(self, features, training=False):
            return tf.reshape(self.dense(features["x"]), shape)

    model = ClsdModel(Own(), None, ClsdConfig(teacher="self", loss_warmup_steps=1, lambda_=0.5, mu=0.0))
    model.compile("adam")
    features, labels = {"x": tf.ones([8, 2])}, tf.constant([0.0, 1.0] * 4)
    model.fit(features, labels, batch_size=4, verbose=0)
    assert model.predict(features, verbose=0).shape == (8,)


def test_a_backbone_with_several_logits_is_refused():
    model = ClsdModel(tf.keras.Sequential([tf.keras.layers.Dense(2)]), None)
    with pytest.raises(ValueError, match=r"logits \[batch\] or \[batch, 1\]. Received: shape \(3, 2\)"):
        model.logits(tf.ones([3, 2]))
