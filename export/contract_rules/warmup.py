"""Rules of assets.extra/tf_serving_warmup_requests: one bad record fails the load of the version."""

from __future__ import annotations

import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow_serving.apis import prediction_log_pb2

from export.contract_rules.behavior import answer_problems
from export.contract_rules.findings import Finding, NotApplicable, failed, judged, listed, reason_of
from export.contract_rules.requests import recorded_inputs
from export.contract_rules.rules import version_rule
from export.contract_rules.signatures import CLASSIFY, REGRESS
from export.contract_rules.version import Version, read_warmup_records
from export.servable.batching_parameters import largest_request
from export.servable.warmup import MAX_WARMUP_RECORDS

_GZIP_MAGIC = b"\x1f\x8b"
_REPLAYED = ("predict_log", "classify_log", "regress_log", "multi_inference_log")
_METHODS = {"classify_log": CLASSIFY, "regress_log": REGRESS}


def _logs(version: Version) -> list[tuple[int, prediction_log_pb2.PredictionLog]]:
    """(number, log) of every record that parses, counted from 1."""
    logs = []
    for number, record in enumerate(version.warmup_records, start=1):
        try:
            logs.append((number, prediction_log_pb2.PredictionLog.FromString(record)))
        except DecodeError:  # Told by the rule warmup_file.
            continue
    return logs


@version_rule(
    title="The warm-up file is an uncompressed TFRecord of at most 1000 PredictionLogs",
    why="It is read before the version is served; another format, a record that does not parse or a 1001st one fails "
    "the load (saved_model_warmup_util.cc).",
)
def warmup_file(version: Version) -> Finding:
    path = version.warmup_file
    try:
        records = read_warmup_records(path)
    except tf.errors.OpError as error:
        with path.open("rb") as file:
            is_gzip = file.read(2) == _GZIP_MAGIC
        return failed("it is compressed with gzip" if is_gzip else f"no TFRecord file: {error.message[:200]}")
    if len(records) > MAX_WARMUP_RECORDS:
        return failed(f"more than {MAX_WARMUP_RECORDS:,} records")
    parsed = {number for number, _ in _logs(version)}
    broken = [f"record {number} is no PredictionLog" for number in range(1, len(records) + 1) if number not in parsed]
    return judged(broken, f"{len(records)} records")


@version_rule(
    title="Every warm-up record is of a kind that is replayed",
    why="Predict, Classify, Regress and MultiInference are; streamed and session-run logs are an error "
    "(saved_model_warmup.cc, tfrt_saved_model_warmup.cc).",
)
def warmup_kinds(version: Version) -> Finding:
    kinds = [(number, log.WhichOneof("log_type")) for number, log in _logs(version)]
    wrong = [f"record {number} is {kind or 'empty'}" for number, kind in kinds if kind not in _REPLAYED]
    counts = [f"{kind} {sum(found == kind for _, found in kinds)}" for kind in _REPLAYED]
    return judged(wrong, listed(counts))


@version_rule(
    title="Every warm-up record fits a signature",
    why="Names of the signature, of inputs and of filtered outputs must be there, and the inputs of MultiInference one "
    "tensor, else the load fails (predict_util.cc, classifier.cc, multi_inference.cc).",
)
def warmup_signatures(version: Version) -> Finding:
    problems, names = [], set()
    for number, log in _logs(version):
        problems += [f"record {number}: {problem}" for problem in _misfits(version, log)]
        names |= {name for name, _ in _inputs(log)}
    return judged(problems, listed(sorted(names)))


@version_rule(
    title="No warm-up record has more rows than a batch may have",
    why="A server with batching replays them through it, and a request larger than max_batch_size is refused, also "
    "where large batches are split, so that the load fails (saved_model_bundle_source_adapter.cc, "
    "saved_model_bundle_factory.cc, shared_batch_scheduler.h).",
)
def warmup_batches(version: Version) -> Finding:
    largest = largest_request(version.batching)
    sizes = [(number, name, num_rows) for number, log in _logs(version) for name, num_rows in _batched_rows(log)]
    problems = [
        f"record {number} ({name}) has {num_rows:,} rows. Allowed: {largest:,}"
        for number, name, num_rows in sizes
        if num_rows > largest
    ]
    return judged(problems, f"at most {max((rows for *_, rows in sizes), default=0):,} of {largest:,} rows")


def _batched_rows(log: prediction_log_pb2.PredictionLog) -> list[tuple[str, int]]:
    """(signature, rows of the 0th dimension) where the request goes through batching.

    Batching knows requests for all outputs of one signature; others run by themselves (batching_session.cc).
    """
    requests = _inputs(log)
    if len(requests) != 1 or log.predict_log.request.output_filter:
        return []
    return [(name, len(values)) for name, inputs in requests for values in list(inputs.values())[:1] if values.ndim]


@version_rule(
    title="Every warm-up record replays",
    why="An error while replaying fails the load of the version (saved_model_warmup_util.cc).",
)
def warmup_replay(version: Version) -> Finding:
    logs = [(number, log) for number, log in _logs(version) if _inputs(log) and not _misfits(version, log)]
    if not logs:
        raise NotApplicable("no record fits a signature")
    model, problems = version.model, []
    for number, log in logs:
        for name, inputs in _inputs(log):
            try:
                outputs = model.run(version.signatures[name], inputs)
            except Exception as error:  # TensorFlow raises errors of many classes.
                problems.append(f"record {number} ({name}): {reason_of(error, private=True)}")
                continue
            method = _METHODS.get(log.WhichOneof("log_type"))
            if method:
                wrong = answer_problems(method, outputs, len(inputs["inputs"]))
                problems += [f"record {number} ({name}): {problem}" for problem in wrong]
    return judged(problems, f"{len(logs)} records")


def _inputs(log: prediction_log_pb2.PredictionLog):
    try:
        return recorded_inputs(log)
    except Exception:  # A TensorProto that holds no tensor; _misfits tells it.
        return []


def _misfits(version: Version, log: prediction_log_pb2.PredictionLog) -> list[str]:
    """Why a record does not fit the signatures; [] for kinds that are not replayed."""
    if log.WhichOneof("log_type") not in _REPLAYED:
        return []
    try:
        requests = recorded_inputs(log)
    except Exception as error:  # make_ndarray raises errors of many classes.
        return [f"an input is no tensor: {type(error).__name__}"]
    problems = []
    for name, inputs in requests:
        if name not in version.signatures:
            problems.append(f"signature {name} does not exist")
            continue
        signature = version.signatures[name]
        missing = signature.inputs.keys() - inputs.keys() - signature.defaults.keys()
        unknown = inputs.keys() - signature.inputs.keys()
        problems += [f"{name} needs the input {key}" for key in sorted(missing)]
        problems += [f"{name} has no input {key}" for key in sorted(unknown)]
        problems += [
            f"{name}, input {key} is {values.dtype.name}"
            for key, values in sorted(inputs.items())
            if key not in unknown and tf.as_dtype(values.dtype) != tf.as_dtype(signature.inputs[key].dtype)
        ]
    if not requests:
        problems.append("it has no tasks")
    if log.HasField("predict_log") and not problems:
        wanted, offered = log.predict_log.request.output_filter, version.signatures[requests[0][0]].outputs
        problems += [f"there is no output {key} to filter" for key in wanted if key not in offered]
    if log.HasField("multi_inference_log") and not problems:
        methods = {task.method_name for task in log.multi_inference_log.request.tasks}
        problems += [f"MultiInference knows no method {method!r}" for method in sorted(methods - {CLASSIFY, REGRESS})]
        tensors = {version.signatures[name].inputs["inputs"].name for name, _ in requests}
        if len(tensors) > 1:
            problems.append(f"MultiInference needs one input tensor, the signatures have {len(tensors)}")
    if log.WhichOneof("log_type") != "predict_log" and any(not len(inputs["inputs"]) for _, inputs in requests):
        problems.append("it has no Examples")
    return problems
