"""A log of served requests as rows of raw inputs, which ``pipelines.validate_data --requests`` compares with training.

Users and sensitive columns are never decoded, so no file can hold them; files say that they leave them out.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import random
import secrets
import threading
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import tensorflow as tf
from absl import logging
from google.protobuf.message import DecodeError
from tensorflow_serving.apis import input_pb2

from clsd_tf.examples import parse_raw_examples, tensors_to_arrow
from clsd_tf.model_inputs import RawInput
from clsd_tf.request_files import LEFT_OUT
from export.server.servable import LoadedVersion

_OF_EXAMPLES = ("serving_default", "classify", "regress")
_OF_TENSORS = "predict_raw"
_OF_LISTS = "rank"


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Requests that have the same columns and the same encoding, and so become rows together."""

    model_name: str
    version: int
    encoding: str
    raw_inputs: tuple[RawInput, ...]
    left_out: tuple[str, ...]

    @classmethod
    def of(cls, version: LoadedVersion, signature_name: str) -> _Kind | None:
        """None for requests that are not logged: other signatures, and models that do not name their raw inputs."""
        if signature_name not in (*_OF_EXAMPLES, _OF_TENSORS, _OF_LISTS):
            return None
        if version.manifest is None or not {"raw_inputs", "private_inputs"} <= version.manifest.keys():
            return None
        encoding = _OF_EXAMPLES[0] if signature_name in _OF_EXAMPLES else signature_name
        private = set(version.manifest["private_inputs"])
        declared = [RawInput(**entry) for entry in version.manifest["raw_inputs"]]
        logged = tuple(entry for entry in declared if entry.name not in private)
        left_out = tuple(entry.name for entry in declared if entry.name in private)
        return cls(version.model_name, version.version, encoding, logged, left_out)


class RequestLog:
    """Samples accepted requests and writes them as Parquet, ``directory``/<model>/<version>-<time>-<random>.parquet.

    ``record`` only keeps a reference; a thread of its own decodes and writes. A file appears under its name when it is
    whole. A killed process loses what it has not yet written. A context manager, which closes it.

    Args:
      directory: made if it does not exist.
      sample_rate: share of the requests that are logged, in (0, 1].
      seed: of the sampling.
      rows_per_file: a longer batch of rows becomes several files; reaching it starts one.
      flush_seconds: how long a request waits at most until a file is begun.
      max_buffer_bytes: of requests that wait; beyond it requests are dropped and counted.

    Attributes:
      dropped_requests: how many of the sampled ones are in no file: the buffer was full, the disk failed, or they held
        nothing that could be decoded.

    Raises:
      ValueError: sample_rate outside (0, 1].
    """

    def __init__(
        self,
        directory: pathlib.Path,
        sample_rate: float = 1.0,
        seed: int = 0,
        rows_per_file: int = 100_000,
        flush_seconds: float = 60.0,
        max_buffer_bytes: int = 64 << 20,
    ):
        if not 0 < sample_rate <= 1:
            raise ValueError(f"the share of logged requests must be in (0, 1]. Received: {sample_rate}")
        self.dropped_requests = 0
        self._directory = directory
        self._directory.mkdir(parents=True, exist_ok=True)
        self._sample_rate = sample_rate
        self._random = random.Random(seed)
        self._rows_per_file = rows_per_file
        self._flush_seconds = flush_seconds
        self._max_buffer_bytes = max_buffer_bytes
        self._condition = threading.Condition()
        self._kinds: dict[tuple[str, int, str], _Kind | None] = {}
        self._waiting: dict[_Kind, list[Mapping[str, np.ndarray]]] = {}
        self._num_rows = self._num_bytes = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._write_until_closed, name="request log", daemon=True)
        self._thread.start()

    def record(self, version: LoadedVersion, signature_name: str, inputs: Mapping[str, np.ndarray]) -> None:
        """Takes an accepted request, if it is sampled; any thread may call it.

        Args:
          version: that answered.
          signature_name: that was called; others than those of raw rows are passed over.
          inputs: as the signature takes them; must not be changed afterwards.
        """
        with self._condition:
            kind = self._kind(version, signature_name)
            if kind is None or self._is_closed or self._random.random() >= self._sample_rate:
                return
            num_bytes = sum(map(_num_bytes, inputs.values()))
            if self._num_bytes + num_bytes > self._max_buffer_bytes:
                self.dropped_requests += 1
                return
            self._waiting.setdefault(kind, []).append(inputs)
            self._num_bytes += num_bytes
            self._num_rows += len(next(iter(inputs.values())))
            if self._is_due():
                self._condition.notify_all()

    def _kind(self, version: LoadedVersion, signature_name: str) -> _Kind | None:
        key = (version.model_name, version.version, signature_name)
        if key not in self._kinds:
            self._kinds[key] = _Kind.of(version, signature_name)
        return self._kinds[key]

    def __enter__(self) -> RequestLog:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Writes what waits and stops; later requests are passed over."""
        with self._condition:
            self._is_closed = True
            self._condition.notify_all()
        self._thread.join()

    def _is_due(self) -> bool:
        half_full = self._num_bytes >= self._max_buffer_bytes / 2
        return self._is_closed or half_full or self._num_rows >= self._rows_per_file

    def _write_until_closed(self) -> None:
        is_closed = False
        while not is_closed:
            with self._condition:
                self._condition.wait_for(self._is_due, self._flush_seconds)
                waiting, self._waiting = self._waiting, {}
                self._num_rows = self._num_bytes = 0
                is_closed = self._is_closed
            dropped_before = self.dropped_requests
            for kind, requests in waiting.items():
                self._write(kind, requests)
            if self.dropped_requests > dropped_before:
                logging.warning("%d requests were not logged so far", self.dropped_requests)

    def _write(self, kind: _Kind, requests: list[Mapping[str, np.ndarray]]) -> None:
        tables, num_failed = _rows_of(kind, requests)
        try:
            rows = pa.concat_tables(tables) if tables else pa.table({})
            for start in range(0, rows.num_rows, self._rows_per_file):
                self._write_file(kind, rows.slice(start, self._rows_per_file))
        except (OSError, pa.ArrowException) as error:
            logging.error("requests could not be logged: %s", type(error).__name__)
            num_failed = len(requests)
        with self._condition:
            self.dropped_requests += num_failed

    def _write_file(self, kind: _Kind, rows: pa.Table) -> None:
        directory = self._directory / kind.model_name
        directory.mkdir(exist_ok=True)
        stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")
        path = directory / f"{kind.version}-{stamp}-{secrets.token_hex(4)}.parquet"
        temporary = path.with_name(f".{path.name}.incomplete")
        with temporary.open("wb") as file:
            pa.parquet.write_table(rows.replace_schema_metadata({LEFT_OUT: json.dumps(kind.left_out)}), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)


def _num_bytes(values: np.ndarray) -> int:
    texts = sum(map(len, values.ravel().tolist())) if values.dtype == object else 0
    return values.nbytes + texts


# --- Requests -> rows -------------------------------------------------------------------------------------------------


def _rows_of(kind: _Kind, requests: Sequence[Mapping[str, np.ndarray]]) -> tuple[list[pa.Table], int]:
    """(the rows of the requests, how many requests could not be decoded)."""
    try:
        return [_decode(kind, requests)], 0
    except (tf.errors.OpError, DecodeError, ValueError, KeyError):
        if len(requests) == 1:
            return [], 1
    parts = [_rows_of(kind, [request]) for request in requests]  # One bad request must not cost the others.
    return [table for tables, _ in parts for table in tables], sum(failed for _, failed in parts)


def _decode(kind: _Kind, requests: Sequence[Mapping[str, np.ndarray]]) -> pa.Table:
    if kind.encoding == _OF_TENSORS:
        tensors = {entry.name: _joined([request[entry.name] for request in requests]) for entry in kind.raw_inputs}
        return tensors_to_arrow(tensors, kind.raw_inputs)
    serialized = [text for request in requests for values in request.values() for text in values.tolist()]
    if kind.encoding == _OF_LISTS:
        serialized = [example for text in serialized for example in _examples_of_list(text)]
    parsed = parse_raw_examples(tf.constant(serialized, tf.string, shape=[len(serialized)]), kind.raw_inputs)
    return tensors_to_arrow({name: values.numpy() for name, values in parsed.items()}, kind.raw_inputs)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """One batch of several; histories, [batch, any], are padded to the longest."""
    if parts[0].ndim == 1:
        return np.concatenate(parts)
    joined = np.full((sum(map(len, parts)), max(part.shape[1] for part in parts)), b"", object)
    start = 0
    for part in parts:
        joined[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return joined


def _examples_of_list(serialized: bytes) -> list[bytes]:
    """The user's features with those of each item: messages that stand one after the other are merged when parsed."""
    request = input_pb2.ExampleListWithContext.FromString(serialized)
    context = request.context.SerializeToString()
    return [context + example.SerializeToString() for example in request.examples]
