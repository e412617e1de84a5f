"""A client of this project's server and of TF Serving: rows in, click probabilities out."""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import tensorflow as tf
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow_serving.apis import input_pb2

from clsd_tf.data.examples import encode_raw_rows
from clsd_tf.data.request_files import rows_of, typed_rows
from clsd_tf.spec.model_inputs import MISSING_INT64, RawInput
from export.clients.grpc_transport import GrpcTransport
from export.clients.rest_transport import RestTransport
from export.clients.transport import Endpoint, VersionStatus

Protocol = Literal["grpc", "rest"]
_Dtype = Literal["string", "int64", "float"]  # Of RawInput.
_DTYPES: Mapping[int, _Dtype] = {
    types_pb2.DT_STRING: "string",
    types_pb2.DT_INT64: "int64",
    types_pb2.DT_FLOAT: "float",
}
_ARROW_DTYPES: Mapping[pa.DataType, _Dtype] = {pa.string(): "string", pa.int64(): "int64", pa.float64(): "float"}


class ServingClient:
    """Client of one model of a server; may be used by several threads. A context manager, which closes it.

    No feature spec is needed: names and types of a row's values come from the server, by the model's signature
    ``predict_raw``. Rows are sent to ``serving_default``, as serialized tf.Examples: one string a row, so that a server
    can put requests together whose histories have different lengths, and a missing value is one that is not there.

    Args:
      endpoint: server, model, version and deadline.
      protocol: ``grpc`` or ``rest``.
      batch_size: rows of a request, >= 1.
      concurrency: requests of ``score`` in flight, >= 1.

    Raises:
      ValueError: an argument out of its range.
    """

    def __init__(self, endpoint: Endpoint, *, protocol: Protocol = "grpc", batch_size: int = 512, concurrency: int = 4):
        if batch_size < 1 or concurrency < 1:
            raise ValueError(f"at least 1. Received: batch_size={batch_size}, concurrency={concurrency}")
        if protocol not in ("grpc", "rest"):
            raise ValueError(f"a protocol is grpc or rest. Received: {protocol}")
        self.endpoint = endpoint
        self.batch_size = batch_size
        self._transport = GrpcTransport(endpoint) if protocol == "grpc" else RestTransport(endpoint, concurrency)
        self._senders = concurrent.futures.ThreadPoolExecutor(concurrency)

    def __enter__(self) -> ServingClient:
        return self

    def __exit__(self, *error: object) -> None:
        self._senders.shutdown(cancel_futures=True)
        self._transport.close()

    def metadata(self) -> dict[str, meta_graph_pb2.SignatureDef]:
        """The signatures of the version that answers, by name.

        Raises:
          ServingError: no answer, as in all methods.
        """
        return dict(self._transport.metadata().signature_def)

    def status(self) -> list[VersionStatus]:
        """The versions that the server knows of the model."""
        return self._transport.status()

    @functools.cached_property
    def raw_inputs(self) -> tuple[RawInput, ...]:
        """The columns that a row needs, in the order of their names; asked once.

        Raises:
          ValueError: the model does not say it as those of this project do.
        """
        signatures = self.metadata()
        inputs = signatures["predict_raw"].inputs if "predict_raw" in signatures else {}
        found = tuple(entry for name in sorted(inputs) if (entry := _raw_input(name, inputs[name])))
        if not found or len(found) < len(inputs):
            raise ValueError(
                "names and types of a row's values are the inputs of the signature predict_raw: text, int64 or float32 "
                f"[batch], and lists of text [batch, any]. Received: others, or none, of {self.endpoint.model_name}. "
                "Export the model with `python -m export.main`"
            )
        return found

    def score(self, rows: pa.Table) -> np.ndarray:
        """Scores rows; columns are read by the rules of the build, and those that the model does not read are not sent.

        Args:
          rows: a column per raw input; a null or "" is a missing value.

        Returns:
          ctr, float32 [num_rows].

        Raises:
          ValueError: a raw input has no column, or a value that does not fit its type.
          ServingError: a request failed.
        """
        scores = self._senders.map(self.score_examples, self.requests(rows))
        return np.concatenate([np.zeros(0, np.float32), *scores])

    def requests(self, rows: pa.Table) -> list[list[bytes]]:
        """Returns ``rows`` as serialized tf.Examples, ``batch_size`` a request; raises ValueError as ``score``."""
        examples = encode_raw_rows(typed_rows(rows, self.raw_inputs), self.raw_inputs)
        return [examples[start : start + self.batch_size] for start in range(0, len(examples), self.batch_size)]

    def score_examples(self, examples: Sequence[bytes]) -> np.ndarray:
        """Returns ctr of each of ``examples``, serialized tf.Examples, by one request: float32 [num_examples]."""
        ctr = self._predict("serving_default", "examples", examples, "ctr")["ctr"]
        return np.asarray(ctr, np.float32)

    def rank(self, user: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> list[tuple[str | int, float]]:
        """Orders items for one user by one request to the signature ``rank``.

        Args:
          user: values that all items share, of the user or of the moment: the request's context.
          items: for each item its id and the values that are its own. What the model reads of users (columns of user
            tables, histories, windows) belongs into ``user``; here it would not be seen.

        Returns:
          (item id, ctr), the highest ctr first; as many as the model's ``top_k`` allows.

        Raises:
          ValueError: no items, a name on both sides, a raw input on neither, a value that does not fit its type, or
            items without the id that the model knows.
        """
        request = self._rank_request(user, items)
        found = self._predict("rank", "requests", [request], "item_ids", "ctr")
        # What follows is padding, where a server answered a longer request at the same time.
        ids = _plain(found["item_ids"][0])[: len(items)]
        ctr = np.asarray(found["ctr"][0], np.float32)[: len(items)].tolist()
        num_without = sum(entry in ("", MISSING_INT64) for entry in ids)
        if num_without:
            raise ValueError(
                f"every item needs its id, under the name that the model knows. Received: {num_without} of {len(ids)} "
                "without"
            )
        return list(zip(ids, ctr, strict=True))

    def _rank_request(self, user: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> bytes:
        if not items:
            raise ValueError("there must be an item to rank. Received: no items")
        rows = rows_of(items)
        shared = sorted(set(user) & set(rows.column_names))
        if shared:
            raise ValueError(f"a value belongs to the user or to the items. Received: {', '.join(shared)} in both")
        of_user = tuple(entry for entry in self.raw_inputs if entry.name in user)
        of_items = _items_inputs(rows, self.raw_inputs, of_user)
        context = encode_raw_rows(typed_rows(rows_of([user]), of_user), of_user) if of_user else [b""]
        request = input_pb2.ExampleListWithContext(context=tf.train.Example.FromString(context[0]))
        # On the wire a list of bytes is what a list of messages is: nothing is parsed here.
        examples = encode_raw_rows(typed_rows(rows, of_items), of_items)
        return request.SerializeToString() + tf.train.BytesList(value=examples).SerializeToString()

    def _predict(self, signature: str, name: str, values: Sequence[bytes], *outputs: str) -> dict[str, Any]:
        """The named outputs, each with an entry per value."""
        found = self._transport.predict(signature, name, values, outputs)
        for output in outputs:
            if output not in found or len(found[output]) != len(values):
                raise ValueError(
                    f"{signature} must answer {output} for each of {len(values)}. Received: "
                    f"{', '.join(f'{key} of {len(value)}' for key, value in found.items())}. Is the model one of "
                    "`python -m export.main`?"
                )
        return found


def _raw_input(name: str, tensor: meta_graph_pb2.TensorInfo) -> RawInput | None:
    dtype, is_list = _DTYPES.get(tensor.dtype), len(tensor.tensor_shape.dim) == 2
    return RawInput(name, dtype, is_list) if dtype == "string" or (dtype and not is_list) else None


def _items_inputs(rows: pa.Table, raw_inputs: Sequence[RawInput], of_user: Sequence[RawInput]) -> tuple[RawInput, ...]:
    """The raw inputs that the user does not bring, and other columns by their own type: one may be the item's id."""
    known = {entry.name for entry in raw_inputs}
    others = (
        RawInput(field.name, _ARROW_DTYPES[field.type])
        for field in rows.schema
        if field.name not in known and field.type in _ARROW_DTYPES
    )
    return (*(entry for entry in raw_inputs if entry not in of_user), *others)


def _plain(ids: Sequence[Any]) -> list[str | int]:
    """Text from bytes, which gRPC gives; numbers as Python's."""
    values = ids.tolist() if isinstance(ids, np.ndarray) else ids
    return [value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value for value in values]
