"""Guards in real runs of ``fit``: each limit ends a run that goes wrong, and none ends a run that does not."""

import re

import numpy as np
import pydantic
import pytest
import tensorflow as tf

from clsd_tf.methods.clsd.ad_gate import AdGate
from clsd_tf.methods.clsd.config import AdGateConfig, ClsdConfig, GuardConfig
from clsd_tf.methods.clsd.guards import ConfidenceGuardError
from clsd_tf.methods.clsd.model import ClsdModel
from clsd_tf.spec.model_inputs import GroupInput, ModelInputs

TIER = GroupInput("tier", ("unknown", "low", "high"))
INPUTS = ModelInputs(categorical=(), numeric=(), groups=(TIER,))
BATCH = 16


class CellLogits(tf.keras.Model):
    """A logit for each cell, all of which start at the same ctr."""

    def __init__(self, initial_ctr, num_cells=1):
        super().__init__()
        initial = tf.keras.initializers.Constant(np.log(initial_ctr / (1 - initial_ctr)))
        self._logits = tf.keras.layers.Embedding(num_cells, 1, embeddings_initializer=initial)

    def call(self, features, training=False):
        return self._logits(features["cell"])


def fit(config, labels, *, initial_ctr=0.25, optimizer="sgd", num_cells=1, batch_size=BATCH, **features):
    """One epoch over rows of one cell and one tier, unless told otherwise; returns its history."""
    tf.keras.utils.set_random_seed(0)
    model = ClsdModel(CellLogits(initial_ctr, num_cells), AdGate(INPUTS, config.ad_gate), config)
    model.compile(optimizer)
    zeros = np.zeros(len(labels), np.int64)
    features = {"cell": zeros, "tier": zeros + 1, **features}
    labels = np.asarray(labels, np.float32)
    return model.fit(features, labels, batch_size=batch_size, shuffle=False, verbose=0).history


def clicks(share, num_steps):
    """Labels [num_steps * BATCH], of which the given share of every batch is 1."""
    return np.tile(np.arange(BATCH) < share * BATCH, num_steps)


def clsd(**changes):
    mix = {"lambda_": 0.5, "mu": 0.5, "global_weighting": "ratio", "local_weighting": "additive"}
    return ClsdConfig(**{"teacher": "self", "loss_warmup_steps": 5, **mix, **changes})


def collapsing(**changes):
    return clsd(lambda_=1.0, mu=0.0, global_weighting="raw", allow_raw=True, **changes)


def frozen_for(num_steps):
    """SGD that moves nothing before ``num_steps``, and much from then on."""
    schedule = tf.keras.optimizers.schedules.PiecewiseConstantDecay([num_steps - 1], [0.0, 10.0])
    return tf.keras.optimizers.SGD(schedule)


# Mean ctr.


@pytest.mark.parametrize(
    ("initial_ctr", "click_rate", "reference"),
    [
        (0.25, 0.25, "0.2500"),
        (0.5, 0.25, "0.2500"),  # The click rate, where the model has not learnt it yet.
        (0.125, 0.25, "0.1250"),  # Mean ctr, where it is below the click rate.
    ],
)
def test_a_collapse_of_predictions_ends_the_run(initial_ctr, click_rate, reference):
    labels = clicks(click_rate, num_steps=100)
    config = collapsing(loss_warmup_steps=5)
    with pytest.raises(ConfidenceGuardError, match=r"mean ctr must not fall below 0\.5 of what it was") as caught:
        fit(config, labels, initial_ctr=initial_ctr, optimizer=frozen_for(5))
    message = str(caught.value)
    ctr, before, step = re.search(r"Received: (\S+) after (\S+), at step (\d+)\.", message).groups()
    assert before == reference
    assert float(ctr) < 0.5 * float(reference)
    assert int(step) % 20 == 0  # Not only at the end of the epoch, at step 100.
    assert int(step) < 100
    assert "lower method.kappa, method.lambda or method.mu, or use a cross_fit teacher" in message


def test_the_limit_of_mean_ctr_is_the_configs():
    labels = clicks(0.25, num_steps=60)
    config = collapsing(guards=GuardConfig(min_ctr_ratio=0.0))
    assert fit(config, labels, optimizer=frozen_for(5))["mean_ctr"][0] < 0.1  # Collapsed, and nobody minded.
    with pytest.raises(ConfidenceGuardError, match=r"below 0\.9 of"):
        fit(collapsing(guards=GuardConfig(min_ctr_ratio=0.9)), labels, optimizer=frozen_for(5))


@pytest.mark.parametrize("loss_warmup_steps", [0, 10])
def test_an_untrained_model_that_learns_a_low_click_rate_is_no_collapse(loss_warmup_steps):
    # ctr goes from .5 to 1/16 within a few steps, far below half of what it was.
    config = clsd(loss_warmup_steps=loss_warmup_steps)
    labels = clicks(1 / 16, num_steps=150)
    history = fit(config, labels, initial_ctr=0.5, optimizer=tf.keras.optimizers.SGD(2.0))
    assert history["mean_ctr"][0] < 0.1


@pytest.mark.parametrize("loss_warmup_steps", [0, 10])
def test_one_batch_rich_in_clicks_does_not_become_the_reference(loss_warmup_steps):
    # The first batch has 8 clicks, all others have 1: .09 on average over ten. ctr goes from .5 to 1/16, well above
    # half of that.
    labels = np.concatenate([clicks(0.5, 1), clicks(1 / 16, 149)])
    config, optimizer = clsd(loss_warmup_steps=loss_warmup_steps), tf.keras.optimizers.SGD(2.0)
    assert fit(config, labels, initial_ctr=0.5, optimizer=optimizer)["mean_ctr"][0] < 0.1


@pytest.mark.parametrize("lambda_", [0.0, 0.5])
def test_guards_stand_only_where_confidence_weights_clicks(lambda_):
    # Clicks stop coming, and ctr falls with them: plain BCE may do so.
    labels = np.concatenate([clicks(0.5, 20), clicks(0.0, 100)])
    arguments = {"initial_ctr": 0.5, "optimizer": tf.keras.optimizers.SGD(2.0)}
    config = clsd(lambda_=lambda_, mu=0.0, global_weighting="mean_one")
    if lambda_:
        with pytest.raises(ConfidenceGuardError, match="mean ctr"):
            fit(config, labels, **arguments)
    else:
        assert fit(config, labels, **arguments)["mean_ctr"][0] < 0.25


# Effective click share.


@pytest.mark.parametrize("least_share", [0.2, 0.1])
def test_confidence_that_collapses_onto_one_click_ends_the_run(least_share):
    # Eight clicks of scores .9 and seven times .001: confidence 7.94 and .0088, (sum c)^2 / sum c^2 / 8 = .127.
    config = ClsdConfig(
        loss_warmup_steps=0,
        teacher="cross_fit",
        global_weighting="mean_one",
        lambda_=1.0,
        mu=0.0,
        min_confidence=0.001,
        max_confidence=100.0,
        guards=GuardConfig(min_effective_click_share=least_share),
    )
    scores = np.tile(np.where(np.arange(BATCH) == 0, 0.9, 0.001), 3).astype(np.float32)
    labels = clicks(0.5, num_steps=3)
    if least_share > 0.127:
        message = r"few clicks\. Received: an effective sample size of 12\.7% of the clicks, at step 3\. Allowed: at "
        with pytest.raises(ConfidenceGuardError, match=message + r"least 20%\. Lower method.kappa or method.max_conf"):
            fit(config, labels, teacher_score=scores)
    else:
        share = fit(config, labels, teacher_score=scores)["effective_click_share"]
        assert share == [pytest.approx(64 / (8 * (7.93826**2 + 7 * 0.0088203**2)), rel=1e-4)]


# AdGate's drift.


@pytest.mark.parametrize("largest_drift", [0.6, 0.7])
def test_an_ad_gate_far_from_1_minus_the_teacher_score_ends_the_run(largest_drift):
    # An untrained AdGate corrects by 0, and the teacher says .2 of two clicks and .4 of six: .35 on average.
    labels, scores = clicks(0.5, num_steps=1), np.where(np.arange(BATCH) < 2, 0.2, 0.4).astype(np.float32)
    config = clsd(teacher="cross_fit", guards=GuardConfig(max_ad_gate_drift=largest_drift))
    if largest_drift < 0.65:
        message = r"stay near 1 - the mean teacher score\. Received: a distance of 0\.65, at step 1\. Allowed: 0\.6\."
        with pytest.raises(ConfidenceGuardError, match=message + " Lower method.ad_gate.learning_rate"):
            fit(config, labels, teacher_score=scores)
    else:
        assert np.isfinite(fit(config, labels, teacher_score=scores)["loss"]).all()


def test_the_literal_objective_may_go_where_it_goes():
    # It ends at -bound = -3, and thus 3 + .75 away from 1 - the teacher score.
    config = clsd(teacher="cross_fit", ad_gate=AdGateConfig(objective="literal", bound=3.0, learning_rate=0.1))
    labels = clicks(0.5, num_steps=60)
    scores = np.full(len(labels), 0.25, np.float32)
    history = fit(config, labels, teacher_score=scores, initial_ctr=0.5, optimizer=tf.keras.optimizers.SGD(0.0))
    assert history["ad_gate/tier/low"][0] < -1.5


# A run that goes well.


@pytest.mark.parametrize("config", [clsd(loss_warmup_steps=40), ClsdConfig()], ids=["self", "defaults"])
def test_a_healthy_run_reaches_its_end(config):
    # Four cells of click rates .05 to .4 in two tiers; the teacher, where it is not the model itself, knows the rates.
    random = np.random.default_rng(0)
    num_rows = 200 * 64
    cell = random.integers(0, 4, num_rows)
    rates = np.array([0.05, 0.1, 0.2, 0.4])[cell]
    labels = random.random(num_rows) < rates
    history = fit(
        config,
        labels,
        initial_ctr=0.5,
        optimizer=tf.keras.optimizers.Adam(0.05),
        num_cells=4,
        batch_size=64,
        cell=cell,
        tier=1 + cell // 2,
        teacher_score=rates.astype(np.float32),
    )
    assert all(np.isfinite(values).all() for name, values in history.items() if "unknown" not in name)
    assert history["effective_click_share"][0] > 0.5
    assert [history[f"click_confidence/tier/{label}"][0] for label in ("low", "high")] == pytest.approx([1, 1], abs=0.4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"min_ctr_ratio": 1.0}, "less than 1"),
        ({"min_effective_click_share": -0.1}, "greater than or equal to 0"),
        ({"max_ad_gate_drift": 0.0}, "greater than 0"),
        ({"max_drift": 1.0}, "max_drift"),
    ],
)
def test_config_refuses(content, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        ClsdConfig.model_validate({"guards": content})
