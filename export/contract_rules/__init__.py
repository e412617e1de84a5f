"""The rules of TF Serving and of good servables, applied to any SavedModel directory.

A rule is one function with ``@version_rule`` or ``@base_rule`` in one of the modules named below.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import get_args

from clsd_tf.serving.versions import version_number
from export.contract_rules import batching, behavior, files, json_round_trip, layout, signatures, warmup
from export.contract_rules.findings import Finding, NotApplicable, Status, reason_of
from export.contract_rules.rules import Rule
from export.contract_rules.version import Base, Version, saved_model_file

# In the order in which rules are applied and shown.
_MODULES = (layout, files, signatures, behavior, json_round_trip, warmup, batching)
RULES = tuple(entry for module in _MODULES for entry in vars(module).values() if isinstance(entry, Rule))


@dataclasses.dataclass(frozen=True)
class Result:
    """A rule and its finding.

    Attributes:
      version: name of the version's directory, None for the base directory.
      rule: that was applied.
      finding: its outcome.
    """

    version: str | None
    rule: Rule
    finding: Finding

    def to_dict(self) -> dict[str, str | None]:
        """Names and texts, as ``export.contract --json`` writes them."""
        return {
            "version": self.version,
            "rule": self.rule.id,
            "title": self.rule.title,
            "status": self.finding.status,
            "found": self.finding.found,
            "why": self.rule.why,
        }


def check_servable(path: pathlib.Path, batching_file: pathlib.Path | None = None) -> list[Result]:
    """Applies every rule to a model's base directory and to each of its versions, or to one version.

    The model is loaded and run in this process. Nothing is written, and no value of a recorded request is told.

    Args:
      path: base directory, or directory of one version.
      batching_file: TF Serving's --batching_parameters_file; by default each version's own.

    Returns:
      A result per rule and directory: the base directory first, then its versions, ascending.

    Raises:
      FileNotFoundError: no directory there.
    """
    if not path.is_dir() or not os.access(path, os.R_OK | os.X_OK):
        raise FileNotFoundError(f"a servable is a readable directory. Received: {path}, which is none")
    path = path.resolve()
    if is_version(path):
        return check_version(path, batching_file)
    base = Base(path)
    results = [Result(None, rule, _applied(rule, base)) for rule in RULES if rule.subject == "base"]
    for version in sorted(base.versions, key=lambda name: (int(name), name)):
        if base.versions[version].is_dir():
            results += check_version(base.versions[version], batching_file)
    return results


def is_version(path: pathlib.Path) -> bool:
    """Returns whether the directory ``path`` is one version, not a model's base directory.

    It holds a SavedModel, or its name is a number and its children's are not.
    """
    holds_versions = any(version_number(child.name) is not None for child in path.iterdir())
    return saved_model_file(path) is not None or (version_number(path.name) is not None and not holds_versions)


def check_version(path: pathlib.Path, batching_file: pathlib.Path | None = None) -> list[Result]:
    """Applies the rules of versions to one directory.

    Args:
      path: the version.
      batching_file: as ``check_servable`` takes it.

    Returns:
      A result per rule.
    """
    version = Version(path, batching_file)
    try:
        return [Result(path.name, rule, _applied(rule, version)) for rule in RULES if rule.subject == "version"]
    finally:
        version.close()


def _applied(rule: Rule, subject: Base | Version) -> Finding:
    try:
        return rule.check(subject)
    except NotApplicable as reason:
        return Finding("not applicable", str(reason))
    except Exception as error:  # Hostile files: whatever TensorFlow makes of them is a failure of the servable.
        return Finding("fail", f"could not be checked: {reason_of(error, private=True)}")


def failures(results: Sequence[Result]) -> list[Result]:
    """Returns those of ``results`` that failed."""
    return [result for result in results if result.finding.status == "fail"]


def summary(results: Sequence[Result]) -> dict[str, int]:
    """Returns status -> number of ``results``, also for a status that none has."""
    return {status: sum(result.finding.status == status for result in results) for status in get_args(Status)}
