"""CLSD behind the contract of a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from clsd_tf.methods.clsd.config import ONLINE_TEACHERS, ClsdConfig, ScoresFile
from clsd_tf.methods.method import ModelParts, TeacherRun
from clsd_tf.methods.pointwise.config import BceConfig
from clsd_tf.methods.pointwise.method import PointwiseMethod

if TYPE_CHECKING:
    from clsd_tf.methods.clsd.model import ClsdModel

_ROUNDING = 1e-9
_AD_GATE_ARCHITECTURE = ("features", "objective", "bound", "embedding_dim", "hidden_units")


class Clsd(PointwiseMethod[ClsdConfig]):
    """Clicks weighted by the teacher's scores, corrected per user group."""

    Config = ClsdConfig
    study_rows: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "clsd": {"method": {"name": "clsd"}},
        "global": {"method": {"name": "clsd", "lambda": 1.0, "mu": 0.0}},
        "local": {"method": {"name": "clsd", "lambda": 0.0, "mu": 1.0}},
        "both": {"method": {"name": "clsd", "lambda": 0.5, "mu": 0.5}},
        "literal_gate": {"method": {"name": "clsd", "lambda": 0.0, "mu": 1.0, "ad_gate": {"objective": "literal"}}},
        "raw": {
            "method": {
                "name": "clsd",
                "lambda": 1.0,
                "mu": 0.0,
                "global_weighting": "raw",
                "allow_raw": True,
                "teacher": "self",
            }
        },
    }

    def build(self, config: ClsdConfig, parts: ModelParts) -> ClsdModel:
        # Configs are read without TensorFlow.
        from clsd_tf.methods.clsd.ad_gate import AdGate
        from clsd_tf.methods.clsd.model import ClsdModel

        backbone = parts.new_backbone()
        teacher_backbone = parts.new_backbone() if config.teacher == "ema" else None
        ad_gate = AdGate(parts.inputs, config.ad_gate) if config.mu > 0 else None
        model = ClsdModel(backbone, ad_gate, config, teacher_backbone=teacher_backbone)
        model.debug_outputs(parts.example)
        return model

    def describe(self, config: ClsdConfig) -> str:
        if not config.weights_clicks:
            return super().describe(config)
        groups = ", ".join(config.ad_gate.features or ("all user groups",))
        parts = (
            (config.lambda_, f"{config.lambda_:g} from global confidence ({config.global_weighting})"),
            (config.mu, f"{config.mu:g} from local confidence ({config.local_weighting}; AdGate reads {groups})"),
            (rest := 1 - config.lambda_ - config.mu, f"{rest:g} as in ordinary training"),
        )
        used = ", ".join(text for share, text in parts if share > _ROUNDING)
        teacher = config.teacher if isinstance(config.teacher, str) else "with scores from a file"
        return (
            f"Clicks were weighted by click confidence: {used}; teacher {teacher}, weights within "
            f"[{config.min_confidence:g}, {config.max_confidence:g}]."
        )

    def limits(self, config: ClsdConfig) -> tuple[str, ...]:
        limits = ["Click confidence is a model's own prediction. Nobody has judged whether a click was meant."]
        if config.placebo != "none":
            limits.append("A control run of a study, whose confidence was spoilt on purpose. Not for serving.")
        return (*limits, *self.limits_of_rows(config))

    def teacher_runs(self, config: ClsdConfig) -> tuple[TeacherRun, ...]:
        if isinstance(config.teacher, ScoresFile):
            return (TeacherRun("scores", {}, files=(config.teacher.scores,)),)
        if config.teacher in ONLINE_TEACHERS:
            return ()
        folds = {"num_folds": config.num_folds, "fold_by": config.fold_by, "num_repeats": config.num_repeats}
        settings = folds if config.teacher == "cross_fit" else {}
        return (TeacherRun(config.teacher, settings, student=BceConfig()),)

    def check_steps(self, config: ClsdConfig, last_step: int) -> None:
        if config.resolved_loss_warmup_steps >= last_step:
            raise ValueError(
                "method.loss_warmup_steps must be below the run's number of steps, or confidence never enters the "
                f"loss. Received: {config.resolved_loss_warmup_steps}. Allowed: less than {last_step}"
            )

    def warning(self, config: ClsdConfig, max_epochs: int) -> str | None:
        return config.teacher_warning(max_epochs)

    def architecture(self, config: ClsdConfig) -> dict[str, Any]:
        content = config.model_dump(mode="json", by_alias=True)
        found = super().architecture(config)
        # Which file scores come from changes no meaning, only that they come from one.
        found["method.teacher"] = config.teacher if isinstance(config.teacher, str) else "scores"
        found["method.normalizer_momentum"] = config.normalizer_momentum
        found["method.mu > 0"] = config.mu > 0
        if config.mu > 0:
            found |= {f"method.ad_gate.{name}": content["ad_gate"][name] for name in _AD_GATE_ARCHITECTURE}
        return found

    def placebos(self, config: ClsdConfig) -> dict[str, Mapping[str, Any]]:
        """Controls for studies, see ``Method.placebos``.

        Args:
          config: settings of the treatment.

        Returns:
          ``shuffled_confidence``, which weights other clicks of the batch by the same values; where there is local
          confidence also ``permuted_groups``, which gives AdGate the profiles of other users.
        """
        if not config.weights_clicks:
            return {}
        names = ["shuffled_confidence", *(["permuted_groups"] if config.mu > 0 else [])]
        return {name: {"placebo": name} for name in names}


CLSD = Clsd()
