"""Post-hoc calibration of ctr: fitted on the validation split in NumPy, applied inside the TensorFlow graph.

Weighting clicks moves mean predictions; the curves of this room move them back and keep the ranking. Both sides compute
in float64: a step of an isotonic curve may be narrower than float32 can tell apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import tensorflow as tf
from scipy.optimize import brentq
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from clsd_tf.layers.calibration_config import CalibrationConfig
from clsd_tf.spec.model_inputs import GroupInput

Array = np.ndarray

_MIN_SPREAD = 1e-3  # Of slope * logits, as a standard deviation: below it float32 predictions fall together.
_MIN_CTR = 1e-6  # An isotonic block without clicks has ctr 0, whose log loss is infinite.


@dataclasses.dataclass(frozen=True)
class PlattCurve:
    """ctr = sigmoid(slope * logits + intercept), slope > 0.

    Source: Platt (1999), "Probabilistic outputs for support vector machines", section 2, without smoothed targets.
    """

    slope: float
    intercept: float

    def __call__(self, logits: Array) -> Array:
        return expit(self.slope * logits + self.intercept)


@dataclasses.dataclass(frozen=True)
class IsotonicCurve:
    """Linear interpolation of ``values`` over ``knots`` at sigmoid(logits); constant beyond the first and last knot.

    Attributes:
      knots: uncalibrated ctr, rising, at the corners of the curve.
      values: calibrated ctr at the knots, non-decreasing, in [1e-6, 1 - 1e-6].

    Source: Zadrozny and Elkan (2002), "Transforming classifier scores into accurate multiclass probability estimates".
    """

    knots: tuple[float, ...]
    values: tuple[float, ...]

    def __call__(self, logits: Array) -> Array:
        return np.interp(expit(logits), self.knots, self.values)


Curve = PlattCurve | IsotonicCurve
_CURVES = {"none": PlattCurve, "platt": PlattCurve, "isotonic": IsotonicCurve}


@dataclasses.dataclass(frozen=True)
class Calibration:
    """ctr = share_g * curve_g(logits) + (1 - share_g) * overall(logits) in user group g.

    Within a group a higher logit never gets a lower ctr; between groups the order may change, which is the purpose.

    Attributes:
      method: of all curves.
      overall: the curve fitted on all rows.
      group: the user group, None without one.
      group_curves: per label of ``group``.
      group_shares: per label of ``group``, in [0, 1].
    """

    method: Literal["none", "platt", "isotonic"]
    overall: Curve
    group: GroupInput | None = None
    group_curves: tuple[Curve, ...] = ()
    group_shares: tuple[float, ...] = ()

    def apply(self, logits: Array, group_ids: Array | None = None) -> Array:
        """Calibrates ctr.

        Args:
          logits: [num_rows], finite.
          group_ids: [num_rows], in [0, number of labels); needed with a user group, else not read.

        Returns:
          float64 [num_rows].

        Raises:
          ValueError: the user group's ids are missing, too few or out of range.
        """
        logits = np.asarray(logits, np.float64)
        ctr = self.overall(logits)
        if self.group is None:
            return ctr
        group_ids = _checked_ids(group_ids, self.group, len(logits))
        for index, (curve, share) in enumerate(zip(self.group_curves, self.group_shares, strict=True)):
            rows = group_ids == index
            ctr[rows] = share * curve(logits[rows]) + (1 - share) * ctr[rows]
        return ctr

    def to_dict(self) -> dict[str, Any]:
        """Returns what ``from_dict`` takes, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Calibration:
        """Returns the calibration whose ``to_dict`` gave ``value``."""

        def curve(entry: Mapping[str, Any]) -> Curve:
            return _CURVES[value["method"]](
                **{key: tuple(found) if isinstance(found, list) else found for key, found in entry.items()}
            )

        group = value["group"]
        return cls(
            method=value["method"],
            overall=curve(value["overall"]),
            group=None if group is None else GroupInput(group["name"], tuple(group["labels"])),
            group_curves=tuple(curve(entry) for entry in value["group_curves"]),
            group_shares=tuple(value["group_shares"]),
        )


def fit_calibration(
    config: CalibrationConfig,
    logits: Array,
    labels: Array,
    weights: Array,
    group_ids: Array | None = None,
    group: GroupInput | None = None,
) -> Calibration:
    """Fits ``config.method`` on all rows and, with a user group, on the rows of each group.

    share_g = effective_rows_g / (effective_rows_g + shrinkage_rows), effective_rows = sum(weights)^2 / sum(weights^2):
    credibility weights (Bühlmann 1967) of Kish's effective sample size (Kish 1965). A group whose labels are all equal
    has share 0.

    Args:
      config: method, user group and shrinkage; ``none`` reads no rows.
      logits: [num_rows], of rows that the model was not trained on.
      labels: 0/1, [num_rows].
      weights: sample weights, >= 0, [num_rows]; rows of weight 0 do not count.
      group_ids: ids of ``config.user_group``, [num_rows].
      group: the input of that name.

    Returns:
      The overall curve and, with a user group, a curve and a share for each of its labels.

    Raises:
      ValueError: the columns do not fit each other, a logit is not finite, all labels are equal, or ``group`` is not
        the user group of ``config``.
    """
    if config.method == "none":
        return Calibration("none", PlattCurve(1.0, 0.0))
    logits, labels, weights = (np.asarray(column, np.float64) for column in (logits, labels, weights))
    _check_rows(logits, labels, weights)
    _check_group(config, group)
    kept = weights > 0
    overall = _fit(config.method, logits[kept], labels[kept], weights[kept])
    if group is None:
        return Calibration(config.method, overall)
    group_ids = _checked_ids(group_ids, group, len(logits))
    curves, shares = [], []
    for index in range(len(group.labels)):
        rows = kept & (group_ids == index)
        mixed = len(np.unique(labels[rows])) > 1
        curves.append(_fit(config.method, logits[rows], labels[rows], weights[rows]) if mixed else overall)
        shares.append(_share(weights[rows], config.shrinkage_rows) if mixed else 0.0)
    return Calibration(config.method, overall, group, tuple(curves), tuple(shares))


def _fit(method: str, logits: Array, labels: Array, weights: Array) -> Curve:
    fits: dict[str, Callable[[Array, Array, Array], Curve]] = {"platt": _fit_platt, "isotonic": _fit_isotonic}
    return fits[method](
        logits, labels, weights / weights.mean()
    )  # The scale of the weights must not matter to the ridge.


def _fit_platt(logits: Array, labels: Array, weights: Array) -> PlattCurve:
    """Maximum likelihood, so that mean ctr equals the click rate; a tiny ridge keeps separable rows finite.

    slope * sd(logits) below 0.001 says that rows of higher logits are not clicked more. Such a curve would reverse or
    erase the ranking: the slope is then 1 and only the intercept is fitted; mean ctr still equals the click rate.
    """
    center, scale = logits.mean(), logits.std() or 1.0  # Standardized logits keep the Hessian well conditioned.
    model = LogisticRegression(C=1e9, solver="newton-cholesky", tol=1e-10)
    model.fit(((logits - center) / scale)[:, np.newaxis], labels, weights)
    if model.coef_[0, 0] < _MIN_SPREAD:
        return _fit_intercept(logits, labels, weights)
    slope = float(model.coef_[0, 0] / scale)
    return PlattCurve(slope, float(model.intercept_[0] - slope * center))


def _fit_intercept(logits: Array, labels: Array, weights: Array) -> PlattCurve:
    click_rate = np.average(labels, weights=weights)
    log_odds = np.log(click_rate) - np.log1p(-click_rate)

    def excess(intercept: float) -> float:
        return float(np.average(expit(logits + intercept), weights=weights) - click_rate)

    # With the first intercept no row is above the click rate, with the second none below; 1 is room for rounding.
    return PlattCurve(1.0, float(brentq(excess, log_odds - logits.max() - 1, log_odds - logits.min() + 1)))


def _fit_isotonic(logits: Array, labels: Array, weights: Array) -> IsotonicCurve:
    model = IsotonicRegression(y_min=_MIN_CTR, y_max=1 - _MIN_CTR, out_of_bounds="clip")
    model.fit(expit(logits), labels, weights)
    # scikit-learn keeps the corners only: a point between two of equal value is left out.
    return IsotonicCurve(tuple(model.X_thresholds_.tolist()), tuple(model.y_thresholds_.tolist()))


def _share(weights: Array, shrinkage_rows: float) -> float:
    effective_rows = weights.sum() ** 2 / (weights**2).sum()
    return float(effective_rows / (effective_rows + shrinkage_rows))


def _check_rows(logits: Array, labels: Array, weights: Array) -> None:
    if not len(logits) == len(labels) == len(weights):
        raise ValueError(
            f"logits, labels and weights need equal lengths. Received: {len(logits)}, {len(labels)} and {len(weights)}"
        )
    if not np.isfinite(logits).all():
        raise ValueError(
            f"calibration needs finite logits. Received: {(~np.isfinite(logits)).sum()} of {len(logits)} rows are not. "
            "The model has diverged: train it with a lower learning rate"
        )
    counting = labels[weights > 0]
    if len(np.unique(counting)) < 2:
        raise ValueError(
            "calibration needs rows with and without a click, of weight above 0. "
            f"Received: {int(counting.sum())} clicks among {len(counting)} rows. "
            "Give the validation split more rows, or set the method to none"
        )


def _check_group(config: CalibrationConfig, group: GroupInput | None) -> None:
    name = None if group is None else group.name
    if name != config.user_group:
        raise ValueError(
            f"the group must be the one that the config names. Received: {name!r}, config: {config.user_group!r}"
        )


def _checked_ids(group_ids: Array | None, group: GroupInput, num_rows: int) -> Array:
    received = None if group_ids is None else len(group_ids)
    if received != num_rows:
        raise ValueError(f"each of {num_rows} rows needs its id of user group {group.name!r}. Received: {received} ids")
    group_ids = np.asarray(group_ids)
    wrong = group_ids[(group_ids < 0) | (group_ids >= len(group.labels))]
    if len(wrong):
        raise ValueError(
            f"ids of user group {group.name!r} are out of range. Received: {wrong[0]}. "
            f"Allowed: integers in [0, {len(group.labels)})"
        )
    return group_ids


class CalibrationLayer(tf.keras.layers.Layer):
    """``Calibration.apply`` as graph constants: no variables, nothing to train.

    Args:
      calibration: the fitted curves.

    Returns:
      ``call(logits, features)`` maps float32 [batch] to ctr, float32 [batch], equal to ``Calibration.apply`` within
      1e-6; ``features`` must hold the ids of ``calibration.group``, integers [batch], if there is one.
    """

    def __init__(self, calibration: Calibration, name: str = "calibration", **kwargs: Any):
        super().__init__(name=name, dtype="float32", **kwargs)
        self.calibration = calibration

    def call(self, logits: tf.Tensor, features: Mapping[str, tf.Tensor]) -> tf.Tensor:
        fitted = self.calibration
        logits = tf.cast(logits, tf.float64)
        ctr = _evaluate([fitted.overall], tf.zeros_like(logits, tf.int32), logits)
        if fitted.group is not None:
            group_ids = tf.cast(features[fitted.group.name], tf.int32)
            share = tf.gather(tf.constant(fitted.group_shares, tf.float64), group_ids)
            ctr = share * _evaluate(fitted.group_curves, group_ids, logits) + (1 - share) * ctr
        return tf.cast(ctr, tf.float32)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "calibration": self.calibration.to_dict()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CalibrationLayer:
        calibration = Calibration.from_dict(config["calibration"])
        return cls(**{**{key: value for key, value in config.items() if key != "dtype"}, "calibration": calibration})


def _evaluate(curves: Sequence[Curve], curve_ids: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """``curves[curve_ids[i]]`` at ``logits[i]``: int32 and float64 [batch] -> float64 [batch]."""
    isotonic = [curve for curve in curves if isinstance(curve, IsotonicCurve)]  # All of them, or none.
    if isotonic:
        return _interpolate(isotonic, curve_ids, tf.sigmoid(logits))
    platt = [curve for curve in curves if isinstance(curve, PlattCurve)]
    slopes = tf.gather(tf.constant([curve.slope for curve in platt], tf.float64), curve_ids)
    intercepts = tf.gather(tf.constant([curve.intercept for curve in platt], tf.float64), curve_ids)
    return tf.sigmoid(slopes * logits + intercepts)


def _interpolate(curves: Sequence[IsotonicCurve], curve_ids: tf.Tensor, ctr: tf.Tensor) -> tf.Tensor:
    """Evaluates all curves over the union of their knots, which leaves each as it is: one search serves every group."""
    # 0 and 1 close the table, so that every ctr lies between two knots; 1 itself counts to the last interval.
    knots = np.unique(np.concatenate([[0.0, 1.0], *(curve.knots for curve in curves)]))
    values = tf.constant(np.stack([np.interp(knots, curve.knots, curve.values) for curve in curves]))
    right = tf.minimum(tf.searchsorted(knots, ctr, side="right"), len(knots) - 1)
    left_knot, right_knot = tf.gather(knots, right - 1), tf.gather(knots, right)
    left_value = tf.gather_nd(values, tf.stack([curve_ids, right - 1], axis=1))
    right_value = tf.gather_nd(values, tf.stack([curve_ids, right], axis=1))
    return left_value + (ctr - left_knot) / (right_knot - left_knot) * (right_value - left_value)
