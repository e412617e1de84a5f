"""Small results of a pipeline: files that the driver reads when it is done."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import apache_beam as beam
import tensorflow as tf


class WriteTogether(beam.PTransform):
    """Writes what one function makes of all elements as a JSON file, for the driver; no file when there are none.

    Elements meet on one worker: there are few of them, and they are small.

    Args:
      path: of the file.
      merge: elements, in any order -> something that JSON has a form for.
    """

    def __init__(self, path: pathlib.Path, merge: Callable[[Iterable[Any]], Any]):
        super().__init__()
        self._path = str(path)
        self._merge = merge

    def expand(self, elements):
        path, merge = self._path, self._merge
        return (
            elements
            | beam.WithKeys(None)
            | beam.GroupByKey()
            | beam.MapTuple(lambda _, together: write_json(merge(together), path))
        )


def write_json(value: Any, path: str) -> None:
    """Writes a JSON file.

    Args:
      value: of types that JSON has a form for.
      path: that driver and workers share.
    """
    with tf.io.gfile.GFile(path, "w") as file:
        file.write(json.dumps(value))


def write_lines(path: str, lines: Iterable[str]) -> None:
    """Writes a text file.

    Args:
      path: that driver and workers share.
      lines: without line ends; a line feed follows each.
    """
    with tf.io.gfile.GFile(path, "w") as file:
        file.write("".join(f"{line}\n" for line in lines))
