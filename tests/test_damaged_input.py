"""Whatever is done to a file: it is refused by name and with a reason, or every row of it is accounted for.

``damaged_files`` makes the files and knows which rows are good. Reading and checking is tested on hundreds of them,
whole builds on a dozen.
"""

import dataclasses
import pathlib
import tempfile

import damaged_files
from damaged_files import SECRET, DamagedFile
from hypothesis import given, settings
from hypothesis import strategies as st

from clsd_tf.features import FeatureSpec, parse_spec
from pipelines import sources
from pipelines.checks import parse_rows

many = settings(max_examples=200, deadline=None)


def log_spec(shop_spec: FeatureSpec, file: DamagedFile) -> FeatureSpec:
    """The shop's spec for the damaged file."""
    content = shop_spec.model_dump(mode="json", exclude_unset=True)
    suffix = next(part for part in file.name.split(".") if part in ("csv", "tsv", "jsonl", "parquet"))
    content["tables"]["log"] |= {"path": file.name, "format": suffix}
    return parse_spec(content, "shop")


@dataclasses.dataclass
class Outcome:
    """Good rows by number, bad rows, and why the file, or the rest of a slice, was refused."""

    good: dict[int, dict] = dataclasses.field(default_factory=dict)
    bad_rows: list[sources.BadRow] = dataclasses.field(default_factory=list)
    refusals: list[str] = dataclasses.field(default_factory=list)


def read_and_check(spec: FeatureSpec, directory: str, slice_bytes: int) -> Outcome:
    """Reads the log as a build does."""
    outcome = Outcome()
    try:
        for file in sources.list_files(spec.tables.log, "log", directory):
            for part in sources.plan_file(file, spec.tables.log, slice_bytes).slices:
                for batch in sources.read_slice(part, spec.tables.log):
                    rows, bad_rows = parse_rows(batch, spec)
                    for row in rows.to_pylist():
                        number = sources.row_number(row.pop(sources.ROW_ID))
                        assert number not in outcome.good, f"two rows are called {number}"
                        outcome.good[number] = row
                    outcome.bad_rows += bad_rows
                    if batch.unreadable:  # A build puts the file's name before it.
                        outcome.refusals.append(f"{batch.file.name}: {batch.unreadable}")
    except (ValueError, FileNotFoundError) as error:
        outcome.refusals.append(str(error))
    return outcome


def check(file: DamagedFile, shop_spec: FeatureSpec, slice_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        (pathlib.Path(directory) / file.name).write_bytes(file.data)
        outcome = read_and_check(log_spec(shop_spec, file), directory, slice_bytes)
    if outcome.refusals:
        assert file.may_fail or file.must_fail, outcome.refusals
        for message in outcome.refusals:
            assert file.name in message
            assert len(message) > len(file.name) + 20, "a reason"
            assert SECRET not in message
        return
    assert not file.must_fail
    assert {number: outcome.good.get(number) for number in file.good} == file.good
    bad_numbers = {bad_row.row for bad_row in outcome.bad_rows}
    assert file.bad <= bad_numbers
    assert not bad_numbers & set(outcome.good)
    assert all(bad_row.file == file.name and bad_row.reason for bad_row in outcome.bad_rows)
    if file.num_lines is not None:
        assert len(outcome.good) + sum(bad_row.lines for bad_row in outcome.bad_rows) == file.num_lines


# Slices of some rows, and one slice.
slices = st.sampled_from([1, 100, 700, 1 << 20])


@many
@given(file=damaged_files.delimited_files("csv"), slice_bytes=slices)
def test_damaged_csv_is_refused_by_name_or_accounted_for(shop_spec, file, slice_bytes):
    check(file, shop_spec, slice_bytes)


@many
@given(file=damaged_files.delimited_files("tsv"), slice_bytes=slices)
def test_damaged_tsv_is_refused_by_name_or_accounted_for(shop_spec, file, slice_bytes):
    check(file, shop_spec, slice_bytes)


@many
@given(file=damaged_files.json_files(), slice_bytes=slices)
def test_damaged_json_lines_are_refused_by_name_or_accounted_for(shop_spec, file, slice_bytes):
    check(file, shop_spec, slice_bytes)


@many
@given(file=damaged_files.parquet_files(), slice_bytes=slices)
def test_damaged_parquet_is_refused_by_name_or_accounted_for(shop_spec, file, slice_bytes):
    check(file, shop_spec, slice_bytes)
