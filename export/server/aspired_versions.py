"""Aspired versions: those that a servable directory says should be served, as TF Serving calls them.

models.config names them; without it they are every model's newest version.
"""

from __future__ import annotations

import dataclasses
import pathlib

from tensorflow_serving.config import model_server_config_pb2

from clsd_tf.serving.versions import versions_on_disk
from export.publishing.models_config import CONFIG_FILE, loaded_versions, parse_models_config


@dataclasses.dataclass(frozen=True, eq=False)
class AspiredVersions:
    """Aspired versions of one model.

    Attributes:
      entry: of models.config: the name, which versions to serve, and their labels; the newest one by default.
      path: the local directory of its versions.
    """

    entry: model_server_config_pb2.ModelConfig
    path: pathlib.Path

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def labels(self) -> dict[str, int]:
        return dict(self.entry.version_labels)

    def versions(self) -> dict[int, pathlib.Path]:
        """Aspired versions that are on disk: number -> directory."""
        found = versions_on_disk(self.path)
        return {number: found[number] for number in sorted(loaded_versions(self.entry, found))}


def read_aspired_versions(servable_dir: pathlib.Path) -> list[AspiredVersions] | None:
    """Reads models.config, or lists the directories of numbered versions.

    Args:
      servable_dir: holds models.config, or one directory per model.

    Returns:
      Those of each model; None for an empty models.config, upon which TF Serving takes no action (server_core.cc).

    Raises:
      FileNotFoundError: no such directory.
      ValueError: models.config is not a ModelServerConfig text proto, or breaks a rule of TF Serving.
    """
    if not servable_dir.is_dir():
        raise FileNotFoundError(f"--servable_dir must be a directory. Received: {servable_dir}")
    file = servable_dir / CONFIG_FILE
    if file.is_file():
        return _read_config(file)
    children = sorted(child for child in servable_dir.iterdir() if not child.name.startswith("."))
    return [
        AspiredVersions(model_server_config_pb2.ModelConfig(name=child.name), child)
        for child in children
        if versions_on_disk(child)
    ]


def _read_config(file: pathlib.Path) -> list[AspiredVersions] | None:
    config = parse_models_config(file.read_text(encoding="utf-8"), file)
    if config.WhichOneof("config") is None:
        return None
    entries = config.model_config_list.config
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise ValueError(f"{CONFIG_FILE} must name each model once. Received: {names}")
    return [_aspired(entry, file.parent) for entry in entries]


def _aspired(entry: model_server_config_pb2.ModelConfig, servable_dir: pathlib.Path) -> AspiredVersions:
    if not entry.name or entry.model_platform != "tensorflow":
        raise ValueError(
            f'{CONFIG_FILE} must give each model a name and model_platform: "tensorflow". '
            f"Received: name {entry.name!r}, model_platform {entry.model_platform!r}"
        )
    # base_path is where a container would see the model; here its last part is a directory beside models.config.
    directory = pathlib.PurePosixPath(entry.base_path).name
    if directory in ("", ".."):
        raise ValueError(f"the base_path of a model ends in its directory. Received: {entry.base_path!r}")
    return AspiredVersions(entry, servable_dir / directory)
