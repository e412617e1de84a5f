"""Files by path or URI: the local disk, and the object stores and HDFS that Arrow reads.

A URI is ``s3://bucket/...``, ``gs://bucket/...`` or ``hdfs://namenode:port/...``. Credentials come from where Arrow's
file systems look for them, such as the environment.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

import pyarrow as pa
from pyarrow import fs

_WILDCARD = re.compile(r"[*?\[]")
_TOKEN = re.compile(
    r"\*\*|\*|\?"
    r"|\[(?:(?P<negated>!)|(?!!))(?P<characters>\][^\]]*|[^\]]+)\]"  # ] is in a class if it comes first.
    r"|.",
    re.DOTALL,
)
_READ_AHEAD_BYTES = 1 << 20  # Of a remote file: decompression and Avro read it in small pieces, each one a request.
_GS_RETRY_SECONDS = 60  # By default a store that cannot be reached is tried for a quarter of an hour.


def resolve_path(path: str, directory: str = "") -> str:
    """Makes a path or a pattern absolute: workers may have another working directory.

    Args:
      path: local or a URI; relative to ``directory`` unless it is absolute.
      directory: local or a URI; empty is the current one.

    Returns:
      An absolute local path or a URI.
    """
    joined = path if "://" in path else os.path.join(directory, path)
    return joined if "://" in joined else os.path.abspath(joined)


def common_folder(paths: Sequence[str]) -> str:
    """The deepest folder of several paths.

    Args:
      paths: absolute, or URIs.

    Returns:
      The folder with a / at its end; "" for one path.
    """
    shared = os.path.commonprefix(paths)  # noqa: RUF071 - commonpath would damage gs://.
    return shared.rpartition("/")[0] + "/" if len(paths) > 1 else ""


def match_files(pattern: str) -> list[str]:
    """Finds the files that match a pattern.

    Hidden files and folders (``.x.crc``, ``_SUCCESS``) are left out unless the pattern names them. Symbolic links to
    local folders are not followed behind a wildcard: a ``latest`` beside folders by date would double its rows.

    Args:
      pattern: an absolute path or a URI. ``*``, ``?``, ``[a-c]`` and ``[!a-c]`` stand for characters of one name,
        ``**`` for anything, folders included.

    Returns:
      Paths or URIs of files, sorted; empty where none matches.

    Raises:
      RuntimeError: the store cannot be reached.
      ValueError: the pattern is malformed.
    """
    wildcard = _WILDCARD.search(pattern)
    if wildcard is None:
        return [pattern] if _is_file(pattern) else []
    matches = _as_regex(pattern).fullmatch
    folder, _, _ = pattern[: wildcard.start()].rpartition("/")
    names = pattern[len(folder) + 1 :]
    found = _list_files(f"{folder}/", recursive="/" in names or "**" in names)
    return sorted(path for path in found if matches(path) and not _is_hidden(path[len(folder) + 1 :]))


def _as_regex(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(_TOKEN.sub(_token_as_regex, pattern), re.DOTALL)
    except re.error as error:
        raise ValueError(
            f"a path must be a valid glob pattern. Received: {pattern} ({error}). Allowed: *, **, ?, [a-c] and [!a-c]"
        ) from error


def _token_as_regex(token: re.Match[str]) -> str:
    if token["characters"] is not None:
        characters = re.sub(r"[\\\[^&|~]", r"\\\g<0>", token["characters"])
        return f"(?!/)[{'^' if token['negated'] else ''}{characters}]"
    return {"**": ".*", "*": "[^/]*", "?": "[^/]"}.get(token[0]) or re.escape(token[0])


def _is_hidden(path: str) -> bool:
    return any(part[:1] in ("_", ".") for part in path.split("/"))


def _is_file(path: str) -> bool:
    if "://" not in path:
        return os.path.isfile(path)
    with _reaching(path):
        file_system, place = _file_system(path)
        return file_system.get_file_info(place).is_file


def _list_files(folder: str, recursive: bool) -> Iterable[str]:
    """Paths of all files of a folder, which ends with /; with those of its folders if ``recursive``."""
    if "://" not in folder:
        return _list_local_files(folder, recursive)
    with _reaching(folder):
        file_system, place = _file_system(folder)
        selector = fs.FileSelector(place, allow_not_found=True, recursive=recursive)
        found = [entry.path for entry in file_system.get_file_info(selector) if entry.is_file]
    return [folder + path.removeprefix(place).removeprefix("/") for path in found]


def _list_local_files(folder: str, recursive: bool) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        if not recursive:
            folders.clear()
        paths = (os.path.join(parent, name) for name in names)
        yield from (path for path in paths if os.path.isfile(path))  # A link may lead nowhere.


def file_size(path: str) -> int:
    """Bytes of a file as it is stored.

    Args:
      path: absolute, or a URI, of a file that is there.

    Raises:
      RuntimeError: the store cannot be reached.
    """
    if "://" not in path:
        return os.path.getsize(path)
    with _reaching(path):
        file_system, place = _file_system(path)
        return file_system.get_file_info(place).size


def open_file(path: str) -> BinaryIO:
    """Opens a file for reading, as it is stored.

    Args:
      path: absolute, or a URI.

    Returns:
      A buffered stream with ``seek``.

    Raises:
      OSError: it cannot be opened.
    """
    if "://" not in path:
        return open(path, "rb")
    file_system, place = _file_system(path)
    return io.BufferedReader(file_system.open_input_file(place), _READ_AHEAD_BYTES)


def _file_system(uri: str) -> tuple[fs.FileSystem, str]:
    """(file system, path in it). Only the root is parsed as a URI: in a name, ? and % are ordinary characters."""
    scheme, _, rest = uri.partition("://")
    authority, _, path = rest.partition("/")
    file_system, root = _connect(scheme, authority)
    return file_system, f"{root}/{path}".rstrip("/")


@functools.lru_cache
def _connect(scheme: str, authority: str) -> tuple[fs.FileSystem, str]:
    """(file system, path of its root): one connection for all files of a process."""
    options = f"?retry_limit_seconds={_GS_RETRY_SECONDS}" if scheme == "gs" else ""
    file_system, root = fs.FileSystem.from_uri(f"{scheme}://{authority}/{options}")
    return file_system, root.rstrip("/")


@contextlib.contextmanager
def _reaching(uri: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise RuntimeError(
            f"{uri} must be on a file system that can be reached. Received: {reason}. Allowed: a local path, s3://, "
            "gs:// or hdfs://. Check the address, the network and the credentials in the environment"
        ) from error
