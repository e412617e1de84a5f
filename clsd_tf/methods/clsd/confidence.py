"""Click confidence: how much each click counts, as pure functions of teacher scores.

The paper (arXiv 2309.16322) publishes no equations; these follow its abstract, with the guards that keep
self-weighting from collapsing: a positive floor, and mean 1 over clicks. Nothing here passes a gradient: confidence is
data to the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import tensorflow as tf

from clsd_tf.distributed.replicas import SAME_EVERYWHERE, sum_over_replicas
from clsd_tf.methods.clsd.config import WEIGHTING_FUNCTIONS, ClsdConfig

_SMALLEST_REFERENCE = 1e-3


def mean_one(score: tf.Tensor, reference: tf.Tensor, spread: tf.Tensor, kappa: float) -> tf.Tensor:
    """score / reference.

    Args:
      score: of the teacher, [batch], in [0, 1].
      reference: its mean over clicks, or over those of the row's user group, [batch] or scalar.
      spread: its standard deviation around the reference over clicks, scalar; does not enter.
      kappa: strength, > 0; does not enter.

    Returns:
      [batch], before it is clipped and normalized.
    """
    return score / tf.maximum(reference, _SMALLEST_REFERENCE)


def ratio(score: tf.Tensor, reference: tf.Tensor, spread: tf.Tensor, kappa: float) -> tf.Tensor:
    """(score / reference)^kappa: the same factor everywhere for the same relative difference.

    Args:
      score: as of ``mean_one``.
      reference: as of ``mean_one``.
      spread: does not enter.
      kappa: strength, > 0.

    Returns:
      [batch], before it is clipped and normalized.
    """
    return tf.pow(mean_one(score, reference, spread, kappa), kappa)


def additive(score: tf.Tensor, reference: tf.Tensor, spread: tf.Tensor, kappa: float) -> tf.Tensor:
    """1 + kappa * (score - reference): with kappa = 1 and a converged AdGate, score + correction.

    Args:
      score: as of ``mean_one``.
      reference: as of ``mean_one``.
      spread: does not enter.
      kappa: strength, > 0.

    Returns:
      [batch], before it is clipped and normalized.
    """
    return 1.0 + kappa * (score - reference)


def standardized(score: tf.Tensor, reference: tf.Tensor, spread: tf.Tensor, kappa: float) -> tf.Tensor:
    """1 + kappa * (score - reference) / spread: of a strength that does not depend on the click rate.

    Args:
      score: as of ``mean_one``.
      reference: as of ``mean_one``.
      spread: as of ``mean_one``; where it is 0, so is the difference.
      kappa: strength, > 0.

    Returns:
      [batch], before it is clipped and normalized.
    """
    return 1.0 + kappa * tf.math.divide_no_nan(score - reference, spread)


def raw(score: tf.Tensor, reference: tf.Tensor, spread: tf.Tensor, kappa: float) -> tf.Tensor:
    """score itself: the trap. Where the click rate is below one half, the fixed point of training is ctr = 0.

    Args:
      score: as of ``mean_one``.
      reference: does not enter.
      spread: does not enter.
      kappa: does not enter.

    Returns:
      The scores, [batch].
    """
    return score


@dataclasses.dataclass(frozen=True)
class WeightingFunction:
    """Confidence of a click before it is clipped and normalized.

    One of your own is registered under a name, by which configs call it:
    ``WEIGHTING_FUNCTIONS.register("mine")(WeightingFunction(my_function))``.

    Attributes:
      function: of teacher_score [batch], its mean over clicks (all of them, or those of the row's user group, [batch]
        or scalar), its standard deviation around that mean over clicks (scalar), and kappa -> [batch].
      needs_spread: whether the standard deviation is computed; it is 1 otherwise.
      is_normalized: whether the result is clipped and divided by its mean over clicks.
    """

    function: Callable[[tf.Tensor, tf.Tensor, tf.Tensor, float], tf.Tensor]
    needs_spread: bool = False
    is_normalized: bool = True


MEAN_ONE = WeightingFunction(mean_one)
RATIO = WeightingFunction(ratio)
ADDITIVE = WeightingFunction(additive)
STANDARDIZED = WeightingFunction(standardized, needs_spread=True)
RAW = WeightingFunction(raw, is_normalized=False)  # The trap as it stands in the literature.


class ClickMeans(tf.Module):
    """Means over clicks: of the batch (momentum 0), or moving ones, sums of which decay by ``momentum`` per step.

    A mean is sum(click_weight * values) / sum(click_weight), and 1 as long as no click was seen. Each name is a mean of
    its own. The batch is the global one: replicas that share it see the same means.
    """

    NAMES = ("score", "global_variance", "global", "local_variance", "local")

    def __init__(self, momentum: float):
        super().__init__()
        self._momentum = momentum
        names = self.NAMES if momentum else ()
        self._sums = {
            name: tf.Variable([0.0, 0.0], trainable=False, name=f"{name}_sums", **SAME_EVERYWHERE) for name in names
        }

    def __call__(self, values: Mapping[str, tf.Tensor], click_weight: tf.Tensor) -> dict[str, tf.Tensor]:
        """Name -> [batch], to name -> mean; together, since replicas wait for each other once per call."""
        if not values:
            return {}
        total = tf.reduce_sum(click_weight)
        sums = {name: tf.stack([tf.tensordot(click_weight, value, 1), total]) for name, value in values.items()}
        return {name: self._mean(name, of_batch) for name, of_batch in sum_over_replicas(sums).items()}

    def _mean(self, name: str, sums: tf.Tensor) -> tf.Tensor:
        if self._momentum:
            sums = self._sums[name].assign(self._momentum * self._sums[name] + sums)
        return tf.where(sums[1] > 0, tf.math.divide_no_nan(sums[0], sums[1]), 1.0)


def global_confidence(
    teacher_score: tf.Tensor, click_weight: tf.Tensor, config: ClsdConfig, means: ClickMeans
) -> tf.Tensor:
    """weighting function(teacher_score, mean of teacher_score over clicks, ...), clipped and normalized.

    Args:
      teacher_score: estimated click probability, [batch], in [0, 1].
      click_weight: labels * sample_weight, [batch].
      config: weighting function, strength and clip range.
      means: of the batch, or moving ones.

    Returns:
      [batch], in [min_confidence, max_confidence], with mean 1 over clicks (a little off where clipping bites twice).
    """
    references = {"global": mean_score(teacher_score, click_weight, means)}
    return confidences(references, teacher_score, click_weight, config, means)["global"]


def mean_score(teacher_score: tf.Tensor, click_weight: tf.Tensor, means: ClickMeans) -> tf.Tensor:
    """Computes the reference of global confidence: the mean of teacher_score over clicks.

    Args:
      teacher_score: [batch], in [0, 1].
      click_weight: labels * sample_weight, [batch].
      means: of the batch, or moving ones.

    Returns:
      Scalar; 1 as long as no click was seen.
    """
    return means({"score": teacher_score}, click_weight)["score"]


def local_confidence(
    teacher_score: tf.Tensor, correction: tf.Tensor, click_weight: tf.Tensor, config: ClsdConfig, means: ClickMeans
) -> tf.Tensor:
    """weighting function(teacher_score, 1 - correction, ...), clipped and normalized.

    AdGate's correction is 1 - E[teacher_score | click, group] at its optimum. There ``additive`` is teacher_score +
    correction, the paper's form, and every user group keeps mean confidence 1; so it does with ``mean_one``.

    Args:
      teacher_score: [batch], in [0, 1].
      correction: AdGate's output, [batch].
      click_weight: labels * sample_weight, [batch].
      config: weighting function, strength and clip range.
      means: of the batch, or moving ones.

    Returns:
      As ``global_confidence``.
    """
    return confidences({"local": 1.0 - correction}, teacher_score, click_weight, config, means)["local"]


def confidences(
    references: Mapping[str, tf.Tensor],
    score: tf.Tensor,
    click_weight: tf.Tensor,
    config: ClsdConfig,
    means: ClickMeans,
) -> dict[str, tf.Tensor]:
    """Computes global and local confidence together, with shared means.

    Args:
      references: of ``global`` and ``local`` those that are wanted: mean teacher score over clicks, [batch] or scalar.
      score: of the teacher, [batch], in [0, 1].
      click_weight: labels * sample_weight, [batch].
      config: weighting functions, strength and clip range.
      means: of the batch, or moving ones.

    Returns:
      Name in ``references`` -> confidence, [batch], as of ``global_confidence``.
    """
    weightings = {
        part: WEIGHTING_FUNCTIONS[config.global_weighting if part == "global" else config.local_weighting]
        for part in references
    }
    squares = {
        f"{part}_variance": tf.square(score - references[part])
        for part, weighting in weightings.items()
        if weighting.needs_spread
    }
    spreads = {name: tf.sqrt(variance) for name, variance in means(squares, click_weight).items()}
    weights = {
        part: weighting.function(
            score, references[part], spreads.get(f"{part}_variance", tf.constant(1.0)), config.kappa
        )
        for part, weighting in weightings.items()
    }
    clipped = {part: _clip(weights[part], config) for part in weights if weightings[part].is_normalized}
    # Clipped again, since dividing moves the ends of the range.
    normalized = {part: _clip(clipped[part] / mean, config) for part, mean in means(clipped, click_weight).items()}
    return {part: tf.stop_gradient(normalized.get(part, weights[part])) for part in references}


def _clip(confidence: tf.Tensor, config: ClsdConfig) -> tf.Tensor:
    return tf.clip_by_value(confidence, config.min_confidence, config.max_confidence)


def mixed_confidence(
    labels: tf.Tensor, global_part: tf.Tensor, local_part: tf.Tensor, lambda_: tf.Tensor, mu: tf.Tensor
) -> tf.Tensor:
    """(1 - lambda - mu) + lambda * global_part + mu * local_part for clicks, 1 for the rest.

    With lambda = mu = 0 this is 1 everywhere, and the weighted loss is the ordinary one.

    Args:
      labels: 0 or 1, float [batch].
      global_part: global confidence, [batch].
      local_part: local confidence, [batch].
      lambda_: share of the global part, scalar in [0, 1].
      mu: share of the local part, scalar in [0, 1 - lambda].

    Returns:
      [batch], without gradient.
    """
    for_clicks = (1.0 - lambda_ - mu) + lambda_ * global_part + mu * local_part
    return tf.where(labels > 0.5, for_clicks, tf.ones_like(for_clicks))


def shuffled_among_clicks(confidence: tf.Tensor, click_weight: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """The placebo: confidence of the batch's clicks dealt out among them at random.

    Args:
      confidence: [batch].
      click_weight: labels * sample_weight, 0 for clicks without a teacher score, [batch].
      seed: int64 [2], a new one per step.

    Returns:
      [batch]: the same values over the clicks that count, in another order; all other rows keep theirs.
    """
    clicks = tf.where(click_weight > 0)
    dealt = tf.random.experimental.stateless_shuffle(tf.gather_nd(confidence, clicks), seed=seed)
    return tf.tensor_scatter_nd_update(confidence, clicks, dealt)
