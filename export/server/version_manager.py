"""Versions that take requests: loads the aspired ones, and never lets go of a version that still answers."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import threading
from collections.abc import Callable, Iterator, Set
from typing import Generic, TypeVar

import grpc
from absl import logging
from tensorflow_serving.apis import get_model_status_pb2, model_pb2

from export.publishing.models_config import CONFIG_FILE
from export.server.aspired_versions import AspiredVersions, read_aspired_versions
from export.server.errors import RequestError, invalid_argument

State = get_model_status_pb2.ModelVersionStatus.State
V = TypeVar("V")


@dataclasses.dataclass(frozen=True)
class VersionState:
    """State of a version, as GetModelStatus tells it.

    Attributes:
      state: a value of ModelVersionStatus.State.
      error: "" unless the version could not be loaded.
    """

    state: int
    error: str = ""


@dataclasses.dataclass(eq=False)
class _Served(Generic[V]):
    version: V
    in_flight: int = 0
    is_retired: bool = False


class VersionManager(Generic[V]):
    """Versions in memory, kept as the servable directory says.

    One thread calls `poll`; requests call the rest from any thread.

    Args:
      servable_dir: holds models.config, or one directory per model.
      load: makes a version of its directory and the model's name; slow, and may raise anything.
    """

    def __init__(self, servable_dir: pathlib.Path, load: Callable[[pathlib.Path, str], V]):
        self._servable_dir = servable_dir
        self._load = load
        self._lock = threading.Lock()  # Of the next three.
        self._served: dict[str, dict[int, _Served[V]]] = {}
        self._labels: dict[str, dict[str, int]] = {}
        self._states: dict[str, dict[int, VersionState]] = {}
        self._broken: dict[tuple[str, int], frozenset] = {}  # What could not be loaded, as it was on disk.
        self._problems: set[str] = set()
        self._told: set[str] = set()
        self._is_stopped = False

    @contextlib.contextmanager
    def lease(self, spec: model_pb2.ModelSpec) -> Iterator[V]:
        """Lends the version that a request means, which is not unloaded meanwhile.

        Args:
          spec: the model, and a version's number or label; without, the largest loaded version is meant.

        Yields:
          The version.

        Raises:
          RequestError: NOT_FOUND, no such model or version; INVALID_ARGUMENT, no name or an unknown label.
        """
        with self._lock:
            number = self._number(spec)
            served = self._served[spec.name][number]
            served.in_flight += 1
        try:
            yield served.version
        finally:
            with self._lock:
                served.in_flight -= 1
                is_unloading = self._states[spec.name][number].state == State.UNLOADING  # Not loaded again meanwhile.
                if served.is_retired and not served.in_flight and is_unloading:
                    self._states[spec.name][number] = VersionState(State.END)

    def versions(self) -> dict[str, list[int]]:
        """Model -> versions that take requests."""
        with self._lock:
            return {name: sorted(served) for name, served in self._served.items() if served}

    def states(self, spec: model_pb2.ModelSpec) -> dict[int, VersionState]:
        """States of all versions of a model that were ever aspired, or of the one that the request means.

        Args:
          spec: the model, and a version's number or label.

        Returns:
          Version -> state, ascending.

        Raises:
          RequestError: as `lease`.
        """
        with self._lock:
            states = self._states.get(spec.name, {})
            choice = spec.WhichOneof("version_choice")
            if choice is None and states:
                return dict(sorted(states.items()))
            if choice == "version" and spec.version.value in states:
                return {spec.version.value: states[spec.version.value]}
            if choice == "version_label":
                number = self._number(spec)
                return {number: states[number]}
        version = f"version {spec.version.value}" if choice else "any versions"
        raise RequestError(grpc.StatusCode.NOT_FOUND, f"Could not find {version} of model {spec.name}")

    def _number(self, spec: model_pb2.ModelSpec) -> int:
        """The loaded version that a request means; with the lock."""
        if not spec.name:
            raise invalid_argument("a request must name its model. Received: a model_spec without a name")
        served = self._served.get(spec.name, {})
        choice = spec.WhichOneof("version_choice")
        if choice == "version_label":
            number = self._labels.get(spec.name, {}).get(spec.version_label)
            if number is None:  # TF Serving's code is this one, not NOT_FOUND (server_core.cc).
                raise invalid_argument(f"Unrecognized servable version label: {spec.version_label}")
            return number
        number = spec.version.value if choice else max(served, default=None)
        if number not in served:
            wanted = f"Specific({spec.name}, {number})" if choice else f"Latest({spec.name})"
            raise RequestError(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: {wanted}")
        return number

    def poll(self) -> None:
        """Compares the servable directory with what is loaded; loads, labels and retires versions.

        A new version is loaded before an old one retires. A broken version or models.config is logged and changes
        nothing.
        """
        self._told, self._problems = self._problems, set()
        try:
            models = read_aspired_versions(self._servable_dir)
            aspired = {model: model.versions() for model in models or ()}
        except (ValueError, OSError) as error:
            self._tell(f"the served models stay as they were: {error}")
            return
        if models is None:
            self._tell(f"the served models stay as they were: {CONFIG_FILE} is empty")
            return
        for model, versions in aspired.items():
            self._apply(model, versions.keys())  # Labels do not wait for versions that load.
            for number, path in versions.items():
                if number not in self._loaded(model.name) and not self._is_stopped:
                    self._try_to_load(model.name, number, path)
                    self._apply(model, versions.keys())
            self._tell_missing(model, versions.keys())
        for name in self.versions().keys() - {model.name for model in aspired}:
            self._publish(name, keep=set(), labels={})

    def stop(self) -> None:
        """Loads no further versions; from any thread."""
        self._is_stopped = True

    def _loaded(self, name: str) -> Set[int]:
        return self._served.get(name, {}).keys()

    def _try_to_load(self, name: str, number: int, path: pathlib.Path) -> None:
        try:
            on_disk = _files(path)
        except OSError:  # Say, it was deleted meanwhile; whatever is there at the next poll is tried.
            on_disk = frozenset()
        if self._broken.get((name, number)) == on_disk:
            return
        self._set_state(name, number, VersionState(State.LOADING))
        try:
            version = self._load(path, name)
        except Exception as error:  # A model may fail in any way, and the others go on.
            reason = str(error).replace(str(path), f"{name}/{number}") or type(error).__name__
            logging.error("version %d of model %r cannot be loaded; what is loaded goes on: %s", number, name, reason)
            self._broken[name, number] = on_disk
            self._set_state(name, number, VersionState(State.END, reason))
            return
        with self._lock:
            self._served.setdefault(name, {})[number] = _Served(version)
            self._states[name][number] = VersionState(State.AVAILABLE)
        logging.info("version %d of model %r takes requests", number, name)

    def _set_state(self, name: str, number: int, state: VersionState) -> None:
        with self._lock:
            self._states.setdefault(name, {})[number] = state

    def _apply(self, model: AspiredVersions, aspired: Set[int]) -> None:
        """Moves labels to versions that are loaded, and retires those that are no longer aspired."""
        loaded = set(self._loaded(model.name))
        before = self._labels.get(model.name, {})
        after = {label: number if number in loaded else before.get(label) for label, number in model.labels.items()}
        labels = {label: number for label, number in after.items() if number in loaded}
        # Nothing retires before an aspired version can take over.
        keep = aspired | set(labels.values()) if not aspired or aspired & loaded else loaded
        self._publish(model.name, keep, labels)

    def _publish(self, name: str, keep: Set[int], labels: dict[str, int]) -> None:
        with self._lock:
            self._labels[name] = labels
            served = self._served.get(name, {})
            retired = sorted(served.keys() - keep)
            for number in retired:
                one = served.pop(number)
                one.is_retired = True
                self._states[name][number] = VersionState(State.UNLOADING if one.in_flight else State.END)
        if retired:
            logging.info("versions %s of model %r retire", retired, name)

    def _tell_missing(self, model: AspiredVersions, found: Set[int]) -> None:
        if not found:
            self._tell(f"model {model.name!r} has no version to serve. Its versions are directories named by a number")
        for number in sorted(set(model.entry.model_version_policy.specific.versions) - found):
            self._tell(f"version {number} of model {model.name!r} is wanted, but not there")
        for label, number in model.labels.items():
            if number not in self._loaded(model.name):
                self._tell(f"label {label!r} of model {model.name!r} waits for version {number}, which is not loaded")

    def _tell(self, problem: str) -> None:
        """Logs a problem once, not at every poll."""
        if problem not in self._told | self._problems:
            logging.error("%s", problem)
        self._problems.add(problem)


def _files(path: pathlib.Path) -> frozenset:
    """Facts that tell a repaired version from the broken one."""
    stats = [(str(file), file.lstat()) for file in path.rglob("*")]
    return frozenset((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
