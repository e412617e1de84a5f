"""A server that is overloaded, and one that swaps versions under load: every answer is compared with the right one."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import pathlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from benchmarks.process_tree import resident_mib
from export.clients.load_generator import LoadResult, generate_load
from export.clients.serving_client import ServingClient
from export.clients.transport import Endpoint, ServingError

TOLERANCE = 1e-5  # Batches of other sizes round otherwise.
_SECONDS_BETWEEN_PROBES = 0.01
_MAX_RECOVERY_SECONDS = 10.0
Request = tuple[Sequence[bytes], np.ndarray]  # Serialized tf.Examples, and the ctr of each.


class Checked:
    """A sender that compares every answer with the right one; may be used by several threads."""

    def __init__(self, client: ServingClient):
        self._client = client
        self._differences: list[float] = []  # Appending is one step of the interpreter, adding to a number is not.

    @property
    def wrong(self) -> int:
        """Number of wrong answers."""
        return len(self._differences)

    def __call__(self, request: Request) -> None:
        examples, expected = request
        received = self._client.score_examples(examples)
        difference = float(np.abs(received - expected).max()) if received.shape == expected.shape else np.inf
        if not difference <= TOLERANCE:  # Nor is NaN.
            self._differences.append(difference)


# --- Overload --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Overload:
    """Behavior of a server that gets twice the requests that it can answer.

    Attributes:
      capacity_per_second: requests that it answered while clients waited for their answers.
      load: what came of the requests.
      sent_per_second: requests that were really sent.
      wrong: answers that were not right.
      before_mib, peak_mib: resident memory of its process.
      recovery_seconds: from the end of sending to the first good answer to a request of one row that was sent after
        it; None if there was none in ten seconds.
    """

    capacity_per_second: float
    load: LoadResult
    sent_per_second: float
    wrong: int
    before_mib: float
    peak_mib: float
    recovery_seconds: float | None


def overload(
    endpoint: Endpoint,
    requests: Sequence[Request],
    pid: int,
    *,
    num_clients: int,
    seconds: float,
    capacity_seconds: float,
) -> Overload:
    """Finds the capacity of a server and then sends twice as much.

    Args:
      endpoint: with one attempt for each request.
      requests: are sent over and over.
      pid: of the server's process.
      num_clients: that send at the same time; an eighth of them while the capacity is measured, since they must fit
        into the queue: clients that are refused send again at once, and that costs the server a part of its capacity.
      seconds: of overload.
      capacity_seconds: for which the capacity is measured.
    """
    with ServingClient(endpoint) as client, ServingClient(endpoint) as single:
        send = Checked(client)
        free = generate_load(send, requests, concurrency=num_clients // 8, duration_seconds=capacity_seconds)
        capacity = free.requests_per_second
        before = resident_mib(pid)
        with Probe(lambda: single.score_examples(requests[0][0][:1])) as probe, peak_memory(pid) as peak:
            end = time.monotonic() + seconds
            load = generate_load(
                send, requests, concurrency=num_clients, duration_seconds=seconds, rate_per_second=2 * capacity
            )
            recovery_seconds = probe.seconds_to_answer(end)
    sent = sum(load.codes.values()) / seconds
    return Overload(capacity, load, sent, send.wrong, before, peak[0], recovery_seconds)


class Probe:
    """A thread that sends one small request after the other and keeps when those with a good answer were sent."""

    def __init__(self, send: Callable[[], object]):
        self._send = send
        self._answered: list[tuple[float, float]] = []  # When sent and when answered.
        self._news = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Probe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_SECONDS_BETWEEN_PROBES):
            sent = time.monotonic()
            with contextlib.suppress(ServingError):
                self._send()
                with self._news:
                    self._answered.append((sent, time.monotonic()))
                    self._news.notify_all()

    def seconds_to_answer(self, moment: float) -> float | None:
        """From ``moment`` to the first good answer to a request sent after it; waits for it for ten seconds."""

        def first() -> float | None:
            return next((answered - moment for sent, answered in self._answered if sent >= moment), None)

        with self._news:
            return self._news.wait_for(first, _MAX_RECOVERY_SECONDS)


@contextlib.contextmanager
def peak_memory(pid: int) -> Iterator[list[float]]:
    """Yields a list of one number: the largest resident memory of a process so far, in MiB."""
    peak, stop = [resident_mib(pid)], threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            peak[0] = max(peak[0], resident_mib(pid))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


# --- Swap ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Swap:
    """Outcome of the requests while a new version appeared, and the versions that were served in the end."""

    load: LoadResult
    wrong: int
    served: tuple[int, ...]

    @property
    def failed(self) -> int:
        """Requests without the right answer."""
        return sum(self.load.codes.values()) - self.load.codes["OK"] + self.wrong


def swap(
    endpoint: Endpoint,
    requests: Sequence[Request],
    old: pathlib.Path,
    new: pathlib.Path,
    *,
    num_clients: int,
    seconds: float,
    rate_per_second: float,
) -> Swap:
    """Copies version ``old`` to ``new``, after a quarter of the time for which requests are sent at a rate."""

    def publish() -> None:
        time.sleep(seconds / 4)
        staging = new.with_name(f".{new.name}.incomplete")
        shutil.copytree(old, staging)
        staging.rename(new)

    with ServingClient(endpoint) as client, concurrent.futures.ThreadPoolExecutor(1) as publisher:
        send, published = Checked(client), publisher.submit(publish)
        load = generate_load(
            send, requests, concurrency=num_clients, duration_seconds=seconds, rate_per_second=rate_per_second
        )
        published.result()
        served = tuple(status.version for status in client.status() if status.state == "AVAILABLE")
    return Swap(load, send.wrong, served)
