"""Rules, and the decorators that make them of functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from export.contract_rules.findings import Finding
from export.contract_rules.version import Base, Version


@dataclasses.dataclass(frozen=True)
class Rule:
    """One thing that a servable must be or do.

    Attributes:
      id: a word for scripts; the name of the function.
      subject: what ``check`` looks at.
      title: the rule as a sentence.
      why: what goes wrong otherwise, with the TF Serving source where it is seen.
      check: ``Base`` or ``Version`` -> Finding; may raise NotApplicable.
    """

    id: str
    subject: Literal["base", "version"]
    title: str
    why: str
    check: Callable[..., Finding]


def base_rule(*, title: str, why: str) -> Callable[[Callable[[Base], Finding]], Rule]:
    """Makes a function ``Base -> Finding`` a rule of a model's base directory.

    Args:
      title: the rule as a sentence.
      why: what goes wrong otherwise, with the TF Serving source where it is seen.

    Returns:
      The decorator.
    """
    return lambda check: Rule(check.__name__, "base", title, why, check)


def version_rule(*, title: str, why: str) -> Callable[[Callable[[Version], Finding]], Rule]:
    """Makes a function ``Version -> Finding`` a rule of one version.

    Args:
      title: the rule as a sentence.
      why: what goes wrong otherwise, with the TF Serving source where it is seen.

    Returns:
      The decorator.
    """
    return lambda check: Rule(check.__name__, "version", title, why, check)
