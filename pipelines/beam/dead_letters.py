"""Dead letters: the rows that were refused, each with its place and its reason, as Parquet."""

from __future__ import annotations

import contextlib
import itertools
import pathlib
import shutil
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet
import tensorflow as tf

from pipelines.beam.shuffle_files import temporary_name
from pipelines.rows.outcome import BadInputError
from pipelines.sources import BadRow, SourceFile

_SCHEMA = pa.schema(
    [
        ("table", pa.string()),
        ("file", pa.string()),
        ("row", pa.int64()),
        ("reason", pa.string()),
        ("raw", pa.string()),
        ("lines", pa.int64()),
    ]
)


def write_dead_letter(bad_rows: Sequence[BadRow], file: SourceFile, directory: str) -> None:
    """Writes the bad rows of a batch to a Parquet file.

    Args:
      bad_rows: of one batch, at least one.
      file: that they are from.
      directory: of the dead letters; the file's name is one that a second attempt of the same batch writes again.
    """
    columns = {
        "table": [row.role for row in bad_rows],
        "file": [row.file for row in bad_rows],
        "row": [row.row for row in bad_rows],
        "reason": [row.reason for row in bad_rows],
        "raw": [row.raw for row in bad_rows],
        "lines": [row.lines for row in bad_rows],
    }
    path = f"{directory}/{file.role}-{file.index:06d}-{min(columns['row']):015d}.parquet"
    temporary = temporary_name(path)
    pa.parquet.write_table(pa.table(columns, _SCHEMA), temporary)
    tf.io.gfile.rename(temporary, path, overwrite=True)


def merge_dead_letters(
    directory: pathlib.Path, path: pathlib.Path, columns: Sequence[str] = tuple(_SCHEMA.names)
) -> None:
    """Joins the files of ``write_dead_letter``.

    Args:
      directory: of the files.
      path: Parquet file to write, by table, file and row; none is written when there are no bad rows.
      columns: to keep.
    """
    parts = sorted(directory.glob("*.parquet"))
    if parts:
        with pa.parquet.ParquetWriter(path, pa.schema([_SCHEMA.field(name) for name in columns])) as writer:
            for part in parts:
                writer.write_table(pa.parquet.read_table(part).sort_by("row").select(columns))


@contextlib.contextmanager
def kept_dead_letter(dead_letter: pathlib.Path, output_dir: pathlib.Path) -> Iterator[None]:
    """When bad input ends the block, saves the bad rows from a staging directory, which is about to be removed.

    Args:
      dead_letter: file in the staging directory.
      output_dir: beside which it is kept, as ``<output_dir>.dead_letter.parquet`` or the first name that is free.

    Raises:
      BadInputError: the one that ended the block, with the place of the bad rows.
    """
    try:
        yield
    except BadInputError as error:
        if not dead_letter.exists():
            raise
        kept = output_dir.with_name(f"{output_dir.name}.dead_letter.parquet")
        for attempt in itertools.count(2):
            if not kept.exists():
                break
            kept = output_dir.with_name(f"{output_dir.name}.dead_letter-{attempt}.parquet")
        shutil.move(dead_letter, kept)
        raise BadInputError(f"{error}. The bad rows are in {kept}") from error
