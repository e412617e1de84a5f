"""The contract of a client's transports: where requests go, what both protocols offer, and how a request fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2

INITIAL_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.1, 2.0
_MAX_ATTEMPTS = 5  # Where gRPC itself stops.
_REMEDIES = {
    "UNAVAILABLE": "Is a server there, does it speak this protocol on that port (gRPC: 8500, REST: 8501), is it full?",
    "RESOURCE_EXHAUSTED": "Send fewer requests at once, or smaller ones",
    "DEADLINE_EXCEEDED": "Allow more time, or send smaller batches",
    "NOT_FOUND": "`python -m export.client status` shows which versions are served",
    "INVALID_ARGUMENT": "The request does not fit the model's signature",
    "FAILED_PRECONDITION": "`python -m export.client status` shows which signatures are served",
}


class ServingError(RuntimeError):
    """A request without an answer.

    Over REST several codes share an HTTP status, and ``code`` is the likeliest: INVALID_ARGUMENT may have been
    FAILED_PRECONDITION, INTERNAL may have been UNKNOWN, UNAVAILABLE may have been RESOURCE_EXHAUSTED.

    Args:
      code: the name of gRPC's status code, over REST as well.
      message: of the server, or of this process where none answered.

    Attributes:
      code: as given.
    """

    def __init__(self, code: str, message: str):
        remedy = _REMEDIES.get(code, "The server's log says more")
        super().__init__(f"the request failed. Received: {code}, {message.rstrip('. ')}. {remedy}")
        self.code = code


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Address of a model on a server, and how long its answers may take.

    Attributes:
      address: ``host:port``.
      model_name: as the server knows the model.
      version, label: of the version that answers; at most one is given. Without: the newest that is served.
      timeout_seconds: for all attempts of a request together, above 0.
      max_attempts: of a request that the server refuses as unavailable or full, in [1, 5].

    Raises:
      ValueError: an attribute out of its range.
    """

    address: str
    model_name: str
    version: int | None = None
    label: str | None = None
    timeout_seconds: float = 10.0
    max_attempts: int = 4

    def __post_init__(self):
        if self.version is not None and self.label is not None:
            raise ValueError(f"a version or a label. Received: version {self.version} and label {self.label}")
        if not 1 <= self.max_attempts <= _MAX_ATTEMPTS:
            raise ValueError(f"max_attempts must be in [1, {_MAX_ATTEMPTS}]. Received: {self.max_attempts}")
        if self.timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds must be above 0. Received: {self.timeout_seconds}")
        if ":" not in self.address or "/" in self.address:
            raise ValueError(f"an address is host:port. Received: {self.address}. Example: localhost:8500")


@dataclasses.dataclass(frozen=True)
class VersionStatus:
    """Status of a version that a server knows.

    Attributes:
      version: its number.
      state: a name of TF Serving's ModelVersionStatus.State, ``AVAILABLE``, ``LOADING``, ...
      error: message; empty if nothing went wrong.
    """

    version: int
    state: str
    error: str = ""


class Transport(Protocol):
    """Calls that both protocols offer. Every method raises ``ServingError``."""

    def predict(self, signature: str, name: str, values: Sequence[bytes], outputs: Sequence[str]) -> dict[str, Any]:
        """Calls a signature that takes one string tensor [batch].

        Args:
          signature: its name.
          name: of the tensor.
          values: of the tensor.
          outputs: wanted ones.

        Returns:
          Output -> array or nested lists. Over REST possibly also other outputs.
        """

    def metadata(self) -> get_model_metadata_pb2.SignatureDefMap:
        """Signatures of the version that answers."""

    def status(self) -> list[VersionStatus]:
        """Versions that the server knows of the model."""

    def close(self) -> None:
        """Closes the connections."""


def statuses_of(response: get_model_status_pb2.GetModelStatusResponse) -> list[VersionStatus]:
    """Returns the versions in ``response``, an answer to GetModelStatus."""
    state_name = get_model_status_pb2.ModelVersionStatus.State.Name
    return [
        VersionStatus(entry.version, state_name(entry.state), entry.status.error_message)
        for entry in response.model_version_status
    ]
