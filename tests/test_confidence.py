"""Click confidence and AdGate: values by hand, invariants, what AdGate converges to, and the collapse it must avoid."""

import numpy as np
import pydantic
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from clsd_tf.clsd import AdGate, ClsdConfig
from clsd_tf.clsd.ad_gate import ad_gate_loss
from clsd_tf.clsd.confidence import global_confidence, local_confidence, mean_over_clicks, mixed_confidence
from clsd_tf.losses import bce_from_logits, weighted_mean
from clsd_tf.model_inputs import GroupInput

CONFIG = ClsdConfig()  # Clips to [.05, 3].

# Four rows; the third is no click, the fourth counts twice. Mean teacher score over clicks:
# (.2 + .4 + 2 * .1) / 4 = .2.
LABELS = tf.constant([1.0, 1.0, 0.0, 1.0])
CLICK_WEIGHT = tf.constant([1.0, 1.0, 0.0, 2.0])
TEACHER = tf.constant([0.2, 0.4, 0.9, 0.1])
CORRECTION = tf.constant([0.4, 0.6, 0.0, 0.9])
GLOBAL = [1.0, 2.0, 3.0, 0.5]  # TEACHER / .2, of which 4.5 is clipped to 3.
# TEACHER + CORRECTION = (.6, 1, .9, 1), of which the mean over clicks is (.6 + 1 + 2 * 1) / 4 = .9.
LOCAL = [0.6 / 0.9, 1 / 0.9, 1.0, 1 / 0.9]

_ROWS = st.lists(
    st.tuples(st.integers(0, 1), st.floats(1e-4, 1.0), st.floats(-2.0, 2.0), st.sampled_from([0.0, 0.5, 1.0, 4.0])),
    min_size=1,
    max_size=8,
)


def _columns(rows):
    labels, teacher, correction, weight = (tf.constant(column, tf.float32) for column in zip(*rows, strict=True))
    return labels, teacher, correction, labels * weight


def _mean_over_clicks(values, click_weight):
    return np.average(np.asarray(values), weights=np.asarray(click_weight))


def test_global_confidence_by_hand():
    assert global_confidence(TEACHER, CLICK_WEIGHT, CONFIG).numpy() == pytest.approx(GLOBAL)


def test_local_confidence_by_hand():
    assert local_confidence(TEACHER, CORRECTION, CLICK_WEIGHT, CONFIG).numpy() == pytest.approx(LOCAL)


def test_local_confidence_clips_before_it_normalises():
    # .2 - 5 -> .05 and .4 + 5 -> 3: mean (.05 + 3) / 2 = 1.525.
    received = local_confidence(tf.constant([0.2, 0.4]), tf.constant([-5.0, 5.0]), tf.ones([2]), CONFIG)
    assert received.numpy() == pytest.approx([0.05 / 1.525, 3 / 1.525])


def test_mixed_confidence_by_hand():
    # .5 + .3 * global + .2 * local for clicks: .5 + .3 + .13333, .5 + .6 + .22222, no click, .5 + .15 + .22222.
    received = mixed_confidence(LABELS, tf.constant(GLOBAL), tf.constant(LOCAL), 0.3, 0.2)
    assert received.numpy() == pytest.approx([0.93333, 1.32222, 1.0, 0.87222], abs=1e-5)
    # The whole keeps mean 1 over clicks, as both parts have it.
    assert _mean_over_clicks(received, CLICK_WEIGHT) == pytest.approx(1.0)


def test_mean_over_clicks_leaves_out_rows_without_a_click():
    assert float(mean_over_clicks(TEACHER, CLICK_WEIGHT)) == pytest.approx(0.2)


def test_a_batch_without_clicks_has_mean_1_and_finite_confidence():
    teacher, nothing = tf.constant([0.2, 0.8]), tf.zeros([2])
    assert float(mean_over_clicks(teacher, nothing)) == 1.0
    assert global_confidence(teacher, nothing, CONFIG).numpy() == pytest.approx([0.2, 0.8])
    assert local_confidence(teacher, tf.zeros([2]), nothing, CONFIG).numpy() == pytest.approx([0.2, 0.8])
    assert mixed_confidence(nothing, teacher, teacher, 0.5, 0.5).numpy().tolist() == [1.0, 1.0]


def test_teacher_scores_of_exactly_0_give_finite_positive_confidence():
    zeros, ones = tf.zeros([2]), tf.ones([2])
    assert global_confidence(zeros, ones, CONFIG).numpy() == pytest.approx([0.05, 0.05])
    assert local_confidence(zeros, zeros, ones, CONFIG).numpy() == pytest.approx([1.0, 1.0])


@settings(deadline=None)
@given(_ROWS)
def test_confidence_is_positive_within_its_clips_and_of_mean_1_over_clicks(rows):
    _, teacher, correction, click_weight = _columns(rows)
    low, high = CONFIG.min_confidence, CONFIG.max_confidence
    of_all = global_confidence(teacher, click_weight, CONFIG).numpy()
    assert (low <= of_all + 1e-6).all()
    assert (of_all <= high + 1e-6).all()
    of_group = local_confidence(teacher, correction, click_weight, CONFIG).numpy()
    has_clicks = float(tf.reduce_sum(click_weight)) > 0
    if has_clicks:
        assert _mean_over_clicks(of_group, click_weight) == pytest.approx(1.0, rel=1e-5)
        ratio = teacher.numpy() / _mean_over_clicks(teacher, click_weight)
        is_clipped = (ratio < low) | (ratio > high)
        if not is_clipped[click_weight.numpy() > 0].any():
            assert _mean_over_clicks(of_all, click_weight) == pytest.approx(1.0, rel=1e-5)
    # Clipped to [low, high], then divided by a mean from the same range.
    assert (of_group >= (low / high if has_clicks else low) * (1 - 1e-5)).all()
    assert (of_group <= (high / low if has_clicks else high) * (1 + 1e-5)).all()


@settings(deadline=None)
@given(_ROWS)
def test_lambda_and_mu_of_0_give_exactly_1(rows):
    labels, teacher, correction, click_weight = _columns(rows)
    confidence = mixed_confidence(
        labels,
        global_confidence(teacher, click_weight, CONFIG),
        local_confidence(teacher, correction, click_weight, CONFIG),
        0.0,
        0.0,
    )
    assert confidence.numpy().tolist() == [1.0] * len(rows)


def test_no_gradient_flows_through_confidence():
    teacher, correction = tf.Variable(TEACHER), tf.Variable(CORRECTION)
    with tf.GradientTape() as tape:
        confidence = mixed_confidence(
            LABELS,
            global_confidence(teacher, CLICK_WEIGHT, CONFIG),
            local_confidence(teacher, correction, CLICK_WEIGHT, CONFIG),
            0.5,
            0.5,
        )
        total = tf.reduce_sum(confidence)
    assert tape.gradient(total, [teacher, correction]) == [None, None]


def test_config_takes_lambda_by_its_alias_and_writes_it_back():
    config = ClsdConfig.model_validate({"lambda": 0.2, "mu": 0.3})
    assert (config.lambda_, config.mu) == (0.2, 0.3)
    assert config == ClsdConfig(lambda_=0.2, mu=0.3)
    assert config.model_dump(by_alias=True)["lambda"] == 0.2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"lambda": 0.8, "mu": 0.3}, r"lambda \+ mu must be at most 1. Received: 0.8 \+ 0.3"),
        ({"min_confidence": 2.0, "max_confidence": 2.0}, "below max_confidence. Received: 2 and 2"),
        ({"lamda": 0.5}, "lamda"),
        ({"mu": -0.1}, "greater than or equal to 0"),
        ({"min_confidence": 0.0}, "greater than 0"),
        ({"teacher": "ema"}, "'self' or 'cross_fit'"),
        ({"num_folds": 1}, "greater than or equal to 2"),
        ({"loss_warmup_steps": -1}, "greater than or equal to 0"),
        ({"mu": "0.5"}, "valid number"),
    ],
)
def test_config_refuses(content, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        ClsdConfig.model_validate(content)


@pytest.mark.parametrize(("lambda_", "mu"), [(0.1, 0.9), (0.7, 0.3), (1.0, 0.0), (0.0, 1.0)])
def test_config_allows_lambda_and_mu_that_sum_to_1(lambda_, mu):
    assert ClsdConfig(lambda_=lambda_, mu=mu).mu == mu


GROUP = GroupInput("tier", ("unknown", "low", "middle", "high"))


def test_an_untrained_ad_gate_corrects_nothing():
    gate = AdGate([GROUP, GroupInput("age", ("unknown", "young"))])
    features = {"tier": tf.constant([0, 1, 2, 3]), "age": tf.constant([0, 1, 0, 1]), "item": tf.constant([7, 7, 7, 7])}
    correction = gate(features)
    assert correction.dtype == tf.float32
    assert correction.numpy().tolist() == [0.0] * 4


def test_ad_gate_without_groups_is_refused():
    with pytest.raises(ValueError, match="Received: none"):
        AdGate([])


def test_ad_gate_survives_get_config_and_from_config():
    gate = AdGate([GROUP], embedding_dim=3, hidden_units=(5,))
    features = {"tier": tf.constant([0, 1, 2, 3])}
    gate(features)
    random = np.random.default_rng(0)
    gate.set_weights([random.normal(size=weight.shape) for weight in gate.get_weights()])
    copy = AdGate.from_config(gate.get_config())
    copy(features)
    copy.set_weights(gate.get_weights())
    assert copy(features).numpy().tolist() == gate(features).numpy().tolist()
    assert len(set(copy(features).numpy())) == 4  # Groups are told apart.


def test_ad_gate_loss_by_hand():
    # Errors 1 - t - a: .4, 0, 0 (no click), 0 -> (1 * .16 + 2 * 0 + ...) / 4 = .04.
    assert float(ad_gate_loss(CORRECTION, TEACHER, CLICK_WEIGHT)) == pytest.approx(0.04)


def test_ad_gate_loss_of_a_batch_without_clicks_is_0_with_a_gradient_of_0():
    correction = tf.Variable([0.3, 0.4])
    with tf.GradientTape() as tape:
        loss = ad_gate_loss(correction, tf.constant([0.1, 0.2]), tf.zeros([2]))
    assert float(loss) == 0.0
    assert tape.gradient(loss, correction).numpy().tolist() == [0.0, 0.0]


def test_ad_gate_loss_reaches_the_correction_and_no_teacher():
    teacher, correction = tf.Variable(TEACHER), tf.Variable(CORRECTION)
    with tf.GradientTape() as tape:
        loss = ad_gate_loss(correction, teacher, CLICK_WEIGHT)
    of_teacher, of_correction = tape.gradient(loss, [teacher, correction])
    assert of_teacher is None
    # -2 * error * weight / 4 in the first row; the others have no error or no weight.
    assert of_correction.numpy() == pytest.approx([-0.2, 0.0, 0.0, 0.0])


@pytest.fixture(scope="module")
def calibrated():
    """Rows of four groups with mean click rates .05, .15, .3 and .5, and a teacher that knows each row's rate."""
    random = np.random.default_rng(1)
    groups = np.repeat(np.arange(4), 3000)
    rates = np.array([0.05, 0.15, 0.3, 0.5])[groups]
    teacher = random.beta(5 * rates, 5 * (1 - rates)).astype(np.float32)
    labels = (random.random(len(groups)) < teacher).astype(np.float32)
    return {"tier": groups}, labels, teacher


@pytest.fixture(scope="module")
def trained_gate(calibrated):
    features, labels, teacher = (tf.nest.map_structure(tf.constant, part) for part in calibrated)
    tf.keras.utils.set_random_seed(1)
    gate = AdGate([GROUP])
    optimizer = tf.keras.optimizers.Adam(0.01)
    gate(features)
    optimizer.build(gate.trainable_variables)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = ad_gate_loss(gate(features), teacher, labels)
        variables = gate.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    for _ in range(300):
        step()
    return gate


def test_ad_gate_converges_to_1_minus_the_mean_teacher_score_of_the_groups_clicks(calibrated, trained_gate):
    _, labels, teacher = calibrated
    groups = np.repeat(np.arange(4), 3000)
    expected = [1 - teacher[(groups == group) & (labels == 1)].mean() for group in range(4)]
    assert expected[0] - expected[3] > 0.3  # The groups differ, or this would show nothing.
    correction = trained_gate({"tier": tf.range(4)}).numpy()
    assert correction == pytest.approx(np.array(expected), abs=0.02)


def test_a_trained_ad_gate_gives_every_group_mean_local_confidence_1(calibrated, trained_gate):
    features, labels, teacher = calibrated
    correction = trained_gate({"tier": tf.constant(features["tier"])})
    confidence = local_confidence(tf.constant(teacher), correction, tf.constant(labels), CONFIG).numpy()
    for group in range(4):
        clicks = (features["tier"] == group) & (labels == 1)
        assert confidence[clicks].mean() == pytest.approx(1.0, abs=0.02)
        assert confidence[clicks].std() > 0.05  # Within a group, clicks still differ.


def test_global_confidence_favours_groups_that_click_more(calibrated):
    # What AdGate is there to mend: the lowest group's clicks count far less than the highest group's.
    features, labels, teacher = calibrated
    confidence = global_confidence(tf.constant(teacher), tf.constant(labels), CONFIG).numpy()
    means = [confidence[(features["tier"] == group) & (labels == 1)].mean() for group in range(4)]
    assert means == sorted(means)
    assert means[0] < 0.6 < 1.1 < means[3]


# The trap of self-weighting: four cells with click rates .1, .2, .3 and .4, a logit for each.
_CELLS = np.repeat(np.arange(4), 1000)


@pytest.fixture(scope="module")
def cell_labels():
    rates = np.array([0.1, 0.2, 0.3, 0.4])
    return (np.random.default_rng(0).random(4000) < rates[_CELLS]).astype(np.float32)


def _fit_cells(labels, confidence_of):
    """Gradient descent on the weighted loss, the model being its own teacher; returns pctr of each cell."""
    labels, logits = tf.constant(labels), tf.Variable(tf.zeros([4]))

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            row_logits = tf.linalg.matvec(tf.one_hot(_CELLS, 4), logits)
            confidence = confidence_of(labels, tf.stop_gradient(tf.sigmoid(row_logits)))
            loss = weighted_mean(confidence * bce_from_logits(labels, row_logits), tf.ones_like(labels))
        logits.assign_sub(2.0 * tape.gradient(loss, logits))

    for _ in range(600):
        step()
    return tf.sigmoid(logits).numpy()


def test_raw_self_weighting_drives_predictions_to_0_below_a_click_rate_of_one_half(cell_labels):
    # With weight w on clicks the odds settle at w * rate / (1 - rate); w = pctr leaves only 0. Measured mean: .008.
    pctr = _fit_cells(cell_labels, lambda labels, teacher: tf.where(labels > 0.5, teacher, 1.0))
    assert cell_labels.mean() == pytest.approx(0.25, abs=0.01)
    assert pctr.max() < 0.03


@pytest.mark.parametrize(
    ("lambda_", "mu", "largest_gap"),
    [
        (0.0, 0.0, 1e-4),  # Plain BCE.
        (0.5, 0.5, 0.02),  # The defaults. Measured: -.011.
        (0.0, 1.0, 0.02),  # Measured: -.003.
        (1.0, 0.0, 0.05),  # Only the clip and the normalisation hold it up. Measured: -.037.
    ],
)
def test_shipped_confidence_keeps_the_mean_prediction_near_the_click_rate(cell_labels, lambda_, mu, largest_gap):
    def confidence_of(labels, teacher):
        correction = 1.0 - mean_over_clicks(teacher, labels) + tf.zeros_like(teacher)  # AdGate's optimum, one group.
        return mixed_confidence(
            labels,
            global_confidence(teacher, labels, CONFIG),
            local_confidence(teacher, correction, labels, CONFIG),
            lambda_,
            mu,
        )

    pctr = _fit_cells(cell_labels, confidence_of)
    assert pctr.mean() == pytest.approx(cell_labels.mean(), abs=largest_gap)
    assert list(pctr) == sorted(pctr)  # The ranking of the cells survives.
