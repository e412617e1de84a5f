"""MaskNet: multiplicative masks, computed from the embeddings, inside feed-forward blocks."""

from __future__ import annotations

from typing import Any, Literal

import tensorflow as tf

from clsd_tf.backbones.base import (
    Backbone,
    Features,
    concat_fields,
    logit_layer,
    mlp,
    require_choice,
    require_positive_integers,
)
from clsd_tf.spec.model_inputs import ModelInputs


class MaskBlock(tf.keras.layers.Layer):
    """relu(layer_norm(W_3 (mask * hidden))) with mask = W_2 relu(W_1 flat + b_1) + b_2.

    Args:
      units: size of the output.
      reduction_ratio: size of the layer W_1 as a multiple of the size of ``hidden``.

    Returns:
      ``call`` maps hidden [batch, hidden_dim] and the embeddings flat [batch, dim] to [batch, units].
    """

    def __init__(self, units: int, reduction_ratio: int, **kwargs: Any):
        super().__init__(**kwargs)
        self._reduction_ratio = reduction_ratio
        self._project = tf.keras.layers.Dense(units, use_bias=False, name="project")
        self._normalise = tf.keras.layers.LayerNormalization(name="normalise")

    def build(self, input_shape: Any) -> None:
        hidden_dim = input_shape[-1]
        self._aggregate = tf.keras.layers.Dense(self._reduction_ratio * hidden_dim, activation="relu", name="aggregate")
        self._mask = tf.keras.layers.Dense(hidden_dim, name="mask")
        super().build(input_shape)

    def call(self, hidden: tf.Tensor, flat: tf.Tensor) -> tf.Tensor:
        mask = self._mask(self._aggregate(flat))
        return tf.nn.relu(self._normalise(self._project(mask * hidden)))


class MaskNet(Backbone):
    """logits = w . mlp(blocks) + b, where the first blocks read the layer-normalized embeddings of each field.

    ``parallel``: blocks = concat of all blocks, side by side. ``serial``: each block reads the one before it, and
    blocks = the last one; the paper's serial model has no MLP on top, which is ``hidden_units=()``. Keras' epsilon of
    1e-3 stays: it keeps the norm of freshly initialized embeddings, whose variance is 1e-4, from blowing up noise.

    Source: Wang et al. (2021), "MaskNet: Introducing Feature-Wise Multiplication to CTR Ranking Models by
    Instance-Guided Mask", section 3.

    Args:
      structure: "parallel" or "serial".
      num_blocks: number of mask blocks, >= 1.
      block_units: size of each block's output, >= 1.
      reduction_ratio: size of a mask's hidden layer as a multiple of the mask's, >= 1.

    Raises:
      ValueError: also for embeddings.dim = 1, since the norm of a single number is always 0.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        *,
        structure: Literal["parallel", "serial"] = "parallel",
        num_blocks: int = 3,
        block_units: int = 64,
        reduction_ratio: int = 2,
        **kwargs: Any,
    ):
        super().__init__(inputs, **kwargs)
        require_choice("structure", structure, ("parallel", "serial"))
        sizes = {"num_blocks": num_blocks, "block_units": block_units, "reduction_ratio": reduction_ratio}
        require_positive_integers(**sizes)
        if self.embeddings.dim < 2:
            raise ValueError("MaskNet normalizes each embedding: embeddings.dim must be at least 2. Received: 1")
        self._config.update(structure=structure, **sizes)
        self._embeddings = self.field_embeddings(inputs, self.embeddings.dim)
        self._normalise = tf.keras.layers.LayerNormalization(name="normalise")
        self._blocks = [MaskBlock(block_units, reduction_ratio, name=f"block_{index}") for index in range(num_blocks)]
        self._mlp = mlp(self._config["hidden_units"], self._config["dropout"])
        self._logits = logit_layer()

    def call(self, features: Features, training: bool = False) -> tf.Tensor:
        embeddings = self._embeddings(features)
        flat, hidden = concat_fields(embeddings), concat_fields(self._normalise(embeddings))
        if self._config["structure"] == "parallel":
            hidden = tf.concat([block(hidden, flat) for block in self._blocks], axis=1)
        else:
            for block in self._blocks:
                hidden = block(hidden, flat)
        return tf.squeeze(self._logits(self._mlp(hidden, training=training)), axis=1)
