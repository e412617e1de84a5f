"""What a rule finds, and how it is said."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Literal

Status = Literal["pass", "warning", "fail", "not applicable"]
_SHOWN = 8
_REASON_LENGTH = 300
# Lines before the reason in what TensorFlow says of an error inside a graph.
_NO_REASON = ("Graph execution error", "Detected at node", "<stack traces", "File ", "Node: ", "2 root error")


@dataclasses.dataclass(frozen=True)
class Finding:
    """The outcome of one rule, and what was found or, if it does not apply, the reason."""

    status: Status
    found: str


class NotApplicable(Exception):  # noqa: N818 - no error: the rule has nothing to look at.
    """A rule that cannot be checked here; the message is the reason."""


def passed(found: str) -> Finding:
    return Finding("pass", found)


def warned(found: str) -> Finding:
    return Finding("warning", found)


def failed(found: str) -> Finding:
    return Finding("fail", found)


def judged(problems: Sequence[str], otherwise: str) -> Finding:
    """A failure that lists the problems, or a pass that says ``otherwise``."""
    return failed(listed(problems, "; ")) if problems else passed(otherwise)


def listed(names: Iterable[str], separator: str = ", ") -> str:
    """The first names, printable, and how many more there are."""
    names = [name if name.isprintable() else repr(name) for name in names]
    more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return separator.join([*names[:_SHOWN], *more])


def reason_of(error: Exception, *, private: bool = False) -> str:
    """One line that says why a call failed.

    Args:
      error: of TensorFlow, mostly.
      private: the inputs were recorded from users. TensorFlow's messages quote values, so only the kind of error and
        the graph's node are told.
    """
    message = str(error).strip()
    if private:
        node = re.search(r"\{\{node ([^}]+)\}\}", message)
        return type(error).__name__ + (f" at node {node[1]}" if node else "")
    lines = [line.strip() for line in message.splitlines()]
    reasons = [line for line in lines if line and not line.startswith(_NO_REASON)] or ["no message"]
    return f"{type(error).__name__}: {reasons[0][:_REASON_LENGTH]}"
