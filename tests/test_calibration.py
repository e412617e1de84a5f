"""Calibration against scikit-learn, its defining equations and hand-worked examples; the graph against NumPy."""

import json

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from clsd_tf.layers.calibration import Calibration, CalibrationLayer, IsotonicCurve, fit_calibration
from clsd_tf.layers.calibration_config import CalibrationConfig
from clsd_tf.metrics import pointwise
from clsd_tf.spec.model_inputs import GroupInput

AGE = GroupInput("age", ("unknown", "young", "old"))
FITTED_METHODS = ("platt", "isotonic")


def simulated_rows(num_rows=4000, *, slope=0.7, intercept=-0.4, seed=0):
    """Logits [num_rows], and clicks of probability sigmoid(slope * logits + intercept)."""
    random = np.random.default_rng(seed)
    logits = random.normal(-1.0, 1.5, num_rows)
    return logits, (random.random(num_rows) < expit(slope * logits + intercept)).astype(np.float64)


def fit(method, logits, labels, weights=None, **arguments):
    weights = np.ones(len(logits)) if weights is None else weights
    return fit_calibration(CalibrationConfig(method=method), logits, labels, weights, **arguments)


def fit_by_age(method, logits, labels, group_ids, *, shrinkage_rows, weights=None):
    config = CalibrationConfig(method=method, user_group="age", shrinkage_rows=shrinkage_rows)
    weights = np.ones(len(logits)) if weights is None else weights
    return fit_calibration(config, logits, labels, weights, group_ids, AGE)


def test_platt_equals_an_unregularised_logistic_regression():
    logits, labels = simulated_rows()
    weights = np.random.default_rng(1).uniform(0.2, 3, len(logits))
    expected = LogisticRegression(C=1e9, solver="lbfgs", tol=1e-10).fit(logits[:, None], labels, weights)
    curve = fit("platt", logits, labels, weights).overall
    assert curve.slope == pytest.approx(expected.coef_[0, 0], rel=1e-5)
    assert curve.intercept == pytest.approx(expected.intercept_[0], rel=1e-5)


def test_platt_solves_the_equations_of_maximum_likelihood():
    # d/d intercept and d/d slope of the log likelihood: sum w (y - ctr) = 0 and sum w z (y - ctr) = 0.
    logits, labels = simulated_rows(500)
    weights = np.random.default_rng(1).uniform(0.2, 3, len(logits))
    residuals = weights * (labels - fit("platt", logits, labels, weights).apply(logits))
    assert residuals.sum() == pytest.approx(0, abs=1e-5)
    assert (logits * residuals).sum() == pytest.approx(0, abs=1e-5)


def test_platt_recovers_the_slope_and_intercept_that_made_the_clicks():
    curve = fit("platt", *simulated_rows(100_000)).overall
    # Standard errors are .006 and .009.
    assert curve.slope == pytest.approx(0.7, abs=0.02)
    assert curve.intercept == pytest.approx(-0.4, abs=0.03)


def test_isotonic_predictions_equal_scikit_learn_within_and_beyond_the_fitted_range():
    logits, labels = simulated_rows(1500)
    weights = np.random.default_rng(1).uniform(0.2, 3, len(logits))
    expected = IsotonicRegression(y_min=1e-6, y_max=1 - 1e-6, out_of_bounds="clip")
    expected.fit(expit(logits), labels, weights)
    points = np.linspace(-12, 12, 3001)
    received = fit("isotonic", logits, labels, weights).apply(points)
    np.testing.assert_allclose(received, expected.predict(expit(points)), atol=1e-12)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 1), st.integers(1, 4)), min_size=2, max_size=12))
def test_isotonic_is_the_minimum_over_right_ends_of_the_maximum_over_left_ends_of_click_rates(rows):
    logits, labels, weights = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    assume(len(set(labels)) == 2)
    distinct = np.unique(logits)

    def click_rate(low, high):
        inside = (logits >= low) & (logits <= high)
        return np.average(labels[inside], weights=weights[inside])

    expected = [
        max(min(click_rate(low, high) for high in distinct[distinct >= point]) for low in distinct[distinct <= point])
        for point in distinct
    ]
    received = fit("isotonic", logits, labels, weights).apply(distinct)
    np.testing.assert_allclose(received, np.clip(expected, 1e-6, 1 - 1e-6), atol=1e-9)


def test_isotonic_keeps_only_corners():
    # 1, 2 | 3, 4 | 5 pool to click rates 1/2, 1/2, 1: knots at the ends of the flat part 1..4 and at 5.
    curve = fit("isotonic", np.array([1.0, 2, 3, 4, 5]), np.array([1.0, 0, 1, 0, 1])).overall
    assert curve.knots == pytest.approx(expit(np.array([1.0, 4.0, 5.0])))
    assert curve.values == pytest.approx([0.5, 0.5, 1 - 1e-6])


@pytest.mark.parametrize("method", FITTED_METHODS)
def test_weights_equal_repeated_rows(method):
    logits, labels = simulated_rows(300)
    times = np.random.default_rng(1).integers(0, 4, len(logits))
    weighted = fit(method, logits, labels, times)
    repeated = fit(method, np.repeat(logits, times), np.repeat(labels, times))
    points = np.linspace(-6, 6, 101)
    np.testing.assert_allclose(weighted.apply(points), repeated.apply(points), atol=1e-8)


@pytest.mark.parametrize("method", FITTED_METHODS)
def test_the_scale_of_the_weights_does_not_matter(method):
    logits, labels = simulated_rows(300)
    np.testing.assert_allclose(
        fit(method, logits, labels, np.full(300, 1e-12)).apply(logits), fit(method, logits, labels).apply(logits)
    )


@pytest.mark.parametrize("method", FITTED_METHODS)
def test_pcoc_of_the_fitted_rows_becomes_1_and_log_loss_falls(method):
    logits, labels = simulated_rows()
    weights = np.random.default_rng(1).uniform(0.2, 3, len(logits))
    ctr = fit(method, logits, labels, weights).apply(logits)
    assert pointwise.pcoc(labels, expit(logits), weights) > 1.1
    assert pointwise.pcoc(labels, ctr, weights) == pytest.approx(1, abs=1e-3)
    assert pointwise.log_loss(labels, ctr, weights) < pointwise.log_loss(labels, expit(logits), weights) - 0.01


_POINTS = st.lists(st.floats(-30, 30), min_size=2, max_size=20)


@settings(deadline=None)
@given(_POINTS, st.integers(0, 3))
def test_platt_keeps_the_order_of_logits(points, seed):
    calibration = fit("platt", *simulated_rows(50, seed=seed))
    assert calibration.overall.slope > 0
    ctr = calibration.apply(np.sort(points))
    assert (np.diff(ctr) >= 0).all()
    # Distinct logits stay distinct, away from the ends of what a float64 can tell apart.
    assert (np.diff(ctr)[(np.diff(np.sort(points)) > 1e-3) & (ctr[1:] < 0.999)] > 0).all()


@settings(deadline=None)
@given(_POINTS, st.integers(0, 3))
def test_isotonic_never_reverses_the_order_of_logits(points, seed):
    ctr = fit("isotonic", *simulated_rows(50, seed=seed)).apply(np.sort(points))
    assert (np.diff(ctr) >= -1e-15).all()
    assert ctr.min() >= 1e-6
    assert ctr.max() <= 1 - 1e-6


def test_platt_of_separable_rows_is_finite_and_ranks():
    calibration = fit("platt", np.array([-2.0, -1.0, 1.0, 2.0]), np.array([0.0, 0.0, 1.0, 1.0]))
    ctr = calibration.apply(np.array([-2.0, -1.0, 0.0, 1.0, 2.0]))
    assert np.isfinite([calibration.overall.slope, calibration.overall.intercept]).all()
    assert (np.diff(ctr) > 0).all()
    assert ctr[2] == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize(
    "logits",
    [
        np.array([3.0, 2.0, 1.0, 0.0]),  # Higher logits are clicked less.
        np.array([1.0, 3.0, 2.0, 2.0]),  # As often.
        np.full(4, -5.0),  # One value.
        np.array([1e3, -1e3, -1e3, 1e3]),  # Less, and the likelihood has no maximum.
    ],
)
def test_platt_of_logits_that_do_not_rank_fits_the_intercept_only(logits):
    labels = np.array([0.0, 0.0, 1.0, 0.0])
    calibration = fit("platt", logits, labels)
    assert calibration.overall.slope == 1.0
    assert calibration.apply(logits).mean() == pytest.approx(0.25, abs=1e-9)


def test_the_intercept_alone_of_equal_logits_by_hand():
    # All logits -5, click rate 1 / 4: -5 + intercept = log(1 / 3), intercept = 5 - 1.0986.
    curve = fit("platt", np.full(4, -5.0), np.array([0.0, 0.0, 1.0, 0.0])).overall
    assert curve.intercept == pytest.approx(3.9014, abs=1e-4)


def test_platt_fits_small_and_shifted_logits_as_well():
    logits, labels = simulated_rows()
    expected = fit("platt", logits, labels).apply(logits)
    for scale, shift in ((1e-3, 0.0), (300.0, 0.0), (1.0, -500.0)):
        received = fit("platt", scale * logits + shift, labels).apply(scale * logits + shift)
        np.testing.assert_allclose(received, expected, atol=1e-6)


def test_isotonic_of_equal_logits_is_the_click_rate():
    calibration = fit("isotonic", np.full(4, -5.0), np.array([0.0, 0.0, 1.0, 0.0]))
    assert calibration.apply(np.array([-9.0, -5.0, 9.0])) == pytest.approx([0.25] * 3)
    assert layer_ctr(calibration, [-9.0, -5.0, 9.0]) == pytest.approx([0.25] * 3)


def test_method_none_is_the_sigmoid_and_needs_no_rows():
    config = CalibrationConfig(method="none", user_group="age")
    calibration = fit_calibration(config, np.ones(0), np.ones(0), np.ones(0))
    logits = np.array([-1e3, -2.0, 0.0, 2.0, 1e3])
    np.testing.assert_array_equal(calibration.apply(logits), expit(logits))


def test_a_planted_bias_of_a_group_is_repaired():
    logits, _ = simulated_rows(30_000)
    random = np.random.default_rng(1)
    group_ids = random.integers(0, 3, len(logits))
    true_ctr = expit(logits + np.array([0.0, -0.8, 0.8])[group_ids])  # The model knows nothing of age.
    labels = (random.random(len(logits)) < true_ctr).astype(np.float64)
    for method in FITTED_METHODS:
        together = fit(method, logits, labels).apply(logits)
        apart = fit_by_age(method, logits, labels, group_ids, shrinkage_rows=100).apply(logits, group_ids)
        young, old = group_ids == 1, group_ids == 2
        assert pointwise.pcoc(labels[young], together[young]) > 1.3
        assert pointwise.pcoc(labels[old], together[old]) < 0.8
        for rows in (young, old):
            assert pointwise.pcoc(labels[rows], apart[rows]) == pytest.approx(1, abs=0.01)
        assert np.abs(apart - true_ctr).mean() < 0.2 * np.abs(together - true_ctr).mean()


def test_shares_are_effective_rows_over_effective_rows_plus_shrinkage_by_hand():
    # Young: weights 1, 1, 2: (1 + 1 + 2)^2 / (1 + 1 + 4) = 2.667 effective rows, share 2.667 / (2.667 + 4) = .4. Old:
    # one row of weight 0, so only clicks count: share 0. Unknown: no rows.
    group_ids = np.array([1, 1, 1, 2, 2, 2])
    labels = np.array([0.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    weights = np.array([1.0, 1.0, 2.0, 1.0, 1.0, 0.0])
    logits = np.array([-1.0, 0.0, 1.0, 0.5, 1.5, -0.5])
    calibration = fit_by_age("platt", logits, labels, group_ids, shrinkage_rows=4, weights=weights)
    assert calibration.group_shares == (0.0, pytest.approx(0.4), 0.0)
    overall = fit("platt", logits, labels, weights)
    young = fit("platt", logits[:3], labels[:3], weights[:3])
    blend = 0.4 * young.apply(logits[:3]) + 0.6 * overall.apply(logits[:3])
    np.testing.assert_allclose(
        calibration.apply(logits, group_ids), np.concatenate([blend, overall.apply(logits[3:])]), rtol=1e-6
    )


@pytest.mark.parametrize("method", FITTED_METHODS)
def test_no_shrinkage_trusts_each_group_and_endless_shrinkage_none(method):
    logits, labels = simulated_rows(600)
    group_ids = np.arange(600) % 3
    alone = fit_by_age(method, logits, labels, group_ids, shrinkage_rows=0.0)
    together = fit_by_age(method, logits, labels, group_ids, shrinkage_rows=1e300)
    overall = fit(method, logits, labels).apply(logits)
    for index in range(3):
        rows = group_ids == index
        own = fit(method, logits[rows], labels[rows]).apply(logits[rows])
        np.testing.assert_allclose(alone.apply(logits, group_ids)[rows], own, rtol=1e-12)
        np.testing.assert_allclose(together.apply(logits, group_ids)[rows], overall[rows], rtol=1e-12)
        assert np.abs(own - overall[rows]).max() > 0.001


@pytest.fixture(params=[(method, grouped) for method in FITTED_METHODS for grouped in (False, True)], scope="module")
def calibration(request):
    """Every kind of calibration, fitted on float32 logits of which some are huge."""
    method, grouped = request.param
    logits, labels = simulated_rows(3000)
    logits[:20] = np.linspace(-1e3, 1e3, 20)
    logits = logits.astype(np.float32)
    if not grouped:
        return fit(method, logits, labels)
    group_ids = np.random.default_rng(1).choice(3, len(logits), p=[0.0, 0.3, 0.7])
    return fit_by_age(method, logits, labels, group_ids, shrinkage_rows=500)


def layer_ctr(calibration, logits, group_ids=None):
    features = {} if group_ids is None else {"age": tf.constant(group_ids, tf.int64)}
    return CalibrationLayer(calibration)(tf.constant(logits, tf.float32), features).numpy()


def served_rows():
    """Logits that the fit has seen and others, to the ends of float32's use, with group ids."""
    fitted, _ = simulated_rows(3000)
    logits = np.concatenate([fitted, np.linspace(-30, 30, 2001), [-1e3, 1e3, 0.0]]).astype(np.float32)
    return logits, np.arange(len(logits)) % 3


def test_the_dict_survives_json(calibration):
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration


def test_the_graph_equals_numpy(calibration):
    logits, group_ids = served_rows()
    received = layer_ctr(calibration, logits, group_ids)
    assert received.dtype == np.float32
    assert np.isfinite(received).all()
    np.testing.assert_allclose(received, calibration.apply(logits, group_ids), atol=1e-6)


def test_the_saved_graph_has_no_variables_and_takes_any_batch_size(calibration, tmp_path):
    layer = CalibrationLayer(calibration)
    specs = {"logits": tf.TensorSpec([None], tf.float32), "age": tf.TensorSpec([None], tf.int64)}
    module = tf.Module()
    module.predict = tf.function(lambda logits, age: layer(logits, {"age": age}))
    tf.saved_model.save(module, str(tmp_path), signatures=module.predict.get_concrete_function(**specs))
    assert layer.variables == []
    loaded = tf.saved_model.load(str(tmp_path))
    assert list(loaded.signatures["serving_default"].variables) == []
    logits, group_ids = served_rows()
    for rows in (slice(None), slice(0, 1), slice(0, 0)):
        received = loaded.predict(tf.constant(logits[rows]), tf.constant(group_ids[rows]))
        assert received.shape == logits[rows].shape
        np.testing.assert_allclose(received, calibration.apply(logits[rows], group_ids[rows]), atol=1e-6)


def test_the_layer_survives_its_config(calibration):
    layer = CalibrationLayer(calibration)
    logits, group_ids = served_rows()
    features = {"age": tf.constant(group_ids)}
    again = CalibrationLayer.from_config(json.loads(json.dumps(layer.get_config())))
    np.testing.assert_array_equal(again(logits, features), layer(logits, features))


def test_the_graph_finds_steps_that_are_narrower_than_float32():
    # Both curves jump within 1e-9 of ctr .5, where float32 has nothing between .5 and .50000006.
    curves = tuple(IsotonicCurve((0.2, 0.5, 0.5 + gap, 0.8), (0.1, 0.1, 0.9, 0.9)) for gap in (1e-9, 2e-9))
    calibration = Calibration("isotonic", curves[0], GroupInput("age", ("unknown", "young")), curves, (1.0, 1.0))
    logits, group_ids = np.float32([0.0, 2e-9, 6e-9, 6e-9, 1.0]), np.array([0, 0, 0, 1, 1])
    # 6e-9 is ctr .5 + 1.5e-9: past the first jump, three quarters up the second.
    expected = [0.1, 0.1 + 0.8 * 0.5, 0.9, 0.1 + 0.8 * 0.75, 0.9]
    np.testing.assert_allclose(calibration.apply(logits, group_ids), expected, atol=1e-6)
    np.testing.assert_allclose(layer_ctr(calibration, logits, group_ids), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "weights", "message"),
    [
        ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0], "Received: 0 clicks among 3 rows. Give the validation split more rows"),
        ([1.0, 1.0, 0.0], [1.0, 1.0, 0.0], "Received: 2 clicks among 2 rows"),
        ([1.0, 0.0], [1.0, 1.0, 1.0], "Received: 3, 2 and 3"),
    ],
)
@pytest.mark.parametrize("method", FITTED_METHODS)
def test_rows_that_cannot_be_fitted_are_refused(method, labels, weights, message):
    with pytest.raises(ValueError, match=message):
        fit(method, np.zeros(3), np.array(labels), np.array(weights))


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="Received: 2 of 3 rows are not"):
        fit("isotonic", np.array([np.nan, np.inf, 1.0]), np.array([0.0, 1.0, 1.0]))


def test_another_group_than_the_configured_one_is_refused():
    logits, labels = np.zeros(2), np.array([0.0, 1.0])
    with pytest.raises(ValueError, match="Received: None, config: 'age'"):
        fit_calibration(CalibrationConfig(user_group="age"), logits, labels, np.ones(2))
    with pytest.raises(ValueError, match="Received: 'age', config: None"):
        fit("platt", logits, labels, group_ids=np.zeros(2, int), group=AGE)


@pytest.mark.parametrize(
    ("group_ids", "message"),
    [
        (None, "each of 2 rows needs its id of user group 'age'. Received: None ids"),
        (np.array([1]), "Received: 1 ids"),
        (np.array([0, 3]), r"Received: 3. Allowed: integers in \[0, 3\)"),
        (np.array([-1, 0]), "Received: -1"),
    ],
)
def test_wrong_group_ids_are_refused(group_ids, message):
    rows = (np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match=message):
        fit_by_age("platt", *rows, group_ids, shrinkage_rows=1)
    fitted = fit_by_age("platt", *rows, np.array([0, 0]), shrinkage_rows=1)
    with pytest.raises(ValueError, match=message):
        fitted.apply(rows[0], group_ids)


def test_a_config_refuses_unknown_methods_and_negative_shrinkage():
    with pytest.raises(ValueError, match="platt"):
        CalibrationConfig(method="beta")
    with pytest.raises(ValueError, match="shrinkage_rows"):
        CalibrationConfig(shrinkage_rows=-1)
