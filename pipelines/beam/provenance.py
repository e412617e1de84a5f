"""The manifest of a dataset: from what, by what and when it was built."""

from __future__ import annotations

import datetime as dt
import hmac
import importlib.metadata
import pathlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import clsd_tf
from clsd_tf.data.examples import packed_columns
from clsd_tf.spec.feature_spec import FeatureSpec
from clsd_tf.spec.model_inputs import Statistics
from clsd_tf.spec.validation import SpecError
from clsd_tf.storage.dataset_dir import DatasetLayout
from clsd_tf.storage.files import read_json, write_json

_CUT_OFFS = ("validation_from", "test_from", "until")  # As they were, given or found by fractions.
_LIBRARIES = ("apache-beam", "numpy", "pyarrow", "tensorflow")


def write_manifest(
    layout: DatasetLayout,
    spec: FeatureSpec,
    *,
    grown_from: str | None,
    salt: bytes | None,
    inputs: Sequence[Mapping[str, Any]],
    counts: Mapping[str, Any],
    seconds: Mapping[str, float],
) -> None:
    """Writes manifest.json. It names a moment, so unlike the rest of a dataset it differs between two builds.

    Args:
      layout: of a directory that is complete but for its marker.
      spec: of the dataset.
      grown_from: fingerprint of the dataset whose ids go on in this one, if any.
      salt: of user ids; a check value of it is written, never the salt.
      inputs: table, file name, bytes and SHA-256 of each file that was read.
      counts: of the build.
      seconds: that each step took.
    """
    ids, numbers = packed_columns(spec.model_inputs(_statistics(layout).vocabulary_lengths))
    manifest = {
        "dataset_fingerprint": layout.fingerprint(),
        "spec": {"name": spec.name, "fingerprint": spec.fingerprint},
        "grown_from": grown_from,
        "inputs": inputs,
        "user_id_salt_check": _salt_check(salt),
        "code": code_versions(),
        "built_at": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "accounting": counts["accounting"],
        "bad_rows": {role: entry["bad"] for role, entry in counts["tables"].items()},
        "split": {**spec.split.model_dump(mode="json"), **{name: counts[name] for name in _CUT_OFFS if name in counts}},
        "splits": {name: _split(entry) for name, entry in counts["splits"].items()},
        "records": {"layout": spec.record_layout, "ids": _columns(ids), "numbers": _columns(numbers)},
    }
    write_json(layout.manifest, manifest)


def _columns(widths: Mapping[str, int | None]) -> list[dict[str, Any]]:
    """In the order in which they are packed."""
    return [{"name": name, "values": width or 1} for name, width in widths.items()]


def _salt_check(salt: bytes | None) -> str | None:
    return hmac.new(salt, b"clsd_tf salt check", "sha256").hexdigest()[:16] if salt else None


def check_same_salt(previous: DatasetLayout, spec: FeatureSpec, salt: bytes | None) -> None:
    """Checks that user ids are hashed as in the dataset that another one grows from.

    Args:
      previous: layout of the earlier dataset.
      spec: of the new one.
      salt: of the new one's user ids; None where they stay as they are.

    Raises:
      SpecError: one has hashed ids and the other has not, or by another salt.
    """
    expected, received = read_json(previous.manifest)["user_id_salt_check"], _salt_check(salt)
    if expected != received:
        raise SpecError(
            f"a dataset that grows from another hashes user ids as it does. Received: {_salted(received)} in "
            f"{spec.name}. Allowed: {_salted(expected)}. Take the same user_id_salt_env and salt, or build without an "
            "earlier dataset"
        )


def _salted(check: str | None) -> str:
    return f"ids hashed with the salt of check value {check}" if check else "ids as they are"


def _statistics(layout: DatasetLayout) -> Statistics:
    return Statistics.from_json(layout.statistics.read_text(encoding="utf-8"))


def _split(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Row count, click rate and time range."""
    facts = {name: entry[name] for name in ("rows", "clicks", "first_event", "last_event")}
    return {**facts, "click_rate": entry["clicks"] / entry["rows"]}


def code_versions() -> dict[str, str | None]:
    """Versions of this project, its commit and its main libraries, for a manifest; None where not known."""
    return {"clsd_tf": clsd_tf.__version__, "commit": _commit(), **{name: _version(name) for name in _LIBRARIES}}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # Another build of it, say tensorflow-cpu.
        return None


def _commit() -> str | None:
    """The commit of a checkout, with + behind it when files differ; None where this file is in no repository."""
    this_file = pathlib.Path(__file__)

    def git(*arguments: str) -> str:
        found = subprocess.run(
            ["git", *arguments], cwd=this_file.parent, capture_output=True, text=True, check=True, timeout=10
        )
        return found.stdout

    try:
        git("ls-files", "--error-unmatch", this_file.name)  # An installed copy may lie in a repository of its user.
        return git("describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*").strip()
    except (OSError, subprocess.SubprocessError):
        return None
