"""Checks a written SavedModel in a process of its own, without clsd_tf, as a server would load it.

Run by `python -m export.main` before a version is published:
  python -m export.verify --servable=<version directory> --sample=<verification.parquet>

Every signature must give what the training model gave (column _expected_*), within 1e-6 * max(1, |expected|); single
rows, unknown ids, missing features and empty histories must answer; every warm-up request must replay.
"""

import json
import pathlib
import sys

import numpy as np
import pyarrow.parquet
import tensorflow as tf
from absl import app, flags
from tensorflow_serving.apis import prediction_log_pb2

_SERVABLE = flags.DEFINE_string("servable", None, "Directory of one version.", required=True)
_SAMPLE = flags.DEFINE_string("sample", None, "Parquet file with examples and expected outputs.", required=True)

TOLERANCE = 1e-6
_BATCH_SIZE = 1000
_CLASS_ROWS = ([], [[b"no_click", b"click"]])


class VerificationError(RuntimeError):
    """A servable that does not do what the training model did."""


def verify(servable: pathlib.Path, sample_path: pathlib.Path) -> dict[str, object]:
    """Checks all signatures and the warm-up file.

    Returns:
      ``rows``, ``warmup_records`` and ``max_difference`` per signature output.

    Raises:
      VerificationError: names the signature, the difference and the row.
    """
    signatures = tf.saved_model.load(str(servable)).signatures
    sample = pyarrow.parquet.read_table(sample_path)
    examples = np.array(sample.column("_example").to_pylist(), object)
    expected = {
        name.removeprefix("_expected_"): sample.column(name).to_numpy()
        for name in sample.column_names
        if name.startswith("_expected_")
    }
    differences = {}
    for batch in (_BATCH_SIZE, 1):
        # Single rows at the end of the sample: those with unknown, missing and empty values.
        rows = slice(None) if batch > 1 else slice(-min(50, len(examples)), None)
        outputs = _run(signatures, examples[rows], batch)
        for key, received in outputs.items():
            found = _compare(key, received, expected[key.split("/")[1]][rows])
            differences[key] = max(found, differences.get(key, 0.0))
    differences["predict_raw/ctr"] = _compare("predict_raw/ctr", _run_raw(signatures, sample), expected["ctr"])
    return {"rows": len(examples), "warmup_records": _replay(signatures, servable), "max_difference": differences}


def _run(signatures, examples: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(examples), batch_size):
        batch = tf.constant(examples[start : start + batch_size], tf.string)
        found = {"serving_default/ctr": signatures["serving_default"](examples=batch)["ctr"]}
        found["classify/ctr"] = _click_score(signatures["classify"](inputs=batch))
        found["regress/ctr"] = signatures["regress"](inputs=batch)["outputs"][:, 0]
        found |= {f"debug/{name}": value for name, value in signatures["debug"](examples=batch).items()}
        for key, value in found.items():
            parts.setdefault(key, []).append(value.numpy())
    return {key: np.concatenate(values) for key, values in parts.items()}


def _click_score(classified) -> tf.Tensor:
    """The second score of a Classify answer whose classes and scores have the shapes that TF Serving accepts."""
    classes, scores = classified["classes"], classified["scores"]
    if classes.shape != scores.shape or scores.shape[1:] != [2] or classes.numpy()[:1].tolist() not in _CLASS_ROWS:
        raise VerificationError(
            f"classify must give [batch, 2] classes and scores. Received: {classes.shape} and {scores.shape}, "
            f"first classes {classes.numpy()[:1].tolist()}. Allowed: no_click, click"
        )
    if np.abs(scores.numpy().sum(axis=1) - 1).max(initial=0) > TOLERANCE:
        raise VerificationError("the two scores of classify must sum to 1")
    return scores[:, 1]


def _run_raw(signatures, sample: pyarrow.Table) -> np.ndarray:
    function = signatures["predict_raw"]
    specs = function.structured_input_signature[1]
    parts = []
    for start in range(0, sample.num_rows, _BATCH_SIZE):
        rows = sample.slice(start, _BATCH_SIZE)
        raw = {name: _raw_tensor(rows.column(name).to_pylist(), spec) for name, spec in specs.items()}
        parts.append(function(**raw)["ctr"].numpy())
    return np.concatenate(parts)


def _raw_tensor(values: list, spec: tf.TensorSpec) -> tf.Tensor:
    if spec.shape.rank == 2:
        return tf.ragged.constant([value or [] for value in values], dtype=spec.dtype, ragged_rank=1).to_tensor("")
    missing = {tf.string: "", tf.int64: tf.int64.min, tf.float32: float("nan")}[spec.dtype]
    return tf.constant([missing if value is None else value for value in values], spec.dtype)


def _compare(what: str, received: np.ndarray, expected: np.ndarray) -> float:
    difference = np.abs(received - expected) / np.maximum(1.0, np.abs(expected))
    worst = int(np.argmax(np.where(np.isnan(difference), np.inf, difference)))
    if not difference[worst] <= TOLERANCE:
        raise VerificationError(
            f"{what} must equal the training model's output. Received: {received[worst]} instead of "
            f"{expected[worst]} in sample row {worst}. Allowed: a difference of {TOLERANCE} * max(1, |expected|)"
        )
    return float(difference[worst])


def _replay(signatures, servable: pathlib.Path) -> int:
    count = 0
    for record in tf.data.TFRecordDataset(str(servable / "assets.extra" / "tf_serving_warmup_requests")):
        log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
        kind = log.WhichOneof("log_type")
        request = getattr(log, kind).request
        function = signatures[request.model_spec.signature_name]
        if kind == "predict_log":
            function(**{name: tf.constant(tf.make_ndarray(value)) for name, value in request.inputs.items()})
        else:
            examples = [example.SerializeToString() for example in request.input.example_list.examples]
            function(inputs=tf.constant(examples))
        count += 1
    return count


def main(argv) -> None:
    result = verify(pathlib.Path(_SERVABLE.value), pathlib.Path(_SAMPLE.value))
    if "clsd_tf" in sys.modules:
        raise VerificationError("the check must not depend on clsd_tf. Received: a process that imported it")
    print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
