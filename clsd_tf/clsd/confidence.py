"""Click confidence: how much each click counts, as pure functions of teacher scores.

The paper (arXiv 2309.16322) publishes no equations; these follow its abstract, with the guards that keep
self-weighting from collapsing: weights are clipped to a positive floor and normalised over clicks. Local confidence
has mean 1 over clicks; global confidence has it before it is clipped, and less where a few scores tower over the rest.
Nothing here passes a gradient: confidence is data to the loss.
"""

from __future__ import annotations

from typing import Literal

import pydantic
import tensorflow as tf

from clsd_tf.validation import StrictModel


class ClsdConfig(StrictModel):
    """How clicks are weighted.

    Attributes:
      loss_warmup_steps: optimizer steps of ordinary BCE before confidence enters the loss, >= 0.
      teacher: ``self``: the model's own prediction in the same forward pass, meant for one pass over the data.
        ``cross_fit``: out-of-fold scores, for several epochs.
      lambda_: share of global confidence, in [0, 1]; ``lambda`` in YAML and on the command line.
      mu: share of local confidence (corrected by AdGate), in [0, 1]; lambda + mu <= 1, the rest is plain BCE.
      min_confidence: lower clip, > 0.
      max_confidence: upper clip.
      num_folds: folds of the ``cross_fit`` teacher, >= 2.
    """

    loss_warmup_steps: int = pydantic.Field(100, ge=0)
    teacher: Literal["self", "cross_fit"] = "cross_fit"
    lambda_: float = pydantic.Field(0.5, ge=0, le=1, alias="lambda")
    mu: float = pydantic.Field(0.5, ge=0, le=1)
    min_confidence: float = pydantic.Field(0.05, gt=0)
    max_confidence: float = pydantic.Field(3.0, gt=0)
    num_folds: int = pydantic.Field(5, ge=2)

    @pydantic.model_validator(mode="after")
    def _check(self) -> ClsdConfig:
        if self.lambda_ + self.mu > 1:
            raise ValueError(f"lambda + mu must be at most 1. Received: {self.lambda_:g} + {self.mu:g}")
        if self.min_confidence >= self.max_confidence:
            raise ValueError(
                "min_confidence must be below max_confidence. "
                f"Received: {self.min_confidence:g} and {self.max_confidence:g}"
            )
        return self


def mean_over_clicks(values: tf.Tensor, click_weight: tf.Tensor) -> tf.Tensor:
    """sum(click_weight * values) / sum(click_weight), or 1 in a batch without clicks.

    Args:
      values: [batch].
      click_weight: labels * sample_weight, [batch].
    """
    total = tf.reduce_sum(click_weight)
    mean = tf.math.divide_no_nan(tf.reduce_sum(click_weight * values), total)
    return tf.where(total > 0, mean, 1.0)


def global_confidence(teacher_score: tf.Tensor, click_weight: tf.Tensor, config: ClsdConfig) -> tf.Tensor:
    """clip(teacher_score / mean_over_clicks(teacher_score), min_confidence, max_confidence).

    Args:
      teacher_score: estimated click probability, [batch], in [0, 1].
      click_weight: labels * sample_weight, [batch].
      config: the clip range.

    Returns:
      [batch], mean 1 over clicks before clipping.
    """
    ratio = tf.math.divide_no_nan(teacher_score, mean_over_clicks(teacher_score, click_weight))
    return tf.stop_gradient(tf.clip_by_value(ratio, config.min_confidence, config.max_confidence))


def local_confidence(
    teacher_score: tf.Tensor, correction: tf.Tensor, click_weight: tf.Tensor, config: ClsdConfig
) -> tf.Tensor:
    """clip(teacher_score + correction, ...) / its mean over clicks.

    With AdGate's correction at its optimum, 1 - E[teacher_score | click, group], this is 1 + (teacher_score - group
    mean): every user group keeps mean confidence 1.

    Args:
      teacher_score: [batch], in [0, 1].
      correction: AdGate's output, [batch].
      click_weight: labels * sample_weight, [batch].
      config: the clip range.

    Returns:
      [batch], mean 1 over clicks.
    """
    clipped = tf.clip_by_value(teacher_score + correction, config.min_confidence, config.max_confidence)
    return tf.stop_gradient(clipped / mean_over_clicks(clipped, click_weight))


def mixed_confidence(
    labels: tf.Tensor, global_part: tf.Tensor, local_part: tf.Tensor, lambda_: tf.Tensor, mu: tf.Tensor
) -> tf.Tensor:
    """(1 - lambda - mu) + lambda * global_part + mu * local_part for clicks, 1 for the rest.

    With lambda = mu = 0 this is 1 everywhere, and the weighted loss is BCE.
    """
    for_clicks = (1.0 - lambda_ - mu) + lambda_ * global_part + mu * local_part
    return tf.where(labels > 0.5, for_clicks, tf.ones_like(for_clicks))
