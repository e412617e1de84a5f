"""Settings that all methods of rows share."""

from __future__ import annotations

from typing import Literal

import pydantic

from clsd_tf.methods.method import MethodConfig


class PointwiseConfig(MethodConfig):
    """The loss of each row, and which clicks it is given.

    Attributes:
      loss: ``bce``, or two of its variants that studies compare with.
      label_smoothing: of ``loss: label_smoothing``, in [0, 1).
      focal_gamma: of ``loss: focal``, >= 0.
      clicks: ``all``, or only ``intense`` ones: clicks without the intensity label are left out. Not for production,
        it is the oracle of a study.
    """

    loss: Literal["bce", "label_smoothing", "focal"] = "bce"
    label_smoothing: float = pydantic.Field(0.1, ge=0, lt=1)
    focal_gamma: float = pydantic.Field(1.0, ge=0)
    clicks: Literal["all", "intense"] = "all"


class BceConfig(PointwiseConfig):
    """Every click counts the same."""

    name: Literal["bce"] = "bce"
