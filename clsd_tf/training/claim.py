"""Whose a work directory is: a run's config, lineage and files, written once and compared with ever after."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from clsd_tf.data.hashing import file_sha256
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import ArtifactError, read_json, write_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.config import TrainConfig, differences, parse_config
from clsd_tf.training.lineage import TrainedOn, lineage


def claim(work_dir: WorkDir, config: TrainConfig, dataset: DatasetDir, init_from: WorkDir | None = None) -> None:
    """Writes resolved config, lineage and what ids mean, or checks that those there give the same result.

    Args:
      work_dir: of the run.
      config: of the run.
      dataset: to train on.
      init_from: the run to go on from. Without it, a run that has a checkpoint goes on whatever it began with.

    Raises:
      ArtifactError: the directory belongs to another config, dataset or lineage, or a run that has read other files;
        or those cannot be read.
    """
    files = file_digests([path for run in config.teacher_runs for path in run.files])
    own_lineage = lineage(dataset, init_from)
    resolved = {"train": config.to_dict(), "dataset_fingerprint": dataset.fingerprint}
    resolved |= {"files": files} if files else {}
    if not work_dir.config.exists():
        work_dir.path.mkdir(parents=True, exist_ok=True)
        write_json(work_dir.trained_on, TrainedOn.of(dataset).to_dict())
        write_json(work_dir.lineage, own_lineage)
        write_json(work_dir.config, resolved)
        return
    work_dir.require_same_dataset(dataset)
    there = parse_config(work_dir.resolved_config["train"], str(work_dir.config)).result_settings
    received, allowed = differences(config.result_settings, there)
    if received:
        raise ArtifactError(
            f"{work_dir.path} belongs to a run with another config. Received: {received}. Allowed: {allowed}. "
            "Choose another --work_dir"
        )
    _require_same_files(work_dir, files)
    if init_from is None and (work_dir.has_checkpoint or work_dir.is_complete):
        return  # All that it needs of an earlier run is here.
    ancestors, allowed = own_lineage["ancestors"], read_json(work_dir.lineage)["ancestors"]
    if ancestors != allowed:
        raise ArtifactError(
            f"{work_dir.path} belongs to a run that goes on from another. Received: --init_from with fingerprint "
            f"{_last_fingerprint(ancestors)}. Allowed: {_last_fingerprint(allowed)}. Give that --init_from again, or "
            "choose another --work_dir"
        )


def _last_fingerprint(ancestors: Sequence[Mapping[str, Any]]) -> str | None:
    return ancestors[-1]["work_fingerprint"] if ancestors else None


def file_digests(paths: Sequence[str]) -> dict[str, str]:
    """Reads the files that a teacher takes its scores from.

    Returns:
      Path -> SHA-256 in hex.

    Raises:
      ArtifactError: one of them cannot be read.
    """
    digests = {}
    for path in paths:
        try:
            digests[path] = file_sha256(pathlib.Path(path))
        except OSError as error:
            raise ArtifactError(
                f"a file that a teacher reads must be there. Received: {path}: {error.strerror}. Put it there, or name "
                "another one in the config"
            ) from error
    return digests


def _require_same_files(work_dir: WorkDir, files: Mapping[str, str]) -> None:
    resolved = work_dir.resolved_config
    there = resolved.get("files", {})
    changed = [path for path, digest in files.items() if there.get(path) != digest]
    if changed and not (work_dir.has_checkpoint or work_dir.is_complete):
        # Nothing was trained with the file that it was: it may have been refused, and corrected since.
        write_json(work_dir.config, {**resolved, "files": files})
    elif changed:
        raise ArtifactError(
            f"{work_dir.path} belongs to a run that has read another file. Received: {changed[0]} with SHA-256 "
            f"{files[changed[0]]}. Allowed: {there.get(changed[0])}. Put that file back, or choose another --work_dir"
        )
