"""The published versions of a model, with what manifests, cards, labels and models.config say of them."""

from __future__ import annotations

import dataclasses

from export.publishing.manifest import ManifestError, read_manifest
from export.publishing.models_config import CONFIG_FILE, ModelsConfig, loaded_versions
from export.publishing.promotion import labels_of, problems_of
from export.publishing.versions import ModelVersions, read_auc


@dataclasses.dataclass(frozen=True)
class PublishedVersion:
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


def list_versions(versions: ModelVersions, *, check: bool = False) -> list[PublishedVersion]:
    """Lists the published versions.

    Args:
      versions: of the model.
      check: read every file and compare it with its manifest.

    Returns:
      Newest first.
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
            PublishedVersion(
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
