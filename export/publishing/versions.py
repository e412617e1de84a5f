"""The versions of one model: their numbers, their directories, and the history of what became of them.

``<servable_dir>/<name>/<number>`` is a published version; TF Serving ignores names that are no numbers, such as that of
a version that is being written or deleted, and ``history.jsonl``. All changes below a servable directory are made under
its lock, so that exports, promotions and deletions of several processes do not clash.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
import re
import secrets
import time
from collections.abc import Iterator
from typing import Any

from clsd_tf.serving.versions import MAX_VERSION, versions_on_disk
from clsd_tf.storage.files import locked, read_json, remove_abandoned, require_absent, staged_directory, write_text

HISTORY_FILE = "history.jsonl"
CARD_JSON = pathlib.PurePosixPath("assets.extra") / "model_card.json"
_STAGED = re.compile(r"\.([0-9]+)\.incomplete-.*")


def check_name(name: str) -> None:
    """Refuses a model name that is not one path component and one component of a URL.

    Args:
      name: of the model.

    Raises:
      ValueError: it holds another character than letters, digits, _ and -.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]*[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"a model name has letters, digits, _ and - only. Received: {name!r}")


def read_auc(version: pathlib.Path) -> float | None:
    """Reads the ``overall`` AUC from a version's card.

    Args:
      version: its directory.

    Returns:
      None where AUC is not defined, or without a card that can be read.
    """
    try:
        return read_json(version / CARD_JSON)["overall"]["metrics"]["auc"]["value"]
    except (OSError, ValueError, KeyError, TypeError):  # None was written then, or it is damaged.
        return None


class ModelVersions:
    """The versions of a model in a servable directory.

    Args:
      servable_dir: holds one directory per model; need not exist.
      name: the model's name, one path component.

    Raises:
      ValueError: bad name.
    """

    def __init__(self, servable_dir: pathlib.Path, name: str):
        check_name(name)
        self.servable_dir = servable_dir
        self.name = name
        self.path = servable_dir / name

    def published(self) -> dict[int, pathlib.Path]:
        """Lists the published versions: number -> directory, ascending."""
        return versions_on_disk(self.path)

    def history(self) -> list[dict[str, Any]]:
        """Everything that happened, oldest first.

        Each entry has ``time`` (ISO, UTC), ``action`` (publish, promote, rollback or delete) and ``version``, those of
        labels also ``label`` and ``previous``: the version that the label pointed to before, or None.
        """
        path = self.path / HISTORY_FILE
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines]

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Holds the servable directory for one process; for moments only, and not within itself."""
        self.servable_dir.mkdir(parents=True, exist_ok=True)
        with locked(self.servable_dir):
            yield

    def record(self, action: str, version: int, **more: Any) -> None:
        """Adds an entry to the history; the caller holds the lock.

        Args:
          action: publish, promote, rollback or delete.
          version: its number.
          **more: further keys of the entry, as ``history`` lists them.
        """
        path = self.path / HISTORY_FILE
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        entry = {"time": now, "action": action, "version": version, **more}
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        write_text(path, before + json.dumps(entry) + "\n")

    @contextlib.contextmanager
    def staged(self, version: int | None = None) -> Iterator[tuple[int, pathlib.Path]]:
        """Stages a directory, which is published as a version if the block succeeds.

        Leftovers of exports that were killed, under any number, are removed.

        Args:
          version: a number that was never used; by default the time in seconds, or more: larger than any number that
            was ever used, those of deleted versions and of versions that other processes are writing included.

        Yields:
          The number, and the directory to write.

        Raises:
          FileExistsError: the version exists, or was deleted, or another process is writing it.
          ValueError: not in [1, 2**63).
        """
        self.remove_leftovers()
        with contextlib.ExitStack() as stack:
            with self.exclusive():  # Nobody else may choose a number until this one can be seen.
                number = self._next_number() if version is None else version
                self._check_number(number)
                staging = stack.enter_context(staged_directory(self.path / str(number)))
            yield number, staging
            os.utime(staging)  # The age of a version counts from its publication.
        with self.exclusive():
            self.record("publish", number)

    def delete(self, version: int) -> None:
        """Makes the published ``version`` a leftover, by one rename; the caller holds the lock."""
        self.record("delete", version)
        directory = self.published()[version]
        directory.rename(directory.with_name(f".{version}.deleted-{secrets.token_hex(4)}"))

    def remove_leftovers(self) -> None:
        """Removes deleted versions, and leftovers of exports that were killed; takes its time, so without the lock."""
        if self.path.is_dir():
            for kind in ("deleted", "incomplete"):
                remove_abandoned(self.path, f".*.{kind}-*")

    def _next_number(self) -> int:
        # Staged ones first: one that is published meanwhile is then seen there or here.
        used = {*self._staged_numbers(), *self.published(), *(entry["version"] for entry in self.history())}
        return max(int(time.time()), max(used, default=0) + 1)

    def _staged_numbers(self) -> list[int]:
        children = self.path.iterdir() if self.path.is_dir() else ()
        return [int(match[1]) for child in children if (match := _STAGED.fullmatch(child.name))]

    def _check_number(self, version: int) -> None:
        if not 1 <= version <= MAX_VERSION:
            raise ValueError(f"a version is an integer in [1, 2**63). Received: {version}")
        published = self.published()
        if version in published:
            require_absent(published[version])
        if any(entry["version"] == version for entry in self.history()):
            raise FileExistsError(
                f"a version number is used once, and never again after its deletion. Received: {version} of "
                f"{self.name}. Leave it out, and a new one is chosen"
            )
        if version in self._staged_numbers():
            raise FileExistsError(
                f"a version is written by one process. Received: {version} of {self.name}, which another one is "
                "writing. Leave the number out, and a new one is chosen"
            )
