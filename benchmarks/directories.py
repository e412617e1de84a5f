"""Where benchmarks work: a directory that is kept, or a temporary one."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def work_directory(path: str | None) -> Iterator[pathlib.Path]:
    """``path``, made where it is missing; for None a directory that ends with the block."""
    if path:
        directory = pathlib.Path(path).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="benchmark-", ignore_cleanup_errors=True) as temporary:
        yield pathlib.Path(temporary)
