"""One loaded version of a model: its signatures, and how they are called."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2


@dataclasses.dataclass(frozen=True)
class Signature:
    """Inputs and outputs of one signature.

    Attributes:
      name: as requests give it.
      inputs: input name -> dtype and shape; an unknown rank or dimension stays unknown.
      outputs: the same of the outputs.
      defaults: values of the inputs that requests may leave out.
    """

    name: str
    inputs: dict[str, tf.TensorSpec]
    outputs: dict[str, tf.TensorSpec]
    defaults: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def input_forms(self) -> dict[str, tuple[np.dtype, list[int | None] | None]]:
        """Input name -> numpy dtype (object for strings) and dimensions, None where free; None for any rank."""
        return {
            name: (np.dtype(spec.dtype.as_numpy_dtype), spec.shape.as_list() if spec.shape.rank is not None else None)
            for name, spec in self.inputs.items()
        }

    @functools.cached_property
    def is_batchable(self) -> bool:
        """True where rows of several requests may run as one: every tensor has a free 0th dimension."""
        specs = [*self.inputs.values(), *self.outputs.values()]
        return bool(self.inputs) and all(spec.shape.rank and spec.shape[0] is None for spec in specs)

    @functools.cached_property
    def is_sliceable(self) -> bool:
        """True where the rows of one request may run apart: further dimensions of outputs depend on no other row."""
        return self.is_batchable and all(spec.shape[1:].is_fully_defined() for spec in self.outputs.values())


class LoadedVersion:
    """A SavedModel in memory.

    Args:
      path: the version's directory; its name is the version.
      model_name: as requests give it.

    Attributes:
      version: the number.
      signatures: name -> Signature.
      signature_defs: the SavedModel's own declarations, for GetModelMetadata.
      manifest: ``assets.extra/manifest.json`` as a dict; None for a SavedModel of another origin.

    Raises:
      OSError, ValueError: the directory holds no SavedModel that TensorFlow can load.
    """

    def __init__(self, path: pathlib.Path, model_name: str):
        self.path = path
        self.model_name = model_name
        self.version = int(path.name)
        self.signature_defs = _signature_defs(path)
        self.manifest = _manifest(path)
        self._loaded = tf.saved_model.load(str(path))  # Kept: it owns the variables of the signatures.
        self._functions = dict(self._loaded.signatures.items())
        self.signatures = {name: signature_of(name, self.signature_defs[name]) for name in self._functions}

    def run(self, signature_name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Calls a signature.

        Args:
          signature_name: a key of ``signatures``.
          inputs: one array per input, with the dtypes and shapes of the signature; object arrays of bytes for strings.

        Returns:
          Output -> array; object arrays of bytes for strings.

        Raises:
          tf.errors.OpError: the graph refused the values.
        """
        specs = self.signatures[signature_name].inputs
        tensors = {name: tf.constant(value, specs[name].dtype) for name, value in inputs.items()}
        try:
            outputs = self._functions[signature_name](**tensors)
        except UnicodeDecodeError:  # TensorFlow's message quotes bytes of the request.
            raise tf.errors.InvalidArgumentError(None, None, "a value that is no text") from None
        return {name: _to_array(value) for name, value in outputs.items()}


def _to_array(tensor: tf.Tensor) -> np.ndarray:
    value = tensor.numpy()  # bytes for a scalar string
    return np.array(value, object) if isinstance(value, bytes) else np.asarray(value)


def _signature_defs(path: pathlib.Path) -> dict[str, meta_graph_pb2.SignatureDef]:
    saved_model = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    for meta_graph in saved_model.meta_graphs:
        if tf.saved_model.SERVING in meta_graph.meta_info_def.tags:
            return dict(meta_graph.signature_def)
    raise ValueError(f"a servable has a graph tagged {tf.saved_model.SERVING!r}. Received: none in version {path.name}")


def _manifest(path: pathlib.Path) -> dict | None:
    file = path / "assets.extra" / "manifest.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def signature_of(name: str, declared: meta_graph_pb2.SignatureDef) -> Signature:
    """Reads the signature that a SavedModel declares.

    Args:
      name: as requests give it.
      declared: in the SavedModel.

    Returns:
      The same with numpy and TensorFlow types.
    """
    defaults = {key: tf.make_ndarray(value) for key, value in declared.defaults.items()}
    return Signature(name, _specs(declared.inputs), _specs(declared.outputs), defaults)


def _specs(tensors: Mapping[str, meta_graph_pb2.TensorInfo]) -> dict[str, tf.TensorSpec]:
    return {name: tf.TensorSpec(info.tensor_shape, info.dtype, name) for name, info in sorted(tensors.items())}
