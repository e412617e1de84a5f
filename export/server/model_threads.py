"""The threads in which models run, so that the event loop never waits for one."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
from collections.abc import Callable


class ModelThreads:
    """The threads in which models run, given to queues in turn.

    Args:
      num_threads: calls of signatures that run at the same time, >= 1.
    """

    def __init__(self, num_threads: int):
        self._pool = concurrent.futures.ThreadPoolExecutor(num_threads, thread_name_prefix="model")
        self._free = num_threads
        self._waiting: collections.deque[Callable[[], bool]] = collections.deque()

    def request_turn(self, start: Callable[[], bool]) -> None:
        """Asks for a thread, now or as soon as one is free.

        Args:
          start: is called then, in the event loop; returns whether it called `run`.
        """
        self._waiting.append(start)
        if self._free:
            self._free -= 1
            self._next_turn()

    def run(self, work: Callable[[], object], done: Callable[[concurrent.futures.Future], None]) -> None:
        """Uses the thread of this turn.

        Args:
          work: is called in the thread.
          done: gets the future of ``work``, in the event loop.
        """
        loop = asyncio.get_running_loop()

        def finish(future: concurrent.futures.Future) -> None:
            self._next_turn()
            done(future)

        self._pool.submit(work).add_done_callback(lambda future: loop.call_soon_threadsafe(finish, future))

    def _next_turn(self) -> None:
        while self._waiting:
            if self._waiting.popleft()():
                return
        self._free += 1

    def close(self) -> None:
        """Waits for what runs."""
        self._pool.shutdown()
