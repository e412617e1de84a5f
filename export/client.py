"""Asks a model server, this project's (`clsd serve`) or TF Serving.

Example:
  clsd client status --model=movielens
  clsd client score --model=movielens --input=rows.parquet --output=scores.parquet
  clsd client rank --model=movielens --user='{"user_id": "7", "age": 31}' --items=items.jsonl
  clsd client compare --model=movielens --input=rows.csv --label=stable --other_label=canary
  clsd client load --model=movielens --input=rows.csv --batch_size=32 --concurrency=8

`status` lists the model's versions and signatures. `score` writes the rows with a column ctr; input and output are CSV,
JSON lines or Parquet, by their ending. `rank` orders items for one user. `compare` sends the same rows to two servers
or versions. `load` repeats requests for --duration_seconds, as fast as answers come or --rate_per_second; it tries each
once. --server defaults to localhost with TF Serving's ports, 8500 for gRPC and 8501 for REST.
"""

import json
import pathlib
from typing import Any

from absl import flags

from clsd_tf.commands import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from clsd_tf.data.request_files import read_rows
from clsd_tf.storage.files import write_json
from export.clients.file_scoring import score_file
from export.clients.load_generator import generate_load
from export.clients.server_comparison import compare
from export.clients.serving_client import ServingClient
from export.clients.transport import Endpoint

_PORTS = {"grpc": 8500, "rest": 8501}
_SERVER = flags.DEFINE_string("server", None, "host:port of the server.")
_PROTOCOL: flags.FlagHolder[Any] = flags.DEFINE_enum("protocol", "grpc", ["grpc", "rest"], "What is spoken there.")
_MODEL = flags.DEFINE_string("model", None, "Name of the model.", required=True)
_VERSION = flags.DEFINE_integer("version", None, "Version that answers; the newest by default.")
_LABEL = flags.DEFINE_string("label", None, "Label of the version that answers.")
_TIMEOUT = flags.DEFINE_float("timeout_seconds", 10.0, "For a request with all its attempts.", 0.001)
_MAX_ATTEMPTS = flags.DEFINE_integer("max_attempts", 4, "Of a request, while the server is unavailable or full.", 1, 5)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 512, "Rows of a request.", 1)
_CONCURRENCY = flags.DEFINE_integer("concurrency", 4, "score, load: requests in flight.", 1)
_INPUT = flags.DEFINE_string("input", None, "score, compare, load: rows, .csv, .jsonl or .parquet.")
_OUTPUT = flags.DEFINE_string("output", None, "score: file to write, .csv, .jsonl or .parquet; must not exist.")
_USER = flags.DEFINE_string("user", None, "rank: JSON object of what is the same for all items.")
_ITEMS = flags.DEFINE_string("items", None, "rank: items, .csv, .jsonl or .parquet.")
_OTHER_SERVER = flags.DEFINE_string("other_server", None, "compare: host:port; --server by default.")
_OTHER_VERSION = flags.DEFINE_integer("other_version", None, "compare: version on the other side.")
_OTHER_LABEL = flags.DEFINE_string("other_label", None, "compare: label on the other side.")
_DURATION = flags.DEFINE_float("duration_seconds", 10.0, "load: for how long.", 0.1)
_RATE = flags.DEFINE_float(
    "rate_per_second", None, "load: requests a second; by default as fast as answers come.", 0.01
)
_JSON = flags.DEFINE_string("json", None, "compare, load: also writes what was found to this file.")


def main(argv) -> None:
    if len(argv) != 2 or argv[1] not in _ACTIONS:
        raise ValueError(f"one action is needed. Received: {' '.join(argv[1:])}. Allowed: {', '.join(_ACTIONS)}")
    _ACTIONS[argv[1]]()


def _client(server=None, version=None, label=None, max_attempts=None) -> ServingClient:
    endpoint = Endpoint(
        address=server or _SERVER.value or f"localhost:{_PORTS[_PROTOCOL.value]}",
        model_name=_MODEL.value,
        version=version,
        label=label,
        timeout_seconds=_TIMEOUT.value,
        max_attempts=max_attempts or _MAX_ATTEMPTS.value,
    )
    return ServingClient(
        endpoint, protocol=_PROTOCOL.value, batch_size=_BATCH_SIZE.value, concurrency=_CONCURRENCY.value
    )


def _path(flag) -> pathlib.Path:
    if not flag.value:
        raise ValueError(f"--{flag.name} is required here. Received: none")
    return pathlib.Path(flag.value)


def _status() -> None:
    with _client(version=_VERSION.value, label=_LABEL.value) as client:
        versions, signatures = client.status(), client.metadata()
    rows = [(str(entry.version), entry.state, entry.error) for entry in versions]
    console.print_table(f"Versions of {_MODEL.value}", ["version", "state", "error"], rows)
    rows = [
        (name, ", ".join(sorted(signature.inputs)), ", ".join(sorted(signature.outputs)))
        for name, signature in sorted(signatures.items())
        if signature.inputs  # Not the one that initializes the model.
    ]
    console.print_table("Signatures", ["name", "inputs", "outputs"], rows)


def _score() -> None:
    rows_done = [0]
    with (
        _client(version=_VERSION.value, label=_LABEL.value) as client,
        console.step(f"score {_INPUT.value}", lambda: f"{rows_done[-1]:,} rows") as say,
    ):
        num_rows = score_file(client, _path(_INPUT), _path(_OUTPUT), rows_done.append)
        say(f"{num_rows:,} rows")
    console.console.print(f"scores in {_OUTPUT.value}", soft_wrap=True)


def _rank() -> None:
    if not _USER.value:
        raise ValueError("--user is required here. Received: none")
    try:
        user = json.loads(_USER.value)
    except ValueError:  # Its text would show the user.
        user = None
    if not isinstance(user, dict):
        raise ValueError("--user must be a JSON object. Received: another text")
    items = [row for rows in read_rows(_path(_ITEMS)) for row in rows.to_pylist()]
    with _client(version=_VERSION.value, label=_LABEL.value) as client:
        ranked = client.rank(user, items)
    rows = [(place, str(item), ctr) for place, (item, ctr) in enumerate(ranked, start=1)]
    console.print_table(f"{len(rows):,} items", ["place", "item", "ctr"], rows)


def _compare() -> None:
    if not (_OTHER_SERVER.value or _OTHER_VERSION.value or _OTHER_LABEL.value):
        raise ValueError("the other side is --other_server, --other_version or --other_label. Received: none of them")
    rows_done = [0]
    with (
        _client(version=_VERSION.value, label=_LABEL.value) as one,
        _client(_OTHER_SERVER.value, _OTHER_VERSION.value, _OTHER_LABEL.value) as other,
        console.step(f"compare on {_INPUT.value}", lambda: f"{rows_done[-1]:,} rows"),
    ):
        found = compare((one, other), read_rows(_path(_INPUT)), rows_done.append).to_dict()
    names = [f"{side.endpoint.address} {side.endpoint.version or side.endpoint.label or ''}" for side in (one, other)]
    facts = ["rows", "max_difference", "mean_difference", "rank_correlation"]
    values = [(name.replace("_", " "), _written(found[name])) for name in facts]
    console.print_table("Scores", ["of both", "value"], values)
    rows = [
        (name, ctr, *latency.values())
        for name, ctr, latency in zip(names, found["mean_ctr"], found["latency_ms"], strict=True)
    ]
    console.print_table("Each", ["server", "mean ctr", *(f"{key} ms" for key in found["latency_ms"][0])], rows)
    _write(found)


def _load() -> None:
    with _client(version=_VERSION.value, label=_LABEL.value, max_attempts=1) as client:
        requests = [request for rows in read_rows(_path(_INPUT)) for request in client.requests(rows)]
        if not requests:
            raise ValueError(f"--input must have rows. Received: {_INPUT.value} with none")
        with console.step(f"load {client.endpoint.address} for {_DURATION.value:g} seconds"):
            result = generate_load(
                client.score_examples,
                requests,
                concurrency=_CONCURRENCY.value,
                duration_seconds=_DURATION.value,
                rate_per_second=_RATE.value,
            )
    found = result.to_dict()
    columns = ["requests/s", *(f"{key} ms" for key in found["latency_ms"])]
    console.print_table("Good answers", columns, [(found["requests_per_second"], *found["latency_ms"].values())])
    console.print_table("Answers by status", ["code", "requests"], sorted(found["codes"].items()))
    if result.unsent:
        console.warn(f"{result.unsent:,} requests were due but not sent: --concurrency is too small for the rate")
    _write(found)


def _written(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else console.format_number(value)


def _write(found) -> None:
    if _JSON.value:
        write_json(pathlib.Path(_JSON.value), found)


_ACTIONS = {"status": _status, "score": _score, "rank": _rank, "compare": _compare, "load": _load}

if __name__ == "__main__":
    console.run(main)
