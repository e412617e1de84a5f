"""SIGTERM: how a machine that is taken away ends a run between two steps, with its state saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL, "try again". 143 (128 + SIGTERM) is also what a process leaves that died unsaved.


class TrainingInterruptedError(Exception):
    """SIGTERM ended training; what is needed to go on is saved. Commands end with its message and ``EXIT_CODE``."""


class Sigterm:
    """Notes SIGTERM instead of dying by it, as long as the context lasts.

    SIGINT keeps its meaning: someone at a terminal waits for the end, and a shell stops its loop only if the command
    died by the signal. One that comes too late for anyone to look at ``received`` is passed on.
    """

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> Sigterm:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(handling_sigterm(self._note))
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: Any) -> None:
        self._stack.close()
        if self.received and error_type is None:
            signal.raise_signal(signal.SIGTERM)

    def _note(self, *_: Any) -> None:
        self.received = True


@contextlib.contextmanager
def handling_sigterm(handler: Callable[..., None]) -> Iterator[None]:
    """Calls ``handler`` on SIGTERM, and puts back what was there before.

    Does nothing where Python cannot: outside the main thread, and where another language has set the handler.

    Args:
      handler: takes the signal's number and the frame that it interrupts.

    Yields:
      Once, with the handler in place.
    """
    before = signal.getsignal(signal.SIGTERM)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
