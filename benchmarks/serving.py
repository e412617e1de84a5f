"""The local server against the numbers it has to reach: latency, ranking, throughput, load, a swap, malformed requests.

Example:
  python -m benchmarks.serving --dataset_dir=demo/dataset --work_dir=demo/clsd --servable_dir=demo/servable \
      --model=movielens_100k

Starts `python -m export.serve` in a process of its own and calls it from this one over loopback, so client and server
share the machine's cores. Ratios are of numbers measured in this run. Load is 64 clients that send requests of
--rows_per_request rows at twice the rate that the server was found to answer, each at its set time; every answer is
compared with what the SavedModel gives in this process.
"""

import contextlib
import functools
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import tensorflow as tf
from absl import flags

from benchmarks.malformed_requests import Target
from benchmarks.send_malformed import send_malformed
from benchmarks.serving_load import TOLERANCE, Request, overload, swap
from clsd_tf.commands import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from clsd_tf.data.examples import arrow_to_tensors, encode_raw_rows
from clsd_tf.data.input_pipeline import read_columns
from clsd_tf.data.request_files import typed_rows
from clsd_tf.metrics.pointwise import auc
from clsd_tf.serving.servable import LocalServable
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import write_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import load_model, predict
from export.clients.grpc_transport import GrpcTransport
from export.clients.load_generator import percentiles
from export.clients.serving_client import ServingClient
from export.clients.transport import Endpoint
from export.servable.ranking import sides_of
from export.servable.warmup import rank_request
from export.server.loaded_version import LoadedVersion

_DATASET_DIR = flags.DEFINE_string("dataset_dir", None, "Dataset of the run.", required=True)
_WORK_DIR = flags.DEFINE_string("work_dir", None, "The run that was exported.", required=True)
_SERVABLE_DIR = flags.DEFINE_string("servable_dir", None, "Where it was exported to.", required=True)
_MODEL = flags.DEFINE_string("model", None, "Its name.", required=True)
_LOAD_SECONDS = flags.DEFINE_float("load_seconds", 60.0, "How long the server is overloaded.", 1.0)
_ROWS_PER_REQUEST = flags.DEFINE_integer("rows_per_request", 1000, "Rows of a request under load.", 1)
_NUM_MALFORMED = flags.DEFINE_integer("num_malformed", 5000, "Malformed requests of both protocols together.", 1)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the numbers.")

_CLIENTS = 64
_RANKED_ITEMS = 1000
_SCORED_ROWS = 4096
_MIN_OVERLOAD = 1.9  # Times the capacity; with less sent nothing is shown.


class Measures:
    """The rows of the table: what was measured, against what it had to reach."""

    def __init__(self):
        self.rows: list[tuple[str, str, str, str]] = []
        self.numbers: dict[str, object] = {}

    def add(self, name: str, text: str, target: str, is_met: bool, **numbers: object) -> None:
        self.rows.append((name, text, target, "yes" if is_met else "NO"))
        self.numbers[name] = {"target": target, "met": is_met, **numbers}


@contextlib.contextmanager
def running_server(servable_dir: pathlib.Path) -> Iterator[tuple[subprocess.Popen, str, str]]:
    """A server process, its gRPC address and its REST address."""
    command = [sys.executable, "-m", "export.serve", f"--servable_dir={servable_dir}", "--grpc_port=0", "--rest_port=0"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            for line in process.stdout:
                if found := re.search(r"gRPC (\S+)\s+REST http://(\S+)", line):
                    break
            else:
                log.seek(0)
                raise RuntimeError(f"the server did not start:\n{log.read()[-2000:]}")
            yield process, found[1], found[2]
        finally:
            process.terminate()
            process.wait(30)


def latencies_ms(call: Callable[[], object], count: int) -> np.ndarray:
    """Of ``count`` calls one after the other, after a tenth of them to warm up."""
    for _ in range(count // 10):
        call()
    found = np.empty(count)
    for index in range(count):
        start = time.perf_counter()
        call()
        found[index] = 1000 * (time.perf_counter() - start)
    return found


class Bench:
    """Common ground of all measurements: the servable in this process, requests, and the answers that are right."""

    def __init__(self, dataset: DatasetDir, model_dir: pathlib.Path):
        self.servable = LocalServable(model_dir)
        self.signatures = tf.saved_model.load(str(self.servable.path)).signatures
        self.sample = pyarrow.parquet.read_table(dataset.layout.serving_sample)
        self.raw_inputs = dataset.spec.raw_inputs
        self.item_inputs = {entry.name for entry in sides_of(dataset.spec).item}

    def encode(self, rows: pa.Table) -> list[bytes]:
        return encode_raw_rows(typed_rows(rows, self.raw_inputs), self.raw_inputs)

    def predict_in_process(self, examples: Sequence[bytes]) -> np.ndarray:
        return self.signatures["serving_default"](examples=tf.constant(examples))["ctr"].numpy()


def measure_single_rows(bench: Bench, client: ServingClient, measures: Measures) -> None:
    example = bench.encode(bench.sample.slice(0, 1))
    tensor = tf.constant(example)
    in_process = percentiles(latencies_ms(lambda: bench.signatures["serving_default"](examples=tensor), 1000))
    served = percentiles(latencies_ms(lambda: client.score_examples(example), 3000))
    ratio = served["p99"] / in_process["p50"]
    measures.add(
        "one row over gRPC: p99 / p50 in process",
        f"{ratio:.1f} ({served['p99']:.2f} / {in_process['p50']:.2f} ms, p50 {served['p50']:.2f} ms)",
        "< 5",
        ratio < 5,
        served_ms=served,
        in_process_ms=in_process,
    )


def measure_ranking(bench: Bench, client: ServingClient, measures: Measures) -> None:
    """The same user and items as one `rank` request and as an Example for each pair."""
    typed = typed_rows(bench.sample.slice(0, _RANKED_ITEMS), bench.raw_inputs)
    of_items = [entry for entry in bench.raw_inputs if entry.name in bench.item_inputs]
    of_user = [entry for entry in bench.raw_inputs if entry not in of_items]
    first_user = typed.take(pa.array([0] * len(typed)))
    pairs = pa.table(
        {
            **{entry.name: first_user.column(entry.name) for entry in of_user},
            **{entry.name: typed.column(entry.name) for entry in of_items},
        }
    )
    examples = encode_raw_rows(pairs, bench.raw_inputs)
    request = rank_request(encode_raw_rows(typed.slice(0, 1), of_user)[0], encode_raw_rows(typed, of_items))
    transport = GrpcTransport(client.endpoint)
    call = functools.partial(transport.predict, "rank", "requests", [request], ["item_ids", "ctr"])
    scores = np.sort(bench.predict_in_process(examples))[::-1]
    np.testing.assert_allclose(call()["ctr"][0], scores, rtol=0, atol=TOLERANCE)
    ranked, full = [], []
    for _ in range(5):  # In turn, against drift.
        ranked.append(latencies_ms(call, 40))
        full.append(latencies_ms(lambda: client.score_examples(examples), 40))
    ranked_ms, full_ms = np.median(ranked), np.median(full)
    measures.add(
        f"rank, {_RANKED_ITEMS} items: items/s over those of full Examples",
        f"{full_ms / ranked_ms:.1f} ({_RANKED_ITEMS / ranked_ms * 1000:,.0f} / {_RANKED_ITEMS / full_ms * 1000:,.0f})",
        ">= 3",
        bool(full_ms / ranked_ms >= 3),
        rank_ms=ranked_ms,
        full_ms=full_ms,
    )


def measure_scoring(bench: Bench, dataset: DatasetDir, work_dir: WorkDir, measures: Measures) -> None:
    rows = bench.sample.take(pa.array(np.arange(_SCORED_ROWS) % len(bench.sample)))
    tensors = arrow_to_tensors(typed_rows(rows, bench.servable.raw_inputs), bench.servable.raw_inputs)
    milliseconds = np.median(latencies_ms(lambda: bench.signatures["predict_raw"](**tensors), 50))
    rate = _SCORED_ROWS / milliseconds * 1000
    name = f"rows/s in process, batch {_SCORED_ROWS}, float32"
    measures.add(name, f"{rate:,.0f}", ">= 200,000", bool(rate >= 200_000), rows_per_second=rate)
    stored = read_columns(dataset, "test", ["row_id", "label", "sample_weight"])
    places = np.argsort(stored["row_id"])[
        np.searchsorted(np.sort(stored["row_id"]), bench.sample.column("row_id").to_numpy())
    ]
    trained = predict(load_model(work_dir, dataset), dataset, "test")[places]
    labels, weights = stored["label"][places], stored["sample_weight"][places]
    difference = abs(auc(labels, bench.servable.score(bench.sample), weights) - auc(labels, trained, weights))
    measures.add(
        "AUC of these scores, difference to the training model", f"{difference:.6f}", "<= 0.0005", difference <= 0.0005
    )


def checked_requests(bench: Bench, num_requests: int = 50) -> list[Request]:
    size = _ROWS_PER_REQUEST.value
    requests = []
    for index in range(num_requests):
        rows = bench.sample.take(pa.array((np.arange(size) + index * size) % len(bench.sample)))
        examples = bench.encode(rows)
        requests.append((examples, bench.predict_in_process(examples)))
    return requests


def measure_overload(
    requests: Sequence[Request], endpoint: Endpoint, process: subprocess.Popen, measures: Measures
) -> float:
    """Returns the capacity, in requests a second."""
    seconds = _LOAD_SECONDS.value
    found = overload(endpoint, requests, process.pid, num_clients=_CLIENTS, seconds=seconds, capacity_seconds=5.0)
    load, capacity = found.load, found.capacity_per_second
    others = set(load.codes) - {"OK", "RESOURCE_EXHAUSTED"}
    is_overload = found.sent_per_second >= _MIN_OVERLOAD * capacity
    measures.add(
        f"{_CLIENTS} clients, {seconds:.0f} s at {found.sent_per_second / capacity:.2f} x the capacity",
        f"{found.wrong} wrong; {dict(load.codes)}; {load.requests_per_second:,.0f} of {capacity:,.0f} requests/s; "
        f"{load.unsent} unsent",
        f"no wrong answer; excess, at >= {_MIN_OVERLOAD} x, refused as RESOURCE_EXHAUSTED",
        is_overload and not found.wrong and not others and load.codes["RESOURCE_EXHAUSTED"] > 0,
        capacity_per_second=capacity,
        sent_per_second=found.sent_per_second,
        wrong=found.wrong,
        **load.to_dict(),
    )
    grown = found.peak_mib - found.before_mib
    measures.add(
        "server's memory under it",
        f"{found.peak_mib:.0f} MiB, {grown:+.0f}",
        "bounded",
        grown < 500,
        mib=found.peak_mib,
    )
    recovery = found.recovery_seconds
    measures.add(
        "one row answered after it",
        "never" if recovery is None else f"{recovery:.3f} s",
        "< 1 s",
        is_overload and recovery is not None and recovery < 1 and process.poll() is None,
        seconds=recovery,
    )
    return capacity


def measure_swap(
    bench: Bench, requests: Sequence[Request], endpoint: Endpoint, capacity: float, measures: Measures
) -> None:
    """A new version appears while requests run at half the capacity."""
    old = bench.servable.path
    new = old.with_name(str(int(old.name) + 1))
    found = swap(endpoint, requests, old, new, num_clients=_CLIENTS, seconds=20.0, rate_per_second=capacity / 2)
    codes = dict(found.load.codes)
    measures.add(
        "a new version while requests run: failed",
        f"{found.failed} of {sum(codes.values()):,}; {codes}; serves {list(found.served)}",
        "0",
        not found.failed and found.served == (int(new.name),),
        codes=codes,
        latency_ms=percentiles(found.load.latencies_ms),
    )


def measure_malformed(
    bench: Bench, grpc_address: str, rest_address: str, process: subprocess.Popen, measures: Measures
) -> None:
    loaded = LoadedVersion(bench.servable.path, _MODEL.value)
    target = Target(_MODEL.value, loaded.signatures, {entry.name: entry.dtype for entry in bench.raw_inputs})
    problems = send_malformed(target, grpc_address, rest_address, _NUM_MALFORMED.value)
    with ServingClient(Endpoint(grpc_address, _MODEL.value)) as client:
        examples = bench.encode(bench.sample.slice(0, 1))
        is_alive = np.abs(client.score_examples(examples) - bench.predict_in_process(examples)).max() <= TOLERANCE
    measures.add(
        "malformed requests not refused with their code and field",
        f"{len(problems)} of {_NUM_MALFORMED.value:,}; {'; '.join(problems[:3])}",
        "0, and the server goes on",
        bool(not problems and is_alive and process.poll() is None),
        problems=problems,
    )


def main(argv) -> None:
    dataset, work_dir = DatasetDir(_DATASET_DIR.value), WorkDir(_WORK_DIR.value)
    measures = Measures()
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = pathlib.Path(scratch) / _MODEL.value
        source = LocalServable(pathlib.Path(_SERVABLE_DIR.value) / _MODEL.value).path
        shutil.copytree(source, model_dir / source.name)
        bench = Bench(dataset, model_dir)
        with console.step("score in this process"):
            measure_scoring(bench, dataset, work_dir, measures)
        with running_server(pathlib.Path(scratch)) as (process, grpc_address, rest_address):
            with ServingClient(Endpoint(grpc_address, _MODEL.value), concurrency=1) as client:
                with console.step("one row over gRPC"):
                    measure_single_rows(bench, client, measures)
                with console.step("rank"):
                    measure_ranking(bench, client, measures)
            requests, once = checked_requests(bench), Endpoint(grpc_address, _MODEL.value, max_attempts=1)
            with console.step("overload"):
                capacity = measure_overload(requests, once, process, measures)
            with console.step("swap versions under load"):
                measure_swap(bench, requests, once, capacity, measures)
            with console.step("malformed requests"):
                measure_malformed(bench, grpc_address, rest_address, process, measures)
    console.print_table("Serving", ["measure", "found", "to reach", "reached"], measures.rows)
    if _OUTPUT.value:
        write_json(pathlib.Path(_OUTPUT.value), measures.numbers)


if __name__ == "__main__":
    console.run(main)
