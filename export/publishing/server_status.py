"""Status of a version on a running server, TF Serving or ours, asked over its REST API."""

from __future__ import annotations

import re
import time

from export.clients.rest_transport import RestTransport
from export.clients.transport import Endpoint, ServingError, VersionStatus

TIMEOUT_SECONDS = 600.0
_REQUEST_TIMEOUT_SECONDS = 10.0
_POLL_SECONDS = 1.0


class ServerStatusError(RuntimeError):
    """A server that does not answer, or that cannot load a version."""


def wait_until_available(server: str, name: str, version: int, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    """Waits until the server answers requests with a version.

    Args:
      server: address of its REST API, say http://localhost:8501.
      name: of the model.
      version: that models.config has it load.
      timeout_seconds: a server looks at models.config only now and then, and loading takes time.

    Raises:
      ServerStatusError: no model server answers there, it failed to load the version, or it did not in time.
      ValueError: no http address.
    """
    address = re.fullmatch("http://([^/]+:[0-9]+)/?", server)
    if address is None:
        raise ValueError(f"a server is named by its REST address. Received: {server!r}. Allowed: http://HOST:PORT")
    transport = RestTransport(Endpoint(address[1], name, version, timeout_seconds=_REQUEST_TIMEOUT_SECONDS), 1)
    deadline = time.monotonic() + timeout_seconds
    try:
        while (status := _status(transport, version)).state != "AVAILABLE":
            # END alone may be of the time before: the server unloaded the version and has not read the file again.
            has_failed = status.state == "END" and status.error
            if has_failed or time.monotonic() > deadline:
                raise ServerStatusError(
                    f"version {version} of {name} must be AVAILABLE before a label moves to it. "
                    f"Received from {server}: {status.state}{f', {status.error}' if status.error else ''}"
                    f"{'' if has_failed else f', for {timeout_seconds:g} seconds'}. "
                    "The label has not moved: ask again once the server has it"
                )
            time.sleep(_POLL_SECONDS)
    finally:
        transport.close()


def _status(transport: RestTransport, version: int) -> VersionStatus:
    try:
        statuses = transport.status()
    except ServingError as error:
        if error.code != "NOT_FOUND":
            raise ServerStatusError(f"{error}. The label has not moved") from error
        return VersionStatus(version, error.code)  # The server has not read models.config again.
    return next((status for status in statuses if status.version == version), VersionStatus(version, "UNKNOWN"))
