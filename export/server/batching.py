"""Dynamic batching: requests that wait while the models are busy run together, in one call of the signature.

Everything here but `_run` happens in the event loop's thread, so there are no locks.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence

import grpc
import numpy as np

from export.servable.batching_parameters import BATCHING_FILE, DEFAULT_MAX_BATCH_SIZE, read_batching_parameters
from export.server.errors import RequestError, invalid_argument
from export.server.loaded_version import LoadedVersion, Signature
from export.server.metrics import Metrics
from export.server.model_threads import ModelThreads
from export.server.tensor_protos import num_bytes

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class BatchingOptions:
    """Limits of one signature's batches; None leaves a number to the version's batching_params.pbtxt.

    Attributes:
      max_batch_size: rows that run together, >= 1; a larger request runs alone, in slices of this size where the
        signature allows it. 1000 by default, as in TF Serving.
      batch_timeout_seconds: how long rows wait for others, >= 0; 0 by default: only while the models are busy.
      max_enqueued_batches: batches of max_batch_size that may wait, >= 1; beyond them requests are refused. 64 by
        default. No request may have more rows than all of them.
    """

    max_batch_size: int | None = None
    batch_timeout_seconds: float | None = None
    max_enqueued_batches: int | None = None

    def or_else(self, others: BatchingOptions) -> BatchingOptions:
        """Returns these numbers, and those of ``others`` where these are None."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return dataclasses.replace(others, **given)


# TF Serving's queue of 10 batches would be full while a version loads, which takes time from requests here.
_DEFAULTS = BatchingOptions(DEFAULT_MAX_BATCH_SIZE, 0.0, 64)
_MAX_QUEUED_REQUEST_SIZES = 4  # The bytes that wait for a signature, in requests of the largest size.


def version_options(version: pathlib.Path, flags: BatchingOptions) -> BatchingOptions:
    """Chooses the options of a version: flags first, then its batching_params.pbtxt, then the defaults.

    Args:
      version: its directory.
      flags: of the server; None for a number that is not set.

    Returns:
      Options, none of them None.

    Raises:
      ValueError: the file is not a BatchingParameters text proto.
    """
    file = version / BATCHING_FILE
    if not file.is_file():
        return flags.or_else(_DEFAULTS)
    read = read_batching_parameters(file)

    def number(name: str) -> int | None:
        return getattr(read, name).value if read.HasField(name) else None

    micros = number("batch_timeout_micros")
    timeout = None if micros is None else micros / 1e6
    stored = BatchingOptions(number("max_batch_size"), timeout, number("max_enqueued_batches"))
    return flags.or_else(stored.or_else(_DEFAULTS))


@dataclasses.dataclass(eq=False)
class _Waiting:
    inputs: Arrays
    rows: int
    num_bytes: int
    deadline: float  # In time.monotonic() seconds; inf for none.
    result: asyncio.Future


class SignatureQueue:
    """The requests of one signature of one version.

    Args:
      version: that answers.
      signature: of the version.
      options: none of them None.
      max_request_bytes: of a joined batch, too; four times as many may wait.
      threads: shared by all queues of the server.
      metrics: told of batches and of the queue's length.
    """

    def __init__(
        self,
        version: LoadedVersion,
        signature: Signature,
        options: BatchingOptions,
        max_request_bytes: int,
        threads: ModelThreads,
        metrics: Metrics,
    ):
        self._version = version
        self._signature = signature
        assert options.max_batch_size is not None, "of version_options"
        assert options.max_enqueued_batches is not None, "of version_options"
        self._max_batch_size = options.max_batch_size
        self._max_queued_rows = options.max_batch_size * options.max_enqueued_batches
        self._timeout_seconds = options.batch_timeout_seconds
        self._max_request_bytes = max_request_bytes
        self._threads = threads
        self._metrics = metrics
        self._queued_rows = self._queued_bytes = 0
        self._turns = 0  # Asked for and not yet taken.
        # One queue per trailing shapes, since only such rows can be joined. The first is served first.
        self._queues: collections.OrderedDict[tuple, collections.deque[_Waiting]] = collections.OrderedDict()

    @property
    def is_full(self) -> bool:
        """True where any request would be refused."""
        return self._queued_rows >= self._max_queued_rows or self._queued_bytes >= self._max_queued_bytes

    @property
    def _max_queued_bytes(self) -> int:
        return _MAX_QUEUED_REQUEST_SIZES * self._max_request_bytes

    async def run(self, inputs: Arrays, rows: int, deadline: float) -> dict[str, np.ndarray]:
        """Runs a request, with others when it has to wait.

        Args:
          inputs: checked arrays.
          rows: of the request.
          deadline: in ``time.monotonic()`` seconds, inf for none; a request that waits longer is not run.

        Returns:
          Output -> array; object arrays of bytes for strings.

        Raises:
          RequestError: INVALID_ARGUMENT, more rows than can ever wait; RESOURCE_EXHAUSTED, the queue is full;
            DEADLINE_EXCEEDED.
          Exception: what the signature raised for this request.
        """
        rows = max(rows, 1)  # A request without rows takes a place, too.
        if rows > self._max_queued_rows:
            raise invalid_argument(
                f"a request may have {self._max_queued_rows} rows, max_batch_size times max_enqueued_batches. "
                f"Received: {rows}. Send several requests, or raise --max_batch_size"
            )
        size = sum(map(num_bytes, inputs.values()))
        has_room = self._queued_rows + rows <= self._max_queued_rows
        if not has_room or (self._queued_bytes and self._queued_bytes + size > self._max_queued_bytes):
            raise self.refusal()
        waiting = _Waiting(inputs, rows, size, deadline, asyncio.get_running_loop().create_future())
        self._queues.setdefault(self._joinable(inputs), collections.deque()).append(waiting)
        self._count(waiting, 1)
        if self._timeout_seconds and self._queued_rows < self._max_batch_size:
            asyncio.get_running_loop().call_later(self._timeout_seconds, self._ask_for_turn)
        else:
            self._ask_for_turn()
        return await waiting.result

    def refusal(self) -> RequestError:
        """Counts and words a refusal."""
        self._metrics.count_refused(self._version.model_name)
        return RequestError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"the queue of model {self._version.model_name!r} is full. Try again later, or raise max_enqueued_batches",
        )

    def _joinable(self, inputs: Arrays) -> tuple:
        if not self._signature.is_batchable:
            return (object(),)  # Equal to nothing else: runs alone.
        return tuple(array.shape[1:] for _, array in sorted(inputs.items()))

    def _count(self, waiting: _Waiting, sign: int) -> None:
        """Counts a request that joins the queue (1) or leaves it (-1)."""
        self._queued_rows += sign * waiting.rows
        self._queued_bytes += sign * waiting.num_bytes
        self._metrics.add_queued_rows(self._version.model_name, self._signature.name, sign * waiting.rows)

    def _ask_for_turn(self) -> None:
        if self._turns < len(self._queues):
            self._turns += 1
            self._threads.request_turn(self._take_turn)

    def _take_turn(self) -> bool:
        self._turns -= 1
        batch = self._next_batch()
        if not batch:
            return False
        if self._queues:
            self._ask_for_turn()
        self._metrics.observe_batch(self._version.model_name, self._signature.name, sum(one.rows for one in batch))
        self._threads.run(lambda: self._run([one.inputs for one in batch]), lambda future: _deliver(batch, future))
        return True

    def _next_batch(self) -> list[_Waiting]:
        """Takes requests from the first queue, up to the largest batch, but none that nobody waits for any more."""
        batch: list[_Waiting] = []
        rows = size = 0
        now = time.monotonic()
        while self._queues and not batch:
            key, queue = self._queues.popitem(last=False)
            while queue and (not batch or self._fits(rows + queue[0].rows, size + queue[0].num_bytes)):
                waiting = queue.popleft()
                self._count(waiting, -1)
                if waiting.result.done():  # The client went away.
                    continue
                if waiting.deadline <= now:
                    waiting.result.set_exception(_deadline_exceeded())
                    continue
                batch.append(waiting)
                rows += waiting.rows
                size += waiting.num_bytes
            if queue:
                self._queues[key] = queue  # To the end: other shapes are next.
        return batch

    def _fits(self, rows: int, size: int) -> bool:
        return rows <= self._max_batch_size and size <= self._max_request_bytes

    def _run(self, requests: Sequence[Arrays]) -> list[dict[str, np.ndarray] | Exception]:
        """In a model thread: what each request gets. A request that fails must not fail its neighbors."""
        try:
            if len(requests) == 1:
                return [self._run_sliced(requests[0])]
            return self._run_joined(requests)
        except Exception as error:  # Whatever it is, it belongs to one request.
            if len(requests) == 1:
                return [error]
            half = len(requests) // 2
            return self._run(requests[:half]) + self._run(requests[half:])

    def _run_sliced(self, request: Arrays) -> dict[str, np.ndarray]:
        """A request beyond max_batch_size takes no more memory at a time than a batch."""
        limit = self._max_batch_size
        if not self._signature.is_sliceable or _num_rows(request) <= limit:
            return self._version.run(self._signature.name, request)
        slices = [
            self._run_rows({name: array[start : start + limit] for name, array in request.items()})
            for start in range(0, _num_rows(request), limit)
        ]
        return {name: np.concatenate([outputs[name] for outputs in slices]) for name in slices[0]}

    def _run_joined(self, requests: Sequence[Arrays]) -> list[dict[str, np.ndarray] | Exception]:
        outputs = self._run_rows(
            {name: np.concatenate([request[name] for request in requests]) for name in requests[0]}
        )
        ends = np.cumsum(list(map(_num_rows, requests))).tolist()
        starts = [0, *ends[:-1]]
        return [
            {name: array[start:end] for name, array in outputs.items()} for start, end in zip(starts, ends, strict=True)
        ]

    def _run_rows(self, inputs: Arrays) -> dict[str, np.ndarray]:
        outputs = self._version.run(self._signature.name, inputs)
        if any(len(array) != _num_rows(inputs) for array in outputs.values()):
            raise ValueError("the signature does not give one output row per input row")
        return outputs


def _num_rows(inputs: Arrays) -> int:
    return len(next(iter(inputs.values())))


def _deliver(batch: Sequence[_Waiting], future: concurrent.futures.Future) -> None:
    for waiting, result in zip(batch, future.result(), strict=True):
        if waiting.result.done():
            continue
        if isinstance(result, Exception):
            waiting.result.set_exception(result)
        else:
            waiting.result.set_result(result)


def _deadline_exceeded() -> RequestError:
    return RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed while the request was waiting")
