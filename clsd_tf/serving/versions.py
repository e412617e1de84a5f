"""Numbers of servable versions: which directory names TF Serving takes for one."""

from __future__ import annotations

import pathlib
import re

MAX_VERSION = 2**63 - 1  # int64.
_NUMBER = re.compile("-?[0-9]+")  # int and isdigit would take digits of other scripts, too.
_SPACES = " \t\n\v\f\r"


def version_number(name: str) -> int | None:
    """Reads a directory's name as TF Serving does: as an int64 in decimal digits.

    Args:
      name: without its parents. Leading zeros and spaces around the number are read over.

    Returns:
      The version; None where TF Serving ignores the directory: another text, or a number beyond int64.

    Source: ParseVersionNumber in TF Serving's file_system_storage_path_source.cc.
    """
    digits = name.strip(_SPACES)
    if not _NUMBER.fullmatch(digits):
        return None
    number = int(digits)
    return number if -MAX_VERSION - 1 <= number <= MAX_VERSION else None


def versions_on_disk(model_dir: pathlib.Path) -> dict[int, pathlib.Path]:
    """The directories of a model's versions by their number, ascending.

    Args:
      model_dir: holds them; need not exist.

    Returns:
      Version -> directory. Of several names of one number, such as 7 and 007, the last in alphabetical order.
    """
    children = sorted(child for child in model_dir.iterdir() if child.is_dir()) if model_dir.is_dir() else []
    numbered = {number: child for child in children if (number := version_number(child.name)) is not None}
    return dict(sorted(numbered.items()))
