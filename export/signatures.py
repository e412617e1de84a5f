"""The serving signatures: raw values in, the transform inside, names and shapes that TF Serving accepts."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from clsd_tf.clsd import ClsdModel
from clsd_tf.examples import parse_raw_examples, raw_tensor_specs
from clsd_tf.features import FeatureSpec
from clsd_tf.transform import FeatureTransform

CLASSES = ("no_click", "click")


class ServingModule(tf.Module):
    """What is saved: the variables and tables that the signatures use, and nothing else of the training model."""

    def __init__(self, transform: FeatureTransform, model: ClsdModel):
        super().__init__()
        self._transform = transform
        # The model itself stays out: a tracked Keras model would be saved with its training functions.
        gate_variables = model.ad_gate.variables if model.ad_gate is not None else []
        self._variables = [*model.backbone.variables, *gate_variables]


def serving_signatures(spec: FeatureSpec, transform: FeatureTransform, model: ClsdModel) -> dict[str, Callable]:
    """Signature name -> concrete function.

    * ``serving_default``: ``examples``, serialized tf.Examples, string [batch] -> ``ctr``, float32 [batch]
    * ``predict_raw``: one tensor per raw input, [batch] (histories [batch, any]) -> ``ctr``
    * ``classify``: ``inputs``, serialized tf.Examples -> ``classes`` string [batch, 2], ``scores`` float32 [batch, 2]
    * ``regress``: ``inputs`` -> ``outputs``, float32 [batch, 1]
    * ``debug``: ``examples`` -> ``logit``, ``teacher_score``, ``ad_gate_correction``, float32 [batch]
    """

    def features_of(examples: tf.Tensor) -> dict[str, tf.Tensor]:
        return transform(parse_raw_examples(examples, spec.raw_inputs))

    def ctr_of(features: dict[str, tf.Tensor]) -> tf.Tensor:
        return model(features, training=False)

    def classify(inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        ctr = ctr_of(features_of(inputs))
        classes = tf.tile(tf.constant([CLASSES]), [tf.shape(ctr)[0], 1])
        return {"classes": classes, "scores": tf.stack([1.0 - ctr, ctr], axis=1)}

    def concrete(function: Callable, **specs: tf.TensorSpec):
        return tf.function(function, autograph=False).get_concrete_function(**specs)

    examples = tf.TensorSpec([None], tf.string, "examples")
    inputs = tf.TensorSpec([None], tf.string, "inputs")
    return {
        "serving_default": concrete(lambda examples: {"ctr": ctr_of(features_of(examples))}, examples=examples),
        "predict_raw": concrete(lambda **raw: {"ctr": ctr_of(transform(raw))}, **raw_tensor_specs(spec.raw_inputs)),
        "classify": concrete(classify, inputs=inputs),
        "regress": concrete(lambda inputs: {"outputs": ctr_of(features_of(inputs))[:, tf.newaxis]}, inputs=inputs),
        "debug": concrete(lambda examples: model.debug_outputs(features_of(examples)), examples=examples),
    }
