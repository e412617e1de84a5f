"""Small results of a pipeline: merged counts, and files that the driver reads when it is done."""

from __future__ import annotations

import json
import pathlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import apache_beam as beam
import tensorflow as tf


class MergeCounts(beam.CombineFn):
    """Sums Counters."""

    def create_accumulator(self):
        return Counter()

    def add_input(self, accumulator, counts):
        accumulator.update(counts)
        return accumulator

    def merge_accumulators(self, accumulators):
        return sum(accumulators, Counter())

    def extract_output(self, accumulator):
        return accumulator


class WriteJson(beam.PTransform):
    """Writes the one element of a PCollection as a JSON file that the driver reads when the pipeline is done."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self._path = str(path)

    def expand(self, values):
        return values | beam.Map(write_json, self._path)


def write_json(value: Any, path: str) -> None:
    with tf.io.gfile.GFile(path, "w") as file:
        file.write(json.dumps(value))


def write_lines(path: str, lines: Iterable[str]) -> None:
    with tf.io.gfile.GFile(path, "w") as file:
        file.write("".join(f"{line}\n" for line in lines))
