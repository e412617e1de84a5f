"""DCN-V2: crosses with full matrices, or with a gated mixture of low-rank ones."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tensorflow_recommenders as tfrs

from clsd_tf.backbones.base import require_positive_integers, stacked_glorot
from clsd_tf.backbones.dcn import CrossAndDeep
from clsd_tf.spec.model_inputs import ModelInputs


class DcnV2(CrossAndDeep):
    """x_{l+1} = x_0 * (W_l x_l + b_l) + x_l; logits = w . concat(x_L, mlp(x_0)) + b, the parallel structure.

    The crosses are ``tfrs.layers.dcn.Cross`` with full matrices.
    Source: Wang et al. (2021), "DCN V2", sections "Cross Network" and "Deep and Cross Combination".

    Args:
      num_cross_layers: number L of cross layers, >= 1.
    """

    def __init__(self, inputs: ModelInputs, *, num_cross_layers: int = 2, **kwargs: Any):
        require_positive_integers(num_cross_layers=num_cross_layers)
        crosses = [tfrs.layers.dcn.Cross(name=f"cross_{index}") for index in range(num_cross_layers)]
        super().__init__(inputs, crosses, **kwargs)
        self._config["num_cross_layers"] = num_cross_layers


class LowRankMixtureCross(tf.keras.layers.Layer):
    """sum_k gate_k * x_0 * (U_k tanh(C_k tanh(V_k^T x_l)) + b) + x_l, gate = softmax(G x_l).

    The gates sum to 1, so b is added once, and all experts' U_k are one matrix product.

    Args:
      num_experts: number K of experts.
      low_rank: rank of each expert's matrices.
    """

    def __init__(self, num_experts: int, low_rank: int, **kwargs: Any):
        super().__init__(**kwargs)
        self._shape = (num_experts, low_rank)

    def build(self, input_shape: Any) -> None:
        num_experts, low_rank = self._shape
        dim = input_shape[-1]
        to_subspace, from_subspace = stacked_glorot(dim, low_rank), stacked_glorot(low_rank, dim)
        self._v = self.add_weight(name="v", shape=[dim, num_experts * low_rank], initializer=to_subspace)
        within = stacked_glorot(low_rank, low_rank)
        self._c = self.add_weight(name="c", shape=[num_experts, low_rank, low_rank], initializer=within)
        self._u = self.add_weight(name="u", shape=[num_experts * low_rank, dim], initializer=from_subspace)
        self._bias = self.add_weight(name="bias", shape=[dim], initializer="zeros")
        self._gate = self.add_weight(name="gate", shape=[dim, num_experts], initializer="glorot_uniform")
        super().build(input_shape)

    def call(self, flat: tf.Tensor, crossed: tf.Tensor) -> tf.Tensor:
        num_experts, low_rank = self._shape
        # [batch, num_experts, low_rank]
        projected = tf.reshape(tf.tanh(tf.matmul(crossed, self._v)), [-1, num_experts, low_rank])
        projected = tf.tanh(tf.einsum("bkr,krs->bks", projected, self._c))
        gate = tf.nn.softmax(tf.matmul(crossed, self._gate))
        gated = tf.reshape(projected * gate[:, :, tf.newaxis], [-1, num_experts * low_rank])
        return flat * (tf.matmul(gated, self._u) + self._bias) + crossed


class DcnV2Mix(CrossAndDeep):
    """DCN-V2 whose cross matrices are gated mixtures of low-rank experts; the rest is as in ``DcnV2``.

    tensorflow-recommenders has low-rank crosses, but neither experts nor gates. Each layer has gates of its own.
    Source: Wang et al. (2021), "DCN V2", section "Cost-Effective Mixture of Low-Rank DCN".

    Args:
      num_cross_layers: number L of cross layers, >= 1.
      num_experts: experts in each layer, >= 1.
      low_rank: rank of each expert's matrices, >= 1; a quarter of num_fields * embedding_dim is plenty.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        *,
        num_cross_layers: int = 2,
        num_experts: int = 4,
        low_rank: int = 16,
        **kwargs: Any,
    ):
        require_positive_integers(num_cross_layers=num_cross_layers, num_experts=num_experts, low_rank=low_rank)
        crosses = [
            LowRankMixtureCross(num_experts, low_rank, name=f"cross_{index}") for index in range(num_cross_layers)
        ]
        super().__init__(inputs, crosses, **kwargs)
        self._config.update(num_cross_layers=num_cross_layers, num_experts=num_experts, low_rank=low_rank)
