"""TF Serving's rules for requests, signatures and outputs (predict_util.cc, classifier.cc, regressor.cc)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import model_pb2

from export.server.errors import RequestError, invalid_argument
from export.server.loaded_version import LoadedVersion, Signature

INPUTS = "inputs"  # The one input of classify and regress.


def signature_name(spec: model_pb2.ModelSpec) -> str:
    """Returns the signature that ``spec`` means: serving_default if it names none."""
    return spec.signature_name or tf.saved_model.DEFAULT_SERVING_SIGNATURE_DEF_KEY


def check_inputs(signature: Signature, inputs: Mapping[str, np.ndarray]) -> int:
    """Checks names, dtypes, ranks, static dimensions and equal 0th dimensions.

    Args:
      signature: that is called.
      inputs: input -> array; object arrays of bytes for strings.

    Returns:
      The number of rows; 1 for a signature whose 0th dimension is not a batch.

    Raises:
      RequestError: INVALID_ARGUMENT, naming the input.
    """
    if inputs.keys() != signature.inputs.keys():
        missing = sorted(signature.inputs.keys() - inputs.keys())
        unknown = sorted(inputs.keys() - signature.inputs.keys())
        raise invalid_argument(
            f"the inputs of signature {signature.name!r} are {sorted(signature.inputs)}. "
            f"Received: {len(inputs)} inputs; missing {missing}, not in the signature {unknown}"
        )
    for name, array in inputs.items():
        _check_array(name, array, *signature.input_forms[name])
    if not signature.is_batchable:
        return 1
    rows = {name: len(array) for name, array in inputs.items()}
    if len(set(rows.values())) > 1:
        raise invalid_argument(f"all inputs must have the same 0th dimension. Received: {rows}")
    return next(iter(rows.values()))


def _check_array(name: str, array: np.ndarray, dtype: np.dtype, dims: Sequence[int | None] | None) -> None:
    if array.dtype != dtype:
        raise invalid_argument(f"input {name!r} has dtype {_text(dtype)}. Received: {_text(array.dtype)}")
    if dims is None:
        return
    if array.ndim != len(dims) or any(
        expected not in (None, size) for expected, size in zip(dims, array.shape, strict=True)
    ):
        shape = [-1 if size is None else size for size in dims]
        raise invalid_argument(f"input {name!r} has shape {shape}, -1 being any. Received: {list(array.shape)}")


def _text(dtype: np.dtype) -> str:
    return "string" if dtype.hasobject else str(dtype)


def check_output_filter(signature: Signature, output_filter: Sequence[str]) -> None:
    """Refuses an output that does not exist or is named twice.

    Args:
      signature: that is called.
      output_filter: outputs that the client asks for; empty for all.

    Raises:
      RequestError: INVALID_ARGUMENT.
    """
    unknown = sorted(set(output_filter) - signature.outputs.keys())
    if unknown or len(set(output_filter)) < len(output_filter):
        raise invalid_argument(
            f"output_filter may name each of {sorted(signature.outputs)} once. Received: {list(output_filter)}"
        )


def check_classify_signature(signature: Signature) -> None:
    """Requires of ``signature`` one input ``inputs`` and one or two outputs, ``scores`` or ``classes`` among them.

    Raises:
      RequestError: INVALID_ARGUMENT or FAILED_PRECONDITION, as in TF Serving.
    """
    _check_one_input(signature)
    if len(signature.outputs) not in (1, 2):
        raise invalid_argument(
            f"a signature for Classify has one or two outputs. Received: {signature.name!r} with {_names(signature)}"
        )
    if not signature.outputs.keys() & {"scores", "classes"}:
        raise _failed_precondition(
            f"a signature for Classify has outputs scores and/or classes. "
            f"Received: {signature.name!r} with {_names(signature)}"
        )


def check_regress_signature(signature: Signature) -> None:
    """Requires of ``signature`` one input ``inputs`` and one output ``outputs``.

    Raises:
      RequestError: INVALID_ARGUMENT or FAILED_PRECONDITION, as in TF Serving.
    """
    _check_one_input(signature)
    if len(signature.outputs) != 1:
        raise invalid_argument(
            f"a signature for Regress has one output. Received: {signature.name!r} with {_names(signature)}"
        )
    if "outputs" not in signature.outputs:
        raise _failed_precondition(
            f"a signature for Regress has the output 'outputs'. Received: {signature.name!r} with {_names(signature)}"
        )


def check_classification(outputs: Mapping[str, np.ndarray], num_examples: int) -> dict[str, np.ndarray]:
    """Checks the outputs that Classify answers.

    Args:
      outputs: of the signature.
      num_examples: of the request.

    Returns:
      ``scores`` float32 [num_examples, num_classes] and/or ``classes``, bytes of the same shape.

    Raises:
      RequestError: INVALID_ARGUMENT, as in TF Serving.
    """
    answered = {name: outputs[name] for name in ("scores", "classes") if name in outputs}
    dtypes = {"scores": np.dtype(np.float32), "classes": np.dtype(object)}
    for name, array in answered.items():
        if array.ndim != 2 or len(array) != num_examples or array.dtype != dtypes[name]:
            raise invalid_argument(
                f"the output {name!r} of Classify is {_text(dtypes[name])} [{num_examples}, num_classes]. "
                f"Received: {_text(array.dtype)} {list(array.shape)}"
            )
    if len({array.shape[1] for array in answered.values()}) > 1:
        raise invalid_argument("scores and classes must have the same number of classes. Received: different numbers")
    return answered


def check_regression(outputs: Mapping[str, np.ndarray], num_examples: int) -> dict[str, np.ndarray]:
    """Checks the output that Regress answers.

    Args:
      outputs: of the signature.
      num_examples: of the request.

    Returns:
      ``outputs`` float32 [num_examples] or [num_examples, 1].

    Raises:
      RequestError: INVALID_ARGUMENT, as in TF Serving.
    """
    array = outputs["outputs"]
    if array.shape not in ((num_examples,), (num_examples, 1)) or array.dtype != np.float32:
        raise invalid_argument(
            f"the output of Regress is float32 [{num_examples}] or [{num_examples}, 1]. "
            f"Received: {_text(array.dtype)} {list(array.shape)}"
        )
    return {"outputs": array}


def _check_one_input(signature: Signature) -> None:
    if len(signature.inputs) != 1:
        raise invalid_argument(
            f"a signature for Classify or Regress has one input. "
            f"Received: {signature.name!r} with {sorted(signature.inputs)}"
        )
    if INPUTS not in signature.inputs:
        raise _failed_precondition(
            f"the input of a signature for Classify or Regress is {INPUTS!r}. "
            f"Received: {signature.name!r} with {sorted(signature.inputs)}"
        )


def _names(signature: Signature) -> list[str]:
    return sorted(signature.outputs)


def _failed_precondition(message: str) -> RequestError:
    return RequestError(grpc.StatusCode.FAILED_PRECONDITION, message)


@dataclasses.dataclass(frozen=True)
class ExampleMethod:
    """A method whose request is a list of tf.Examples.

    Attributes:
      check_signature: whether a signature can answer it.
      answer: outputs and number of examples -> checked outputs of the answer.
    """

    check_signature: Callable[[Signature], None]
    answer: Callable[[Mapping[str, np.ndarray], int], dict[str, np.ndarray]]


# By the name that MultiInference gives them.
EXAMPLE_METHODS = {
    "tensorflow/serving/classify": ExampleMethod(check_classify_signature, check_classification),
    "tensorflow/serving/regress": ExampleMethod(check_regress_signature, check_regression),
}
CLASSIFY, REGRESS = EXAMPLE_METHODS.values()


def check_examples(examples: Sequence[bytes]) -> dict[str, np.ndarray]:
    """Makes the input of an `ExampleMethod`.

    Args:
      examples: serialized tf.Examples.

    Returns:
      ``inputs``, an object array [num_examples].

    Raises:
      RequestError: INVALID_ARGUMENT, no examples.
    """
    if not examples:
        raise invalid_argument("the input of Classify and Regress has at least one example. Received: none")
    array = np.empty(len(examples), object)
    array[:] = examples
    return {INPUTS: array}


def check_tasks(tasks: Sequence[tuple[model_pb2.ModelSpec, str]]) -> None:
    """Requires of the tasks of MultiInference one model and different signatures.

    Args:
      tasks: (spec, method name) of each, from the request.

    Raises:
      RequestError: INVALID_ARGUMENT, or UNIMPLEMENTED for a method that does not exist.
    """
    if not tasks:
        raise invalid_argument("a MultiInference request has at least one task. Received: none")
    models = {spec.name for spec, _ in tasks}
    if len(models) > 1:
        raise invalid_argument(f"all tasks must name the same model. Received: {sorted(models)}")
    names = [signature_name(spec) for spec, _ in tasks]
    if len(set(names)) < len(names):
        raise invalid_argument(f"tasks must name different signatures. Received: {names}")
    for _, method in tasks:
        if method not in EXAMPLE_METHODS:
            raise RequestError(
                grpc.StatusCode.UNIMPLEMENTED, f"method_name is one of {list(EXAMPLE_METHODS)}. Received: {method!r}"
            )


def check_same_tensor(loaded: LoadedVersion, tasks: Sequence[tuple[model_pb2.ModelSpec, str]]) -> None:
    """Requires that the signatures of MultiInference read one tensor, since TF Serving feeds only one.

    Args:
      loaded: the version that answers.
      tasks: (spec, method name) of each, as ``check_tasks`` takes them.

    Raises:
      RequestError: INVALID_ARGUMENT.
    """
    names = [signature_name(spec) for spec, _ in tasks]
    declared = [loaded.signature_defs[name] for name in names if name in loaded.signature_defs]
    tensors = {info.name for signature in declared for info in signature.inputs.values()}
    if len(declared) > 1 and len(tensors) > 1:
        raise invalid_argument(
            "the signatures of a MultiInference request must read the same tensor of the graph. "
            f"Received: {names}, which read {sorted(tensors)}"
        )
