"""Plug-ins: modules of a user's own that register backbones and the like as they are imported."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

ENTRY_POINTS = "clsd_tf.plugins"


class PluginError(RuntimeError):
    """A plug-in that cannot be imported; the message names it and its error."""


def load_plugins(modules: Iterable[str] = ()) -> None:
    """Imports the plug-ins of installed packages (entry points of the group ``clsd_tf.plugins``), then ``modules``.

    Whatever is imported already stays as it is. The current directory joins the Python path, at its end.

    Args:
      modules: dotted names.

    Raises:
      PluginError: a module is not found, or fails while it is imported.
    """
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        _load(f"entry point {entry.name} = {entry.value}", entry.load)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # As `python -m` does; the script of a console command does not.
    for module in modules:
        _load(module, functools.partial(importlib.import_module, module))


def _load(plugin: str, load: Callable[[], Any]) -> None:
    try:
        load()
    except Exception as error:
        raise PluginError(
            f"a plug-in cannot be imported. Received: {plugin}, which fails with {type(error).__name__}: {error}"
            f"{_place(error)}. Allowed: a module, named as in an import statement, on the Python path or in the "
            "current directory"
        ) from error


def _place(error: Exception) -> str:
    """The line of the plug-in that failed; nothing for a module that is not there."""
    importers = ("<frozen", __file__, os.path.dirname(importlib.__file__))
    for frame in traceback.extract_tb(error.__traceback__):
        if not frame.filename.startswith(importers):
            return f" ({frame.filename}:{frame.lineno})"
    return ""
