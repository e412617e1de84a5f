"""Load on a server: many senders for a while, at full speed or at a given rate."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from export.clients.transport import ServingError

_OK = "OK"
Request = TypeVar("Request")


@dataclasses.dataclass(frozen=True)
class LoadResult:
    """Outcome of a run.

    Attributes:
      seconds: from the first request to the last answer.
      codes: number of answers by status code.
      latencies_ms: of the good answers, float64 [num_good], in milliseconds.
      unsent: requests whose set time came and that found no sender until the end; their waiting is in no latency.
    """

    seconds: float
    codes: Counter
    latencies_ms: np.ndarray
    unsent: int = 0

    @property
    def requests_per_second(self) -> float:
        """Good answers a second."""
        return len(self.latencies_ms) / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Everything that was measured, as JSON has it."""
        return {
            "seconds": self.seconds,
            "codes": dict(self.codes),
            "requests_per_second": self.requests_per_second,
            "latency_ms": percentiles(self.latencies_ms),
            "unsent": self.unsent,
        }


def percentiles(latencies_ms: np.ndarray) -> dict[str, float | None]:
    """Returns p50, p90, p99 and max of ``latencies_ms``, each None where there is none."""
    if not len(latencies_ms):
        return dict.fromkeys(("p50", "p90", "p99", "max"))
    found = {f"p{share}": float(np.percentile(latencies_ms, share)) for share in (50, 90, 99)}
    return {**found, "max": float(np.max(latencies_ms))}


def generate_load(
    send: Callable[[Request], Any],
    requests: Sequence[Request],
    *,
    concurrency: int,
    duration_seconds: float,
    rate_per_second: float | None = None,
) -> LoadResult:
    """Sends requests in turn, over and over, from ``concurrency`` threads.

    Without a rate (a closed loop) a sender sends as soon as it has an answer, so a slow server gets fewer requests.
    With one (an open loop) requests have set times, and the latency of one that had to wait for a sender counts from
    its set time: otherwise a server that stalls would hide it (coordinated omission).

    Args:
      send: sends one request and waits for the answer; raises ``ServingError``.
      requests: at least one.
      concurrency: requests in flight, at most.
      duration_seconds: for how long requests are sent; those that are late by then are not.
      rate_per_second: requests a second of all senders together.

    Returns:
      Answers by code, and latencies.
    """
    numbers = itertools.count()  # Counting up is one step of the interpreter: no two senders get the same.
    start = time.monotonic()
    end = start + duration_seconds
    num_due = math.inf if rate_per_second is None else math.ceil(duration_seconds * rate_per_second)

    def sender(_: int) -> list[tuple[str, float]]:
        found = []
        while (moment := time.monotonic()) < end and (number := next(numbers)) < num_due:
            if rate_per_second is not None:
                moment = start + number / rate_per_second
                time.sleep(max(0.0, moment - time.monotonic()))
            found.append((_code_of(send, requests[number % len(requests)]), time.monotonic() - moment))
        return found

    with concurrent.futures.ThreadPoolExecutor(concurrency) as threads:
        answers = list(itertools.chain.from_iterable(threads.map(sender, range(concurrency))))
    seconds = time.monotonic() - start
    latencies = np.array([1000 * latency for code, latency in answers if code == _OK], np.float64)
    unsent = 0 if rate_per_second is None else int(num_due) - len(answers)
    return LoadResult(seconds, Counter(code for code, _ in answers), latencies, unsent)


def _code_of(send: Callable[[Request], Any], request: Request) -> str:
    try:
        send(request)
    except ServingError as error:
        return error.code
    return _OK
