"""Profiles of files that nobody prepared: format and columns, and what each looks like in a sample."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Container, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clsd_tf.data.columns import LIST_SEPARATOR, convert_column
from clsd_tf.spec.record_fields import RESERVED_RAW_NAMES
from clsd_tf.spec.tables import Column, Table
from pipelines import sources
from pipelines.sources.files import until_unreadable

_DELIMITERS = (",", "\t", ";", "|")
_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".avro": "avro",
}
_MAX_FILES = 10
_MAX_UNPARSABLE = 0.001  # Rarer ones become bad rows, of which a build allows 1 %.
_SEPARATORS = (LIST_SEPARATOR, ",", ";", " ")
_NO_AND_YES = (("false", "true"), ("f", "t"), ("no", "yes"), ("n", "y"))
ID_ENDING = r"(_?(id|key|idx|index|no|hash|token))"
# Of columns with such names, and of ids and names in the user table, no value is shown.
_PERSONAL_NAME = re.compile(
    rf"(^|_)(user|uid|visitor|customer|member|account|reader|viewer|reviewer|person){ID_ENDING}?$|"
    rf"(^|_)(device|cookie|client|session){ID_ENDING}$|"
    r"(^|_)(e?mail|phone|mobile|msisdn|tel|telephone|imei|idfa|gaid|ip|ssn|passport|address|"
    r"(first|last|full|user|nick|sur)_?name)(_|$)"
)


@dataclasses.dataclass(frozen=True)
class ColumnProfile:
    """A column as the sample shows it.

    Attributes:
      name: as the spec will call it.
      source_name: as the file calls it.
      type: ``string``, ``int64`` or ``float``.
      values: the sample, typed; null where missing.
      num_distinct: different values.
      missing: share of rows without a value, in [0, 1].
      unit: of a column of moments (``seconds``, ``milliseconds``, ``microseconds``); None otherwise.
      separator: between the values of a column of several values a row; None otherwise.
      is_personal: no value of it may be shown: the user key, and what identifies a person by its name.
    """

    name: str
    source_name: str
    type: str
    values: pa.Array
    num_distinct: int
    missing: float
    unit: str | None = None
    separator: str | None = None
    is_personal: bool = False

    @property
    def num_rows(self) -> int:
        return len(self.values)

    @property
    def is_number(self) -> bool:
        return self.type != "string"

    @property
    def numbers(self) -> np.ndarray:
        """The values of a number column that are not missing, float64."""
        return self.values.drop_null().cast(pa.float64()).to_numpy()

    @property
    def yes(self) -> int | str | None:
        """The value that says yes, in a column of 0 and 1 or of two words such as false and true; None in any other."""
        values = pc.unique(self.values.drop_null()).to_pylist() if self.num_distinct <= 2 else []
        if self.is_number:
            return 1 if set(values) == {0, 1} else None
        words = {value.lower(): value for value in values}
        return next((words[yes] for no, yes in _NO_AND_YES if set(words) == {no, yes}), None)

    @property
    def is_binary(self) -> bool:
        """Yes and no, both of them, and nothing else."""
        return self.missing == 0 and self.yes is not None

    @property
    def yes_expression(self) -> str:
        """Of a binary column: the comparison that holds where it says yes."""
        return f"{self.name} == {self.yes!r}"

    @property
    def yes_share(self) -> float:
        """Of a binary column: the share of rows that say yes, in [0, 1]."""
        return pc.mean(pc.equal(self.values, self.yes)).as_py()

    def as_text(self) -> ColumnProfile:
        """The same column declared as text."""
        return dataclasses.replace(self, type="string", values=self.values.cast(pa.string()), unit=None)

    def most_frequent(self) -> list[tuple[object, int]]:
        """(value, rows), the most frequent first; ties in the order of values."""
        counts = pc.value_counts(self.values.drop_null()).to_pylist()
        return sorted(((entry["values"], entry["counts"]) for entry in counts), key=lambda pair: (-pair[1], pair[0]))

    def evidence(self) -> str:
        """One line for a comment: how many values, how many missing, their range.

        No value of a text column, none of a personal one.
        """
        parts = [f"{self.num_distinct:,} distinct in {self.num_rows:,} rows", f"{self.missing:.1%} missing"]
        if self.is_number and len(self.numbers) and not self.is_personal:
            parts.append(f"from {self.numbers.min():.15g} to {self.numbers.max():.15g}")
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class TableProfile:
    """A sampled table.

    Attributes:
      role: ``log``, ``user`` or ``item``.
      table: declares every column as text, under the names the spec will use.
      columns: in the file's order.
      unreadable: files whose rest could not be read, each with the reason.
    """

    role: str
    table: Table
    columns: tuple[ColumnProfile, ...]
    unreadable: tuple[str, ...] = ()

    def column(self, name: str) -> ColumnProfile | None:
        """Finds a column.

        Args:
          name: in the spec or in the file.

        Returns:
          The first column of that name; None if there is none.
        """
        return next((column for column in self.columns if name in (column.name, column.source_name)), None)


def profile_table(role: str, path: str, input_dir: str, max_rows: int) -> TableProfile:
    """Looks at a sample of a table.

    Args:
      role: ``log``, ``user`` or ``item``.
      path: path, URI or pattern, as for ``sources.match_files``.
      input_dir: that the path is relative to; empty is the current folder.
      max_rows: at most that many, from at most ten of the files.

    Returns:
      The profile; its path is ``path`` as it was given.

    Raises:
      FileNotFoundError: no file matches.
      RuntimeError: the file system cannot be reached.
      ValueError: the files cannot be read, or hold no rows.
    """
    paths = sources.match_files(sources.resolve_path(path, input_dir))
    if not paths:
        raise FileNotFoundError(
            f"--{role} must match at least one file. Received: {path}, relative to {input_dir or '.'}"
        )
    files = [sources.SourceFile(role, index, found) for index, found in enumerate(paths)]
    table = declare_table(path, files[0])
    chosen = files[:: -(-len(files) // _MAX_FILES)]
    batches = [batch for file in chosen for batch in _first_batches(file, table, -(-max_rows // len(chosen)))]
    unreadable = tuple(f"{batch.file.name}: {batch.unreadable}" for batch in batches if batch.unreadable)
    # A file without rows has no types either.
    filled = [batch.table for batch in batches if batch.table.num_rows]
    if not filled:
        raise ValueError(
            f"--{role} must have rows. Received: {path} with none that can be read. {'; '.join(unreadable)}".rstrip()
        )
    rows = pa.concat_tables(filled, promote_options="permissive")
    columns = (_profile(role, column, rows.column(column.name).combine_chunks()) for column in table.columns)
    return TableProfile(role, table, tuple(columns), unreadable)


def declare_table(path: str, file: sources.SourceFile, file_format: str | None = None) -> Table:
    """The table with every column of the file as text.

    Args:
      path: of the table.
      file: one of its files.
      file_format: as in a spec; by default what the name's ending or the first lines say.

    Returns:
      The table, with its format and delimiter.

    Raises:
      ValueError: the file cannot be read, or a column occurs twice in it.
    """
    found_format, delimiter = _format(file)
    if file_format not in (None, found_format):
        found_format, delimiter = file_format, None
    draft = Table(path=path, format=found_format, delimiter=delimiter, columns=(Column(name="any", type="string"),))
    return draft.model_copy(update={"columns": declare_columns(file, sources.discover_columns(file, draft))})


def declare_columns(file: sources.SourceFile, source_names: Sequence[str]) -> tuple[Column, ...]:
    """Declares the columns of a file as text, under names that a spec allows.

    Args:
      file: for messages.
      source_names: in the file; those without a name are left out.

    Returns:
      Columns in the same order; ``source_name`` where the name differs.

    Raises:
      ValueError: a column occurs twice, or there is none.
    """
    # Without a name there is nothing to declare: the index that pandas writes.
    found = [source_name for source_name in source_names if source_name]
    repeated = [source_name for source_name in found if found.count(source_name) > 1]
    if repeated or not found:
        received = f"{repeated[0]!r} {found.count(repeated[0])} times" if repeated else "no column with a name"
        raise ValueError(f"{file.name} must have each column once. Received: {received}. Rename it in the file")
    names: dict[str, str] = {}
    for source_name in found:
        names[unique_name(spec_name(source_name), names)] = source_name
    return tuple(
        Column(name=name, type="string", source_name=None if name == source_name else source_name)
        for name, source_name in names.items()
    )


def spec_name(source_name: str) -> str:
    """Makes a name that a spec allows; RecBole's ``user_id:token`` loses what stands behind the colon.

    Args:
      source_name: of a column.

    Returns:
      Letters, digits and _, a letter first.

    >>> spec_name("Unix Time"), spec_name("user_id:token"), spec_name("1st")
    ('Unix_Time', 'user_id', 'column_1st')
    """
    name = re.sub(r"\W+", "_", source_name.split(":")[0], flags=re.ASCII).strip("_")
    name = name if re.match(r"[A-Za-z]", name) else f"column_{name}".rstrip("_")
    return f"{name}_value" if name in RESERVED_RAW_NAMES else name


def unique_name(name: str, taken: Container[str]) -> str:
    """Finds a name that is neither taken nor reserved.

    Args:
      name: the wanted one.
      taken: by others.

    Returns:
      ``name`` itself, or the first of name_2, name_3, ...

    >>> unique_name("age", {"age", "age_2"})
    'age_3'
    """
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return next(
        choice
        for choice in itertools.chain([name], numbered)
        if choice not in RESERVED_RAW_NAMES and choice not in taken
    )


def _format(file: sources.SourceFile) -> tuple[str, str | None]:
    """(format, delimiter) by the name's ending; of other text by what stands between its values."""
    if ".tfrecord" in file.name:
        return "tfrecord", None
    name = pathlib.PurePath(file.name)
    ending = (name.with_suffix("") if file.compression else name).suffix.lower()
    if ending in _FORMATS:
        return _FORMATS[ending], None
    delimiter = _sniff_delimiter(sources.first_bytes(file))
    return ("tsv", None) if delimiter == "\t" else ("csv", None if delimiter == "," else delimiter)


def _sniff_delimiter(start: bytes) -> str:
    """The delimiter that gives the first lines the same number of values, and most of them."""
    lines = start.decode("utf-8", errors="replace").splitlines()[:50]
    lines = [re.sub(r'"[^"]*"', "", line) for line in lines[:-1] or lines if line]

    def score(delimiter: str) -> tuple[float, int]:
        counts = [line.count(delimiter) for line in lines]
        return (counts.count(counts[0]) / len(counts) if counts[0] else 0.0, counts[0])

    return max(_DELIMITERS, key=score) if lines else ","


def _first_batches(file: sources.SourceFile, table: Table, max_rows: int) -> Iterator[sources.RawBatch]:
    """Batches with at most ``max_rows`` rows in all."""
    for batch in until_unreadable(_all_batches(file, table), file, table):
        yield dataclasses.replace(batch, table=batch.table.slice(0, max_rows))
        max_rows -= batch.table.num_rows
        if max_rows <= 0:
            return


def _all_batches(file: sources.SourceFile, table: Table) -> Iterator[sources.RawBatch]:
    yield from sources.read_slice(sources.whole_slice(file, table), table)  # The slice alone may be unreadable.


# --- What a column looks like ----------------------------------------------------------------------------------------


def _profile(role: str, column: Column, values: pa.Array) -> ColumnProfile:
    declared, typed = _typed(column.name, values)
    is_list = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
    return ColumnProfile(
        name=column.name,
        source_name=column.name_in_file,
        type=declared,
        values=typed,
        num_distinct=pc.count_distinct(typed).as_py(),
        missing=typed.null_count / len(typed),
        unit=_unit(values.type, typed) if declared != "string" else None,
        separator=(LIST_SEPARATOR if is_list else _separator(typed)) if declared == "string" else None,
        is_personal=_is_personal(role, column.name.lower()),
    )


def _is_personal(role: str, name: str) -> bool:
    return bool(_PERSONAL_NAME.search(name) or (role == "user" and re.search(rf"{ID_ENDING}$|^name$", name)))


def _typed(name: str, values: pa.Array) -> tuple[str, pa.Array]:
    """The narrowest type that nearly all values have."""
    text, _ = convert_column(values, Column(name=name, type="string"))
    # 007 is a name, not the number 7; and an id of 19 digits is none that a float can tell from the next.
    is_name = pc.any(pc.match_substring_regex(text, r"^[+-]?(0\d|\d{19,}$)")).as_py()
    for declared in () if is_name or text.null_count == len(text) else ("int64", "float"):
        typed, _ = convert_column(values, Column(name=name, type=declared))
        if typed.null_count - text.null_count <= _MAX_UNPARSABLE * len(values):
            return declared, typed
    return "string", text


_MICROSECONDS = {"seconds": 1_000_000, "milliseconds": 1_000, "microseconds": 1}
_ARROW_UNITS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "microseconds"}
_MOMENTS = (631_152_000, 4_102_444_800)  # Seconds from 1970 to 1990 and to 2100.


def _unit(kind: pa.DataType, typed: pa.Array) -> str | None:
    """The unit in which all values are moments between 1990 and 2100."""
    if pa.types.is_timestamp(kind):
        return _ARROW_UNITS[kind.unit]
    limits = pc.min_max(typed)
    low, high = limits["min"].as_py(), limits["max"].as_py()
    for unit, microseconds in _MICROSECONDS.items():
        per_second = 1_000_000 // microseconds
        if _MOMENTS[0] * per_second <= low and high < _MOMENTS[1] * per_second:
            return unit
    return None


def _separator(text: pa.Array) -> str | None:
    """Separator of values: splitting by it must leave far fewer different values, each of them short."""
    distinct = pc.unique(text.drop_null())
    for separator in _SEPARATORS:
        lists = pc.split_pattern(distinct, separator)
        lengths = pc.list_value_length(lists)
        if not len(distinct) or pc.mean(pc.greater(lengths, 1)).as_py() < 0.2:
            continue
        parts = pc.list_flatten(lists)
        if pc.count_distinct(parts).as_py() <= 0.6 * len(distinct) and pc.mean(pc.utf8_length(parts)).as_py() <= 30:
            return separator
    return None
