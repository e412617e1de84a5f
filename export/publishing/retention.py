"""Deletion of old versions, but of none that a server may need."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

from export.publishing.models_config import CONFIG_FILE, ModelsConfig
from export.publishing.promotion import rollback_targets
from export.publishing.versions import ModelVersions

MIN_AGE_SECONDS = 600  # Of a version that may be deleted: a server may be loading a younger one.


@dataclasses.dataclass(frozen=True)
class Pruned:
    """Outcome of a deletion.

    Attributes:
      deleted: versions.
      kept: versions that are old enough but needed -> the reason.
    """

    deleted: tuple[int, ...]
    kept: Mapping[int, str]


def prune(versions: ModelVersions, keep: int) -> Pruned:
    """Deletes all but the newest ``keep`` versions.

    Older ones stay that a server loads, that a label names or would name after a rollback, or that are younger than
    ten minutes, since a server that has not looked again may still be loading one.

    Args:
      versions: of the model.
      keep: how many of the newest stay in any case, >= 1.

    Returns:
      Versions that were deleted, and those that had to stay.

    Raises:
      ValueError: ``keep`` < 1.
    """
    if keep < 1:
        raise ValueError(f"the newest version is never deleted: keep at least 1. Received: {keep}")
    with versions.exclusive():
        reasons = _reasons_to_keep(versions)
        old = list(versions.published())[:-keep]
        deleted = tuple(version for version in old if version not in reasons)
        for version in deleted:
            versions.delete(version)
    versions.remove_leftovers()
    return Pruned(deleted, {version: reasons[version] for version in old if version in reasons})


def _reasons_to_keep(versions: ModelVersions) -> dict[int, str]:
    published = versions.published()
    now = time.time()
    young = [version for version, path in published.items() if now - path.stat().st_mtime < MIN_AGE_SECONDS]
    config = ModelsConfig(versions.servable_dir / CONFIG_FILE)
    return {
        **dict.fromkeys(young, f"younger than {MIN_AGE_SECONDS // 60} minutes"),
        **dict.fromkeys(rollback_targets(versions), "a rollback leads to it"),
        **dict.fromkeys(config.versions_in_use(versions.name, published), "in models.config"),
    }
