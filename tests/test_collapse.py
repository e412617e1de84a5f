"""The trap of self-weighting: raw confidence drives predictions to 0, and what is shipped does not.

Cells with a logit each, in which exactly a given share of ten rows are clicks, trained until nothing moves.
"""

import numpy as np
import pytest
import tensorflow as tf

from clsd_tf.layers.losses import bce_from_logits, weighted_mean
from clsd_tf.methods.clsd.confidence import ClickMeans, global_confidence, local_confidence, mixed_confidence
from clsd_tf.methods.clsd.config import ClsdConfig

NORMALIZED_FUNCTIONS = ("mean_one", "ratio", "additive", "standardized")
RATES = np.array([0.3, 0.6, 0.8])
MIXED = ClsdConfig(lambda_=0.5, mu=0.5, global_weighting="ratio", local_weighting="additive")


def config_of(form, **changes):
    return ClsdConfig(global_weighting=form, local_weighting=form, allow_raw=form == "raw", **changes)


def fit_cells(rates, config, *, teacher=None, num_steps=1000):
    """Gradient descent on the weighted loss; returns ctr of each cell. The model teaches itself unless told otherwise.

    All cells are one user group, and AdGate is at its optimum.
    """
    cells = tf.repeat(tf.range(len(rates)), 10)
    labels = tf.constant(np.concatenate([np.arange(10) < 10 * rate for rate in rates]), tf.float32)
    logits, means = tf.Variable(tf.zeros([len(rates)])), ClickMeans(0.0)

    @tf.function
    def descend():
        for _ in tf.range(num_steps):
            with tf.GradientTape() as tape:
                row_logits = tf.gather(logits, cells)
                scores = tf.gather(tf.sigmoid(logits) if teacher is None else tf.constant(teacher, tf.float32), cells)
                correction = tf.ones_like(scores) - weighted_mean(scores, labels)
                parts = (
                    global_confidence(scores, labels, config, means),
                    local_confidence(scores, correction, labels, config, means),
                )
                confidence = mixed_confidence(labels, *parts, config.lambda_, config.mu)
                loss = weighted_mean(confidence * bce_from_logits(labels, row_logits), tf.ones_like(labels))
            logits.assign_sub(2.0 * tf.convert_to_tensor(tape.gradient(loss, logits)))

    descend()
    return tf.sigmoid(logits).numpy().astype(np.float64)


def test_raw_confidence_collapses_a_click_rate_of_point_3_and_bends_the_others():
    # Odds settle at ctr * rate / (1 - rate): at ctr (2 * rate - 1) / rate above a rate of one half, at 0 below it.
    ctr = fit_cells(RATES, config_of("raw", lambda_=1.0, mu=0.0))
    assert ctr[0] < 0.005
    assert ctr[1:] == pytest.approx((2 * RATES[1:] - 1) / RATES[1:], abs=1e-3)


@pytest.mark.parametrize("form", NORMALIZED_FUNCTIONS)
def test_no_shipped_form_collapses_a_click_rate_of_point_3(form):
    assert fit_cells([0.3], config_of(form, lambda_=0.5, mu=0.5)) == pytest.approx([0.3], abs=1e-3)


@pytest.mark.parametrize(
    ("config", "largest_gap"),
    [
        (ClsdConfig(lambda_=0.0, mu=0.0), 1e-4),  # Plain BCE.
        (MIXED, 0.06),  # Measured: -.047.
        (config_of("additive", lambda_=0.0, mu=1.0), 0.04),  # Measured: -.030.
        (config_of("ratio", lambda_=1.0, mu=0.0, kappa=0.5), 0.04),  # Measured: -.027.
        (config_of("standardized", lambda_=0.5, mu=0.5, kappa=0.3), 0.06),  # Measured: -.042.
    ],
)
def test_a_model_that_teaches_itself_stays_near_the_click_rates(config, largest_gap):
    ctr = fit_cells(RATES, config)
    assert ctr[0] > 0.1  # No collapse.
    assert list(ctr) == sorted(ctr)  # The ranking of the cells survives.
    assert ctr.mean() == pytest.approx(RATES.mean(), abs=largest_gap)


def test_the_lower_clip_is_the_floor_where_nothing_else_holds_a_cell_up():
    # lambda = 1 at full strength pushes the lowest cell down to odds of min_confidence * rate / (1 - rate).
    ctr = fit_cells(RATES, config_of("ratio", lambda_=1.0, mu=0.0))
    assert ctr[0] / (1 - ctr[0]) == pytest.approx(0.05 * 0.3 / 0.7, rel=0.01)


def test_self_teaching_ends_where_the_odds_are_confidence_times_those_of_the_click_rate():
    # The gradient of a cell, (1 - rate) * ctr - confidence * rate * (1 - ctr), is 0 there. In float64, by hand.
    ctr = fit_cells(RATES, MIXED)
    mean = np.average(ctr, weights=RATES)
    confidence = 0.5 * ctr / mean + 0.5 * (1 + ctr - mean)
    assert ctr / (1 - ctr) == pytest.approx(confidence * RATES / (1 - RATES), rel=1e-3)


@pytest.mark.parametrize(
    ("form", "confidence"),
    [
        # The mean of the clicks' scores is (.09 + .36 + .64) / 1.7 = .641.
        ("ratio", RATES / (1.09 / 1.7)),  # .468, .936 and 1.248.
        ("additive", 1 + RATES - 1.09 / 1.7),  # .659, .959 and 1.159.
    ],
)
def test_a_teacher_that_stays_as_it_is_feeds_nothing_back(form, confidence):
    ctr = fit_cells(RATES, config_of(form, lambda_=0.5, mu=0.5), teacher=RATES)
    assert ctr / (1 - ctr) == pytest.approx(confidence * RATES / (1 - RATES), rel=1e-3)


@pytest.mark.parametrize("teacher", [None, RATES])
def test_the_defaults_do_not_collapse(teacher):
    ctr = fit_cells(RATES, ClsdConfig(), teacher=teacher)
    assert ctr[0] > 0.1
    assert list(ctr) == sorted(ctr)
