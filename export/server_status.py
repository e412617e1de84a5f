"""Asks a running server, TF Serving's REST API or ours, whether it has loaded a version."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request

TIMEOUT_SECONDS = 600.0
_REQUEST_TIMEOUT_SECONDS = 10.0
_POLL_SECONDS = 1.0


class ServerStatusError(RuntimeError):
    """A server that does not answer, or that cannot load a version."""


def wait_until_available(server: str, name: str, version: int, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    """Returns once the server answers requests with a version.

    Args:
      server: address of its REST API, say http://localhost:8501.
      name: of the model.
      version: that models.config has it load.
      timeout_seconds: a server looks at models.config only now and then, and loading takes time.

    Raises:
      ServerStatusError: not in time; says what the server said last.
      ValueError: no http address.
    """
    if not server.startswith(("http://", "https://")):
        raise ValueError(f"a server is named by its REST address. Received: {server!r}. Allowed: http://HOST:PORT")
    url = f"{server.rstrip('/')}/v1/models/{name}/versions/{version}"
    deadline = time.monotonic() + timeout_seconds
    while (state := _state(url)) != "AVAILABLE":
        if time.monotonic() > deadline:
            raise ServerStatusError(
                f"version {version} of {name} must be AVAILABLE before a label moves to it. Received: {state} from "
                f"{url} for {timeout_seconds:g} seconds. The label has not moved: ask again once the server has it"
            )
        time.sleep(_POLL_SECONDS)


def _state(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=_REQUEST_TIMEOUT_SECONDS) as answer:
            return str(json.load(answer)["model_version_status"][0]["state"])
    except urllib.error.HTTPError as error:  # 404: the server has not read models.config again.
        return f"HTTP status {error.code}"
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        return f"no status ({type(error).__name__})"
