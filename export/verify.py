"""Checks a written SavedModel in a process of its own, without clsd_tf, as a server would load it.

Run by `python -m export.main` before a version is published:
  python -m export.verify --servable=<version directory> --sample=<verification.parquet>

Every signature must give what the training model gave (column _expected_*), within 1e-6 * max(1, |expected|); single
rows, unknown ids, missing features and empty histories must answer; `rank` must order items as their own requests
would; every warm-up request must replay.
"""

import json
import pathlib
import sys

import numpy as np
import pyarrow.parquet
import tensorflow as tf
from absl import app, flags
from tensorflow_serving.apis import prediction_log_pb2

from export.servable.warmup import WARMUP_FILE, rank_request

_SERVABLE = flags.DEFINE_string("servable", None, "Directory of one version.", required=True)
_SAMPLE = flags.DEFINE_string("sample", None, "Parquet file with examples and expected outputs.", required=True)

TOLERANCE = 1e-6
_BATCH_SIZE = 1000
_NUM_RANKED = 100
_CLASS_ROWS: tuple[list[list[bytes]], ...] = ([], [[b"no_click", b"click"]])


class VerificationError(RuntimeError):
    """A servable that does not do what the training model did."""


def verify(servable: pathlib.Path, sample_path: pathlib.Path) -> dict[str, object]:
    """Checks all signatures and the warm-up file.

    Args:
      servable: directory of the version.
      sample_path: Parquet file with examples and expected outputs, written by ``export.servable.verification_sample``.

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
    num_edge_rows = int(sample.schema.metadata[b"num_edge_rows"])
    differences: dict[str, float] = {}
    for batch in (_BATCH_SIZE, 1):
        # Single rows at the end of the sample: those with unknown, missing and empty values.
        rows = slice(None) if batch > 1 else slice(len(examples) - num_edge_rows, None)
        for key, received in _run(signatures, examples[rows], batch).items():
            found = _compare(key, received, expected[key.split("/")[1]][rows])
            differences[key] = max(found, differences.get(key, 0.0))
    if "predict_raw" in signatures:
        differences["predict_raw/ctr"] = _compare("predict_raw/ctr", _run_raw(signatures, sample), expected["ctr"])
    if "rank" in signatures:
        found = _check_ranking(signatures, examples, sample.schema.metadata)
        differences["rank/ctr"] = max(found, differences["rank/ctr"])
    return {"rows": len(examples), "warmup_records": _replay(signatures, servable), "max_difference": differences}


def _run(signatures, examples: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
    """Outputs of the signatures that give an output per Example."""
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(examples), batch_size):
        batch = tf.constant(examples[start : start + batch_size], tf.string)
        found = {"serving_default/ctr": signatures["serving_default"](examples=batch)["ctr"]}
        if "classify" in signatures:
            found["classify/ctr"] = _click_score(signatures["classify"](inputs=batch))
        if "regress" in signatures:
            found["regress/ctr"] = signatures["regress"](inputs=batch)["outputs"][:, 0]
        if "rank" in signatures:  # A single item, sent with its own user.
            ranked = signatures["rank"](requests=tf.constant([rank_request(row, [row]) for row in batch.numpy()]))
            found["rank/ctr"] = ranked["ctr"][:, 0]
        if "debug" in signatures:
            found |= {f"debug/{name}": value for name, value in signatures["debug"](examples=batch).items()}
        for key, value in found.items():
            parts.setdefault(key, []).append(value.numpy())
    return {key: np.concatenate(values) for key, values in parts.items()}


def _check_ranking(signatures, examples: np.ndarray, metadata: dict[bytes, bytes]) -> float:
    """Many items of one user, against serving_default with an Example of each pair; users with and without values."""
    item_inputs, item_key = json.loads(metadata[b"item_inputs"]), metadata[b"item_key"].decode()
    items = [tf.train.Example.FromString(example) for example in examples[:_NUM_RANKED]]
    worst = 0.0
    for user in (examples[0], examples[len(examples) // 2], examples[-1], b""):
        pairs = [_pair(tf.train.Example.FromString(user), item, item_inputs) for item in items]
        expected = signatures["serving_default"](examples=tf.constant(pairs))["ctr"].numpy()
        order = np.argsort(-expected, kind="stable")
        ranked = signatures["rank"](requests=tf.constant([rank_request(user, list(examples[:_NUM_RANKED]))]))
        received, ids = ranked["ctr"].numpy()[0], ranked["item_ids"].numpy()[0]
        worst = max(worst, _compare("rank/ctr", received, expected[order][: len(received)]))
        scores_of: dict[object, list[float]] = {}  # Several rows of the sample may show one item.
        for item, score in zip(items, expected.tolist(), strict=True):
            scores_of.setdefault(_id_of(item, item_key, is_text=ids.dtype == object), []).append(score)
        for item_id, score in zip(ids.tolist(), received.tolist(), strict=True):
            if min(abs(score - own) for own in scores_of.get(item_id, [np.inf])) > TOLERANCE:
                raise VerificationError("rank must give each item its own score. Received: an item with another's")
    return worst


def _pair(user: tf.train.Example, item: tf.train.Example, item_inputs: list[str]) -> bytes:
    """One Example for both: an item's input is the item's where it has a value."""
    for name in item_inputs:
        feature = item.features.feature[name]  # Empty if it was absent.
        if feature.WhichOneof("kind") and getattr(feature, feature.WhichOneof("kind")).value:
            user.features.feature[name].CopyFrom(feature)
    return user.SerializeToString()


def _id_of(item: tf.train.Example, item_key: str, *, is_text: bool) -> object:
    """An item's id as ``rank`` gives it: missing is "" or the smallest int64."""
    feature = item.features.feature[item_key]  # Empty if it was absent.
    values = feature.bytes_list.value if is_text else feature.int64_list.value
    return values[0] if values else (b"" if is_text else np.iinfo(np.int64).min)


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
    if received.dtype == object:  # Labels.
        wrong = np.flatnonzero(received != expected)
        if len(wrong):
            raise VerificationError(f"{what} must be the training model's label. Received: another in row {wrong[0]}")
        return 0.0
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
    for record in tf.data.TFRecordDataset(str(servable / WARMUP_FILE)):
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
