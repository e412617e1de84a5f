"""Settings of click-confidence learning, checked where they enter."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from clsd_tf.methods.method import MethodWarning
from clsd_tf.methods.pointwise.config import PointwiseConfig
from clsd_tf.methods.teachers import TEACHERS
from clsd_tf.plugins.registry import Registry
from clsd_tf.spec.validation import StrictModel

# Name -> ``clsd_tf.methods.clsd.confidence.WeightingFunction``.
WEIGHTING_FUNCTIONS = Registry(
    "weighting function",
    {
        name: f"clsd_tf.methods.clsd.confidence:{name.upper()}"
        for name in ("mean_one", "ratio", "additive", "standardized", "raw")
    },
)
_ONLINE_WARMUP_STEPS = 100
_FROM_FILE = "scores"
ONLINE_TEACHERS = ("self", "ema")  # Score a row in the training step; the others score all rows before it.


class OverconfidentTeacherWarning(MethodWarning):
    """The teacher judges clicks that it was trained on."""


class AdGateConfig(StrictModel):
    """The local correction.

    Attributes:
      features: names of user groups and of user-profile features that it reads; all user groups by default.
      objective: ``residual`` fits 1 - teacher_score on clicks, the recommended one. ``literal`` is trained by the loss
        that it weights, within ``[-bound, bound]``: it ends at -bound for every group, and is here for comparison.
      bound: of ``literal``, > 0.
      embedding_dim: size of each id's embedding.
      hidden_units: units of the hidden layers.
      learning_rate: of its own Adam.
    """

    features: tuple[str, ...] | None = pydantic.Field(None, min_length=1)
    objective: Literal["residual", "literal"] = "residual"
    bound: float = pydantic.Field(0.3, gt=0)
    embedding_dim: int = pydantic.Field(8, ge=1)
    hidden_units: tuple[Annotated[int, pydantic.Field(ge=1)], ...] = (16,)
    learning_rate: float = pydantic.Field(1e-2, gt=0)


class GuardConfig(StrictModel):
    """When training stops because confidence has gone wrong. Each is a mean over about the last 50 steps.

    Attributes:
      min_ctr_ratio: mean ctr / mean ctr at the end of loss warm-up (without one: / click rate) must not fall below.
      min_effective_click_share: effective sample size of the clicks, (sum w)^2 / sum w^2, over their number.
      max_ad_gate_drift: |mean correction - (1 - mean teacher_score)| over clicks; 0 at the optimum of the ``residual``
        objective, and not looked at with the other.
    """

    min_ctr_ratio: float = pydantic.Field(0.5, ge=0, lt=1)
    min_effective_click_share: float = pydantic.Field(0.2, ge=0, lt=1)
    max_ad_gate_drift: float = pydantic.Field(1.0, gt=0)


class ScoresFile(StrictModel):
    """Teacher scores from anywhere.

    Attributes:
      scores: Parquet file with a row for each training row: ``row_id``, int64, as in the records, and ``score``, a
        float in [0, 1]. Where it is missing (NaN or null), a click counts 1.
    """

    scores: str


class ClsdConfig(PointwiseConfig):
    """Settings of click confidence.

    By default each click counts 1 + teacher_score - the mean teacher_score over the clicks of its user group, which
    leaves the mean of every user group at 1. ``lambda = 1, mu = 0`` compares with all clicks instead.

    Attributes:
      loss_warmup_steps: optimizer steps of the ordinary loss before confidence enters it, >= 0. By default 100 where
        the teacher is the model itself, and 0 where its scores come from models that are trained already.
      teacher: where the scores come from. ``self``: the model's own prediction in the same forward pass, honest in
        one pass over the data. ``ema``: an exponential moving average of the model, likewise. ``prequential``: a model
        that had trained up to the day before. ``cross_fit``: models that never saw the row; for several epochs.
        ``{scores: file.parquet}``: scores from anywhere, see ``ScoresFile``. Or the name of a plug-in's teacher.
      ema_momentum: of the ``ema`` teacher, per step.
      num_folds: folds of the ``cross_fit`` teacher, >= 2.
      fold_by: what ``cross_fit`` keeps together: a row (with what the user saw in the same moment, since logs repeat
        events), or all rows of a user.
      num_repeats: ``cross_fit`` averages its scores over this many divisions into folds.
      lambda_: share of global confidence, in [0, 1]; ``lambda`` in YAML and on the command line.
      mu: share of local confidence (corrected by AdGate), in [0, 1]; lambda + mu <= 1, the rest is the ordinary loss.
      global_weighting: confidence as a function of teacher_score and its mean over clicks: ``mean_one``, ``ratio``,
        ``additive``, ``standardized`` or ``raw``, see ``clsd_tf.methods.clsd.confidence``, or a plug-in's.
      local_weighting: likewise, with the mean over the clicks of the user group.
      kappa: strength of ``ratio``, ``additive`` and ``standardized``, > 0.
      min_confidence: lower clip, > 0 and < 1.
      max_confidence: upper clip, > 1.
      normalizer_momentum: means over clicks are those of the batch (0) or moving ones (.95 suits small batches).
      allow_raw: lifts the refusal of ``raw``, which collapses predictions to 0.
      placebo: control runs of a study. ``shuffled_confidence`` deals confidence out among the clicks of the batch at
        random; ``permuted_groups`` gives AdGate the user features of other rows,
        drawn anew in each step: it then knows no groups. Under a strategy each replica shuffles its own rows.
      ad_gate: the local correction.
      guards: when to stop.
    """

    name: Literal["clsd"] = "clsd"
    loss_warmup_steps: int | None = pydantic.Field(None, ge=0)
    teacher: str | ScoresFile = "cross_fit"
    ema_momentum: float = pydantic.Field(0.999, gt=0, lt=1)
    num_folds: int = pydantic.Field(5, ge=2)
    fold_by: Literal["row", "user"] = "row"
    num_repeats: int = pydantic.Field(1, ge=1)
    lambda_: float = pydantic.Field(0.0, ge=0, le=1, alias="lambda")
    mu: float = pydantic.Field(1.0, ge=0, le=1)
    global_weighting: str = "ratio"
    local_weighting: str = "additive"
    kappa: float = pydantic.Field(1.0, gt=0, allow_inf_nan=False)
    min_confidence: float = pydantic.Field(0.05, gt=0, lt=1)
    max_confidence: float = pydantic.Field(3.0, gt=1)
    normalizer_momentum: float = pydantic.Field(0.0, ge=0, lt=1)
    allow_raw: bool = False
    placebo: Literal["none", "shuffled_confidence", "permuted_groups"] = "none"
    ad_gate: AdGateConfig = AdGateConfig()
    guards: GuardConfig = GuardConfig()

    @pydantic.field_validator("teacher")
    @classmethod
    def _is_known(cls, teacher: str | ScoresFile) -> str | ScoresFile:
        names = (*ONLINE_TEACHERS, *(name for name in TEACHERS if name != _FROM_FILE))
        if isinstance(teacher, str) and teacher not in names:
            raise ValueError(
                f"unknown teacher. Received: {teacher!r}. Allowed: {', '.join(names)}, {{scores: file.parquet}}; those "
                "of your own module with --plugin=<module>"
            )
        return teacher

    @pydantic.model_validator(mode="after")
    def _check(self) -> ClsdConfig:
        if self.lambda_ + self.mu > 1:
            raise ValueError(f"lambda + mu must be at most 1. Received: {self.lambda_:g} + {self.mu:g}")
        if self.placebo != "none" and self.lambda_ + self.mu == 0:
            raise ValueError(f"a placebo needs lambda + mu > 0. Received: {self.placebo}, lambda = mu = 0")
        if self.placebo == "permuted_groups" and self.mu == 0:
            raise ValueError("placebo permuted_groups needs an AdGate to mislead. Received: mu = 0. Set mu > 0")
        for weighting in (self.global_weighting, self.local_weighting):
            WEIGHTING_FUNCTIONS.require(weighting)
        if "raw" in (self.global_weighting, self.local_weighting) and not self.allow_raw:
            raise ValueError(
                "the weighting function raw drives every prediction to 0 where the click rate is below one half. "
                "Received: raw. Allowed: mean_one, ratio, additive, standardized; or allow_raw=true to see it happen"
            )
        return self

    @property
    def weights_clicks(self) -> bool:
        """True if confidence ever enters the loss."""
        return self.lambda_ + self.mu > 0

    def teacher_warning(self, num_epochs: int) -> str | None:
        """Warns of a teacher that will be overconfident after ``num_epochs`` epochs.

        Returns:
          What to tell the user, or None.
        """
        if self.teacher not in ONLINE_TEACHERS or not self.weights_clicks or num_epochs == 1:
            return None
        return (
            f"from the second epoch on, teacher={self.teacher} judges clicks that it was trained on, and is "
            f"overconfident. Received: {num_epochs} epochs. Use a cross_fit teacher, or train for one epoch"
        )

    @property
    def resolved_loss_warmup_steps(self) -> int:
        """``loss_warmup_steps``, or what it is by default."""
        if self.loss_warmup_steps is not None:
            return self.loss_warmup_steps
        return _ONLINE_WARMUP_STEPS if self.teacher in ONLINE_TEACHERS else 0
