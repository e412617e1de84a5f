"""Rules of what the model answers, found by loading and calling it with requests made for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from export.contract_rules.findings import Finding, NotApplicable, failed, judged, listed, passed, reason_of
from export.contract_rules.requests import Inputs, Requests, largest_recorded_batch, requests_for
from export.contract_rules.rules import version_rule
from export.contract_rules.signatures import CLASSIFY, REGRESS, api_signatures
from export.contract_rules.version import Version

Outputs = Mapping[str, np.ndarray]


class CallFailed(Exception):  # noqa: N818 - a finding, not an error.
    """A request that got no answer; the message is the reason."""


def call(version: Version, requests: Requests, inputs: Inputs, what: str) -> Outputs:
    """Runs one signature.

    Args:
      version: whose model is called.
      requests: of the signature.
      inputs: one of the requests.
      what: the request, for errors.

    Returns:
      Output -> array [batch, ...].

    Raises:
      CallFailed: says ``what`` was asked and what TensorFlow said; of recorded requests, without values.
    """
    try:
        return version.model.run(requests.signature, inputs)
    except NotApplicable:
        raise
    except Exception as error:  # TensorFlow raises errors of many classes.
        raise CallFailed(f"{what}: {reason_of(error, private=requests.recorded is not None)}") from error


def each_signature(
    version: Version, check: Callable[[Requests], list[str]], names: Iterable[str] | None = None
) -> Finding:
    """Applies a check to the signatures for which requests can be made.

    Args:
      version: whose signatures are called.
      check: requests of a signature -> problems.
      names: of the signatures; all by default.

    Returns:
      A failure that lists the problems of all, or a pass that lists what was checked.

    Raises:
      NotApplicable: the model does not load, or no signature can be checked.
    """
    _ = version.model
    problems, checked, skipped = [], [], []
    for name in version.signatures if names is None else names:
        try:
            problems += [f"{name}: {problem}" for problem in check(requests_for(version, name))]
            checked.append(name)
        except CallFailed as failure:
            problems.append(f"{name}: {failure}")
        except NotApplicable as reason:
            skipped.append(f"{name} {reason}")
    if not checked and not problems:
        raise NotApplicable(listed(skipped, "; ") or "there are no signatures")
    return judged(problems, listed(checked) + (f". Not checked: {listed(skipped, '; ')}" if skipped else ""))


@version_rule(
    title="The model loads",
    why="A version that does not load is retried five times, a minute apart, and never served (saved_model/loader.cc).",
)
def loads(version: Version) -> Finding:
    if isinstance(version.loading, Exception):
        return failed(reason_of(version.loading))
    return passed("graph and variables loaded, initializers run")


@version_rule(
    title="Every signature answers batches of 0, 1 and the largest size, with a row per row",
    why="Batching cuts answers along dimension 0 and hands each client its rows; a client's empty list of items is a "
    "batch of 0 (batching_session.cc).",
)
def batch_sizes(version: Version) -> Finding:
    largest, source = version.max_batch_size(largest_recorded_batch(version))

    def check(requests: Requests) -> list[str]:
        problems = []
        for size in (0, 1, largest):
            outputs = call(version, requests, requests.typical(size), f"batch of {size}")
            problems += [
                f"batch of {size}: {name} has shape {list(values.shape)}"
                for name, values in outputs.items()
                if not values.ndim or len(values) != size
            ]
        return problems

    finding = each_signature(version, check)
    return Finding(finding.status, f"{finding.found}. Largest: {largest:,} ({source})")


@version_rule(
    title="A tf.Example without any feature gets finite numbers",
    why="Clients leave out what they do not know; NaN, as the mean of an empty history gives, is no JSON and sorts "
    "anywhere.",
)
def empty_example(version: Version) -> Finding:
    def check(requests: Requests) -> list[str]:
        outputs = call(version, requests, requests.empty(1), "an empty Example")
        return [f"{name} is not finite" for name in _not_finite(outputs)]

    return each_signature(version, check)


@version_rule(
    title="A tf.Example that misses one feature gets an answer",
    why="A feature without a default fails the request, and with batching the requests of other clients too "
    "(example_parser, batching_session.cc).",
)
def missing_features(version: Version) -> Finding:
    def check(requests: Requests) -> list[str]:
        problems = []
        for feature, inputs in requests.without_each_feature():
            try:
                outputs = call(version, requests, inputs, f"without {feature}")
                problems += [f"without {feature}: {name} is not finite" for name in _not_finite(outputs)]
            except CallFailed as failure:
                problems.append(str(failure))
        return problems

    return each_signature(version, check)


@version_rule(
    title="Strings and integers that training never saw get an answer",
    why="New users and items come every day; an id outside of a table or an embedding fails the whole batch.",
)
def unknown_values(version: Version) -> Finding:
    def check(requests: Requests) -> list[str]:
        outputs = call(version, requests, requests.unknown(2), "unknown values")
        return [f"unknown values: {name} is not finite" for name in _not_finite(outputs)]

    return each_signature(version, check)


@version_rule(
    title="Classify and Regress get answers of their shapes",
    why="Shapes that the signature leaves open are checked at each answer (classifier.cc, regressor.cc).",
)
def api_answers(version: Version) -> Finding:
    methods: dict[str, str] = {}
    for method in (CLASSIFY, REGRESS):
        try:
            methods |= dict.fromkeys(api_signatures(version, method), method)
        except NotApplicable:
            continue
    if not methods:
        raise NotApplicable("there are no signatures for Classify or Regress")

    def check(requests: Requests) -> list[str]:
        outputs = call(version, requests, requests.typical(2), "2 Examples")
        return answer_problems(methods[requests.name], outputs, 2)

    return each_signature(version, check, methods)


def answer_problems(method: str, outputs: Outputs, num_examples: int) -> list[str]:
    """Finds why Classify or Regress would refuse an answer (PostProcess... in classifier.cc and regressor.cc).

    Args:
      method: method name, ``CLASSIFY`` or ``REGRESS``.
      outputs: of the signature.
      num_examples: that were sent.

    Returns:
      A sentence for each problem; [] if there is none.
    """
    read = ("outputs",) if method == REGRESS else ("scores", "classes")
    shapes = {name: list(outputs[name].shape) for name in read if name in outputs}
    if method == REGRESS:
        allowed = ([num_examples], [num_examples, 1])
        return [f"{name} has shape {shape}" for name, shape in shapes.items() if shape not in allowed]
    problems = [
        f"{name} has shape {shape}" for name, shape in shapes.items() if len(shape) != 2 or shape[0] != num_examples
    ]
    if not problems and len({tuple(shape) for shape in shapes.values()}) > 1:
        problems.append(f"scores and classes differ in shape: {listed(map(str, shapes.values()))}")
    return problems


def _not_finite(outputs: Outputs) -> list[str]:
    return [name for name, values in outputs.items() if values.dtype.kind == "f" and not np.isfinite(values).all()]
