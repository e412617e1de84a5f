"""Rules of signatures, read from the SavedModel without loading it."""

from __future__ import annotations

from collections.abc import Iterator

import tensorflow as tf
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import meta_graph_pb2

from export.contract_rules.findings import Finding, NotApplicable, failed, judged, listed, passed, warned
from export.contract_rules.rules import version_rule
from export.contract_rules.version import Version

PREDICT = tf.compat.v1.saved_model.signature_constants.PREDICT_METHOD_NAME
CLASSIFY = tf.compat.v1.saved_model.signature_constants.CLASSIFY_METHOD_NAME
REGRESS = tf.compat.v1.saved_model.signature_constants.REGRESS_METHOD_NAME
_NAMES = {CLASSIFY: ("classify", "classification"), REGRESS: ("regress", "regression")}
_UNSENDABLE = (types_pb2.DT_INVALID, types_pb2.DT_RESOURCE, types_pb2.DT_VARIANT)
_FIRST_REFERENCE_DTYPE = 100
# The cases of json_tensor.cc.
JSON_DTYPES = frozenset(
    types_pb2.DataType.Value(f"DT_{name}")
    for name in ["FLOAT", "DOUBLE", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT32", "UINT64", "BOOL", "STRING"]
)

Tensor = tuple[str, meta_graph_pb2.TensorInfo]


def api_signatures(version: Version, method: str) -> dict[str, meta_graph_pb2.SignatureDef]:
    """Finds signatures meant for Classify or Regress: by method name, or by name, since TF 2 always writes Predict.

    Args:
      version: that has the signatures.
      method: method name, ``CLASSIFY`` or ``REGRESS``.

    Returns:
      Name -> signature; at least one.

    Raises:
      NotApplicable: there is none.
    """
    found = {
        name: signature
        for name, signature in version.signatures.items()
        if signature.method_name == method or name in _NAMES[method]
    }
    if not found:
        raise NotApplicable(f"no signature is named {' or '.join(_NAMES[method])}, or has the method name {method}")
    return found


def is_sendable(info: meta_graph_pb2.TensorInfo) -> bool:
    """Returns whether a TensorProto can carry the dtype of ``info``: handles and references stay inside a process."""
    return info.dtype not in _UNSENDABLE and info.dtype < _FIRST_REFERENCE_DTYPE


def _tensors(version: Version) -> Iterator[Tensor]:
    for name, signature in version.signatures.items():
        yield from ((f"{name}, input {key}", info) for key, info in sorted(signature.inputs.items()))
        yield from ((f"{name}, output {key}", info) for key, info in sorted(signature.outputs.items()))


@version_rule(
    title="There is a signature serving_default",
    why="A request that names no signature means this one, and fails without it (predict_util.cc).",
)
def serving_default(version: Version) -> Finding:
    names = listed(version.signatures) or "no signature at all"
    if tf.saved_model.DEFAULT_SERVING_SIGNATURE_DEF_KEY not in version.signatures:
        return failed(f"found: {names}")
    return passed(names)


@version_rule(
    title="Inputs and outputs are named tensors, at least one of each",
    why="Requests and answers are maps from names to dense tensors; a batch needs an input, and an answer in JSON an "
    "output (predict_util.cc, batching_util.h, json_tensor.cc).",
)
def tensor_names(version: Version) -> Finding:
    problems = []
    for name, signature in version.signatures.items():
        if not signature.inputs:
            problems.append(f"{name} has no input")
        if not signature.outputs:
            problems.append(f"{name} has no output")
        if list(signature.inputs) == ["b64"]:
            problems.append(f"{name}, input b64: in JSON this is the mark of base64, not a name")
        if "" in signature.inputs or "" in signature.outputs:
            problems.append(f"{name} has an input or output without a name")
    for where, info in _tensors(version):
        if info.WhichOneof("encoding") != "name" or not info.name:
            problems.append(f"{where} is not one dense tensor")
    return judged(problems, f"{len(list(_tensors(version)))} tensors")


@version_rule(
    title="Requests and answers can carry the dtypes",
    why="A TensorProto holds no resource, variant or reference; REST knows numbers, booleans and strings only "
    "(json_tensor.cc).",
)
def tensor_dtypes(version: Version) -> Finding:
    tensors = list(_tensors(version))
    unsendable = [
        f"{where} is {types_pb2.DataType.Name(info.dtype)}" for where, info in tensors if not is_sendable(info)
    ]
    if unsendable:
        return failed(listed(unsendable, "; "))
    not_json = [f"{where} is {_dtype(info)}" for where, info in tensors if info.dtype not in JSON_DTYPES]
    if not_json:
        return warned(f"gRPC only, since JSON has no such numbers: {listed(not_json, '; ')}")
    return passed(listed(sorted({_dtype(info) for _, info in tensors})))


def _dtype(info: meta_graph_pb2.TensorInfo) -> str:
    return tf.as_dtype(info.dtype).name


@version_rule(
    title="Every input and output has a batch as its first dimension",
    why="Batching joins requests along dimension 0, and REST answers row by row; a scalar or a fixed size cannot be "
    "joined (batching_util.h, json_tensor.cc).",
)
def batch_dimension(version: Version) -> Finding:
    problems = []
    for where, info in _tensors(version):
        shape = info.tensor_shape
        if not shape.unknown_rank and not shape.dim:
            problems.append(f"{where} is a scalar")
        elif shape.dim and shape.dim[0].size != -1:
            problems.append(f"{where} has exactly {shape.dim[0].size} rows")
    return judged(problems, "all have an unknown first dimension")


@version_rule(
    title="A Classify signature has one input `inputs` and outputs `scores`, `classes` or both",
    why="Classify takes serialized tf.Examples as string [batch] and refuses other names, a third output, and anything "
    "but float scores and string classes of shape [batch, classes] (classifier.cc).",
)
def classify_signature(version: Version) -> Finding:
    found = api_signatures(version, CLASSIFY)
    problems = []
    for name, signature in found.items():
        problems += _input_problems(name, signature)
        outputs = signature.outputs
        expected = {"scores": types_pb2.DT_FLOAT, "classes": types_pb2.DT_STRING}
        if len(outputs) > 2 or not outputs.keys() & expected.keys():
            problems.append(f"{name} has outputs {listed(sorted(outputs)) or 'none'}. Allowed: scores, classes or both")
        for key in expected.keys() & outputs.keys():
            problems += _tensor_problems(f"{name}, output {key}", outputs[key], expected[key], ranks=(2,))
        last_sizes = [_last_size(outputs[key]) for key in expected.keys() & outputs.keys()]
        sizes = {size for size in last_sizes if size is not None}
        if len(sizes) > 1:
            problems.append(f"{name} has another number of scores than of classes: {sorted(sizes)}")
    return judged(problems, listed(found))


@version_rule(
    title="A Regress signature has one input `inputs` and one output `outputs`",
    why="Regress takes serialized tf.Examples as string [batch] and refuses other names, a second output, and anything "
    "but float of shape [batch] or [batch, 1] (regressor.cc).",
)
def regress_signature(version: Version) -> Finding:
    found = api_signatures(version, REGRESS)
    problems = []
    for name, signature in found.items():
        problems += _input_problems(name, signature)
        outputs = signature.outputs
        if list(outputs) != ["outputs"]:
            problems.append(f"{name} has outputs {listed(sorted(outputs)) or 'none'}. Allowed: outputs alone")
        else:
            where, info = f"{name}, output outputs", outputs["outputs"]
            problems += _tensor_problems(where, info, types_pb2.DT_FLOAT, ranks=(1, 2))
            if len(info.tensor_shape.dim) == 2 and info.tensor_shape.dim[1].size not in (-1, 1):
                problems.append(f"{where} has {info.tensor_shape.dim[1].size} values per row. Allowed: one")
    return judged(problems, listed(found))


def _input_problems(name: str, signature: meta_graph_pb2.SignatureDef) -> list[str]:
    if list(signature.inputs) != ["inputs"]:
        return [f"{name} has inputs {listed(sorted(signature.inputs)) or 'none'}. Allowed: inputs alone"]
    return _tensor_problems(f"{name}, input inputs", signature.inputs["inputs"], types_pb2.DT_STRING, ranks=(1,))


def _tensor_problems(where: str, info: meta_graph_pb2.TensorInfo, dtype: int, ranks: tuple[int, ...]) -> list[str]:
    problems = []
    if info.dtype != dtype:
        problems.append(f"{where} is {_dtype(info)}. Allowed: {tf.as_dtype(dtype).name}")
    if not info.tensor_shape.unknown_rank and len(info.tensor_shape.dim) not in ranks:
        allowed = " or ".join(str(rank) for rank in ranks)
        problems.append(f"{where} has {len(info.tensor_shape.dim)} dimensions. Allowed: {allowed}")
    return problems


def _last_size(info: meta_graph_pb2.TensorInfo) -> int | None:
    """Size of the last dimension, None if it is not declared."""
    shape = info.tensor_shape
    return shape.dim[-1].size if shape.dim and shape.dim[-1].size >= 0 else None


@version_rule(
    title="Method names are those of TF Serving",
    why="By default they are not checked, so that TF 2 signatures, which all say Predict, answer Classify and Regress "
    "too; a server with enable_signature_method_name_check refuses them (model_servers/server.h, predict_util.cc).",
)
def method_names(version: Version) -> Finding:
    known = (PREDICT, CLASSIFY, REGRESS)
    names = {name: signature.method_name for name, signature in version.signatures.items()}
    unknown = [f"{name} has {method or 'no method name'}" for name, method in names.items() if method not in known]
    if unknown:
        return warned(f"{listed(unknown, '; ')}. Allowed: {', '.join(known)}")
    return passed(listed(sorted(set(names.values()))) or "no signatures")
