"""Files and directories that are whole or not there: staged, renamed, locked."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import pathlib
import secrets
import shutil
import sys
from collections.abc import Iterator
from typing import Any

try:
    import fcntl
except ModuleNotFoundError:  # Windows: what needs no lock works there.
    fcntl = None  # type: ignore[assignment]

SUCCESS = "_SUCCESS"


class ArtifactError(RuntimeError):
    """A directory that is missing, incomplete, changed after it was written, or of another data set."""


def incomplete(kind: str, path: pathlib.Path, remedy: str) -> ArtifactError:
    """Returns the error for a directory without ``_SUCCESS``.

    Args:
      kind: "dataset" or "work".
      path: the directory, which may not exist.
      remedy: what to do, a sentence without its period.
    """
    state = "has none" if path.is_dir() else "does not exist"
    return ArtifactError(
        f"a {kind} directory is complete when it holds {SUCCESS}. Received: {path}, which {state}. {remedy}"
    )


def require_absent(path: pathlib.Path) -> None:
    """Refuses an output ``path`` that exists, so that nothing is ever overwritten.

    Raises:
      FileExistsError: it does.
    """
    if path.exists():
        raise FileExistsError(
            f"an output directory must not exist yet. Received: {path}. Choose another name or remove it first"
        )


@contextlib.contextmanager
def staged_directory(final: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary sibling of ``final`` that becomes ``final`` by one rename, only if the block succeeds.

    Siblings that processes left which were killed are removed: a living process holds a lock on its own.

    Yields:
      The sibling, an empty directory.

    Raises:
      FileExistsError: ``final`` exists, before the block or after it.
      ArtifactError: this platform has no locks.
    """
    require_absent(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = final.with_name(f".{final.name}.incomplete-{secrets.token_hex(4)}")
    remove_abandoned(final.parent, f".{glob.escape(final.name)}.incomplete-*")
    with contextlib.ExitStack() as locks:
        with locked(final.parent):  # Nobody may find the new directory before it is locked.
            staging.mkdir()
            locks.enter_context(locked(staging))
        try:
            yield staging
            _sync(staging)
            require_absent(final)
            staging.rename(final)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def locked(directory: pathlib.Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds a directory's lock, which ends with the process and its children.

    Args:
      directory: exists.
      wait: until another process that holds the lock lets go.

    Yields:
      Whether the lock could be had: not where another process has it, or the file system knows none.

    Raises:
      ArtifactError: this platform has no locks.
    """
    _require_locks()
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        lock(descriptor, wait=wait)
        held = True
    except OSError:
        held = False
    try:
        yield held
    finally:
        os.close(descriptor)


def lock(file: Any, *, wait: bool) -> None:
    """Locks a file for this process until it is closed.

    Args:
      file: descriptor, or what has a ``fileno``.
      wait: until another process that holds the lock lets go.

    Raises:
      OSError: the lock could not be had.
      ArtifactError: this platform has no locks.
    """
    _require_locks()
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _require_locks() -> None:
    if fcntl is None:
        raise ArtifactError(
            "a directory is locked by the process that writes it, which needs the Python module fcntl. "
            f"Received: platform {sys.platform}, which has none. Use Linux, macOS or the Windows Subsystem for Linux"
        )


def remove_abandoned(parent: pathlib.Path, pattern: str) -> None:
    """Removes directories that no process holds, as far as it may.

    Args:
      parent: of the directories.
      pattern: glob of their names.
    """
    with contextlib.ExitStack() as locks:
        with locked(parent):  # None is between its making and its lock.
            abandoned = [path for path in parent.glob(pattern) if _hold_if_free(locks, path)]
        for path in abandoned:
            shutil.rmtree(path, ignore_errors=True)


def _hold_if_free(locks: contextlib.ExitStack, directory: pathlib.Path) -> bool:
    with contextlib.suppress(OSError):  # It is gone, or another user's.
        return locks.enter_context(locked(directory, wait=False))
    return False


def _sync(directory: pathlib.Path) -> None:
    """Flushes every file below ``directory`` to disk: a rename must not outlive the bytes it promises."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def remove(path: pathlib.Path) -> None:
    """Removes ``path``, a file or a directory with all that it holds."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON as ``write_text`` does.

    Args:
      path: of the file.
      value: ready for JSON.
    """
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes through a temporary file, so that a reader never sees half of it.

    Args:
      path: of the file; one that is there is replaced.
      text: stored in UTF-8.
    """
    temporary = path.with_name(f".{path.name}.incomplete")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_json(path: pathlib.Path) -> Any:
    """Reads the file ``path``, JSON in UTF-8.

    Returns:
      Its value.
    """
    return json.loads(path.read_text(encoding="utf-8"))
