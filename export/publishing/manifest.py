"""assets.extra/manifest.json: what a version is, of what it was made, and the checksum of each of its files."""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
from collections.abc import Mapping
from typing import Any

import pydantic

from clsd_tf.data.hashing import file_sha256
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import read_json, write_json
from clsd_tf.storage.work_dir import WorkDir

MANIFEST_FILE = pathlib.PurePosixPath("assets.extra") / "manifest.json"


class ManifestError(ValueError):
    """A manifest that is cut off, or that is none."""


class _FileEntry(pydantic.BaseModel):
    bytes: int
    sha256: str


class _Verification(pydantic.BaseModel):
    max_difference: dict[str, float] = {}


class _Read(pydantic.BaseModel):
    """Part of a manifest that is read here; the rest may be anything."""

    model_name: str | None = None
    version: int | None = None
    created: str | None = None
    files: dict[str, _FileEntry] = {}
    verification: _Verification = _Verification()


def file_entries(directory: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Lists the files of a version, but its manifest.

    Args:
      directory: the version.

    Returns:
      Relative POSIX path -> ``bytes`` and ``sha256`` (hex).
    """
    return {
        name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for name, path in _files(directory).items()
    }


def check_files(directory: pathlib.Path, manifest: Mapping[str, Any]) -> list[str]:
    """Compares a version's files with its manifest.

    Args:
      directory: the version.
      manifest: its manifest, as ``read_manifest`` gives it.

    Returns:
      A sentence for each problem; [] if there is none.
    """
    written = manifest.get("files")
    if not written:
        return ["the manifest lists no files, so that nothing can be checked. Export the run again"]
    found = {name: path for name, path in _files(directory).items() if path.is_file() or name not in written}
    problems = [f"missing: {name}" for name in sorted(set(written) - set(found))]
    problems += [f"not in the manifest: {name}" for name in sorted(set(found) - set(written))]
    for name in sorted(set(written) & set(found)):
        num_bytes = found[name].stat().st_size
        if num_bytes != written[name]["bytes"]:
            problems.append(f"{name} has {num_bytes:,} bytes, the manifest says {written[name]['bytes']:,}")
        elif file_sha256(found[name]) != written[name]["sha256"]:
            problems.append(f"{name} has another SHA-256 than the manifest says")
    return problems


def read_manifest(directory: pathlib.Path) -> dict[str, Any] | None:
    """Reads the manifest of a version.

    Args:
      directory: the version.

    Returns:
      The JSON object; None where there is no manifest.

    Raises:
      ManifestError: one that cannot be read.
    """
    path = directory / MANIFEST_FILE
    try:
        if not path.is_file():
            return None
        manifest = read_json(path)
        _Read.model_validate(manifest)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or "the whole"
        raise ManifestError(f"the manifest cannot be read: {place}: {problem['msg']}") from error
    except (ValueError, OSError, RecursionError) as error:
        raise ManifestError(f"the manifest cannot be read: {type(error).__name__}") from error
    return manifest


def write_manifest(
    directory: pathlib.Path,
    dataset: DatasetDir,
    work_dir: WorkDir,
    *,
    model_name: str,
    version: int,
    verification: Mapping[str, Any],
    profile: Mapping[str, Any],
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Writes the manifest: the last file of a version, since it holds the checksums of all others.

    ``private_inputs`` names what no log may hold: the user's key, and sensitive columns, which no model reads but which
    a request may carry.

    Args:
      directory: the version, complete but for its manifest.
      dataset: that the run was trained on.
      work_dir: of the run.
      model_name: as the server will know the model.
      version: its number.
      verification: what ``export.verify`` found.
      profile: the export profile.
      quantisation: what quantization cost; None without it.
    """
    spec = dataset.spec
    raw_inputs = [dataclasses.asdict(entry) for entry in spec.raw_inputs]
    user_key = {spec.user_key} & {entry["name"] for entry in raw_inputs}
    manifest = {
        "model_name": model_name,
        "version": version,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "feature_spec": spec.name,
        "spec_fingerprint": spec.fingerprint,
        "dataset_fingerprint": dataset.fingerprint,
        "raw_inputs": raw_inputs,
        "private_inputs": sorted(user_key | spec.sensitive_columns),
        "profile": dict(profile),
        "quantisation": quantization,
        "config": work_dir.resolved_config,
        "verification": dict(verification),
        "files": file_entries(directory),
    }
    path = directory / MANIFEST_FILE
    path.parent.mkdir(exist_ok=True)
    write_json(path, manifest)


def _files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """Relative POSIX path -> file, but the manifest's."""
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if not path.is_dir()}
    files.pop(MANIFEST_FILE.as_posix(), None)
    return files
