"""Placebos: controls of a study that weight clicks as much as the real thing does, and know nothing."""

import numpy as np
import pytest
import tensorflow as tf

from clsd_tf.methods.clsd.ad_gate import AdGate
from clsd_tf.methods.clsd.confidence import shuffled_among_clicks
from clsd_tf.methods.clsd.config import ClsdConfig
from clsd_tf.methods.clsd.model import ClsdModel
from clsd_tf.spec.model_inputs import GroupInput, ModelInputs

TIER = GroupInput("tier", ("unknown", "low", "high"))
INPUTS = ModelInputs(categorical=(), numeric=("x",), groups=(TIER,))
NUM_ROWS = 200  # In one batch.


class Linear(tf.keras.Model):
    """logits = w * x + b."""

    def __init__(self):
        super().__init__()
        self._logits = tf.keras.layers.Dense(1)

    def call(self, features, training=False):
        return self._logits(features["x"][:, tf.newaxis])


@pytest.fixture(scope="module")
def data():
    """Every second row is a click, of a low or a high tier alike; the teacher gives them scores around .2 and .6."""
    random = np.random.default_rng(0)
    tier = np.arange(NUM_ROWS) // 2 % 2 + 1
    scores = np.where(tier == 1, 0.2, 0.6) + random.uniform(-0.05, 0.05, NUM_ROWS)
    features = {
        "x": tf.constant(random.normal(size=NUM_ROWS), tf.float32),
        "tier": tf.constant(tier),
        "teacher_score": tf.constant(scores, tf.float32),
    }
    return features, tf.constant(np.arange(NUM_ROWS) % 2, tf.float32)


def new_model(placebo, *, gate_optimizer="sgd", run_eagerly=True, **changes):
    forms = {"global_weighting": "mean_one", "local_weighting": "additive"}
    config = ClsdConfig(**{"placebo": placebo, "loss_warmup_steps": 0, **forms, **changes})
    tf.keras.utils.set_random_seed(3)
    model = ClsdModel(Linear(), AdGate(INPUTS), config)
    model.compile("adam", ad_gate_optimizer=gate_optimizer, run_eagerly=run_eagerly)
    return model


def fit(model, data, num_steps):
    return model.fit(*data, batch_size=NUM_ROWS, epochs=num_steps, shuffle=False, verbose=0).history


# Confidence shuffled among clicks.


def test_shuffled_among_clicks_keeps_what_clicks_have_and_leaves_the_rest():
    random = np.random.default_rng(0)
    labels = (random.random(200) < 0.4).astype(np.float32)
    confidence = random.uniform(0.1, 3.0, 200).astype(np.float32)
    shuffled = shuffled_among_clicks(confidence, tf.constant(labels), tf.constant([0, 1], tf.int64)).numpy()
    clicks = labels == 1
    assert shuffled[~clicks].tolist() == confidence[~clicks].tolist()
    assert sorted(shuffled[clicks]) == sorted(confidence[clicks])
    # Nothing is left of the order: a few of about 80 clicks keep their place by chance.
    assert (shuffled[clicks] == confidence[clicks]).sum() < 8


def test_shuffled_among_clicks_depends_on_the_seed_and_needs_no_clicks():
    def shuffled(labels, step):
        seed = tf.constant([0, step], tf.int64)
        return shuffled_among_clicks(tf.range(20.0), labels, seed).numpy().tolist()

    assert shuffled(tf.ones([20]), 1) == shuffled(tf.ones([20]), 1) != shuffled(tf.ones([20]), 2)
    assert shuffled(tf.zeros([20]), 1) == list(range(20))


def test_clicks_that_do_not_count_take_no_part_in_the_placebo(data):
    # The placebo must have the weights of what it controls for. Three of four clicks count nothing here.
    features, labels = data
    scores, nothing = features["teacher_score"], tf.zeros([NUM_ROWS])
    weight = tf.cast(tf.range(NUM_ROWS) % 8 < 2, tf.float32)
    real, placebo = (
        new_model(placebo).click_confidence(labels, scores, nothing, weight, tf.constant(9, tf.int64)).numpy()
        for placebo in ("none", "shuffled_confidence")
    )
    counted = (labels.numpy() * weight.numpy()) > 0
    assert counted.sum() == NUM_ROWS / 8
    np.testing.assert_allclose(sorted(placebo[counted]), sorted(real[counted]), rtol=1e-6)
    assert placebo[counted].tolist() != real[counted].tolist()


def test_shuffled_confidence_is_dealt_out_anew_at_each_step_of_one_traced_function(data):
    features, labels = data
    scores, nothing, ones = features["teacher_score"], tf.zeros([NUM_ROWS]), tf.ones([NUM_ROWS])
    real = new_model("none").click_confidence(labels, scores, nothing, ones, tf.constant(0)).numpy()
    placebo = new_model("shuffled_confidence", loss_warmup_steps=1)

    @tf.function
    def click_confidence(step):
        return placebo.click_confidence(labels, scores, nothing, ones, step)

    steps = [click_confidence(tf.constant(step, tf.int64)).numpy() for step in range(4)]
    assert click_confidence.experimental_get_tracing_count() == 1
    assert steps[0].tolist() == [1.0] * NUM_ROWS  # Loss warm-up.
    clicks = labels.numpy() == 1
    for shuffled in steps[1:]:
        assert shuffled[~clicks].tolist() == [1.0] * clicks.sum()
        np.testing.assert_allclose(sorted(shuffled[clicks]), sorted(real[clicks]), rtol=1e-6)
    assert len({tuple(shuffled) for shuffled in (real, *steps[1:])}) == 4


def test_shuffled_confidence_weights_as_much_and_tells_no_groups_apart(data):
    real, placebo = (
        fit(new_model(name, lambda_=1.0, mu=0.0), data, num_steps=1) for name in ("none", "shuffled_confidence")
    )
    for name in ("min_click_confidence", "max_click_confidence", "effective_click_share"):
        assert placebo[name] == pytest.approx(real[name], rel=1e-5)
    # .2 and .6 over their mean of .4; the placebo's groups are samples of 50 of all clicks.
    of_tiers = [f"click_confidence/tier/{label}" for label in ("low", "high")]
    assert [real[name][0] for name in of_tiers] == pytest.approx([0.5, 1.5], abs=0.05)
    assert [placebo[name][0] for name in of_tiers] == pytest.approx([1.0, 1.0], abs=0.2)


# User features of other rows for AdGate.


def test_permuted_groups_teach_ad_gate_nothing_while_monitors_keep_the_true_groups(data):
    seen = {}
    for placebo in ("none", "permuted_groups"):
        adam = tf.keras.optimizers.Adam(0.05)
        model = new_model(placebo, gate_optimizer=adam, run_eagerly=False, lambda_=0.0, mu=1.0)
        batches = tf.data.Dataset.from_tensors(data).repeat()
        history = model.fit(batches, steps_per_epoch=60, epochs=2, verbose=0).history
        names = [f"{name}/tier/{label}" for name in ("ad_gate", "click_confidence") for label in ("low", "high")]
        seen[placebo] = [history[name][-1] for name in names]
    # AdGate gives 1 - .2 and 1 - .6, so that the clicks of both groups count the same.
    assert seen["none"] == pytest.approx([0.8, 0.4, 1.0, 1.0], abs=0.05)
    # It gives 1 - .4 to all, and score + correction is .8 and 1.2.
    assert seen["permuted_groups"] == pytest.approx([0.6, 0.6, 0.8, 1.2], abs=0.1)


def test_permuted_groups_deals_out_the_rows_of_the_batch_anew_at_each_step(data):
    features, labels = data
    everything_clicked = features, tf.ones_like(labels)
    seen = {}
    for placebo in ("none", "permuted_groups"):
        model = new_model(placebo, gate_optimizer=tf.keras.optimizers.SGD(0.0))
        model.ad_gate(features)
        random = np.random.default_rng(0)
        model.ad_gate.set_weights([random.normal(size=weight.shape) for weight in model.ad_gate.get_weights()])
        history = fit(model, everything_clicked, num_steps=4)
        seen[placebo] = np.array([history["ad_gate/tier/low"], history["ad_gate/tier/high"]])
    assert len(set(seen["none"][0])) == 1
    assert len(set(seen["permuted_groups"][0])) == 4
    # A permutation: both tiers have 100 rows, and the mean over all of them stays.
    np.testing.assert_allclose(seen["permuted_groups"].mean(axis=0), seen["none"].mean(axis=0), rtol=1e-4)


def test_permuted_groups_reaches_nothing_but_ad_gate(data):
    # In loss warm-up AdGate learns, and the backbone is that of every other run.
    weights = []
    for placebo in ("none", "permuted_groups"):
        model = new_model(placebo, loss_warmup_steps=10, lambda_=0.0, mu=1.0)
        fit(model, data, num_steps=3)
        weights.append([weight.tolist() for weight in model.backbone.get_weights()])
    assert weights[0] == weights[1]
