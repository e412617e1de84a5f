"""Answers to requests, whatever the protocol: gRPC and REST both call `PredictionCore`."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2, model_pb2

from export.server.batching import BatchingOptions, SignatureQueue, version_options
from export.server.checks import (
    CLASSIFY,
    EXAMPLE_METHODS,
    REGRESS,
    ExampleMethod,
    check_examples,
    check_inputs,
    check_output_filter,
    check_same_tensor,
    check_tasks,
    signature_name,
)
from export.server.errors import RequestError, internal_error, invalid_argument
from export.server.loaded_version import LoadedVersion, Signature
from export.server.metrics import Metrics
from export.server.model_threads import ModelThreads
from export.server.request_log import RequestLog
from export.server.version_manager import VersionManager
from export.server.warmup_replay import replay_warmup_requests

# TensorFlow's words for the feature of a tf.Example that it cannot use. Its other words may quote the request.
_FEATURE = re.compile(r"^Name: <unknown>, (?:Feature|Key): (\w{1,100})", re.MULTILINE)

# What graphs raise for values that they do not take; DataLossError is that of decode_proto, in `rank`.
_REFUSALS = (tf.errors.InvalidArgumentError, tf.errors.OutOfRangeError, tf.errors.DataLossError)


@dataclasses.dataclass(frozen=True)
class Answer:
    """Answer to one request.

    Attributes:
      outputs: output -> array; object arrays of bytes for strings.
      model_name, version, signature_name: of what answered.
    """

    outputs: dict[str, np.ndarray]
    model_name: str
    version: int
    signature_name: str


class ServedVersion:
    """A loaded version that has replayed its warm-up requests, with a queue for each signature.

    Args:
      path: the version's directory.
      model_name: as requests give it.
      batching: limits of batches; None leaves a number to the version.
      max_request_bytes: of a batch, too.
      threads: shared by all queues of the server.
      metrics: told of batches and of the queues' lengths.

    Attributes:
      loaded: the model.
      queues: signature name -> queue.

    Raises:
      Exception: whatever is wrong with the files, the model or its warm-up requests.
    """

    def __init__(
        self,
        path: pathlib.Path,
        model_name: str,
        *,
        batching: BatchingOptions,
        max_request_bytes: int,
        threads: ModelThreads,
        metrics: Metrics,
    ):
        options = version_options(path, batching)
        self.loaded = LoadedVersion(path, model_name)
        replay_warmup_requests(self.loaded)
        self.queues = {
            name: SignatureQueue(self.loaded, signature, options, max_request_bytes, threads, metrics)
            for name, signature in self.loaded.signatures.items()
        }


class PredictionCore:
    """Finds the version that a request means, checks the request by TF Serving's rules, batches and runs it.

    Its coroutines all run in one event loop.

    Args:
      manager: of the versions.
      request_log: gets every answered request; None for no log.
    """

    def __init__(self, manager: VersionManager[ServedVersion], request_log: RequestLog | None = None):
        self._manager = manager
        self.request_log = request_log

    async def predict(
        self,
        spec: model_pb2.ModelSpec,
        inputs_of: Callable[[Signature], Mapping[str, np.ndarray]],
        output_filter: Sequence[str] = (),
        timeout_seconds: float | None = None,
    ) -> Answer:
        """Answers Predict.

        Args:
          spec: model, version or label, and signature; no signature means serving_default.
          inputs_of: converts the request to arrays for the signature; raises RequestError that names the field.
          output_filter: outputs that the client asks for; empty for all.
          timeout_seconds: what is left of the client's deadline; None for no deadline.

        Returns:
          The filtered outputs.

        Raises:
          RequestError: with TF Serving's code.
        """
        with self._manager.lease(spec) as served:
            name = signature_name(spec)
            if name not in served.loaded.signatures:
                raise RequestError(grpc.StatusCode.FAILED_PRECONDITION, f'Serving signature key "{name}" not found.')
            signature = served.loaded.signatures[name]
            check_output_filter(signature, output_filter)
            outputs = await self._run(served, signature, inputs_of, timeout_seconds)
            wanted = {output: outputs[output] for output in output_filter} if output_filter else outputs
            return _answer(served, signature, wanted)

    async def classify(
        self, spec: model_pb2.ModelSpec, examples: Sequence[bytes], timeout_seconds: float | None = None
    ) -> Answer:
        """Answers Classify.

        Args:
          spec: as in `predict`.
          examples: serialized tf.Examples.
          timeout_seconds: as in `predict`.

        Returns:
          ``classes``, bytes [num_examples, num_classes], and/or ``scores``, float32 of the same shape.

        Raises:
          RequestError: with TF Serving's code.
        """
        with self._manager.lease(spec) as served:
            return await self._infer(served, spec, CLASSIFY, examples, timeout_seconds)

    async def regress(
        self, spec: model_pb2.ModelSpec, examples: Sequence[bytes], timeout_seconds: float | None = None
    ) -> Answer:
        """Answers Regress.

        Args:
          spec: as in `predict`.
          examples: serialized tf.Examples.
          timeout_seconds: as in `predict`.

        Returns:
          ``outputs``, float32 [num_examples] or [num_examples, 1].

        Raises:
          RequestError: with TF Serving's code.
        """
        with self._manager.lease(spec) as served:
            return await self._infer(served, spec, REGRESS, examples, timeout_seconds)

    async def multi_inference(
        self,
        tasks: Sequence[tuple[model_pb2.ModelSpec, str]],
        examples: Sequence[bytes],
        timeout_seconds: float | None = None,
    ) -> list[Answer]:
        """Answers MultiInference: several signatures of one version, by the same examples.

        Args:
          tasks: specs of one model, each with a method: tensorflow/serving/classify or tensorflow/serving/regress.
          examples: serialized tf.Examples.
          timeout_seconds: as in `predict`.

        Returns:
          An answer per task.

        Raises:
          RequestError: with TF Serving's code. As there, the signatures must read the same tensor of the graph, so two
            signatures that TensorFlow 2 saved never go together.
        """
        check_tasks(tasks)
        with self._manager.lease(tasks[0][0]) as served:
            check_same_tensor(served.loaded, tasks)
            return [
                await self._infer(served, spec, EXAMPLE_METHODS[method], examples, timeout_seconds)
                for spec, method in tasks
            ]

    def metadata(self, spec: model_pb2.ModelSpec) -> get_model_metadata_pb2.GetModelMetadataResponse:
        """Answers GetModelMetadata of ``signature_def``.

        Args:
          spec: model, and version or label.

        Returns:
          The signatures of the version.

        Raises:
          RequestError: no such version.
        """
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        with self._manager.lease(spec) as served:
            response.model_spec.name = served.loaded.model_name
            response.model_spec.version.value = served.loaded.version
            signatures = get_model_metadata_pb2.SignatureDefMap()
            for name, declared in served.loaded.signature_defs.items():
                signatures.signature_def[name].CopyFrom(declared)
        response.metadata["signature_def"].Pack(signatures)
        return response

    def status(self, spec: model_pb2.ModelSpec) -> get_model_status_pb2.GetModelStatusResponse:
        """Answers GetModelStatus.

        Args:
          spec: model, and version or label; without, all versions are meant.

        Returns:
          State and error of each version.

        Raises:
          RequestError: no such model or version.
        """
        response = get_model_status_pb2.GetModelStatusResponse()
        for number, state in self._manager.states(spec).items():
            status = response.model_version_status.add(version=number, state=state.state)
            if state.error:
                status.status.error_code = grpc.StatusCode.UNKNOWN.value[0]
            status.status.error_message = state.error
        return response

    async def _infer(
        self,
        served: ServedVersion,
        spec: model_pb2.ModelSpec,
        method: ExampleMethod,
        examples: Sequence[bytes],
        timeout_seconds: float | None,
    ) -> Answer:
        name = signature_name(spec)
        if name not in served.loaded.signatures:
            raise invalid_argument(f"No signature was found with the name: {name}")
        signature = served.loaded.signatures[name]
        method.check_signature(signature)
        outputs = await self._run(served, signature, lambda _: check_examples(examples), timeout_seconds)
        return _answer(served, signature, method.answer(outputs, len(examples)))

    async def _run(
        self,
        served: ServedVersion,
        signature: Signature,
        inputs_of: Callable[[Signature], Mapping[str, np.ndarray]],
        timeout_seconds: float | None,
    ) -> dict[str, np.ndarray]:
        queue = served.queues[signature.name]
        if queue.is_full:  # Asked before the request is converted: a refusal must cost little.
            raise queue.refusal()
        deadline = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
        inputs = signature.defaults | dict(inputs_of(signature))
        rows = check_inputs(signature, inputs)
        try:
            outputs = await queue.run(inputs, rows, deadline)
        except RequestError:
            raise
        except _REFUSALS as error:
            raise _refused_by_the_graph(signature, error) from None
        except Exception as error:
            raise internal_error(error) from None
        if self.request_log is not None:
            self.request_log.record(served.loaded, signature.name, inputs)
        return outputs


def _answer(served: ServedVersion, signature: Signature, outputs: dict[str, np.ndarray]) -> Answer:
    return Answer(outputs, served.loaded.model_name, served.loaded.version, signature.name)


def _refused_by_the_graph(signature: Signature, error: tf.errors.OpError) -> RequestError:
    feature = _FEATURE.search(error.message)
    at = f", feature {feature[1]!r}," if feature else ""
    names = ", ".join(repr(name) for name in signature.inputs)
    return invalid_argument(
        f"the model cannot read input {names}{at} of signature {signature.name!r}. Received: values that it refuses. "
        "Allowed: what the signature and its tf.Example features declare"
    )
