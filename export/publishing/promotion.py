"""Promotion and rollback: the versions that a server loads, and the labels that name them.

Without labels TF Serving loads the largest version. As soon as there is one, models.config lists what to load:

* every version that a label names;
* the version that a label named before, if it is older than some labeled one: a rollback then needs no loading, and
  no unlabeled version becomes the largest.

TF Serving's rules, from its server_core.cc:

* A request without version or label goes to the largest loaded version, so to a canary that is newer than stable:
  clients that want stable must name the label.
* A label moves to a loaded version only. Where it moves to another one the server refuses the whole file, and goes on
  refusing: it checks labels before it loads. So a version that is not yet loaded is first added to the file without the
  label; once the server has it, the same promotion is asked for again and the label moves.
* A server that starts has nothing loaded: with labels it needs --allow_version_labels_for_unavailable_models.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from export.publishing.manifest import ManifestError, check_files, read_manifest
from export.publishing.models_config import CONFIG_FILE, ModelsConfig, loaded_versions, set_versions
from export.publishing.versions import ModelVersions

_MAX_NAMED_PROBLEMS = 3


class PromotionError(RuntimeError):
    """A version that must not get a label."""


@dataclasses.dataclass(frozen=True)
class Promotion:
    """Outcome of a promotion or a rollback.

    Attributes:
      label: that moves.
      version: that it shall name.
      previous: the version that it named before, None where it is new.
      is_waiting: the label has not moved: the server must load ``version`` first. Then ask again.
      loaded: versions that the server is now told to load, ascending.
    """

    label: str
    version: int
    previous: int | None
    is_waiting: bool
    loaded: tuple[int, ...]


def promote(versions: ModelVersions, label: str, version: int | None = None) -> Promotion:
    """Gives a label to a version, by default the newest.

    Args:
      versions: of a model in models.config.
      label: [a-zA-Z0-9_]+, say stable or canary.
      version: a published version whose files are as its manifest says.

    Returns:
      What has moved, or is waiting for the server.

    Raises:
      PromotionError: no such version, or damaged files.
      ValueError: bad label, or a models.config that cannot be changed.
    """
    if not re.fullmatch("[a-zA-Z0-9_]+", label):
        raise ValueError(f"a label has letters, digits and _ only. Received: {label!r}")
    if version is None:
        version = max(versions.published(), default=None)
    version = _check_version(versions, version)
    with versions.exclusive():
        return _move(versions, "promote", label, version)


def rollback(versions: ModelVersions, label: str, version: int | None = None) -> Promotion:
    """Gives a label back to the version that it named before; asked for again, to the one before that.

    Args:
      versions: of a model in models.config.
      label: one that was promoted.
      version: where it must lead, for who asks again after waiting; by default wherever it leads.

    Returns:
      What has moved, or is waiting for the server.

    Raises:
      PromotionError: the label named nothing before, or another version, or that version is gone or damaged.
      ValueError: no such label, or a models.config that cannot be changed.
    """
    if version is None:
        version = _rollback_target(versions, label)
    _check_version(versions, version)
    with versions.exclusive():
        target = _rollback_target(versions, label)
        if target != version:
            raise PromotionError(
                f"{label} was moved meanwhile. Received: a rollback to {version}; now it leads to {target}. "
                "Look at `python -m export.manage list` and ask again"
            )
        return _move(versions, "rollback", label, version)


def _rollback_target(versions: ModelVersions, label: str) -> int:
    labels = labels_of(versions)
    if label not in labels:
        raise ValueError(
            f"a rollback needs a label of the model. Received: {label!r}. "
            f"Allowed: {', '.join(sorted(labels)) or 'none, since nothing was promoted'}"
        )
    target = version_before(versions.history(), label, labels[label])
    if target is None:
        raise PromotionError(
            f"a rollback needs a version that the label named before. Received: {label}, which named "
            f"{labels[label]} only. Promote another version"
        )
    return target


def version_before(history: Sequence[Mapping[str, Any]], label: str, current: int) -> int | None:
    """Finds the version that a label named before its current one; promotions that were rolled back do not count.

    Args:
      history: of the model, oldest first, as ``ModelVersions.history`` gives it.
      label: of the versions.
      current: the version that it names now, as models.config says.

    Returns:
      The version; None if there was no other.
    """
    named: list[int] = []
    for entry in history:
        if entry.get("label") != label:
            continue
        if entry["action"] == "rollback":
            named = named[: _last_place(named, entry["version"])]
        elif entry["previous"] not in (None, *named[-1:]):  # The label was moved without this history.
            named.append(entry["previous"])
        named.append(entry["version"])
    # models.config is what counts: it may be changed by hand, or by a command that was killed before it wrote history.
    return next((version for version in reversed(named[: _last_place(named, current)]) if version != current), None)


def _last_place(named: Sequence[int], version: int) -> int:
    """Index of the last ``version``, or the length without one."""
    places = [index for index, other in enumerate(named) if other == version]
    return places[-1] if places else len(named)


def _move(versions: ModelVersions, action: str, label: str, version: int) -> Promotion:
    """Moves a label, or has the server load the version first; the caller holds the lock."""
    _require_published(versions, version)  # Its files were checked before the lock was taken.
    config = ModelsConfig(versions.servable_dir / CONFIG_FILE)
    entry = config.entry(versions.name)
    published, labels = versions.published(), dict(entry.version_labels)
    loaded, previous = loaded_versions(entry, published), labels.get(label)
    is_waiting = previous not in (None, version) and version not in loaded
    if is_waiting:
        to_load = loaded | {version}
    else:
        labels[label] = version
        before = [version_before(versions.history(), name, named) for name, named in labels.items() if name != label]
        before.append(_before_move(versions, action, label, previous, version))
        newest = max(labels.values())
        to_load = {*labels.values(), *(x for x in before if x is not None and x < newest)} & set(published)
    set_versions(entry, to_load, labels)
    config.write()
    if not is_waiting and previous != version:
        versions.record(action, version, label=label, previous=previous)
    return Promotion(label, version, previous, is_waiting, tuple(sorted(to_load)))


def _before_move(versions: ModelVersions, action: str, label: str, previous: int | None, version: int) -> int | None:
    """Version that a rollback would lead to after the move."""
    if action == "promote" and previous != version:
        return previous
    return version_before(versions.history(), label, version)


def _require_published(versions: ModelVersions, version: int | None) -> tuple[int, pathlib.Path]:
    published = versions.published()
    if version not in published:
        raise PromotionError(
            f"only a published version gets a label. Received: {version} of {versions.name}. "
            f"Allowed: {', '.join(map(str, published)) or 'none, export one first'}"
        )
    return version, published[version]


def _check_version(versions: ModelVersions, version: int | None) -> int:
    """Returns the version; reads all its files, which takes long for a large model."""
    version, directory = _require_published(versions, version)
    problems = problems_of(versions.name, directory)
    if problems:
        more = f" and {len(problems) - _MAX_NAMED_PROBLEMS} more" if len(problems) > _MAX_NAMED_PROBLEMS else ""
        raise PromotionError(
            f"a version gets a label only if its files are as its manifest says. Received: {directory}: "
            f"{'; '.join(problems[:_MAX_NAMED_PROBLEMS])}{more}. Export the run again, or promote another version"
        )
    return version


def problems_of(name: str, directory: pathlib.Path) -> list[str]:
    """Compares a published version with its manifest, which must be that of this model and version.

    Args:
      name: of the model.
      directory: the version.

    Returns:
      A sentence for each problem; [] if there is none.
    """
    try:
        manifest = read_manifest(directory)
        if manifest is None:
            return ["no manifest"]
        version = int(directory.name)
        said = (manifest.get("model_name"), manifest.get("version", version))
        if said != (name, version):
            return [f"the manifest is that of {said[0]} {said[1]}"]
        return check_files(directory, manifest)
    except ManifestError as error:
        return [str(error)]
    except OSError as error:  # Another process may be deleting it.
        return [f"a file cannot be read: {error}"]


def labels_of(versions: ModelVersions) -> dict[str, int]:
    """Returns label -> version of the model of ``versions``, as models.config says; {} if it has no such model."""
    config = ModelsConfig(versions.servable_dir / CONFIG_FILE)
    return dict(config.entry(versions.name).version_labels) if config.knows(versions.name) else {}


def rollback_targets(versions: ModelVersions) -> set[int]:
    """Returns the versions that a rollback of some label would lead to, of all ``versions`` of the model."""
    history = versions.history()
    found = (version_before(history, label, version) for label, version in labels_of(versions).items())
    return {version for version in found if version is not None}
