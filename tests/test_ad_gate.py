"""AdGate: what it may read, its losses by hand, and what it converges to in groups of different click rates."""

import json

import numpy as np
import pydantic
import pytest
import tensorflow as tf

from clsd_tf.layers.losses import bce_from_logits
from clsd_tf.methods.clsd.ad_gate import AdGate, literal_loss, residual_loss
from clsd_tf.methods.clsd.confidence import ClickMeans, global_confidence, local_confidence
from clsd_tf.methods.clsd.config import AdGateConfig, ClsdConfig
from clsd_tf.spec.model_inputs import CategoricalInput, GroupInput, ModelInputs

TIER = GroupInput("tier", ("unknown", "low", "middle", "high"))
AGE = GroupInput("age", ("unknown", "young"))
INPUTS = ModelInputs(
    categorical=(
        CategoricalInput("city", "city", 5),
        CategoricalInput("item", "item", 7),
        CategoricalInput("tags", "tags", 6, max_values=3),
    ),
    numeric=("height", "price"),
    groups=(TIER, AGE),
    user_features=("city", "height"),
)
ROW = {"tier": 1, "age": 0, "city": 2, "item": 3, "tags": [1, 2, 0], "height": 0.5, "price": -1.0, "teacher_score": 0.1}
OTHER = {
    "tier": 3,
    "age": 1,
    "city": 4,
    "item": 5,
    "tags": [4, 0, 0],
    "height": 2.0,
    "price": 3.0,
    "teacher_score": 0.9,
}


def batch_of(*rows):
    return {name: tf.constant([row[name] for row in rows]) for name in ROW}


def randomised(gate):
    """``gate`` with random weights: an untrained one gives 0 for everything."""
    gate(batch_of(ROW))
    random = np.random.default_rng(0)
    gate.set_weights([random.normal(size=weight.shape) for weight in gate.get_weights()])
    return gate


# What it reads.


@pytest.mark.parametrize(
    ("features", "read"),
    [
        (None, ("tier", "age")),  # All user groups.
        (("age",), ("age",)),
        (("city",), ("city",)),
        (("height",), ("height",)),
        (("height", "tier", "city"), ("height", "tier", "city")),
    ],
)
def test_the_correction_depends_on_exactly_the_features_it_reads(features, read):
    gate = randomised(AdGate(INPUTS, AdGateConfig(features=features, hidden_units=())))
    before = float(gate(batch_of(ROW))[0])
    changing = {name for name in ROW if float(gate(batch_of({**ROW, name: OTHER[name]}))[0]) != before}
    assert changing == set(read) == set(gate.features)
    assert [group.name for group in gate.groups] == [name for name in ("tier", "age") if name in read]


def test_the_correction_by_hand():
    gate = AdGate(INPUTS, AdGateConfig(features=("tier", "city", "height"), embedding_dim=1, hidden_units=(2,)))
    gate(batch_of(ROW))
    tier, city = [[0.0], [1.0], [2.0], [3.0]], [[0.0], [10.0], [20.0], [30.0], [40.0]]  # One table, tier first.
    hidden = [[2.0, 0.0], [1.0, -1.0], [0.1, 0.0]], [-3.0, 5.0]  # Of height, tier and city.
    gate.set_weights([np.array(weight) for weight in ([*tier, *city], *hidden, [[2.0], [-1.0]], [0.25])])
    # Tier 1 and city 2 look up 1 and 20, height is .5: hidden max(1 + 2 + 1 - 3, 0) = 1 and max(-1 + 5, 0) = 4,
    # 2 * 1 - 4 + .25 = -1.75. Tier 3, city 4, height 2: max(3 + 4 + 4 - 3, 0) = 8, max(-3 + 5, 0) = 2, 14.25.
    assert gate(batch_of(ROW, OTHER)).numpy() == pytest.approx([-1.75, 14.25])


@pytest.mark.parametrize(
    ("features", "received"),
    [
        (("item",), "item"),
        (("tier", "price"), "price"),
        (("tags",), "tags"),
        (("tier", "nonsense", "item"), "nonsense, item"),
        (("teacher_score",), "teacher_score"),
    ],
)
def test_what_is_no_single_valued_feature_of_the_user_is_refused(features, received):
    message = f"user table only: .* Received: {received}. Allowed: tier, age, city, height$"
    with pytest.raises(ValueError, match=message):
        AdGate(INPUTS, AdGateConfig(features=features))


def test_a_spec_without_groups_needs_features_to_be_named():
    inputs = ModelInputs(INPUTS.categorical, INPUTS.numeric, groups=(), user_features=INPUTS.user_features)
    with pytest.raises(ValueError, match=r"needs at least one user group\. Received: none"):
        AdGate(inputs)
    gate = AdGate(inputs, AdGateConfig(features=("city",)))
    assert gate.groups == ()
    assert gate(batch_of(ROW)).numpy().tolist() == [0.0]


def test_where_nothing_of_the_user_is_known_nothing_is_allowed():
    inputs = ModelInputs(INPUTS.categorical, INPUTS.numeric, groups=())
    with pytest.raises(ValueError, match=r"Received: item\. Allowed: none"):
        AdGate(inputs, AdGateConfig(features=("item",)))


@pytest.mark.parametrize("objective", ["residual", "literal"])
def test_an_untrained_ad_gate_corrects_nothing(objective):
    correction = AdGate(INPUTS, AdGateConfig(objective=objective))(batch_of(ROW, OTHER))
    assert correction.dtype == tf.float32
    assert correction.numpy().tolist() == [0.0, 0.0]


def test_the_literal_correction_stays_within_its_bound():
    gate = randomised(AdGate(INPUTS, AdGateConfig(objective="literal", bound=0.2)))
    plain = AdGate(INPUTS)
    plain(batch_of(ROW))
    plain.set_weights([30 * weight for weight in gate.get_weights()])
    unbounded = plain(batch_of(ROW, OTHER)).numpy()
    assert np.abs(unbounded).min() > 10
    gate.set_weights(plain.get_weights())
    assert gate(batch_of(ROW, OTHER)).numpy() == pytest.approx(0.2 * np.tanh(unbounded))


@pytest.mark.parametrize(
    "config",
    [
        AdGateConfig(),
        AdGateConfig(features=("height", "city", "age"), embedding_dim=3, hidden_units=(5, 4), learning_rate=0.1),
        AdGateConfig(objective="literal", bound=0.7, hidden_units=()),
    ],
)
def test_ad_gate_survives_get_config_and_from_config_by_way_of_json(config):
    gate = randomised(AdGate(INPUTS, config, name="gate"))
    copy = AdGate.from_config(json.loads(json.dumps(gate.get_config())))
    copy(batch_of(ROW))
    copy.set_weights(gate.get_weights())
    assert copy(batch_of(ROW, OTHER)).numpy().tolist() == gate(batch_of(ROW, OTHER)).numpy().tolist()
    assert (copy.config, copy.features, copy.groups, copy.name) == (config, gate.features, gate.groups, "gate")
    assert copy.get_config() == gate.get_config()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"features": ()}, "at least 1 item"),
        ({"objective": "adversarial"}, "'residual' or 'literal'"),
        ({"bound": 0.0}, "greater than 0"),
        ({"embedding_dim": 0}, "greater than or equal to 1"),
        ({"hidden_units": (8, 0)}, "greater than or equal to 1"),
        ({"learning_rate": 0.0}, "greater than 0"),
        ({"learnign_rate": 0.1}, "learnign_rate"),
    ],
)
def test_config_refuses(content, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        ClsdConfig.model_validate({"ad_gate": content})


# Its losses, by hand. Four rows; the third is no click, the fourth counts twice.

CLICK_WEIGHT = tf.constant([1.0, 1.0, 0.0, 2.0])
TEACHER = tf.constant([0.2, 0.4, 0.9, 0.1])
CORRECTION = tf.constant([0.4, 0.6, 0.0, 0.8])
BCE = tf.constant([1.5, 1.0, 9.0, 2.0])


def gate_of(objective):
    return AdGate(INPUTS, AdGateConfig(objective=objective))


def test_residual_loss_by_hand():
    # 1 - teacher - correction is (.4, 0, ., .1): (.16 + 0 + 2 * .01) / 4.
    assert float(residual_loss(CORRECTION, TEACHER, CLICK_WEIGHT)) == pytest.approx(0.045)
    assert float(gate_of("residual").loss(CORRECTION, TEACHER, BCE, CLICK_WEIGHT)) == pytest.approx(0.045)


def test_literal_loss_by_hand():
    # (teacher + correction) * bce is (.6 * 1.5, 1 * 1, ., .9 * 2): (.9 + 1 + 2 * 1.8) / 4.
    assert float(literal_loss(CORRECTION, TEACHER, BCE, CLICK_WEIGHT)) == pytest.approx(1.375)
    assert float(gate_of("literal").loss(CORRECTION, TEACHER, BCE, CLICK_WEIGHT)) == pytest.approx(1.375)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("residual", [-0.2, 0.0, 0.0, -0.1]),  # -2 * (1 - teacher - correction) * weight / 4.
        ("literal", [1.5 / 4, 1 / 4, 0.0, 2 * 2 / 4]),  # bce * weight / 4: positive wherever there is a click.
    ],
)
def test_losses_reach_the_correction_and_neither_teacher_nor_backbone(objective, expected):
    correction, teacher, bce = tf.Variable(CORRECTION), tf.Variable(TEACHER), tf.Variable(BCE)
    with tf.GradientTape() as tape:
        loss = gate_of(objective).loss(correction, teacher, bce, CLICK_WEIGHT)
    of_correction, *of_others = tape.gradient(loss, [correction, teacher, bce])
    assert of_others == [None, None]
    assert of_correction.numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("objective", ["residual", "literal"])
def test_the_loss_of_a_batch_without_clicks_is_0_with_a_gradient_of_0(objective):
    correction = tf.Variable([0.3, 0.4])
    with tf.GradientTape() as tape:
        loss = gate_of(objective).loss(correction, tf.constant([0.1, 0.2]), tf.ones([2]), tf.zeros([2]))
    assert float(loss) == 0.0
    assert tape.gradient(loss, correction).numpy().tolist() == [0.0, 0.0]


# What it converges to: four groups of click rates .05, .15, .3 and .5, and a calibrated teacher that stays as it is.

GROUPS = np.repeat(np.arange(4), 500)


@pytest.fixture(scope="module")
def calibrated():
    """Teacher scores and clicks [2000]: each row is clicked with exactly the probability that its teacher says."""
    random = np.random.default_rng(1)
    rates = np.array([0.05, 0.15, 0.3, 0.5])[GROUPS]
    teacher = random.beta(20 * rates, 20 * (1 - rates)).astype(np.float32)
    return teacher, (random.random(len(teacher)) < teacher).astype(np.float32)


def clicks_of(group, labels):
    return np.equal(GROUPS, group) & (labels == 1)


def trained_corrections(calibrated, objective, num_steps):
    """AdGate's correction for each group after training on all rows at once, [4]."""
    teacher, labels = (tf.constant(column) for column in calibrated)
    bce = bce_from_logits(labels, tf.math.log(teacher / (1 - teacher)))
    features = {"tier": tf.constant(GROUPS)}
    tf.keras.utils.set_random_seed(1)
    gate = AdGate(INPUTS, AdGateConfig(features=("tier",), objective=objective))
    optimizer = tf.keras.optimizers.Adam(0.02)
    gate(features)
    optimizer.build(gate.trainable_variables)

    @tf.function
    def train():
        for _ in tf.range(num_steps):
            with tf.GradientTape() as tape:
                loss = gate.loss(gate(features), teacher, bce, labels)
            variables = gate.trainable_variables
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    train()
    return gate({"tier": tf.range(4)}).numpy()


@pytest.fixture(scope="module")
def residual_corrections(calibrated):
    return trained_corrections(calibrated, "residual", num_steps=300)


def test_residual_converges_to_1_minus_the_mean_teacher_score_of_the_groups_clicks(calibrated, residual_corrections):
    teacher, labels = calibrated
    expected = np.array([1 - teacher[clicks_of(group, labels)].mean() for group in range(4)])
    assert expected[0] - expected[3] > 0.3  # The groups differ, or this would show nothing.
    assert residual_corrections == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("form", ["additive", "mean_one"])
def test_a_trained_ad_gate_gives_every_group_mean_confidence_1(calibrated, residual_corrections, form):
    teacher, labels = (tf.constant(column) for column in calibrated)
    correction = tf.constant(residual_corrections[GROUPS])
    config = ClsdConfig(local_weighting=form)
    confidence = local_confidence(teacher, correction, labels, config, ClickMeans(0.0)).numpy()
    for group in range(4):
        own = confidence[clicks_of(group, calibrated[1])]
        assert own.mean() == pytest.approx(1.0, abs=0.02)
        assert own.std() > 0.05  # Within a group, clicks still differ.


def test_global_confidence_favours_groups_that_click_more(calibrated):
    # What AdGate is there to mend: the lowest group's clicks count far less than the highest group's.
    teacher, labels = (tf.constant(column) for column in calibrated)
    config = ClsdConfig(global_weighting="mean_one")
    confidence = global_confidence(teacher, labels, config, ClickMeans(0.0)).numpy()
    means = [confidence[clicks_of(group, calibrated[1])].mean() for group in range(4)]
    assert means == sorted(means)
    assert means[0] < 0.5 < 1.2 < means[3]


def test_the_literal_objective_ends_at_its_lower_bound_for_every_group(calibrated):
    # It lowers the loss by trusting no click at all: nothing is learnt about groups.
    assert trained_corrections(calibrated, "literal", num_steps=300) == pytest.approx([-0.3] * 4, abs=0.005)
