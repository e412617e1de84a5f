"""The record of ``golden_results``: what is read from the files that commands leave, and how two records compare.

A part of a record has up to three kinds of content. ``exact`` is compared exactly on every platform. ``numbers`` are,
on another platform than the recorded one, compared within ``TOLERANCE``; only where they are fractions. ``bits`` are
digests, which another platform leaves out.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import sys
import types
from typing import Any

import numpy as np
import pyarrow.parquet

from benchmarks.golden_steps import NUM_REQUESTS, SIZES, Results

TOLERANCE = 1e-3
KILLED = "train clsd_self, killed and resumed"
_NOT_WEIGHTS = ("_CHECKPOINTABLE_OBJECT_GRAPH", "save_counter")
_HEADLINES = ("auc", "gauc", "log_loss", "normalized_entropy", "pcoc", "ece", "rows", "clicks")


def read_results(results: Results, size: str) -> dict[str, Any]:
    """Reads the record of finished commands."""
    parts = {"dataset": _dataset(results.dataset)}
    for name in SIZES[size].runs:
        parts[f"train {name}"] = _run(results.run(name))
    killed = _run(results.killed)
    difference = first_difference(parts["train clsd_self"], killed)
    parts[KILLED] = {"exact": {"difference_to_the_unkilled_run": difference}, "bits": killed["bits"]}
    parts["evaluate"] = _evaluation(results.evaluation)
    parts["study"] = _study(results.study)
    parts["export and predict"] = _answers(results.answers)
    return {"size": size, "platform": this_platform(), "parts": parts}


def write(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Writes a record with a line for each kind of content, so that differences of two files can be read."""
    text = json.dumps(record, indent=1, sort_keys=True)
    flat = re.sub(r"\n {4,}", " ", text)  # Below parts, their names and kinds.
    path.write_text(re.sub(r"\n {3}([\]}])", r" \1", flat) + "\n", encoding="utf-8")


def this_platform() -> dict[str, Any]:
    """Describes what the bits of floating-point results may hang on."""
    cpu = pathlib.Path("/proc/cpuinfo")
    pairs = re.findall(r"^(model name|flags)\s*:\s*(.*)$", cpu.read_text() if cpu.exists() else "", re.MULTILINE)
    facts = dict(reversed(pairs))  # Of the first processor.
    return {
        "processor": facts.get("model name", platform.processor()),
        "processor_flags": _digest(sorted(facts.get("flags", "").split())),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("tensorflow", "tf-keras", "numpy")},
    }


def compare(recorded: dict[str, Any], found: dict[str, Any]) -> dict[str, str | None]:
    """Part -> its first difference, None where it has none."""
    same_platform = first_difference(recorded["platform"], found["platform"]) is None
    names = dict.fromkeys((*recorded["parts"], *found["parts"]))
    outcomes: dict[str, str | None] = {}
    for name in names:
        sides = [record["parts"].get(name) for record in (recorded, found)]
        if None in sides:
            outcomes[name] = "only recorded" if sides[1] is None else "not recorded"
            continue
        kinds = ("exact", "numbers", "bits") if same_platform else ("exact", "numbers")
        tolerances = {"numbers": 0.0 if same_platform else TOLERANCE}
        differences = (
            first_difference(*(side.get(kind) for side in sides), tolerances.get(kind, 0.0), kind) for kind in kinds
        )
        outcomes[name] = next(filter(None, differences), None)
    return outcomes


def first_difference(recorded: Any, found: Any, tolerance: float = 0.0, path: str = "") -> str | None:
    """Says where two JSON values differ first and how, None if they are the same.

    Args:
      recorded: the one.
      found: the other.
      tolerance: how far fractions may be apart; with 0 they must be the same to the bit.
      path: of both, for the message.
    """
    if isinstance(recorded, dict) and isinstance(found, dict):
        keys = sorted(recorded.keys() | found.keys())
        pairs = [(f"{path}.{key}".lstrip("."), recorded.get(key), found.get(key)) for key in keys]
    elif isinstance(recorded, list) and isinstance(found, list) and len(recorded) == len(found):
        pairs = [(f"{path}[{index}]", *pair) for index, pair in enumerate(zip(recorded, found, strict=True))]
    else:
        return None if _same(recorded, found, tolerance) else f"{path} recorded {recorded!r}, found {found!r}"
    differences = (first_difference(one, other, tolerance, place) for place, one, other in pairs)
    return next(filter(None, differences), None)


def _same(recorded: Any, found: Any, tolerance: float) -> bool:
    if tolerance and isinstance(recorded, float) and isinstance(found, float):
        return abs(recorded - found) <= tolerance
    return repr(recorded) == repr(found)  # Tells -0.0 from 0.0, and NaN is the same as NaN.


def _dataset(dataset: pathlib.Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    shards = sorted(dataset.rglob("*.tfrecord*"), key=lambda path: path.name)
    for shard in shards:
        digest.update(shard.read_bytes())
    fingerprint = _read_json(dataset / "manifest.json")["dataset_fingerprint"]
    return {"exact": {"fingerprint": fingerprint, "shards": len(shards), "records": digest.hexdigest()}}


def _run(work_dir: pathlib.Path) -> dict[str, Any]:
    history, calibration = (_read_json(work_dir / f"{name}.json") for name in ("history", "calibration"))
    return {
        "numbers": {"history": history, "calibration": calibration},
        "bits": {"best_weights": _weights_digest(work_dir / "best_weights")},
    }


def _weights_digest(directory: pathlib.Path) -> str:
    """Digest of the newest checkpoint's tensors, without their names, which follow those of attributes in the code."""
    tf = _tensorflow()
    newest = max(directory.glob("*.index"), key=lambda path: int(path.stem.rsplit("-", 1)[1]))
    checkpoint = tf.train.load_checkpoint(str(newest.with_suffix("")))
    names = [name for name in checkpoint.get_variable_to_shape_map() if not name.startswith(_NOT_WEIGHTS)]
    tensors = [np.asarray(checkpoint.get_tensor(name)) for name in names]
    digest = hashlib.sha256()
    for shape, dtype, content in sorted((value.shape, str(value.dtype), value.tobytes()) for value in tensors):
        digest.update(f"{shape} {dtype} ".encode() + content)
    return digest.hexdigest()


def _tensorflow() -> types.ModuleType:
    """TensorFlow, imported without its start-up messages, which come before any log level applies."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    original = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        return importlib.import_module("tensorflow")
    finally:
        os.dup2(original, 2)
        os.close(original)


def _evaluation(path: pathlib.Path) -> dict[str, Any]:
    evaluation = {key: value for key, value in _read_json(path).items() if not key.endswith("fingerprint")}
    headlines = {key: value for key, value in evaluation["overall"].items() if key in _HEADLINES}
    return {"numbers": {"overall": headlines}, "bits": {"all_numbers": _digest(evaluation)}}


def _study(path: pathlib.Path) -> dict[str, Any]:
    rows = sorted(pyarrow.parquet.read_table(path).to_pylist(), key=lambda row: [str(value) for value in row.values()])
    aucs = {
        f"{row['backbone']} {row['method']} seed {row['seed']}": row["value"]
        for row in rows
        if row["slice"] == "overall" and row["metric"] == "auc"
    }
    return {"exact": {"rows": len(rows)}, "numbers": {"auc": aucs}, "bits": {"all_rows": _digest(rows)}}


def _answers(path: pathlib.Path) -> dict[str, Any]:
    scores = pyarrow.parquet.read_table(path)["ctr"].to_numpy().astype(np.float32)
    if len(scores) != NUM_REQUESTS or not np.isfinite(scores).all():
        raise ValueError(f"an answer is a number, one to each of {NUM_REQUESTS} rows. Received: {len(scores)}, {path}")
    first = [float(score) for score in scores[:5]]
    return {"numbers": {"first": first}, "bits": {"float32": hashlib.sha256(scores.tobytes()).hexdigest()}}


def _read_json(path: pathlib.Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
