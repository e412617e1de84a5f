"""Findings of rules, and the sentences that tell them."""

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
    """Returns a pass that tells what was ``found``."""
    return Finding("pass", found)


def warned(found: str) -> Finding:
    """Returns a warning that tells what was ``found``."""
    return Finding("warning", found)


def failed(found: str) -> Finding:
    """Returns a failure that tells what was ``found``."""
    return Finding("fail", found)


def judged(problems: Sequence[str], otherwise: str) -> Finding:
    """Judges by the number of problems.

    Args:
      problems: a sentence each.
      otherwise: what was found if there are none.

    Returns:
      A failure that lists the problems, or a pass that says ``otherwise``.
    """
    return failed(listed(problems, "; ")) if problems else passed(otherwise)


def listed(names: Iterable[str], separator: str = ", ") -> str:
    """Joins the first names, printable, and says how many more there are.

    Args:
      names: any number.
      separator: between two.

    Returns:
      One line; "" without names.
    """
    names = [name if name.isprintable() else repr(name) for name in names]
    more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return separator.join([*names[:_SHOWN], *more])


def reason_of(error: Exception, *, private: bool = False) -> str:
    """Words an error in one line.

    Args:
      error: of TensorFlow, mostly.
      private: the inputs were recorded from users. TensorFlow's messages quote values, so only the kind of error and
        the graph's node are told.

    Returns:
      The kind of error and, unless private, its reason.
    """
    message = str(error).strip()
    if private:
        node = re.search(r"\{\{node ([^}]+)\}\}", message)
        return type(error).__name__ + (f" at node {node[1]}" if node else "")
    lines = [line.strip() for line in message.splitlines()]
    reasons = [line for line in lines if line and not line.startswith(_NO_REASON)] or ["no message"]
    return f"{type(error).__name__}: {reasons[0][:_REASON_LENGTH]}"
