"""Small SavedModels for tests of the server: answers are arithmetic that a reader does in the head."""

from __future__ import annotations

import pathlib

import numpy as np
import tensorflow as tf
from google.protobuf import text_format
from tensorflow_serving.apis import input_pb2
from tensorflow_serving.config import model_server_config_pb2

from export.servable.ranking import NO_ITEM_CTR, decode_requests


class TinyModel(tf.Module):
    """``ctr`` = ``scale`` * x; from a tf.Example with feature x, or from the raw tensor x."""

    def __init__(self, scale: float):
        super().__init__()
        self._scale = tf.Variable(scale, dtype=tf.float32)

    def _x(self, examples: tf.Tensor) -> tf.Tensor:
        return tf.io.parse_example(examples, {"x": tf.io.FixedLenFeature([], tf.float32)})["x"]

    def signatures(self) -> dict:
        """All kinds of signatures that the protocols know."""

        def classify(inputs):
            scores = self._scale * self._x(inputs)
            classes = tf.tile([["no_click", "click"]], [tf.shape(inputs)[0], 1])
            return {"classes": classes, "scores": tf.stack([1.0 - scores, scores], axis=1)}

        def raw(x, names, counts):
            lengths = tf.strings.length(names)
            return {
                "ctr": self._scale * x,
                "name_lengths": lengths,
                "names": names,
                "count_sums": tf.reduce_sum(counts, axis=1),
            }

        def slow(x, steps):
            """Takes some microseconds a step, so that tests can fill the server."""
            _, extra = tf.while_loop(
                lambda step, _: step < tf.reduce_max(steps),
                lambda step, extra: (step + 1, extra * 0.5),
                [tf.constant(0, tf.int64), tf.constant(0.0)],
            )
            return {"ctr": self._scale * x + extra}

        def rank(requests):
            _, items = decode_requests(requests)
            ctr = items.with_values(self._scale * self._x(items.values)).to_tensor(NO_ITEM_CTR)
            return {"ctr": tf.sort(ctr, direction="DESCENDING")}

        def regress(inputs):
            return {"outputs": self._scale * self._x(inputs)[:, tf.newaxis]}

        def concrete(function, **specs):
            return tf.function(function, autograph=False).get_concrete_function(**specs)

        strings = tf.TensorSpec([None], tf.string)
        x = tf.TensorSpec([None], tf.float32)
        return {
            "serving_default": concrete(lambda examples: {"ctr": self._scale * self._x(examples)}, examples=strings),
            "predict_raw": concrete(raw, x=x, names=strings, counts=tf.TensorSpec([None, None], tf.int64)),
            "classify": concrete(classify, inputs=strings),
            "regress": concrete(regress, inputs=strings),
            "rank": concrete(rank, requests=strings),
            "slow": concrete(slow, x=x, steps=tf.TensorSpec([None], tf.int64)),
        }


def save_tiny(servable_dir: pathlib.Path, name: str, version: int, scale: float = 1.0) -> pathlib.Path:
    """Writes servable_dir/name/version; it appears by one rename, as a published version does."""
    model = TinyModel(scale)
    staging = servable_dir / name / f".{version}.staging"
    tf.saved_model.save(model, str(staging), signatures=model.signatures())
    return staging.rename(servable_dir / name / str(version))


def write_config(servable_dir: pathlib.Path, text: str) -> None:
    """Writes models.config by one rename, checked by the real class."""
    text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    temporary = servable_dir / ".models.config"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(servable_dir / "models.config")


def example(x: float) -> bytes:
    """A serialized tf.Example with feature x."""
    result = tf.train.Example()
    result.features.feature["x"].float_list.value.append(x)
    return result.SerializeToString()


def examples(*xs: float) -> np.ndarray:
    """Serialized tf.Examples as an object array."""
    return np.array([example(x) for x in xs], object)


def rank_request(*xs: float) -> bytes:
    """A serialized request for the signature ``rank``: an item of each x."""
    items = [tf.train.Example.FromString(example(x)) for x in xs]
    return input_pb2.ExampleListWithContext(examples=items).SerializeToString()
