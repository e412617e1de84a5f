"""Backbones: feature dict -> logits. One family a file; any ``tf.keras.Model`` with that contract works as well.

Bring your own Keras model: register a factory under a name, before ``build_model`` or ``build_backbone`` is called.
Everything else, from training to export, then treats it like the backbones of this package::

    import clsd_tf  # First: it selects the Keras that tensorflow-recommenders needs.
    import tensorflow as tf

    from clsd_tf.backbones import register_backbone
    from clsd_tf.backbones.base import feature_inputs
    from clsd_tf.layers.embeddings import FieldEmbeddings


    @register_backbone("two_layers")
    def two_layers(inputs, *, embeddings, hidden_units, dropout, activation="gelu"):
        features = feature_inputs(inputs)
        hidden = tf.keras.layers.Flatten()(FieldEmbeddings(inputs, embeddings)(features))
        for units in hidden_units:
            hidden = tf.keras.layers.Dense(units, activation)(hidden)
            hidden = tf.keras.layers.Dropout(dropout)(hidden)
        return tf.keras.Model(features, tf.keras.layers.Dense(1, dtype="float32")(hidden))

A factory takes the model inputs and at least these three keyword arguments; what it takes beyond them is an option of
that backbone. The model may be functional or subclassed, and gives logits [batch] or [batch, 1].
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from clsd_tf.backbones.afm import Afm
from clsd_tf.backbones.autoint import AutoInt
from clsd_tf.backbones.base import Backbone
from clsd_tf.backbones.dcn import Dcn
from clsd_tf.backbones.dcnv2 import DcnV2, DcnV2Mix
from clsd_tf.backbones.deepfm import DeepFm
from clsd_tf.backbones.din import Din
from clsd_tf.backbones.dnn import Dnn
from clsd_tf.backbones.fibinet import FiBiNet
from clsd_tf.backbones.finalmlp import FinalMlp
from clsd_tf.backbones.fm import Fm
from clsd_tf.backbones.lr import Lr
from clsd_tf.backbones.masknet import MaskNet
from clsd_tf.backbones.wide_deep import WideDeep
from clsd_tf.backbones.xdeepfm import XDeepFm
from clsd_tf.spec.model_inputs import ModelInputs

BackboneFactory = Callable[..., tf.keras.Model]

BACKBONES: dict[str, BackboneFactory] = {
    "lr": Lr,
    "fm": Fm,
    "dnn": Dnn,
    "wide_deep": WideDeep,
    "deepfm": DeepFm,
    "dcn": Dcn,
    "dcnv2": DcnV2,
    "dcnv2_mix": DcnV2Mix,
    "xdeepfm": XDeepFm,
    "autoint": AutoInt,
    "afm": Afm,
    "fibinet": FiBiNet,
    "masknet": MaskNet,
    "finalmlp": FinalMlp,
    "din": Din,
}


def register_backbone(name: str) -> Callable[[BackboneFactory], BackboneFactory]:
    """Decorator that adds a factory to ``BACKBONES``.

    Raises:
      ValueError: the name is taken.
    """

    def register(factory: BackboneFactory) -> BackboneFactory:
        if name in BACKBONES:
            raise ValueError(
                f"a backbone of this name is registered already. Received: {name!r}. "
                f"Choose another name, or remove the old one first: del BACKBONES[{name!r}]"
            )
        BACKBONES[name] = factory
        return factory

    return register


def require_backbone(name: str) -> None:
    """Raises ValueError for a name that is not registered; the message lists the known ones."""
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone. Received: {name!r}. Allowed: {', '.join(sorted(BACKBONES))}")


def build_backbone(name: str, inputs: ModelInputs, **arguments: Any) -> tf.keras.Model:
    """Builds a registered backbone.

    Args:
      name: a name in ``BACKBONES``.
      inputs: what the transform gives.
      arguments: ``embeddings``, ``hidden_units``, ``dropout`` and the backbone's own arguments.

    Raises:
      ValueError: an unknown name or argument, the message lists the known ones; or a value that the backbone refuses.
    """
    require_backbone(name)
    allowed = _argument_names(BACKBONES[name])
    unknown = [] if allowed is None else sorted(arguments.keys() - allowed)
    if unknown:
        raise ValueError(
            f"backbone {name!r} takes no such argument. Received: {', '.join(unknown)}. "
            f"Allowed: {', '.join(sorted(allowed))}"
        )
    return BACKBONES[name](inputs, **arguments)


def _argument_names(factory: BackboneFactory) -> set[str] | None:
    """Names of the keyword arguments that a factory takes; None: any."""
    if isinstance(factory, type) and issubclass(factory, Backbone):
        return factory.argument_names()
    _, *parameters = inspect.signature(factory).parameters.values()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    return None if takes_any else {parameter.name for parameter in parameters}
