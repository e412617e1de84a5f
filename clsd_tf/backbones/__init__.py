"""Backbones: feature dict -> logits. One family a file; any ``tf.keras.Model`` with that contract works as well.

Bring your own Keras model: register a factory under a name, before ``build_model`` or ``build_backbone`` is called.
Everything else, from training to export, then treats it like the backbones of this package::

    import tensorflow as tf
    from clsd_tf import FieldEmbeddings, feature_inputs, register_backbone


    @register_backbone("two_layers")
    def two_layers(inputs, *, embeddings, hidden_units, dropout, activation="gelu"):
        features = feature_inputs(inputs)
        hidden = tf.keras.layers.Flatten()(FieldEmbeddings(inputs, embeddings)(features))
        for units in hidden_units:
            hidden = tf.keras.layers.Dense(units, activation)(hidden)
            hidden = tf.keras.layers.Dropout(dropout)(hidden)
        return tf.keras.Model(features, tf.keras.layers.Dense(1, dtype="float32")(hidden))

A factory takes the model inputs and at least these three keyword arguments; what it takes beyond them is an option of
that backbone. The model may be functional or subclassed, and gives logits [batch] or [batch, 1]. Commands know it with
``--plugin=<the module it is in>``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clsd_tf.plugins.registry import Registry
from clsd_tf.spec.model_inputs import ModelInputs

if TYPE_CHECKING:
    import tensorflow as tf

    BackboneFactory = Callable[..., tf.keras.Model]

BACKBONES = Registry(
    "backbone",
    {
        "lr": "clsd_tf.backbones.lr:Lr",
        "fm": "clsd_tf.backbones.fm:Fm",
        "dnn": "clsd_tf.backbones.dnn:Dnn",
        "wide_deep": "clsd_tf.backbones.wide_deep:WideDeep",
        "deepfm": "clsd_tf.backbones.deepfm:DeepFm",
        "dcn": "clsd_tf.backbones.dcn:Dcn",
        "dcnv2": "clsd_tf.backbones.dcnv2:DcnV2",
        "dcnv2_mix": "clsd_tf.backbones.dcnv2:DcnV2Mix",
        "xdeepfm": "clsd_tf.backbones.xdeepfm:XDeepFm",
        "autoint": "clsd_tf.backbones.autoint:AutoInt",
        "afm": "clsd_tf.backbones.afm:Afm",
        "fibinet": "clsd_tf.backbones.fibinet:FiBiNet",
        "masknet": "clsd_tf.backbones.masknet:MaskNet",
        "finalmlp": "clsd_tf.backbones.finalmlp:FinalMlp",
        "din": "clsd_tf.backbones.din:Din",
    },
)


def register_backbone(name: str) -> Callable[[BackboneFactory], BackboneFactory]:
    """Registers a factory in ``BACKBONES``: ``@register_backbone("mine")`` above its definition.

    Args:
      name: by which configs call it.

    Returns:
      A decorator that gives back the factory.

    Raises:
      ValueError: the name is taken; from the decorator.
    """
    return BACKBONES.register(name)


def require_backbone(name: str) -> None:
    """Checks the ``name`` of a backbone.

    Raises:
      ValueError: it is not registered; the message lists those that are.
    """
    BACKBONES.require(name)


def build_backbone(name: str, inputs: ModelInputs, **arguments: Any) -> tf.keras.Model:
    """Builds a registered backbone.

    Args:
      name: a name in ``BACKBONES``.
      inputs: what the transform gives.
      arguments: ``embeddings``, ``hidden_units``, ``dropout`` and the backbone's own arguments.

    Returns:
      A model from a feature dict to logits, [batch] or [batch, 1].

    Raises:
      ValueError: an unknown name or argument, the message lists the known ones; or a value that the backbone refuses.
    """
    factory = BACKBONES[name]
    allowed = _argument_names(factory)
    if allowed is not None and (unknown := sorted(arguments.keys() - allowed)):
        raise ValueError(
            f"backbone {name!r} takes no such argument. Received: {', '.join(unknown)}. "
            f"Allowed: {', '.join(sorted(allowed))}{_hint_of_0_1(unknown)}"
        )
    return factory(inputs, **arguments)


def _hint_of_0_1(unknown: list[str]) -> str:
    if "embeddings" not in unknown:
        return ""
    return (
        ". Since version 0.2 a factory takes embeddings, a clsd_tf.layers.embedding_config.EmbeddingConfig, in place "
        "of embedding_dim: give FieldEmbeddings that, or read embeddings.dim"
    )


def _argument_names(factory: BackboneFactory) -> set[str] | None:
    """Names of the keyword arguments that a factory takes; None: any."""
    if hasattr(factory, "argument_names"):  # A subclass of ``base.Backbone``.
        return factory.argument_names()
    _, *parameters = inspect.signature(factory).parameters.values()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    return None if takes_any else {parameter.name for parameter in parameters}
