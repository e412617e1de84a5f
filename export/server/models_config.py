"""What a servable directory says should be served: models.config, or without it every model's newest version."""

from __future__ import annotations

import dataclasses
import pathlib

from google.protobuf import text_format
from tensorflow_serving.config import file_system_storage_path_source_pb2, model_server_config_pb2

CONFIG_FILE = "models.config"
VersionPolicy = file_system_storage_path_source_pb2.FileSystemStoragePathSourceConfig.ServableVersionPolicy


@dataclasses.dataclass(frozen=True, eq=False)
class WantedModel:
    """One model that should be served.

    Attributes:
      name: as requests give it.
      path: the local directory of its versions.
      policy: which of them to serve; the newest when not set.
      labels: label -> version.
    """

    name: str
    path: pathlib.Path
    policy: VersionPolicy
    labels: dict[str, int]

    def versions(self) -> dict[int, pathlib.Path]:
        """The versions on disk that the policy wants: number -> directory."""
        found = _versions_on_disk(self.path)
        if self.policy.HasField("all"):
            wanted = set(found)
        elif self.policy.HasField("specific"):
            wanted = set(self.policy.specific.versions) & found.keys()
        else:
            wanted = set(sorted(found)[-max(self.policy.latest.num_versions, 1) :])
        return {number: found[number] for number in sorted(wanted)}


def read_wanted_models(servable_dir: pathlib.Path) -> list[WantedModel]:
    """Reads models.config, or lists the directories of numbered versions.

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
    return [WantedModel(child.name, child, VersionPolicy(), {}) for child in children if _versions_on_disk(child)]


def _versions_on_disk(path: pathlib.Path) -> dict[int, pathlib.Path]:
    # As TF Serving: a child is a version if its whole name is a number. A temporary name is none.
    if not path.is_dir():
        return {}
    children = [child for child in path.iterdir() if child.name.isascii() and child.name.isdigit() and child.is_dir()]
    return {int(child.name): child for child in children if int(child.name) < 2**63}


def _read_config(file: pathlib.Path) -> list[WantedModel]:
    try:
        text = file.read_text(encoding="utf-8")
        config = text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise ValueError(f"{CONFIG_FILE} must be a ModelServerConfig text proto. Received: {error}") from error
    entries = config.model_config_list.config
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise ValueError(f"{CONFIG_FILE} must name each model once. Received: {names}")
    return [_wanted(entry, file.parent) for entry in entries]


def _wanted(entry: model_server_config_pb2.ModelConfig, servable_dir: pathlib.Path) -> WantedModel:
    if not entry.name or entry.model_platform != "tensorflow":
        raise ValueError(
            f'{CONFIG_FILE} must give each model a name and model_platform: "tensorflow". '
            f"Received: name {entry.name!r}, model_platform {entry.model_platform!r}"
        )
    # base_path is where a container would see the model; here its last part is a directory beside models.config.
    directory = pathlib.PurePosixPath(entry.base_path).name
    if directory in ("", ".."):
        raise ValueError(f"the base_path of a model ends in its directory. Received: {entry.base_path!r}")
    return WantedModel(entry.name, servable_dir / directory, entry.model_version_policy, dict(entry.version_labels))
