"""TF Serving's BatchingParameters as a text proto: read and written through a real proto class.

tensorflow-serving-api leaves the message out (session_bundle_config.proto), so its class is made here. A text proto
names its fields, so their numbers do not matter.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format, wrappers_pb2
from google.protobuf.message import Message

from clsd_tf.storage.files import write_text
from export.servable.profile import BatchingProfile

# Where TF Serving looks for a version's own parameters with --enable_per_model_batching_parameters.
BATCHING_FILE = "batching_params.pbtxt"
DEFAULT_MAX_BATCH_SIZE = 1000
_WRAPPED: Mapping[str, type[Message]] = {
    "max_batch_size": wrappers_pb2.Int64Value,
    "batch_timeout_micros": wrappers_pb2.Int64Value,
    "max_enqueued_batches": wrappers_pb2.Int64Value,
    "num_batch_threads": wrappers_pb2.Int64Value,
    "thread_pool_name": wrappers_pb2.StringValue,
    "enable_large_batch_splitting": wrappers_pb2.BoolValue,
    "max_execution_batch_size": wrappers_pb2.Int64Value,
}
_SMALLEST = {
    "max_batch_size": 1,
    "batch_timeout_micros": 0,
    "max_enqueued_batches": 1,
    "num_batch_threads": 1,
    "max_execution_batch_size": 1,
}


def _message_class() -> type[Message]:
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="clsd_tf/batching_parameters.proto",
        package="clsd_tf",
        syntax="proto3",
        dependency=[wrappers_pb2.DESCRIPTOR.name],
    )
    message = file.message_type.add(name="BatchingParameters")
    for number, (name, wrapper) in enumerate(_WRAPPED.items(), start=1):
        type_name = f".{wrapper.DESCRIPTOR.full_name}"
        message.field.add(
            name=name, number=number, label=field.LABEL_OPTIONAL, type=field.TYPE_MESSAGE, type_name=type_name
        )
    number = len(_WRAPPED) + 1
    message.field.add(name="allowed_batch_sizes", number=number, label=field.LABEL_REPEATED, type=field.TYPE_INT64)
    message.field.add(
        name="pad_variable_length_inputs", number=number + 1, label=field.LABEL_OPTIONAL, type=field.TYPE_BOOL
    )
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("clsd_tf.BatchingParameters"))


if TYPE_CHECKING:
    BatchingParameters: TypeAlias = Any  # A type checker cannot know the fields.
else:
    BatchingParameters = _message_class()


def read_batching_parameters(path: pathlib.Path) -> BatchingParameters:
    """Reads and checks a batching file.

    Args:
      path: of the text proto.

    Returns:
      A BatchingParameters; a number that is not set has no field (``HasField``).

    Raises:
      ValueError: the text is not a BatchingParameters text proto, or breaks a rule of TF Serving.
    """
    parameters = parse_batching_parameters(path)
    check_batching_parameters(parameters)
    return parameters


def parse_batching_parameters(path: pathlib.Path) -> BatchingParameters:
    """Reads a batching file as ``read_batching_parameters`` does, whatever the numbers are.

    Args:
      path: of the text proto.

    Returns:
      A BatchingParameters.

    Raises:
      ValueError: the text is not a BatchingParameters text proto.
    """
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), BatchingParameters())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path.name} must be a BatchingParameters text proto. Received: {error}. "
            "Allowed: max_batch_size { value: 64 } and so on"
        ) from error


def check_batching_parameters(parameters: BatchingParameters) -> None:
    """Applies the rules of TF Serving's batching session (session_bundle_config.proto, batching_session.cc).

    Args:
      parameters: a BatchingParameters.

    Raises:
      ValueError: a number below its smallest, or allowed_batch_sizes that do not rise, or do not end at the largest
        batch that is run.
    """
    for name, smallest in _SMALLEST.items():
        if parameters.HasField(name) and getattr(parameters, name).value < smallest:
            raise ValueError(f"{name} must be {smallest} or more. Received: {getattr(parameters, name).value}")
    sizes = list(parameters.allowed_batch_sizes)
    if sizes != sorted(set(sizes)) or any(size < 1 for size in sizes):
        raise ValueError(f"allowed_batch_sizes must rise, from 1 or more. Received: {sizes}")
    largest = _largest_batch(parameters)
    if sizes and sizes[-1] != largest:
        raise ValueError(f"the last of allowed_batch_sizes must be the largest batch. Received: {sizes}, not {largest}")


def largest_request(parameters: BatchingParameters) -> int:
    """Returns the rows that a request may have by ``parameters``.

    They are the same with large batch splitting (shared_batch_scheduler.h).
    """
    return parameters.max_batch_size.value if parameters.HasField("max_batch_size") else DEFAULT_MAX_BATCH_SIZE


def _largest_batch(parameters: BatchingParameters) -> int:
    """Rows of the largest batch that is run; with large batch splitting requests may be larger."""
    splits = parameters.enable_large_batch_splitting.value
    if splits and parameters.HasField("max_execution_batch_size"):
        return parameters.max_execution_batch_size.value
    return largest_request(parameters)


def write_batching_parameters(version_dir: pathlib.Path, profile: BatchingProfile) -> None:
    """Writes a version's batching file; without padding, which would repeat a history's first value.

    Args:
      version_dir: the version.
      profile: the numbers; None leaves one to the server.
    """
    parameters = BatchingParameters(allowed_batch_sizes=profile.allowed_batch_sizes)
    for name in ("max_batch_size", "batch_timeout_micros", "max_enqueued_batches", "num_batch_threads"):
        if (value := getattr(profile, name)) is not None:
            getattr(parameters, name).value = value
    write_text(version_dir / BATCHING_FILE, text_format.MessageToString(parameters))
