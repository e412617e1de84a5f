"""Use of strings in a signature's graph: the features that it parses from tf.Examples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping

import tensorflow as tf
from tensorflow.core.framework import node_def_pb2
from tensorflow.core.protobuf import meta_graph_pb2

_PARSERS = ("ParseExample", "ParseExampleV2")
_RANK_MESSAGE = "tensorflow.serving.ExampleListWithContext"
# Operations that take strings of a certain form only: no made-up string would be a fair request.
_DECODERS = (
    "Decode", "ParseSequenceExample", "ParseSingle", "ParseTensor", "StringToNumber", "ReadFile", "Substr",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Feature:
    """A feature that a graph parses from tf.Examples: its type and how many values a made-up one gets."""

    dtype: tf.DType
    num_values: int


@dataclasses.dataclass(frozen=True)
class StringUse:
    """Use of strings in a signature's graph.

    Attributes:
      features: name -> feature of the tf.Examples that it parses; None if it parses none.
      rank_requests: whether the Examples come inside of serialized ExampleListWithContext messages.
      decoders: other operations that only take strings of a certain form.
    """

    features: dict[str, Feature] | None
    rank_requests: bool
    decoders: tuple[str, ...]


def string_use(graph: meta_graph_pb2.MetaGraphDef, signature: meta_graph_pb2.SignatureDef) -> StringUse:
    """Looks through the nodes on which the signature's outputs depend, functions included.

    Args:
      graph: of the SavedModel.
      signature: one of its signatures.

    Returns:
      What the nodes do with strings.
    """
    features: dict[str, Feature] = {}
    parses, ranks, decoders = False, False, set()
    for nodes in _bodies(graph.graph_def, [info.name for info in signature.outputs.values()]):
        for node in nodes.values():
            if node.op in _PARSERS:
                parses = True
                features |= _features(node, nodes)
            elif node.op == "DecodeProtoV2" and node.attr["message_type"].s.decode() == _RANK_MESSAGE:
                ranks = True
            elif node.op.startswith(_DECODERS):
                decoders.add(node.op)
    return StringUse(features if parses else None, ranks, tuple(sorted(decoders)))


def _bodies(graph: tf.compat.v1.GraphDef, outputs: Iterable[str]) -> Iterator[Mapping[str, node_def_pb2.NodeDef]]:
    """Nodes by name of the main graph, as far as ``outputs`` need them, and of every function called from them."""
    functions = {function.signature.name: function for function in graph.library.function}
    main = _ancestors({node.name: node for node in graph.node}, outputs)
    yield main
    seen, waiting = set(), [name for node in main.values() for name in _called(node, functions)]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            nodes = {node.name: node for node in functions[name].node_def}
            yield nodes
            waiting += [called for node in nodes.values() for called in _called(node, functions)]


def _ancestors(nodes: Mapping[str, node_def_pb2.NodeDef], tensors: Iterable[str]) -> dict[str, node_def_pb2.NodeDef]:
    found: dict[str, node_def_pb2.NodeDef] = {}
    waiting = [_node_name(tensor) for tensor in tensors]
    while waiting:
        name = waiting.pop()
        if name not in found and name in nodes:
            found[name] = nodes[name]
            waiting += [_node_name(tensor) for tensor in nodes[name].input]
    return found


def _node_name(tensor: str) -> str:
    return tensor.lstrip("^").split(":")[0]


def _called(node: node_def_pb2.NodeDef, functions: Mapping) -> list[str]:
    names = [node.op]
    for value in node.attr.values():
        names += [value.func.name] if value.HasField("func") else [entry.name for entry in value.list.func]
    return [name for name in names if name in functions]


def _features(node: node_def_pb2.NodeDef, nodes: Mapping[str, node_def_pb2.NodeDef]) -> dict[str, Feature]:
    """Keys are constant inputs of the parser, types and shapes its attributes."""
    attr = node.attr
    inputs = [tensor for tensor in node.input if not tensor.startswith("^")]
    if node.op == "ParseExampleV2":
        sparse, dense, ragged = (_constant(tensor, nodes) for tensor in inputs[2:5])
    else:
        num_sparse, num_dense = attr["Nsparse"].i, attr["Ndense"].i
        keys = [key for tensor in inputs[2 : 2 + num_sparse + num_dense] for key in _constant(tensor, nodes)]
        sparse, dense, ragged = keys[:num_sparse], keys[num_sparse:], []
    features = dict(zip(sparse, map(_any_number, attr["sparse_types"].list.type), strict=False))
    features |= dict(zip(ragged, map(_any_number, attr["ragged_value_types"].list.type), strict=False))
    for key, dtype, shape in zip(dense, attr["Tdense"].list.type, attr["dense_shapes"].list.shape, strict=False):
        features[key] = Feature(tf.as_dtype(dtype), max(1, math.prod(abs(dim.size) for dim in shape.dim)))
    return features


def _any_number(dtype: int) -> Feature:
    return Feature(tf.as_dtype(dtype), 1)


def _constant(tensor: str, nodes: Mapping[str, node_def_pb2.NodeDef]) -> list[str]:
    """Strings of a constant, [] if the graph computes them."""
    node = nodes.get(_node_name(tensor))
    while node is not None and node.op == "Identity":
        node = nodes.get(_node_name(node.input[0]))
    if node is None or node.op != "Const":
        return []
    return [key.decode() for key in tf.make_ndarray(node.attr["value"].tensor).ravel().tolist()]
