"""Scoring many items for one user in one call: what the user brings is parsed, transformed and looked up once."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import tensorflow as tf
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FileDescriptor
from tensorflow_serving.apis import input_pb2

from clsd_tf.backbones.base import Backbone
from clsd_tf.data.examples import is_missing, parse_raw_examples
from clsd_tf.data.transform import FeatureTransform
from clsd_tf.layers.embeddings import SharedRows, per_row
from clsd_tf.methods.method_model import MethodModel
from clsd_tf.spec.feature_spec import FeatureSpec
from clsd_tf.spec.model_inputs import MISSING_INT64, RawInput

NO_ITEM_CTR = -1.0
_REQUEST = input_pb2.ExampleListWithContext.DESCRIPTOR


class Sides(NamedTuple):
    """Where ``rank`` reads a raw input.

    Attributes:
      user: from the context: the user's key, columns of user tables, and what the user did before.
      item: from each item, or where it has no value from the context: the item's key, columns of item tables, and other
        columns of the log, which may tell of the item or of the moment.
    """

    user: tuple[RawInput, ...]
    item: tuple[RawInput, ...]


def sides_of(spec: FeatureSpec) -> Sides:
    """Sorts the raw inputs of ``spec``: those that tell of the user, and all others.

    Returns:
      The two sides.
    """
    sides = spec.sides
    return Sides(
        user=tuple(entry for entry in spec.raw_inputs if sides[entry.name] == "user"),
        item=tuple(entry for entry in spec.raw_inputs if sides[entry.name] != "user"),
    )


def rank_function(
    spec: FeatureSpec, transform: FeatureTransform, model: MethodModel, top_k: int | None
) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
    """Makes the function behind ``rank``: requests, string [batch] -> the items of each request by falling ``ctr``.

    A request is a serialized ``tensorflow.serving.ExampleListWithContext``: ``context`` is the user's Example,
    ``examples`` are the items'; ``sides_of`` says what is read where. Its ``item_ids`` [batch, num_items] and ``ctr``,
    float32 [batch, num_items], are padded with "" (of integer ids: the smallest int64) and -1 where another request of
    the batch has more items. One string per request, because TF Serving's batching cannot join requests whose tensors
    differ in a later dimension, or pads them with repetitions of their first value.

    Args:
      spec: names and types.
      transform: as in training.
      model: scores the items.
      top_k: how many items an answer holds; None for all.

    Returns:
      A function of the requests; its answer holds ``item_ids`` and ``ctr``.
    """
    sides = sides_of(spec)
    group_names = {group.name for group in spec.user_groups}
    key = RawInput(spec.item_key, spec.column_types[spec.item_key])
    no_id = "" if key.dtype == "string" else MISSING_INT64

    def rank(requests: tf.Tensor) -> dict[str, tf.Tensor]:
        context, items = decode_requests(requests)
        row_of = items.value_rowids()
        of_user = parse_raw_examples(context, spec.raw_inputs)
        of_item = parse_raw_examples(items.values, list(dict.fromkeys([*sides.item, key])))
        for entry in sides.item:
            shared = tf.gather(of_user[entry.name], row_of)
            of_item[entry.name] = tf.where(is_missing(of_item[entry.name]), shared, of_item[entry.name])
        users = transform(of_user, inputs={entry.name for entry in sides.user})
        features = {name: SharedRows(values, row_of) for name, values in users.items()}
        features |= transform(of_item, inputs={entry.name for entry in sides.item})
        ctr = items.with_values(model(_for_model(features, model, group_names)))
        ids = items.with_values(of_item[key.name]).to_tensor(no_id)
        ctr = ctr.to_tensor(NO_ITEM_CTR)
        order = tf.argsort(ctr, direction="DESCENDING", stable=True)[:, :top_k]
        return {"item_ids": tf.gather(ids, order, batch_dims=1), "ctr": tf.gather(ctr, order, batch_dims=1)}

    return rank


def _for_model(
    features: dict[str, tf.Tensor | SharedRows], model: MethodModel, group_names: Collection[str]
) -> dict[str, tf.Tensor | SharedRows]:
    """Our backbones take shared rows; other models, and calibration of its user groups, need a value per row."""
    takes_shared = isinstance(model.backbone, Backbone)
    return {
        name: values if takes_shared and name not in group_names else per_row(values)
        for name, values in features.items()
    }


def decode_requests(requests: tf.Tensor) -> tuple[tf.Tensor, tf.RaggedTensor]:
    """Takes requests apart.

    Args:
      requests: serialized, string [batch].

    Returns:
      The users' serialized Examples, [batch], and the items', ragged [batch, num_items].
    """
    sizes, (context, examples) = tf.io.decode_proto(
        tf.concat([requests, [""]], axis=0),  # The op refuses an empty batch.
        _REQUEST.full_name,
        ["context", "examples"],
        [tf.string, tf.string],
        descriptor_source=b"bytes://" + _descriptors(_REQUEST.file),
    )
    # A request without a context is one of a user of whom nothing is known.
    context = tf.concat([context, tf.fill([tf.shape(context)[0], 1], "")], axis=1)[:-1, 0]
    return context, tf.RaggedTensor.from_tensor(examples[:-1], lengths=sizes[:-1, 1])


def _descriptors(file: FileDescriptor) -> bytes:
    """The file and what it imports, so that the graph needs no library that knows the message."""
    found: dict[str, FileDescriptor] = {}

    def add(entry: FileDescriptor) -> None:
        for dependency in entry.dependencies:
            add(dependency)
        found[entry.name] = entry

    add(file)
    files = [descriptor_pb2.FileDescriptorProto.FromString(entry.serialized_pb) for entry in found.values()]
    return descriptor_pb2.FileDescriptorSet(file=files).SerializeToString()
