"""What versions of a model there are, and which may be deleted."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

from export.publishing.manifest import ManifestError, read_manifest
from export.publishing.models_config import CONFIG_FILE, ModelsConfig, loaded_versions
from export.publishing.promotion import labels_of, problems_of, rollback_targets
from export.publishing.versions import ModelVersions, read_auc

MIN_AGE_SECONDS = 600  # Of a version that may be deleted: a server may be loading a younger one.


@dataclasses.dataclass(frozen=True)
class Pruned:
    """Versions that were deleted, and those that were not for another reason than their newness: version -> reason."""

    deleted: tuple[int, ...]
    kept: Mapping[int, str]


def prune(versions: ModelVersions, keep: int) -> Pruned:
    """Deletes all but the newest ``keep`` versions.

    Older ones stay that a server loads, that a label names or would name after a rollback, or that are younger than
    ten minutes, since a server that has not looked again may still be loading one.

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


@dataclasses.dataclass(frozen=True)
class VersionState:
    """A published version.

    Attributes:
      version: its number.
      created: ISO time, None without a manifest.
      num_bytes: of all its files.
      labels: that name it.
      is_loaded: models.config has a server load it.
      max_difference: the largest difference to the training model that its verification found.
      auc: on the test split, as its model card says; None without a card that can be read.
      problems: of its manifest and its files, None where these were not checked.
    """

    version: int
    created: str | None
    num_bytes: int
    labels: tuple[str, ...]
    is_loaded: bool
    max_difference: float | None
    auc: float | None
    problems: tuple[str, ...] | None


def list_versions(versions: ModelVersions, *, check: bool = False) -> list[VersionState]:
    """The published versions, newest first.

    Args:
      versions: of the model.
      check: read every file and compare it with its manifest.
    """
    published = versions.published()
    config = ModelsConfig(versions.servable_dir / CONFIG_FILE)
    loaded = loaded_versions(config.entry(versions.name), published) if config.knows(versions.name) else set()
    labels = labels_of(versions)
    states = []
    for version, directory in reversed(published.items()):
        problems = problems_of(versions.name, directory) if check else None
        try:
            manifest = read_manifest(directory) or {}
        except ManifestError as error:
            manifest, problems = {}, [str(error)]
        differences = manifest.get("verification", {}).get("max_difference", {})
        states.append(
            VersionState(
                version,
                manifest.get("created"),
                sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
                tuple(sorted(label for label, named in labels.items() if named == version)),
                version in loaded,
                max(differences.values(), default=None),
                read_auc(directory),
                None if problems is None else tuple(problems),
            )
        )
    return states
