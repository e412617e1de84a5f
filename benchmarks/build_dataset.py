"""Speed and memory of building a dataset from a wide CSV log, against peers measured in the same run.

Example:
  python -m benchmarks.build_dataset --rows=1000000 --columns=27

Makes a log (ids of users and items, time, click; the other columns integers, texts and floats with 10 to 100,000
values), and builds it, each time in a process of its own, by

  ours       pipelines.beam.dataset with its defaults: read and check, split by time, vocabularies, transform, TFRecords
  beam rows  Apache Beam row by row on its in-process engine: the same split, ids and scaling, tf.train.Example,
             WriteToTFRecord; on --peer_rows rows, since it is slow
  fuxictr    FuxiCTR 2.3.10's build_dataset: vocabularies and scaling over all rows -> one Parquet file, no split

Rows per second count the build alone; "with start-up" adds imports and the start of workers. Memory is the largest sum
over the process and all its children, shared pages counted once. CPU seconds are those of the build. --scale builds ten
times the rows, too: time per row should not grow, and memory should not either. Peers are installed by pip under
--work_dir, which keeps logs and environments for the next run. Linux only. Give the machine nothing else to do.
"""

import dataclasses
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable

from absl import flags

from benchmarks import peer_environments, process_tree, wide_log
from benchmarks.directories import work_directory
from clsd_tf.commands import console

_ROWS = flags.DEFINE_integer("rows", 1_000_000, "Rows of the log.", 1000)
_COLUMNS = flags.DEFINE_integer("columns", 27, "Columns of the log.", wide_log.MIN_COLUMNS)
_PEERS = flags.DEFINE_list("peers", ["beam rows", "fuxictr"], "Peers to measure; empty for none.")
_PEER_ROWS = flags.DEFINE_integer("peer_rows", 50_000, "Rows for 'beam rows', at most --rows.", 1000)
_SCALE = flags.DEFINE_bool("scale", False, "Also build ten times the rows.")
_WORK_DIR = flags.DEFINE_string("work_dir", None, "Keeps logs and peers' environments; default: a temporary directory.")

_OURS = "ours"
_HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Result:
    """One build: ``seconds`` and ``cpu_seconds`` of the build alone, ``total_seconds`` with start-up."""

    name: str
    rows: int
    seconds: float
    total_seconds: float
    cpu_seconds: float
    peak_mib: float

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.seconds


def measured_build(name: str, command: list[str], work_dir: pathlib.Path, num_rows: int, **environment: str) -> Result:
    """Runs ``command LOG_DIR OUTPUT_DIR TIMES_JSON``, and removes what it built."""
    log_dir = wide_log.cached_log(work_dir, num_rows=num_rows, num_columns=_COLUMNS.value)
    with tempfile.TemporaryDirectory(dir=work_dir) as scratch, console.step(f"{name}: {num_rows:,} rows"):
        times = pathlib.Path(scratch) / "times.json"
        usage = process_tree.measure([*command, str(log_dir), f"{scratch}/built", str(times)], environment)
        span = json.loads(times.read_text())
    return Result(
        name=name,
        rows=num_rows,
        seconds=span["end"] - span["begin"],
        total_seconds=usage.end - usage.begin,
        cpu_seconds=usage.cpu_seconds(span["begin"], span["end"]),
        peak_mib=usage.peak_mib,
    )


def _ours(work_dir: pathlib.Path, num_rows: int) -> Result:
    return measured_build(_OURS, [sys.executable, "-m", "benchmarks.build_ours"], work_dir, num_rows)


def _beam_rows(work_dir: pathlib.Path) -> Result:
    command = [sys.executable, "-m", "benchmarks.build_per_row"]
    path = f"{peer_environments.beam_tfrecord_path(work_dir)}:{':'.join(filter(None, sys.path))}"
    num_rows = min(_PEER_ROWS.value, _ROWS.value)
    return measured_build("beam rows", command, work_dir, num_rows, PYTHONPATH=path)


def _fuxictr(work_dir: pathlib.Path) -> Result:
    command = [str(peer_environments.peer_python(work_dir, "fuxictr")), str(_HERE / "build_fuxictr.py")]
    return measured_build("fuxictr", command, work_dir, _ROWS.value, RAY_USAGE_STATS_ENABLED="0", PYTHONPATH="")


PEERS: dict[str, Callable[[pathlib.Path], Result]] = {"beam rows": _beam_rows, "fuxictr": _fuxictr}


def _measured_peers(work_dir: pathlib.Path) -> list[Result]:
    unknown = [name for name in _PEERS.value if name not in PEERS]
    if unknown:
        raise ValueError(f"unknown peers. Received: {', '.join(unknown)}. Allowed: {', '.join(PEERS)}")
    results = []
    for name in _PEERS.value:
        try:
            results.append(PEERS[name](work_dir))
        except peer_environments.InstallError as error:
            console.warn(f"{name} is left out: {error}")
    return results


def _print_comparison(results: list[Result]) -> None:
    ours = results[0]
    rows = [
        (
            result.name,
            result.rows,
            f"{result.seconds:.1f}",
            f"{result.total_seconds:.1f}",
            f"{result.rows_per_second:,.0f}",
            f"{ours.rows_per_second / result.rows_per_second:.2f}",
            f"{result.peak_mib:,.0f}",
            f"{result.cpu_seconds:.1f}",
        )
        for result in results
    ]
    columns = ["build", "rows", "seconds", "with start-up", "rows/s", "ours over it", "peak MiB", "CPU seconds"]
    console.print_table(f"Building a dataset from a CSV log of {_COLUMNS.value} columns", columns, rows)


def _print_scale(small: Result, large: Result) -> None:
    per_row = [result.seconds / result.rows for result in (small, large)]
    rows = [
        (f"{result.rows:,} rows", f"{result.seconds:.1f}", f"{1e6 * seconds:.2f}", f"{result.peak_mib:,.0f}")
        for result, seconds in zip((small, large), per_row, strict=True)
    ]
    rows.append(("ratio", "", f"{per_row[1] / per_row[0]:.2f}", f"{large.peak_mib / small.peak_mib:.2f}"))
    console.print_table("Ten times the rows", ["log", "seconds", "microseconds per row", "peak MiB"], rows)


def _run(work_dir: pathlib.Path) -> None:
    ours = _ours(work_dir, _ROWS.value)
    _print_comparison([ours, *_measured_peers(work_dir)])
    if _SCALE.value:
        _print_scale(ours, _ours(work_dir, 10 * _ROWS.value))


def main(argv) -> None:
    with work_directory(_WORK_DIR.value) as work_dir:
        _run(work_dir)


if __name__ == "__main__":
    console.run(main)
