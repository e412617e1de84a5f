"""The local server as a whole: gRPC and REST in one event loop, in a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import os
import pathlib
import socket
import threading
from collections.abc import Iterator

import uvicorn
from absl import logging

from export.server.aspired_versions import read_aspired_versions
from export.server.batching import BatchingOptions
from export.server.core import PredictionCore, ServedVersion
from export.server.grpc_api import GrpcServer
from export.server.metrics import Metrics
from export.server.model_threads import ModelThreads
from export.server.request_log import RequestLog
from export.server.rest_api import rest_app
from export.server.version_manager import VersionManager


class LocalServer:
    """Serves a servable directory on this machine; for development and tests. A context manager.

    Args:
      servable_dir: holds models.config, or one directory per model with numbered versions.
      host: the address to listen on.
      grpc_port: 0 takes any free port.
      rest_port: the same.
      batching: limits of batches; by default those of each version.
      num_threads: calls of models at the same time, >= 1; the number of cores by default.
      poll_seconds: how often the directory is looked at.
      max_request_bytes: larger requests are refused.
      grace_seconds: how long requests may take to finish when the server stops.
      rest_timeout_seconds: for a request over REST, its body included; gRPC's clients give their own.
      request_log: gets answered requests; closed by the caller, after the server.

    Attributes:
      grpc_address, rest_address: host:port, once started.
      manager: of the versions that are served.
    """

    def __init__(
        self,
        servable_dir: pathlib.Path,
        *,
        host: str = "127.0.0.1",
        grpc_port: int = 0,
        rest_port: int = 0,
        batching: BatchingOptions | None = None,
        num_threads: int | None = None,
        poll_seconds: float = 1.0,
        max_request_bytes: int = 16 << 20,
        grace_seconds: float = 10.0,
        rest_timeout_seconds: float = 30.0,
        request_log: RequestLog | None = None,
    ):
        self._servable_dir = servable_dir
        self._host = host
        self._ports = grpc_port, rest_port
        self._poll_seconds = poll_seconds
        self._max_request_bytes = max_request_bytes
        self._grace_seconds = grace_seconds
        self._rest_timeout_seconds = rest_timeout_seconds
        self._metrics = Metrics()
        self._threads = ModelThreads(num_threads or os.cpu_count() or 1)
        self.manager: VersionManager[ServedVersion] = VersionManager(
            servable_dir,
            functools.partial(
                ServedVersion,
                batching=batching or BatchingOptions(),
                max_request_bytes=max_request_bytes,
                threads=self._threads,
                metrics=self._metrics,
            ),
        )
        self._core = PredictionCore(self.manager, request_log)
        self._started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_requested = asyncio.Event()
        self._failure: Exception | None = None
        self.grpc_address = self.rest_address = ""

    def __enter__(self) -> LocalServer:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.request_stop()
        self.join()

    def start(self) -> None:
        """Returns when both protocols answer and every model that can be loaded is loaded.

        Raises:
          FileNotFoundError: no such directory.
          ValueError: a broken models.config, or a port that is taken.
        """
        read_aspired_versions(self._servable_dir)  # Later a broken models.config is only logged.
        self._thread.start()
        self._started.result()

    def request_stop(self) -> None:
        """Asks the server to stop: no new requests, and the running ones have grace_seconds to finish."""
        self.manager.stop()
        with contextlib.suppress(RuntimeError):  # It has stopped already.
            assert self._loop is not None, "started"
            self._loop.call_soon_threadsafe(self._stop_requested.set)

    def join(self) -> None:
        """Waits until the server has stopped.

        Raises:
          Exception: what ended the server, unless it was asked to stop.
        """
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:
            if self._started.done():
                self._failure = error
            else:
                self._started.set_exception(error)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        grpc_port, rest_port = self._ports
        grpc_server = GrpcServer(self._core, self._metrics, _address(self._host, grpc_port), self._max_request_bytes)
        http_server = _HttpServer(
            rest_app(self._core, self._metrics, self._max_request_bytes, self._rest_timeout_seconds),
            self._host,
            rest_port,
            self._grace_seconds,
        )
        self.grpc_address = _address(self._host, grpc_server.port)
        self.rest_address = _address(self._host, http_server.port)
        # Before anyone is answered: a client that is early would be told "no such model".
        await self._poll(grpc_server)
        await grpc_server.start()
        serving_http = asyncio.create_task(http_server.serve())
        self._started.set_result(None)
        polling = asyncio.create_task(self._poll_until_stopped(grpc_server))
        await self._stop_requested.wait()
        http_server.should_exit = True
        await asyncio.gather(grpc_server.stop(self._grace_seconds), serving_http)
        await polling  # A version that loads cannot be interrupted.
        await asyncio.to_thread(self._threads.close)  # What runs still tells this loop that it ended.

    async def _poll_until_stopped(self, grpc_server: GrpcServer) -> None:
        while not self._stop_requested.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stop_requested.wait(), self._poll_seconds)
                break
            await self._poll(grpc_server)

    async def _poll(self, grpc_server: GrpcServer) -> None:
        try:
            await asyncio.to_thread(self.manager.poll)
        except Exception:  # Say, a directory that went away while it was read. The next poll tells.
            logging.exception("the servable directory could not be followed")
        versions = self.manager.versions()
        self._metrics.set_served(versions)
        await grpc_server.set_serving(bool(versions))


class _HttpServer(uvicorn.Server):
    """uvicorn on a port that is taken when this is made."""

    def __init__(self, app, host: str, port: int, grace_seconds: float):
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host, port), family=family, backlog=1024)
        except OSError as error:
            raise ValueError(f"the REST address must be free. Received: {_address(host, port)}: {error}") from error
        # Connections inherit it. asyncio sets it on sockets that name TCP, which those of create_server do not: without
        # it each answer waits 40 ms for the client to confirm its headers.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port: int = self._socket.getsockname()[1]
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                ws="none",
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=max(1, round(grace_seconds)),
            )
        )

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        await super().serve([self._socket])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # Signals are the command's.


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
