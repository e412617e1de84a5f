"""What the server answers, whatever the protocol: gRPC and REST both call `PredictionCore`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2, model_pb2

from export.server.servable import Signature


@dataclasses.dataclass(frozen=True)
class Answer:
    """Outputs of one request, and who gave them; string outputs are object arrays of bytes."""

    outputs: dict[str, np.ndarray]
    model_name: str
    version: int
    signature_name: str


class PredictionCore:
    """Finds the version that a request means, checks the request by TF Serving's rules, batches and runs it."""

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
          output_filter: the outputs wanted; all when empty.
          timeout_seconds: what is left of the client's deadline; None for no deadline.

        Raises:
          RequestError: with TF Serving's code.
        """
        raise NotImplementedError

    async def classify(
        self, spec: model_pb2.ModelSpec, examples: Sequence[bytes], timeout_seconds: float | None = None
    ) -> Answer:
        """Answers Classify: ``classes`` string [batch, C] and/or ``scores`` float32 [batch, C]."""
        raise NotImplementedError

    async def regress(
        self, spec: model_pb2.ModelSpec, examples: Sequence[bytes], timeout_seconds: float | None = None
    ) -> Answer:
        """Answers Regress: ``outputs`` float32 [batch] or [batch, 1]."""
        raise NotImplementedError

    def metadata(self, spec: model_pb2.ModelSpec) -> get_model_metadata_pb2.GetModelMetadataResponse:
        """The signatures of a version, as GetModelMetadata answers ``signature_def``."""
        raise NotImplementedError

    def status(self, spec: model_pb2.ModelSpec) -> get_model_status_pb2.GetModelStatusResponse:
        """The states of the versions of a model, or of one version."""
        raise NotImplementedError
