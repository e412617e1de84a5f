"""The comparison that a study makes, declared in one YAML file."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pydantic

from clsd_tf.backbones import require_backbone
from clsd_tf.methods import DEFAULT_METHOD
from clsd_tf.spec.tables import Name
from clsd_tf.spec.validation import SpecError, StrictModel, explain_validation_error, parse_yaml_mapping
from clsd_tf.study.cells import BASELINE, Cell, StudyRow, cell_config, known_rows, merged_settings, with_placebos
from clsd_tf.training.config_of_0_1 import converted
from pipelines.public_data.feed import FeedConfig

_STUDIES = pathlib.Path(__file__).parent
_Settings = Annotated[dict[str, Any], pydantic.AfterValidator(converted)]


class StudyData(StrictModel):
    """A data set of a study: a feature spec and where its tables come from.

    Attributes:
      name: what tables call it.
      spec: name or path of a feature spec; without one, the data set is whatever ``--dataset_dir`` gives for it.
      fetch: downloads the tables of this public data set.
      simulate: writes the tables of this simulated feed; each seed of the study simulates with its own seed.
      input: name of the directory with the tables, given by ``--input_dir=<input>=<path>``; by default ``name``.
      split: replaces these settings of the spec's split.
      shared: training settings for all runs on this data set; those under ``method`` are for rows of that method.
    """

    name: Name
    spec: str | None = None
    fetch: Literal["movielens_100k"] | None = None
    simulate: FeedConfig | None = None
    input: Name | None = None
    split: _Settings = pydantic.Field(default_factory=dict)
    shared: _Settings = pydantic.Field(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _check(self) -> StudyData:
        if sum(source is not None for source in (self.fetch, self.simulate, self.input)) > 1:
            raise ValueError("give one of fetch, simulate and input. Received: more than one")
        if self.spec is None and (self.fetch or self.simulate or self.input or self.split):
            raise ValueError("tables and a split need a spec. Received: none. Add spec: <name or path>")
        return self


class _Variant(StrictModel):
    name: Name
    set: _Settings = pydantic.Field(default_factory=dict)


class StudyBackbone(_Variant):
    """A backbone under a name of its own; ``set`` changes training settings (``backbone``, ``backbone_arguments``)."""


class StudyMethod(_Variant):
    """A method under a name of its own: what ``like`` changes, then ``set``."""

    like: str = BASELINE


class Grid(StrictModel):
    """Every combination of data, backbones and methods, over the study's seeds: one table.

    Attributes:
      title: heading of the table.
      data: names of declared data sets.
      backbones: names in the registry, or of declared backbones.
      methods: names of known or declared methods; bce and the placebos come by themselves.
      baseline: the method of the table that all others are compared with.
      seeds: number of paired seeds, instead of the study's.
    """

    title: str
    data: tuple[str, ...] = pydantic.Field(min_length=1)
    backbones: tuple[str, ...] = ("deepfm",)
    methods: tuple[str, ...] = pydantic.Field(min_length=1)
    baseline: str = BASELINE
    seeds: int | None = pydantic.Field(None, ge=1)


class StudyConfig(StrictModel):
    """A study: what ``pipelines.study`` runs.

    Attributes:
      seeds: number of paired seeds: 1, 2, ...
      split: the split that is measured. Hyper-parameters are never chosen on it.
      shared: training settings for all runs; those under ``method`` are for rows of the method that it names.
      data, backbones, methods: declarations that grids refer to by name.
      grids: the tables.
    """

    seeds: int = pydantic.Field(5, ge=1)
    split: Literal["train", "validation", "test"] = "test"
    shared: _Settings = pydantic.Field(default_factory=dict)
    data: tuple[StudyData, ...] = pydantic.Field(min_length=1)
    backbones: tuple[StudyBackbone, ...] = ()
    methods: tuple[StudyMethod, ...] = ()
    grids: tuple[Grid, ...] = pydantic.Field(min_length=1)

    @pydantic.model_validator(mode="after")
    def _check(self) -> StudyConfig:
        for declared in (self.data, self.backbones, self.methods):
            names = [entry.name for entry in declared]
            repeated = {name for name in names if names.count(name) > 1}
            if repeated:
                raise ValueError(f"names must be unique. Received: {', '.join(sorted(repeated))} twice")
        known = [entry.name for entry in self.data]
        taken = [entry.name for entry in self.methods if entry.name in known_rows()]
        if taken:
            raise ValueError(f"a declared method needs a name of its own. Received: {taken[0]!r}, which is a known one")
        unknown = [name for grid in self.grids for name in grid.data if name not in known]
        if unknown:
            raise ValueError(f"a grid's data must be declared. Received: {unknown[0]!r}. Allowed: {', '.join(known)}")
        return self

    def data_set(self, name: str) -> StudyData:
        """Finds a data set by its ``name``, which must be a declared one.

        Returns:
          Its declaration.
        """
        return next(entry for entry in self.data if entry.name == name)

    def row(self, name: str) -> StudyRow:
        """Finds the row ``name``: a declared method, or a known one.

        Returns:
          Name and what it changes in the shared config.

        Raises:
          SpecError: neither, or it sets what its method does not have.
        """
        declared = {entry.name: entry for entry in self.methods}
        if name not in declared:
            return StudyRow(name, self._known_changes(name))
        entry = declared[name]
        changes, own = self._known_changes(entry.like), entry.set.get("method", {})
        named = own.get("name", DEFAULT_METHOD if own else changes["method"]["name"])
        if "name" not in own and named != changes["method"]["name"]:
            raise SpecError(
                f"method {name!r} sets {', '.join(sorted(own))} of method {named}, but is like {entry.like}, of method "
                f"{changes['method']['name']}. Add like: global, local or both, or set method.name"
            )
        return StudyRow(name, merged_settings(changes, entry.set))

    def _known_changes(self, name: str) -> dict[str, Any]:
        known = known_rows()
        if name not in known:
            raise SpecError(f"unknown method. Received: {name!r}. Allowed: {', '.join(known)}, or a declared one")
        return dict(known[name])

    def backbone(self, name: str) -> dict[str, Any]:
        """Finds the backbone ``name``: a declared one, or one in the registry.

        Returns:
          Its settings.

        Raises:
          ValueError: neither.
        """
        declared = {entry.name: dict(entry.set) for entry in self.backbones}
        settings = declared.get(name, {"backbone": name})
        require_backbone(settings.get("backbone", name))
        return settings

    def cells(self, grid: Grid) -> Iterator[Cell]:
        """Makes the runs of a ``grid``.

        Yields:
          Cells, those of ``bce`` first.

        Raises:
          SpecError: unknown method or baseline, or a setting out of range.
        """
        names = dict.fromkeys((BASELINE, *grid.methods))
        for data in grid.data:
            shared = merged_settings(self.shared, self.data_set(data).shared)
            rows = with_placebos([self.row(name) for name in names], shared)
            known = [row.name for row in rows]
            if grid.baseline not in known:
                raise SpecError(
                    f"grid {grid.title!r}: the baseline must be one of its methods. Received: {grid.baseline!r}. "
                    f"Allowed: {', '.join(known)}"
                )
            for backbone in grid.backbones:
                for row in rows:
                    for seed in range(1, (grid.seeds or self.seeds) + 1):
                        config = cell_config(shared, row, self.backbone(backbone), seed)
                        yield Cell(data, backbone, row.name, seed, config)


def study_names() -> list[str]:
    """Names of the studies that come with the package."""
    return sorted(path.stem for path in _STUDIES.glob("*.yaml"))


def load_study(name_or_path: str) -> StudyConfig:
    """Reads a study.

    Args:
      name_or_path: of one that comes with the package, or of a YAML file.

    Returns:
      The study.

    Raises:
      ValueError: neither a known name nor an existing file.
      SpecError: the file is not YAML, or breaks a rule.
    """
    path = _STUDIES / f"{name_or_path}.yaml" if name_or_path in study_names() else pathlib.Path(name_or_path)
    if not path.is_file():
        raise ValueError(
            f"a study is a name or the path of a YAML file. Received: {name_or_path!r}. "
            f"Known names: {', '.join(study_names())}"
        )
    return parse_study(parse_yaml_mapping(path.read_text(encoding="utf-8"), str(path)), str(path))


def parse_study(content: dict[str, Any], source: str) -> StudyConfig:
    """Checks a study.

    Args:
      content: as from YAML.
      source: what errors call it.

    Returns:
      The study, with defaults.

    Raises:
      SpecError: it breaks a rule; says what is allowed.
    """
    try:
        return StudyConfig.model_validate_json(json.dumps(content, default=str))
    except pydantic.ValidationError as error:
        raise SpecError(explain_validation_error(error, StudyConfig, source)) from error
