"""models.config, the text file that TF Serving takes as --model_config_file: one entry changed, all others kept."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Mapping

from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

from clsd_tf.storage.files import write_text

CONFIG_FILE = "models.config"
_SERVING_BASE_PATH = "/models"  # Where TF Serving's containers look.
_TEXT_OR_COMMENT = re.compile(r""""(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|#[^\n]*""")


class ModelsConfig:
    """A models.config in memory; absent files are empty ones.

    Comments of the first lines are kept; a change of a file with other comments is refused, since they would be lost.

    Args:
      path: the file. Whoever writes holds the lock of its directory from reading to writing.

    Raises:
      ValueError: not a text ModelServerConfig with a model_config_list.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        header = re.match(r"(?:[ \t]*(?:#[^\n]*)?\n)*", text)
        self._header = header[0] if header else ""
        self._body = text[len(self._header) :]
        self._read = parse_models_config(text, path)
        self._config = parse_models_config(text, path)

    def knows(self, name: str) -> bool:
        """Returns whether the model ``name`` has an entry."""
        return any(entry.name == name for entry in self._config.model_config_list.config)

    def entry(self, name: str) -> model_server_config_pb2.ModelConfig:
        """Finds the entry of a model, to read or to change.

        Args:
          name: of the model.

        Returns:
          The message itself, not a copy.

        Raises:
          ValueError: no entry of that name, or several.
        """
        found = [entry for entry in self._config.model_config_list.config if entry.name == name]
        if len(found) != 1:
            raise ValueError(
                f"{self.path} must have one entry for the model. Received: {len(found)} for {name!r}. "
                "Allowed: a model that python -m export.main has published there"
            )
        return found[0]

    def set_model(self, name: str, serving_base_path: str | None) -> None:
        """Adds a model, or changes where the server finds it.

        Args:
          name: of the model and of its directory.
          serving_base_path: where the server sees the servable directory; None leaves an entry as it is, and means
            /models for a new one.

        Raises:
          ValueError: several entries, or one that leads to another directory and would be left so.
        """
        entries = self._config.model_config_list.config
        entry = self.entry(name) if self.knows(name) else entries.add(name=name)
        if serving_base_path is not None or not entry.base_path:
            entry.base_path = f"{(serving_base_path or _SERVING_BASE_PATH).rstrip('/')}/{name}"
        entry.model_platform = "tensorflow"
        if _directory_of(entry) != name:
            raise ValueError(
                f"{self.path}: the base_path of a model ends in its name. Received: {entry.base_path} for {name!r}, "
                "where an export would not be seen. Mend it, or say --serving_base_path"
            )

    def versions_in_use(self, directory_name: str, published: Iterable[int]) -> set[int]:
        """Finds versions of a directory that the server loads or that a label names, by whatever entry.

        Args:
          directory_name: of the model.
          published: versions in it.

        Returns:
          Numbers; those of labels need not be published.
        """
        entries = self._config.model_config_list.config
        readers = [entry for entry in entries if _directory_of(entry) == directory_name]
        published = list(published)
        return {version for x in readers for version in (*loaded_versions(x, published), *x.version_labels.values())}

    def text(self) -> str | None:
        """Text to write, None if nothing has changed.

        Raises:
          ValueError: comments would be lost.
        """
        if self._config == self._read:
            return None
        if any(token.startswith("#") for token in _TEXT_OR_COMMENT.findall(self._body)):
            raise ValueError(
                f"comments in the middle of a {CONFIG_FILE} would be lost. Received: {self.path}. "
                "Allowed: comments above everything else. Move them there"
            )
        return self._header + text_format.MessageToString(self._config)

    def write(self) -> None:
        """Writes a changed config; a server that polls never sees half of it."""
        if (text := self.text()) is not None:
            write_text(self.path, text)


def parse_models_config(text: str, path: pathlib.Path) -> model_server_config_pb2.ModelServerConfig:
    """Parses a models.config.

    Args:
      text: its text.
      path: of the file, for errors.

    Returns:
      The message; one without any field if the text is empty.

    Raises:
      ValueError: not a text ModelServerConfig with a model_config_list.
    """
    try:
        config = text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    except text_format.ParseError as error:
        raise ValueError(f"{path} must be a ModelServerConfig text proto. Received: {error}. Mend it") from error
    if config.WhichOneof("config") == "custom_model_config":
        raise ValueError(f"{path} must list models. Received: custom_model_config. Allowed: model_config_list")
    return config


def _directory_of(entry: model_server_config_pb2.ModelConfig) -> str:
    """The name of the model's directory, which is the same for the server and here."""
    return pathlib.PurePosixPath(entry.base_path).name


def require_room_for(path: pathlib.Path, name: str, serving_base_path: str | None) -> None:
    """Refuses a models.config to which the model could not be added, before any work is done.

    Args:
      path: the file; need not exist.
      name: of the model.
      serving_base_path: as ``ModelsConfig.set_model`` takes it.

    Raises:
      ValueError: as ``ModelsConfig`` and its ``set_model``.
    """
    config = ModelsConfig(path)
    config.set_model(name, serving_base_path)
    config.text()


def loaded_versions(entry: model_server_config_pb2.ModelConfig, published: Iterable[int]) -> set[int]:
    """Applies the version policy of an entry; by default the largest version is loaded.

    Args:
      entry: of a model.
      published: versions on disk.

    Returns:
      Those that the server loads.
    """
    ascending = sorted(published)
    policy = entry.model_version_policy
    choice = policy.WhichOneof("policy_choice")
    if choice == "specific":
        return set(ascending) & set(policy.specific.versions)
    return set(ascending) if choice == "all" else set(ascending[-max(policy.latest.num_versions, 1) :])


def set_versions(
    entry: model_server_config_pb2.ModelConfig, versions: Iterable[int], labels: Mapping[str, int]
) -> None:
    """Has the server load these versions and give them these labels.

    Args:
      entry: of the model; changed.
      versions: to load.
      labels: label -> version.
    """
    entry.model_version_policy.Clear()
    entry.model_version_policy.specific.versions.extend(sorted(versions))
    entry.version_labels.clear()
    entry.version_labels.update(sorted(labels.items()))
