"""Requests that a server must refuse, each with the field that its error must name: for tests and for benchmarks.

Each request is a good one that is broken in one place. ``malformed_rest`` and ``malformed_grpc`` break them; the random
numbers that they are given decide everything, so requests can be repeated.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import input_pb2

from export.server.loaded_version import Signature

RAW, EXAMPLES, RANK = "predict_raw", "serving_default", "rank"
ROWS = 3
HOSTILE_TEXTS = ("", "é" * 300, "x" * 5000, "../../etc", "a\x00b", "{}", "%s%n")


@dataclasses.dataclass(frozen=True)
class Target:
    """A servable that is asked.

    Attributes:
      model: its name.
      signatures: at least predict_raw, serving_default, classify and regress; rank is asked if it is there.
      features: of its tf.Examples: name -> string, int64 or float.
    """

    model: str
    signatures: Mapping[str, Signature]
    features: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Malformed:
    """A request to be refused.

    Attributes:
      kind: how it is broken.
      address: of REST the path, of gRPC the method of PredictionService.
      body: of REST the JSON text, of gRPC the serialized message.
      field: what the error's message must contain.
      code: what gRPC must answer, and REST by the matching status.
    """

    kind: str
    address: str
    body: bytes
    field: str
    code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT


def good_tensors(choose: random.Random, signature: Signature) -> dict[str, np.ndarray]:
    """Good inputs: free dimensions but the first are 2."""
    found = {}
    for name, spec in signature.inputs.items():
        shape = [ROWS, *(size or 2 for size in spec.shape[1:])]
        numbers = np.array([choose.randrange(100) for _ in range(int(np.prod(shape)))]).reshape(shape)
        is_text = spec.dtype == tf.string
        found[name] = (numbers.astype(str).astype(object) if is_text else numbers).astype(spec.dtype.as_numpy_dtype)
    return found


def wrong_kind(choose: random.Random, target: Target) -> tuple[str, tf.train.Example]:
    """(a feature, an Example where it has values of another kind)."""
    name = choose.choice(sorted(target.features))
    example = tf.train.Example()
    feature = example.features.feature[name]
    if target.features[name] == "string":
        feature.float_list.value.append(0.5)
    else:
        feature.bytes_list.value.append(b"text")
    return name, example


def no_example(choose: random.Random, target: Target) -> bytes:
    """Bytes that are no tf.Example."""
    _, example = wrong_kind(choose, target)
    whole = example.SerializeToString()
    # Not cut to two bytes, a message whose content is missing: TensorFlow takes that for an empty Example.
    # Bytes that are no text either: TensorFlow's message quotes them, and Python fails to read it.
    return choose.choice([whole[: choose.choice([1, *range(3, len(whole))])], b"\x0a\xff", b"\x0a\x02\xff\xfe"])


def input_of(choose: random.Random, target: Target) -> str:
    """One of predict_raw's inputs."""
    return choose.choice(sorted(target.signatures[RAW].inputs))


def broken_lists(choose: random.Random, target: Target) -> bytes:
    """Bytes that are no ExampleListWithContext: what `rank` takes."""
    _, example = wrong_kind(choose, target)
    whole = input_pb2.ExampleListWithContext(context=example, examples=[example]).SerializeToString()
    # Cut within the item; a tag without its value; a field 1 that is longer than the message.
    return choose.choice([whole[:-1], whole + b"\x0a", b"\x0a\x7f", b"\xff" * 11])
