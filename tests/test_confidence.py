"""Click confidence: every form by hand, what holds for any scores, and moving means."""

import numpy as np
import pydantic
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from clsd_tf.methods.clsd.confidence import ClickMeans, global_confidence, local_confidence, mixed_confidence
from clsd_tf.methods.clsd.config import ClsdConfig

NORMALIZED_FUNCTIONS = ("mean_one", "ratio", "additive", "standardized")

# Four rows; the third is no click, the fourth counts twice. Mean teacher score over clicks:
# (.2 + .4 + 2 * .1) / 4 = .2; variance around it (0 + .04 + 2 * .01) / 4 = .015.
LABELS = tf.constant([1.0, 1.0, 0.0, 1.0])
CLICK_WEIGHT = tf.constant([1.0, 1.0, 0.0, 2.0])
TEACHER = tf.constant([0.2, 0.4, 0.9, 0.1])
# The means of the rows' groups are 1 - CORRECTION = (.6, .4, 1, .1); variance around them: .16 / 4 = .04.
CORRECTION = tf.constant([0.4, 0.6, 0.0, 0.9])


def config_of(form="mean_one", **changes):
    return ClsdConfig(**{"global_weighting": form, "local_weighting": form, "allow_raw": form == "raw", **changes})


def global_of(teacher, click_weight, config):
    """Global confidence with the means of the batch."""
    return global_confidence(teacher, click_weight, config, ClickMeans(0.0))


def local_of(teacher, correction, click_weight, config):
    """Local confidence with the means of the batch."""
    return local_confidence(teacher, correction, click_weight, config, ClickMeans(0.0))


# Values by hand.


@pytest.mark.parametrize(
    ("form", "kappa", "expected"),
    [
        ("mean_one", 1.0, [1.0, 2.0, 3.0, 0.5]),  # TEACHER / .2, of which 4.5 is clipped to 3.
        ("mean_one", 2.0, [1.0, 2.0, 3.0, 0.5]),  # Of no strength.
        # The squares (1, 4, 20.25, .25) are clipped to 3; mean (1 + 3 + 2 * .25) / 4 = 1.125.
        ("ratio", 2.0, [1 / 1.125, 3 / 1.125, 3 / 1.125, 0.25 / 1.125]),
        ("ratio", 0.5, np.array([1.0, 2**0.5, 4.5**0.5, 0.5**0.5]) / ((1 + 2**0.5 + 2 * 0.5**0.5) / 4)),
        ("additive", 1.0, [1.0, 1.2, 1.7, 0.9]),  # 1 + TEACHER - .2.
        ("additive", 2.0, [1.0, 1.4, 2.4, 0.8]),
        ("standardized", 1.0, [1.0, 1 + 0.2 / 0.015**0.5, 3.0, 1 - 0.1 / 0.015**0.5]),
        # (1, 4.27, ., -.63) are clipped to (1, 3, 3, .05), of mean 1.025; .05 / 1.025 is clipped once more.
        ("standardized", 2.0, [1 / 1.025, 3 / 1.025, 3 / 1.025, 0.05]),
        ("raw", 1.0, [0.2, 0.4, 0.9, 0.1]),
    ],
)
def test_global_confidence_by_hand(form, kappa, expected):
    received = global_of(TEACHER, CLICK_WEIGHT, config_of(form, kappa=kappa))
    assert received.numpy() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("form", "kappa", "expected"),
    [
        # TEACHER + CORRECTION = (.6, 1, .9, 1), of mean (.6 + 1 + 2 * 1) / 4 = .9 over clicks.
        ("additive", 1.0, [0.6 / 0.9, 1 / 0.9, 1.0, 1 / 0.9]),
        # 1 + 2 * (-.4, 0, -.1, 0) = (.2, 1, .8, 1), of mean .8.
        ("additive", 2.0, [0.25, 1.25, 1.0, 1.25]),
        # TEACHER / (.6, .4, 1, .1) = (1/3, 1, .9, 1), of mean 5/6.
        ("mean_one", 1.0, [0.4, 1.2, 1.08, 1.2]),
        # The squares of these, (1/9, 1, .81, 1), of mean 7/9.
        ("ratio", 2.0, [1 / 7, 9 / 7, 0.81 * 9 / 7, 9 / 7]),
        # 1 + (-.4, 0, -.1, 0) / .2 = (-1, 1, .5, 1), clipped to (.05, 1, .5, 1), of mean .7625.
        ("standardized", 1.0, [0.05 / 0.7625, 1 / 0.7625, 0.5 / 0.7625, 1 / 0.7625]),
        ("raw", 1.0, [0.2, 0.4, 0.9, 0.1]),
    ],
)
def test_local_confidence_by_hand(form, kappa, expected):
    received = local_of(TEACHER, CORRECTION, CLICK_WEIGHT, config_of(form, kappa=kappa))
    assert received.numpy() == pytest.approx(expected, rel=1e-5)


def test_each_part_has_its_own_form():
    config = ClsdConfig(global_weighting="mean_one", local_weighting="additive")
    assert global_of(TEACHER, CLICK_WEIGHT, config).numpy() == pytest.approx([1.0, 2.0, 3.0, 0.5])
    assert local_of(TEACHER, CORRECTION, CLICK_WEIGHT, config).numpy()[0] == pytest.approx(0.6 / 0.9)


@pytest.mark.parametrize("form", ["mean_one", "ratio"])
def test_a_correction_above_1_means_a_small_reference_and_never_negative_confidence(form):
    # 1 - correction = (-.5, .4): the first counts as .001. .2 / .001 is clipped to 3, .4 / .4 = 1; mean 2.
    received = local_of(tf.constant([0.2, 0.4]), tf.constant([1.5, 0.6]), tf.ones([2]), config_of(form))
    assert received.numpy() == pytest.approx([1.5, 0.5])


def test_mixed_confidence_by_hand():
    # .5 + .3 * global + .2 * local for clicks: .5 + .3 + .16, .5 + .6 + .2, no click, .5 + .15 + .22.
    parts = tf.constant([1.0, 2.0, 3.0, 0.5]), tf.constant([0.8, 1.0, 2.0, 1.1])
    received = mixed_confidence(LABELS, *parts, 0.3, 0.2)
    assert received.numpy() == pytest.approx([0.96, 1.3, 1.0, 0.87])
    # The whole keeps mean 1 over clicks, as both parts have it.
    assert np.average(received, weights=CLICK_WEIGHT) == pytest.approx(1.0)


# What holds for any scores.

_ROWS = st.lists(
    st.tuples(st.integers(0, 1), st.floats(0.0, 1.0), st.floats(-100.0, 100.0), st.sampled_from([0.0, 0.5, 1.0, 4.0])),
    min_size=1,
    max_size=8,
)
_CONFIGS = st.builds(
    config_of,
    st.sampled_from(NORMALIZED_FUNCTIONS),
    kappa=st.floats(1e-3, 100.0),
    min_confidence=st.floats(1e-3, 0.9),
    max_confidence=st.floats(1.1, 100.0),
)


def columns(rows):
    labels, teacher, correction, weight = (tf.constant(column, tf.float32) for column in zip(*rows, strict=True))
    return labels, teacher, correction, labels * weight


@settings(deadline=None, max_examples=60)
@given(_ROWS, _CONFIGS)
def test_confidence_never_leaves_its_clip_range(rows, config):
    _, teacher, correction, click_weight = columns(rows)
    low, high = np.float32(config.min_confidence), np.float32(config.max_confidence)
    for confidence in (global_of(teacher, click_weight, config), local_of(teacher, correction, click_weight, config)):
        assert ((low <= confidence.numpy()) & (confidence.numpy() <= high)).all()


@settings(deadline=None, max_examples=60)
@given(_ROWS, _CONFIGS)
def test_a_higher_score_never_means_less_global_confidence(rows, config):
    _, teacher, _, click_weight = columns(rows)
    by_score = global_of(teacher, click_weight, config).numpy()[np.argsort(teacher)]
    assert (np.diff(by_score) >= -1e-5 * by_score[:-1]).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.floats(0.0, 1.0), st.floats(-2.0, 2.0), _CONFIGS)
def test_clicks_of_equal_scores_have_confidence_1(num_rows, score, correction, config):
    ones = tf.ones([num_rows])
    parts = global_of(score * ones, ones, config), local_of(score * ones, correction * ones, ones, config)
    for confidence in parts:
        assert confidence.numpy() == pytest.approx([1.0] * num_rows, rel=1e-5)


@pytest.mark.parametrize("form", ["mean_one", "ratio", "standardized"])
def test_halving_every_score_changes_no_relative_form(form):
    config = config_of(form, kappa=0.7)
    half = global_of(TEACHER / 2, CLICK_WEIGHT, config)
    assert half.numpy() == pytest.approx(global_of(TEACHER, CLICK_WEIGHT, config).numpy(), rel=1e-5)


@pytest.mark.parametrize("form", NORMALIZED_FUNCTIONS)
@pytest.mark.parametrize("part", ["global", "local"])
def test_mean_over_clicks_is_1_where_clipping_bites_rarely(form, part):
    # A teacher in four groups of click rates .05 to .5, with sample weights.
    random = np.random.default_rng(0)
    rates = np.repeat([0.05, 0.15, 0.3, 0.5], 500)
    teacher = random.beta(20 * rates, 20 * (1 - rates))
    click_weight = (random.random(2000) < teacher) * random.uniform(0.5, 2.0, 2000)
    rows = [tf.constant(column, tf.float32) for column in (teacher, 1 - rates, click_weight)]
    config = config_of(form, kappa=0.5)
    parts = {"global": global_of(rows[0], rows[2], config), "local": local_of(*rows, config)}
    of_clicks, weights = parts[part].numpy()[click_weight > 0], click_weight[click_weight > 0]
    assert np.isin(of_clicks, np.float32([config.min_confidence, config.max_confidence])).mean() < 0.03
    assert np.average(of_clicks, weights=weights) == pytest.approx(1.0, abs=0.02)
    assert of_clicks.std() > 0.03


@settings(deadline=None, max_examples=60)
@given(_ROWS, _CONFIGS)
def test_lambda_and_mu_of_0_give_exactly_1(rows, config):
    labels, teacher, correction, click_weight = columns(rows)
    parts = global_of(teacher, click_weight, config), local_of(teacher, correction, click_weight, config)
    assert mixed_confidence(labels, *parts, 0.0, 0.0).numpy().tolist() == [1.0] * len(rows)


@pytest.mark.parametrize("form", [*NORMALIZED_FUNCTIONS, "raw"])
def test_a_batch_without_clicks_has_finite_confidence_and_weights_of_1(form):
    teacher, nothing, config = tf.constant([0.2, 0.8]), tf.zeros([2]), config_of(form)
    parts = global_of(teacher, nothing, config), local_of(teacher, tf.zeros([2]), nothing, config)
    # A reference of 1, as no click tells of another: score / 1 = 1 + score - 1 = the score, with a spread of 1, too.
    assert [part.numpy() for part in parts] == [pytest.approx([0.2, 0.8], rel=1e-5)] * 2
    assert mixed_confidence(nothing, *parts, 0.5, 0.5).numpy().tolist() == [1.0, 1.0]


@pytest.mark.parametrize("form", [*NORMALIZED_FUNCTIONS, "raw"])
def test_no_gradient_flows_through_confidence(form):
    teacher, correction = tf.Variable(TEACHER), tf.Variable(CORRECTION)
    with tf.GradientTape() as tape:
        parts = (
            global_of(teacher, CLICK_WEIGHT, config_of(form)),
            local_of(teacher, correction, CLICK_WEIGHT, config_of(form)),
        )
        total = tf.reduce_sum(mixed_confidence(LABELS, *parts, 0.5, 0.5))
    assert tape.gradient(total, [teacher, correction]) == [None, None]


# Means over clicks.


def mean_of(means, name, values, click_weight):
    return float(means({name: values}, click_weight)[name])


def test_momentum_of_0_gives_the_mean_of_the_batch():
    means = ClickMeans(0.0)
    assert mean_of(means, "score", TEACHER, CLICK_WEIGHT) == pytest.approx(0.2)
    assert mean_of(means, "score", tf.constant([0.6]), tf.constant([2.0])) == pytest.approx(0.6)
    assert mean_of(means, "score", tf.constant([0.6]), tf.constant([0.0])) == 1.0
    assert not means.variables


def test_momentum_decays_sums_of_earlier_batches_by_hand():
    means = ClickMeans(0.5)
    assert mean_of(means, "score", tf.constant([0.7]), tf.constant([0.0])) == 1.0  # No click so far.
    assert mean_of(means, "score", tf.constant([0.2, 0.4]), tf.ones([2])) == pytest.approx(0.6 / 2)
    # Half of (.6, 2), and (2 * .8, 2) on top.
    assert mean_of(means, "score", tf.constant([0.8, 0.1]), tf.constant([2.0, 0.0])) == pytest.approx(1.9 / 3)
    # A batch without clicks leaves the mean, and decays its weight: (.95, 1.5).
    assert mean_of(means, "score", tf.constant([0.9]), tf.zeros([1])) == pytest.approx(1.9 / 3)
    assert mean_of(means, "score", tf.constant([0.1]), tf.ones([1])) == pytest.approx((0.475 + 0.1) / 1.75)
    # Each name is a mean of its own.
    assert mean_of(means, "local", tf.constant([2.0]), tf.ones([1])) == pytest.approx(2.0)


@pytest.mark.parametrize("traced", [False, True])
def test_moving_means_are_reference_spread_and_normaliser(traced):
    # Clicks .2 and .4 have the mean .3 and deviations of -.1 and .1, which is 1 - 1 -> .05 and 1 + 1 = 2, mean 1.025.
    # With momentum .5 a click of .6 follows: mean (.3 + .6) / 2 = .45, variance (.01 + .0225) / 2 = .01625,
    # 1 + .15 / sqrt(.01625) = 2.17670, mean (1.025 + 2.17670) / 2 = 1.60085.
    config, means = config_of("standardized"), ClickMeans(0.5)

    def confidence(teacher, click_weight):
        return global_confidence(teacher, click_weight, config, means)

    if traced:
        shape = tf.TensorSpec([None], tf.float32)
        confidence = tf.function(confidence, input_signature=[shape, shape])
    assert confidence(tf.constant([0.2, 0.4]), tf.ones([2])).numpy() == pytest.approx([0.05, 2 / 1.025], rel=1e-4)
    assert confidence(tf.constant([0.6]), tf.ones([1])).numpy() == pytest.approx([2.17670 / 1.60085], rel=1e-4)


@pytest.mark.parametrize("form", ["mean_one", "standardized"])
def test_global_and_local_confidence_keep_moving_means_of_their_own(form):
    config, together, of_global, of_local = config_of(form), ClickMeans(0.5), ClickMeans(0.5), ClickMeans(0.5)
    for scores in (TEACHER, TEACHER**2):
        batch = scores, CLICK_WEIGHT, config
        received = global_confidence(*batch, together), local_confidence(scores, CORRECTION, *batch[1:], together)
        alone = global_confidence(*batch, of_global), local_confidence(scores, CORRECTION, *batch[1:], of_local)
        np.testing.assert_array_equal(received, alone)


# Settings.


def test_config_takes_lambda_by_its_alias_and_writes_it_back():
    config = ClsdConfig.model_validate({"lambda": 0.2, "mu": 0.3})
    assert (config.lambda_, config.mu) == (0.2, 0.3)
    assert config == ClsdConfig(lambda_=0.2, mu=0.3)
    assert config.model_dump(by_alias=True)["lambda"] == 0.2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"lambda": 0.8, "mu": 0.3}, r"lambda \+ mu must be at most 1. Received: 0.8 \+ 0.3"),
        ({"lamda": 0.5}, "lamda"),
        ({"mu": -0.1}, "greater than or equal to 0"),
        ({"mu": "0.5"}, "valid number"),
        ({"min_confidence": 0.0}, "greater than 0"),
        ({"min_confidence": 1.0}, "less than 1"),
        ({"max_confidence": 1.0}, "greater than 1"),
        ({"kappa": 0.0}, "greater than 0"),
        ({"kappa": float("inf")}, "finite"),
        ({"normalizer_momentum": 1.0}, "less than 1"),
        (
            {"teacher": "crossfit"},
            r"Received: 'crossfit'. Allowed: self, ema, cross_fit, prequential, ",
        ),
        (
            {"global_weighting": "power"},
            r"Received: 'power'. Allowed: additive, mean_one, ratio, raw, standardized",
        ),
        ({"ema_momentum": 1.0}, "less than 1"),
        ({"num_folds": 1}, "greater than or equal to 2"),
        ({"loss_warmup_steps": -1}, "greater than or equal to 0"),
        ({"placebo": "shuffled_confidence", "lambda": 0.0, "mu": 0.0}, r"a placebo needs lambda \+ mu > 0"),
        ({"placebo": "permuted_groups", "lambda": 0.5, "mu": 0.0}, r"needs an AdGate to mislead\. Received: mu = 0"),
    ],
)
def test_config_refuses(content, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        ClsdConfig.model_validate(content)


@pytest.mark.parametrize("key", ["global_weighting", "local_weighting"])
def test_the_form_raw_is_refused_unless_it_is_allowed(key):
    rule = "raw drives every prediction to 0 where the click rate is below one half. Received: raw. "
    allowed = "Allowed: mean_one, ratio, additive, standardized; or allow_raw=true"
    with pytest.raises(pydantic.ValidationError, match=rule + allowed):
        ClsdConfig.model_validate({key: "raw"})
    assert getattr(ClsdConfig.model_validate({key: "raw", "allow_raw": True}), key) == "raw"


@pytest.mark.parametrize(("teacher", "steps"), [("self", 100), ("ema", 100), ("prequential", 0), ("cross_fit", 0)])
def test_loss_warmup_is_for_teachers_that_have_learnt_nothing_yet(teacher, steps):
    assert ClsdConfig(teacher=teacher).resolved_loss_warmup_steps == steps
    assert ClsdConfig(teacher=teacher, loss_warmup_steps=7).resolved_loss_warmup_steps == 7
    assert ClsdConfig(teacher=teacher, loss_warmup_steps=0).resolved_loss_warmup_steps == 0


@pytest.mark.parametrize(("lambda_", "mu"), [(0.1, 0.9), (0.7, 0.3), (1.0, 0.0), (0.0, 1.0)])
def test_config_allows_lambda_and_mu_that_sum_to_1(lambda_, mu):
    assert ClsdConfig(lambda_=lambda_, mu=mu).mu == mu
