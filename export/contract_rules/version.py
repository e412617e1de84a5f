"""Subjects of rules: a model's base directory and one version, read and loaded once."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Mapping

import numpy as np
import tensorflow as tf
from google.protobuf import text_format
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2

from clsd_tf.serving.versions import version_number
from export.contract_rules.findings import NotApplicable
from export.servable.batching_parameters import BATCHING_FILE, BatchingParameters, parse_batching_parameters
from export.servable.warmup import MAX_WARMUP_RECORDS, WARMUP_FILE

_SAVED_MODELS = ("saved_model.pb", "saved_model.pbtxt")  # The first that is there is read (reader.cc).
_DEFAULT_BATCH = 64
_LARGEST_BATCH_TRIED = 4096
_TIMEOUT_MILLISECONDS = 60_000
_NO_SIGNATURE = ("__saved_model_init_op", "__saved_model_train_op")


class Base:
    """A model's base directory.

    Args:
      path: the directory.

    Attributes:
      children: name -> path, by name.
      versions: those whose names are numbers.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.children = {child.name: child for child in sorted(path.iterdir())}
        self.versions = {name: child for name, child in self.children.items() if version_number(name) is not None}


class LoadedModel:
    """A graph run as TF Serving runs it: in a session, fed and fetched by the tensor names of a signature.

    The model's operations run in this process, so only look at models that you would serve.

    Args:
      path: of the version.

    Raises:
      Exception: whatever TensorFlow raises.
    """

    def __init__(self, path: pathlib.Path):
        self._session = tf.compat.v1.Session(graph=tf.Graph())
        with self._session.graph.as_default():
            tf.compat.v1.saved_model.load(self._session, [tf.saved_model.SERVING], str(path))

    def run(self, signature: meta_graph_pb2.SignatureDef, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs a signature.

        Args:
          signature: of the model.
          inputs: input -> array, object arrays of bytes for strings; those left out take the signature's defaults.

        Returns:
          Output -> array; object arrays of bytes for strings.

        Raises:
          Exception: whatever TensorFlow raises; ``tf.errors.DeadlineExceededError`` after a minute.
        """
        values = {name: tf.make_ndarray(value) for name, value in signature.defaults.items()} | dict(inputs)
        return self._session.run(
            {name: info.name for name, info in signature.outputs.items()},
            {signature.inputs[name].name: value for name, value in values.items()},
            options=tf.compat.v1.RunOptions(timeout_in_ms=_TIMEOUT_MILLISECONDS),
        )

    def close(self) -> None:
        self._session.close()


class Version:
    """One version's directory, whose parts are read when a rule asks for them.

    Args:
      path: the directory; its name is the version.
      batching_file: TF Serving's --batching_parameters_file; by default the one in the version, if there is one.

    Properties raise ``NotApplicable`` when what they need is broken: another rule says so.
    """

    def __init__(self, path: pathlib.Path, batching_file: pathlib.Path | None = None):
        self.path = path
        own = path / BATCHING_FILE
        self.batching_file = batching_file or (own if os.path.isfile(own) else None)

    @functools.cached_property
    def special_files(self) -> list[str]:
        """Names of pipes, devices and sockets: whoever reads one may wait for ever."""
        paths = sorted(self.path.rglob("*"))
        special = [path for path in paths if path.exists() and not (path.is_file() or path.is_dir())]
        return [path.relative_to(self.path).as_posix() for path in special]

    @functools.cached_property
    def meta_graph(self) -> meta_graph_pb2.MetaGraphDef:
        """The graph tagged ``serve``."""
        if self.special_files:
            raise NotApplicable("nothing is read beside pipes and devices, see the rule file_kinds")
        try:
            return read_meta_graph(self.path)
        except ValueError as error:
            raise NotApplicable("the SavedModel cannot be read, see the rule saved_model") from error

    @property
    def signatures(self) -> dict[str, meta_graph_pb2.SignatureDef]:
        """Signatures that can be called, in name order."""
        found = self.meta_graph.signature_def
        return {name: found[name] for name in sorted(found) if name not in _NO_SIGNATURE}

    @property
    def model(self) -> LoadedModel:
        if isinstance(self.loading, Exception):
            raise NotApplicable("the model does not load, see the rule loads")
        return self.loading

    @functools.cached_property
    def loading(self) -> LoadedModel | Exception:
        """The loaded model, or why it does not load."""
        _ = self.meta_graph
        try:
            return LoadedModel(self.path)
        except Exception as error:  # A corrupt file may raise anything.
            return error

    @property
    def warmup_file(self) -> pathlib.Path:
        path = self.path / WARMUP_FILE
        if not path.is_file():
            raise NotApplicable(f"there is no file {WARMUP_FILE}")
        return path

    @functools.cached_property
    def warmup_records(self) -> list[bytes]:
        try:
            return read_warmup_records(self.warmup_file)
        except tf.errors.OpError as error:
            raise NotApplicable("the warm-up file cannot be read, see the rule warmup_file") from error

    @property
    def batching(self) -> BatchingParameters:
        """BatchingParameters, whatever the numbers are."""
        if isinstance(self.parsed_batching, Exception):
            raise NotApplicable("the batching file cannot be read, see the rule batching_file")
        return self.parsed_batching

    @functools.cached_property
    def parsed_batching(self) -> BatchingParameters | Exception:
        """BatchingParameters, or why the file cannot be read."""
        if self.batching_file is None:
            raise NotApplicable(f"there is no {BATCHING_FILE}, and none was given")
        try:
            return parse_batching_parameters(self.batching_file)
        except (ValueError, OSError) as error:
            return error

    def max_batch_size(self, recorded: int | None) -> tuple[int, str]:
        """Chooses the largest batch to try: that of the batching file, of the warm-up file, or 64; at most 4096.

        Args:
          recorded: rows of the largest warm-up batch, None without one.

        Returns:
          The rows, and where the number is from.
        """
        try:
            parameters = self.batching
        except NotApplicable:
            parameters = None
        if parameters is not None and parameters.max_batch_size.value > 0:
            size, source = parameters.max_batch_size.value, "the batching file"
        elif recorded:
            size, source = recorded, "the warm-up file"
        else:
            size, source = _DEFAULT_BATCH, "by default"
        if size > _LARGEST_BATCH_TRIED:
            return _LARGEST_BATCH_TRIED, f"instead of {size:,} of {source}"
        return size, source

    def close(self) -> None:
        loading = self.__dict__.get("loading")
        if isinstance(loading, LoadedModel):
            loading.close()


def saved_model_file(version: pathlib.Path) -> pathlib.Path | None:
    """Returns the file that TensorFlow reads the graph of a ``version`` from, None if there is none."""
    # Unlike pathlib's, these questions know no errors of permissions.
    return next((version / name for name in _SAVED_MODELS if os.path.exists(version / name)), None)


def read_meta_graph(version: pathlib.Path) -> meta_graph_pb2.MetaGraphDef:
    """Reads the graph tagged ``serve``.

    Args:
      version: its directory.

    Returns:
      Graph and signatures.

    Raises:
      ValueError: no file, no SavedModel in it, or no such graph.
    """
    path = saved_model_file(version)
    if path is None:
        raise ValueError(f"no file {_SAVED_MODELS[0]}")
    try:
        saved_model = saved_model_pb2.SavedModel()
        if path.suffix == ".pb":
            saved_model.ParseFromString(path.read_bytes())
        else:
            text_format.Parse(path.read_bytes(), saved_model)
    except Exception as error:  # DecodeError, whose class depends on protobuf's implementation, or an OSError.
        raise ValueError(f"{path.name} is no SavedModel: {error}") from error
    tags = [sorted(graph.meta_info_def.tags) for graph in saved_model.meta_graphs]
    for graph in saved_model.meta_graphs:
        if list(graph.meta_info_def.tags) == [tf.saved_model.SERVING]:
            return graph
    raise ValueError(f"no graph tagged {tf.saved_model.SERVING!r} alone; {len(tags)} graphs, tagged {tags}")


def read_warmup_records(path: pathlib.Path) -> list[bytes]:
    """Reads an uncompressed TFRecord file.

    Args:
      path: of the file.

    Returns:
      Its records, at most one more than TF Serving takes.

    Raises:
      tf.errors.OpError: another format, or damaged.
    """
    return list(tf.data.TFRecordDataset(str(path)).take(MAX_WARMUP_RECORDS + 1).as_numpy_iterator())
