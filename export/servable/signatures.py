"""The serving signatures: raw values in, the transform inside, names and shapes that TF Serving accepts."""

from __future__ import annotations

from collections.abc import Mapping

import tensorflow as tf
from tensorflow.types.experimental import ConcreteFunction

from clsd_tf.data.examples import parse_raw_examples, raw_tensor_specs
from clsd_tf.data.transform import FeatureTransform
from clsd_tf.methods.method_model import MethodModel
from clsd_tf.spec.feature_spec import FeatureSpec
from export.servable.profile import ExportProfile
from export.servable.ranking import rank_function

CLASSES = ("no_click", "click")


class ServingModule(tf.Module):
    """The variables and tables that the signatures use, and nothing else of the training model: what is saved."""

    def __init__(self, transform: FeatureTransform, signatures: Mapping[str, ConcreteFunction]):
        super().__init__()
        self._transform = transform
        # The model itself stays out: a tracked Keras model would be saved with its training functions.
        used = {id(variable): variable for function in signatures.values() for variable in function.variables}
        self._variables = list(used.values())


def serving_signatures(
    spec: FeatureSpec, transform: FeatureTransform, model: MethodModel, profile: ExportProfile
) -> dict[str, ConcreteFunction]:
    """Signature name -> concrete function, of those that the profile names.

    * ``serving_default``: ``examples``, serialized tf.Examples, string [batch] -> ``ctr``, float32 [batch]
    * ``predict_raw``: one tensor per raw input, [batch] (histories [batch, any]) -> ``ctr``
    * ``classify``: ``inputs``, serialized tf.Examples -> ``classes`` string [batch, 2], ``scores`` float32 [batch, 2]
    * ``regress``: ``inputs`` -> ``outputs``, float32 [batch, 1]
    * ``rank``: ``requests``, one user and many items each -> ``item_ids`` and ``ctr``, [batch, num_items], see
      ``rank_function``
    * ``debug``: ``examples`` -> ``logit``, ``teacher_score``, ``ad_gate_correction``, float32 [batch], and where the
      profile asks for them the labels of the user groups, string [batch]
    """

    def features_of(examples: tf.Tensor) -> dict[str, tf.Tensor]:
        return transform(parse_raw_examples(examples, spec.raw_inputs))

    def ctr_of(features: dict[str, tf.Tensor]) -> tf.Tensor:
        return model(features, training=False)

    def classify(inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        ctr = ctr_of(features_of(inputs))
        classes = tf.tile(tf.constant([CLASSES]), [tf.shape(ctr)[0], 1])
        return {"classes": classes, "scores": tf.stack([1.0 - ctr, ctr], axis=1)}

    def debug(examples: tf.Tensor) -> dict[str, tf.Tensor]:
        return debug_outputs(model, features_of(examples), spec, profile)

    rank = rank_function(spec, transform, model, profile.rank.top_k)
    raw_specs = raw_tensor_specs(spec.raw_inputs)
    functions = {
        "serving_default": (lambda examples: {"ctr": ctr_of(features_of(examples))}, _text("examples")),
        "predict_raw": (lambda **raw: {"ctr": ctr_of(transform(raw))}, raw_specs),
        "classify": (classify, _text("inputs")),
        "regress": (lambda inputs: {"outputs": ctr_of(features_of(inputs))[:, tf.newaxis]}, _text("inputs")),
        "rank": (rank, _text("requests")),
        "debug": (debug, _text("examples")),
    }
    return {
        name: tf.function(function, autograph=False).get_concrete_function(**specs)
        for name, (function, specs) in functions.items()
        if profile.signatures is None or name in profile.signatures
    }


def debug_outputs(
    model: MethodModel, features: Mapping[str, tf.Tensor], spec: FeatureSpec, profile: ExportProfile
) -> dict[str, tf.Tensor]:
    """Computes the outputs of ``debug``.

    Args:
      model: that is served.
      features: transformed, name -> [batch, ...].
      spec: of the dataset.
      profile: asks for the labels of user groups, or not.

    Returns:
      Name -> [batch]: the model's debug outputs, and labels as strings.
    """
    outputs = model.debug_outputs(features)
    if profile.debug_user_groups:
        outputs |= {
            group.name: tf.gather(tf.constant(group.labels), features[group.name]) for group in spec.user_groups
        }
    return outputs


def _text(name: str) -> dict[str, tf.TensorSpec]:
    return {name: tf.TensorSpec([None], tf.string, name)}
