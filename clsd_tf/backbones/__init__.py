"""Backbones: feature dict -> logits. One family a file; any ``tf.keras.Model`` with that contract works as well."""

from __future__ import annotations

from typing import Any

from clsd_tf.backbones.base import Backbone
from clsd_tf.backbones.dcnv2 import DcnV2
from clsd_tf.backbones.deepfm import DeepFm
from clsd_tf.backbones.dnn import Dnn
from clsd_tf.model_inputs import ModelInputs

BACKBONES: dict[str, type[Backbone]] = {"dnn": Dnn, "deepfm": DeepFm, "dcnv2": DcnV2}


def build_backbone(name: str, inputs: ModelInputs, **arguments: Any) -> Backbone:
    """Builds a registered backbone.

    Raises:
      ValueError: unknown name; the message lists the known ones.
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone. Received: {name!r}. Allowed: {', '.join(sorted(BACKBONES))}")
    return BACKBONES[name](inputs, **arguments)
