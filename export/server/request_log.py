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
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet
from absl import logging

from clsd_tf.data.request_files import LEFT_OUT
from export.server.loaded_version import LoadedVersion
from export.server.request_rows import Request, RequestKind, num_rows, parts, rows_of
from export.server.tensor_protos import num_bytes


class RequestLog:
    """Samples accepted requests and writes them as Parquet, ``directory``/<model>/<version>-<time>-<random>.parquet.

    ``record`` only keeps a reference; a thread of its own decodes and writes. A file appears under its name when it is
    whole. A killed process loses what it has not yet written. Whatever fails costs rows of the log, and no request. A
    context manager, which closes it.

    Args:
      directory: made if it does not exist.
      sample_rate: share of the requests that are logged, in (0, 1].
      seed: of the sampling.
      rows_per_file: a longer batch of rows becomes several files; reaching it starts one. Items of `rank` are rows.
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
        self._kinds: dict[tuple[str, int, str], RequestKind | None] = {}
        self._waiting: dict[RequestKind, list[Request]] = {}
        self._num_rows = self._num_bytes = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._write_until_closed, name="request log", daemon=True)
        self._thread.start()

    def record(self, version: LoadedVersion, signature_name: str, inputs: Request) -> None:
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
            size = sum(map(num_bytes, inputs.values()))
            if self._num_bytes + size > self._max_buffer_bytes:
                self.dropped_requests += 1
                return
            self._waiting.setdefault(kind, []).append(inputs)
            self._num_bytes += size
            self._num_rows += num_rows(kind, inputs)
            if self._is_due():
                self._condition.notify_all()

    def _kind(self, version: LoadedVersion, signature_name: str) -> RequestKind | None:
        key = (version.model_name, version.version, signature_name)
        if key not in self._kinds:
            self._kinds[key] = RequestKind.of(version, signature_name)
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

    def _write(self, kind: RequestKind, requests: Sequence[Request]) -> None:
        """Decodes a few requests at a time, and writes a file as soon as it is full."""
        num_written, waiting = 0, _RowBuffer()
        try:
            for part in parts(kind, requests):
                tables, num_failed = rows_of(kind, part)
                waiting.add(tables, len(part) - num_failed)
                if waiting.num_rows >= self._rows_per_file or waiting.num_bytes >= self._max_buffer_bytes:
                    num_written += self._write_rows(kind, waiting)
                    waiting = _RowBuffer()
            num_written += self._write_rows(kind, waiting)
        except Exception as error:  # The disk, mostly; its message may quote values.
            logging.error("requests could not be logged: %s", type(error).__name__)
        with self._condition:
            self.dropped_requests += len(requests) - num_written

    def _write_rows(self, kind: RequestKind, waiting: _RowBuffer) -> int:
        """Writes rows; returns of how many requests."""
        rows = pa.concat_tables(waiting.tables) if waiting.tables else pa.table({})
        for start in range(0, rows.num_rows, self._rows_per_file):
            self._write_file(kind, rows.slice(start, self._rows_per_file))
        return waiting.num_requests

    def _write_file(self, kind: RequestKind, rows: pa.Table) -> None:
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


@dataclasses.dataclass
class _RowBuffer:
    """Rows of requests that are not yet in a file."""

    tables: list[pa.Table] = dataclasses.field(default_factory=list)
    num_requests: int = 0

    def add(self, tables: Sequence[pa.Table], num_requests: int) -> None:
        self.tables += tables
        self.num_requests += num_requests

    @property
    def num_rows(self) -> int:
        return sum(table.num_rows for table in self.tables)

    @property
    def num_bytes(self) -> int:
        return sum(table.nbytes for table in self.tables)
