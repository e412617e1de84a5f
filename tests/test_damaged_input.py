"""Whatever is done to a file: it is refused by name and with a reason, or every row of it is accounted for.

``damaged_files`` makes the files and knows which rows are good. Reading and checking is tested on hundreds of them,
whole builds on a dozen.
"""

import dataclasses
import gzip
import json
import pathlib
import tempfile

import damaged_files
import pytest
from damaged_files import SECRET, DamagedFile
from hypothesis import given, settings
from hypothesis import strategies as st
from shop import LOG, build, events, refused, write_shop

from clsd_tf.data.input_pipeline import read_columns
from clsd_tf.spec.feature_spec import FeatureSpec, parse_spec
from clsd_tf.storage.dataset_dir import SPLITS
from pipelines import sources
from pipelines.rows.checks import parse_rows

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


@pytest.mark.long
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


ROWS = [json.dumps(damaged_files.good_row(k)).encode() for k in range(3)]
CSV_ROWS = [",".join(map(str, damaged_files.good_row(k).values())).encode() for k in range(3)]
CSV_HEADER = ",".join(damaged_files.COLUMNS).encode()


@pytest.mark.parametrize(
    "file",
    [
        DamagedFile(
            "log.csv",
            b"\n".join([CSV_HEADER, CSV_ROWS[0], CSV_ROWS[1] + b",\xff", CSV_ROWS[2]]),
            {2: damaged_files.good_row(0), 4: damaged_files.good_row(2)},
            {3},
            num_lines=3,
            cause=["one value too many, which is not UTF-8"],
        ),
        DamagedFile(
            "log.jsonl",
            b"\n".join([ROWS[0], ROWS[1].replace(b'"i1"', b"[[1], [2, 3]]"), ROWS[2]]),
            {1: damaged_files.good_row(0), 3: damaged_files.good_row(2)},
            num_lines=3,
            cause=["lists of unequal length"],
        ),
        DamagedFile("log.jsonl.gz", must_fail=True, cause=["compressed bytes cut at their beginning"]),
    ],
    ids=lambda file: file.cause[0],
)
@pytest.mark.parametrize("slice_bytes", [1, 1 << 20])
def test_damage_that_a_random_search_may_miss(shop_spec, file, slice_bytes):
    check(file, shop_spec, slice_bytes)


# --- Whole builds ----------------------------------------------------------------------------------------------------


def log_lines() -> list[bytes]:
    """The shop's log of 200 events: a header and a line for each event."""
    rows = [",".join(LOG), *(",".join(str(event[name]) for name in LOG) for event in events())]
    return [row.encode() for row in rows]


def text(lines: list[bytes], ends: tuple[bytes, ...] = (b"\n",)) -> bytes:
    """Lines with these line ends in turn."""
    return b"".join(line + ends[k % len(ends)] for k, line in enumerate(lines))


def with_odd_columns() -> bytes:
    """Columns in another order and one more; a byte order mark; three kinds of line ends."""
    lines = [b",".join([*line.split(b",")[::-1], b"x"]) for line in log_lines()]
    return b"\xef\xbb\xbf" + text(lines, (b"\n", b"\r\n", b"\r"))


BAD_LINES = {
    20: b"u\xff,i1,1700000000,1,1.5,1.0",
    40: b"u1,i1,1700000000,1,NaN,1.0",
    60: b"u1,i1,%b,1,1.5,1.0" % (b"9" * 40),
    80: b"u1,i1",
    100: b"",
    120: b"u1,i1,1700000000,1,1.5,1.0,7",
}


def with_bad_lines() -> bytes:
    return text([BAD_LINES.get(number, line) for number, line in enumerate(log_lines(), start=1)])


def with_an_event_twice() -> bytes:
    return text([*log_lines(), log_lines()[50]])


def cut_off() -> bytes:
    """Without the last 40 bytes: line 201 is gone, line 200 has lost its end."""
    return text(log_lines())[:-40]


GOOD = frozenset(range(2, 202))


@pytest.mark.parametrize(
    ("damaged", "num_rows", "good", "bad"),
    [
        (with_odd_columns, 200, GOOD, frozenset()),
        (with_bad_lines, 200, GOOD - set(BAD_LINES), frozenset(BAD_LINES)),
        (with_an_event_twice, 201, GOOD, frozenset()),
        (cut_off, 199, GOOD - {200, 201}, frozenset([200])),
    ],
)
def test_a_build_keeps_every_good_row_and_accounts_for_the_others(shop_spec, tmp_path, damaged, num_rows, good, bad):
    raw = write_shop(tmp_path / "raw")
    (raw / "log.csv").write_bytes(damaged())
    dataset = build(shop_spec, raw, tmp_path / "dataset", max_bad_fraction=0.1)
    written = [line for split in SPLITS for line in read_columns(dataset, split, ["row_id"])["row_id"].tolist()]
    assert len(written) == len(set(written))
    assert good <= set(written)
    assert not bad & set(written)
    found = dataset.counts["accounting"]
    assert (found["read"], found["written"], found["dead_lettered"]) == (num_rows, len(written), len(bad))
    assert num_rows == found["written"] + found["dead_lettered"] + found["duplicates_dropped"] + found["left_out"]


# Enough rows that the file's beginning can be read.
LONG = text([log_lines()[0], *log_lines()[1:] * 100])
# Name -> (suffix, file, what the message says).
REFUSED = {
    "empty": ("", b"", "log.csv is empty"),
    "header only": ("", text(log_lines()[:1]), "tables.log with 0 rows"),
    "missing column": ("", text(log_lines()).replace(b"weight", b"wait", 1), "Missing: weight"),
    "column twice": ("", text(log_lines()).replace(b"weight", b"weight,weight", 1), "log.csv must have each declared"),
    "cut gzip": (".gz", gzip.compress(LONG)[:-20], "readable to its end. Received: tables.log, log.csv.gz"),
    "no gzip": (".gz", LONG, "log.csv.gz must be a readable csv file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_build_refuses_a_damaged_file_by_name_and_publishes_nothing(shop_content, tmp_path, name):
    suffix, data, reason = REFUSED[name]
    raw = write_shop(tmp_path / "raw")
    (raw / f"log.csv{suffix}").write_bytes(data)
    shop_content["tables"]["log"]["path"] = f"log.csv{suffix}"
    assert reason in refused(parse_spec(shop_content, "shop"), raw, tmp_path, ValueError)
