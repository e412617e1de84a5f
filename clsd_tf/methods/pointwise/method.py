"""The part that methods of rows have in common, and ``bce``, which adds nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from clsd_tf.methods.method import Method, MethodConfig, ModelParts, Objective, Output, RowFilter
from clsd_tf.methods.pointwise.config import BceConfig, PointwiseConfig
from clsd_tf.metrics import pointwise

if TYPE_CHECKING:
    import numpy as np

    from clsd_tf.methods.pointwise.model import PointwiseModel

PointwiseT = TypeVar("PointwiseT", bound=PointwiseConfig)


class PointwiseMethod(Method[PointwiseT]):
    """A method that gives each row the probability of a click, ``ctr``."""

    Config: ClassVar[type[MethodConfig]] = PointwiseConfig
    objective = Objective(
        "auc",
        "AUC",
        missing="the validation split needs clicks and non-clicks of positive sample weight. Received: no AUC. "
        "Change the spec's split or weights",
    )

    def build(self, config: PointwiseT, parts: ModelParts) -> PointwiseModel:
        model = self.model_class()(parts.new_backbone(), config)
        model.debug_outputs(parts.example)
        return model

    def model_class(self) -> type[PointwiseModel]:
        """Returns the class that ``build`` makes of a backbone and the settings; imports TensorFlow."""
        from clsd_tf.methods.pointwise.model import PointwiseModel  # Configs are read without TensorFlow.

        return PointwiseModel

    def outputs(self, config: PointwiseT) -> tuple[Output, ...]:
        return (Output("ctr", "probability", label="label", is_calibrated=True),)

    def signatures(self, config: PointwiseT) -> tuple[str, ...]:
        return ("serving_default", "predict_raw", "classify", "regress", "rank", "debug")

    def describe(self, config: PointwiseT) -> str:
        return "Every click counted the same in training."

    def validate(self, fields: Mapping[str, np.ndarray], scores: np.ndarray) -> dict[str, float | None]:
        rows = fields["label"], scores, fields["sample_weight"]
        return {"auc": pointwise.auc(*rows), "log_loss": pointwise.log_loss(*rows)}

    def limits(self, config: PointwiseT) -> tuple[str, ...]:
        return ("Clicks by mistake count as clicks.", *self.limits_of_rows(config))

    def limits_of_rows(self, config: PointwiseT) -> tuple[str, ...]:
        """Says which rows the settings ``config`` leave out.

        Returns:
          Sentences for the model card.
        """
        if config.clicks == "all":
            return ()
        return ("Trained on intense clicks only, as an oracle for studies: ctr is not the probability of a click.",)

    def row_filter(self, config: PointwiseT) -> RowFilter | None:
        return RowFilter(("label", "intensity_label"), _is_no_weak_click) if config.clicks == "intense" else None

    def check_dataset(self, config: PointwiseT, has_intensity_label: bool) -> None:
        if config.clicks == "intense" and not has_intensity_label:
            raise ValueError(
                "method.clicks=intense needs a spec with an intensity_label. Received: none. Use clicks=all"
            )

    def architecture(self, config: PointwiseT) -> dict[str, Any]:
        return {"method": config.name}


def _is_no_weak_click(fields: Mapping[str, np.ndarray]) -> np.ndarray:
    return ~((fields["label"] > 0.5) & (fields["intensity_label"] < 0.5))


class Bce(PointwiseMethod[BceConfig]):
    """Binary cross-entropy: the baseline of every study."""

    Config = BceConfig
    study_rows: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "bce": {"method": {"name": "bce"}},
        "label_smoothing": {"method": {"name": "bce", "loss": "label_smoothing"}},
        "focal": {"method": {"name": "bce", "loss": "focal"}},
        "oracle": {"method": {"name": "bce", "clicks": "intense"}},
    }


BCE = Bce()
