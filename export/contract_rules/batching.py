"""Rules of the batching file: what --batching_parameters_file or batching_params.pbtxt may say."""

from __future__ import annotations

from google.protobuf import text_format

from export.contract_rules.findings import Finding, failed, listed, passed, warned
from export.contract_rules.rules import version_rule
from export.contract_rules.version import Version
from export.servable.batching_parameters import check_batching_parameters


@version_rule(
    title="The batching file is a BatchingParameters text proto",
    why="An unknown field or a number without { value: } stops the server, or with per-model parameters the load of "
    "the version (session_bundle_config.proto, bundle_factory_util.cc).",
)
def batching_file(version: Version) -> Finding:
    parsed = version.parsed_batching
    if isinstance(parsed, Exception):
        return failed(str(parsed))
    return passed(" ".join(text_format.MessageToString(parsed, as_one_line=True).split()) or "it sets nothing")


@version_rule(
    title="Allowed batch sizes rise to the largest batch",
    why="Batches are padded up to the next allowed size; the last must be max_batch_size, or max_execution_batch_size "
    "with enable_large_batch_splitting, else the version does not load (batching_session.cc).",
)
def batching_sizes(version: Version) -> Finding:
    parameters = version.batching
    try:
        check_batching_parameters(parameters)
    except ValueError as error:
        return failed(str(error))
    return passed(listed(map(str, parameters.allowed_batch_sizes)) or "any size is allowed")


@version_rule(
    title="Batching does not pad requests with their own values",
    why="pad_variable_length_inputs fills shorter requests with a repetition of their first element, so that a history "
    "gains events that never happened (AddPadding in batching_util.h).",
)
def batching_padding(version: Version) -> Finding:
    parameters = version.batching
    variable = [
        f"{name}, input {key}"
        for name, signature in version.signatures.items()
        for key, info in sorted(signature.inputs.items())
        if any(dim.size == -1 for dim in info.tensor_shape.dim[1:])
    ]
    if parameters.pad_variable_length_inputs:
        return warned(f"it pads {listed(variable, '; ') or 'inputs, but no input has a variable length'}")
    if variable:
        return passed(f"requests of equal lengths only are joined in {listed(variable, '; ')}")
    return passed("no input has a variable length")
