"""A method of a user's own, whole: every click counts ``weight`` times. ``--plugin=positive_weight`` brings it."""

from typing import Literal

import pydantic
import tensorflow as tf

from clsd_tf.methods import METHODS
from clsd_tf.methods.pointwise.config import PointwiseConfig
from clsd_tf.methods.pointwise.method import PointwiseMethod
from clsd_tf.methods.pointwise.model import PointwiseModel


class PositiveWeightConfig(PointwiseConfig):
    name: Literal["positive_weight"] = "positive_weight"
    weight: float = pydantic.Field(3.0, gt=0)
    placebo: bool = False  # The weights of a batch, dealt out among all of its rows.


class PositiveWeightModel(PointwiseModel):
    def loss_weights(self, batch):
        weights = 1.0 + (self.config.weight - 1.0) * batch.labels
        seed = tf.stack([tf.constant(0, tf.int64), batch.step])
        return tf.random.experimental.stateless_shuffle(weights, seed) if self.config.placebo else weights


class PositiveWeight(PointwiseMethod[PositiveWeightConfig]):
    Config = PositiveWeightConfig
    study_rows = {"positive_weight": {"method": {"name": "positive_weight"}}}  # noqa: RUF012

    def model_class(self):
        return PositiveWeightModel

    def describe(self, config):
        return f"A click counted {config.weight:g} times in training."

    def placebos(self, config):
        return {"shuffled": {"placebo": True}}


METHODS.register("positive_weight")(PositiveWeight())
