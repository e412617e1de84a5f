"""The feature spec: what a data set contains, declared once in YAML and read by every stage.

Strict, frozen pydantic models; no TensorFlow. Labels, weights, event time and keys are other types than features, so
they cannot become a model input. ``FeatureSpec.model_inputs`` is what a backbone may see.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
import yaml

from clsd_tf.model_inputs import (
    OTHER_GROUP,
    RECORD_FIELDS,
    UNKNOWN_GROUP,
    CategoricalInput,
    GroupInput,
    ModelInputs,
    RawInput,
)

Name = Annotated[str, pydantic.Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
_COMPARISON = re.compile(r"^\s*([A-Za-z]\w*)\s*(>=|<=|==|!=|>|<)\s*(-?\d+(?:\.\d+)?|'[^']*')\s*$")


class SpecError(ValueError):
    """A feature spec that breaks a rule; the message names the key, what was received and what is allowed."""


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)


class Column(_Model):
    """One column of a source table.

    Attributes:
      name: the name used in the rest of the spec and in serving requests.
      type: how the text is read. Unparsable values make the row a bad row.
      source_name: the column's name in the file, when it differs.
    """

    name: Name
    type: Literal["string", "int64", "float"]
    source_name: str | None = None

    @property
    def name_in_file(self) -> str:
        return self.source_name or self.name


class Table(_Model):
    """A source table: ``path`` is relative to the input directory and may be a glob pattern.

    ``key`` is the unique key that joins a user or item table to the log; the log has none.
    """

    path: str
    format: Literal["csv", "tsv", "jsonl", "parquet", "tfds"]
    columns: tuple[Column, ...] = pydantic.Field(min_length=1)
    key: Name | None = None

    @property
    def column_names(self) -> list[str]:
        return [column.name for column in self.columns]

    def column(self, name: str) -> Column:
        return next(column for column in self.columns if column.name == name)


class Tables(_Model):
    log: Table
    user: Table | None = None
    item: Table | None = None

    def items(self) -> list[tuple[str, Table]]:
        """The declared tables as (role, table)."""
        roles = (("log", self.log), ("user", self.user), ("item", self.item))
        return [(role, table) for role, table in roles if table is not None]


class EventTime(_Model):
    """Where an event's time stands. Rows outside [earliest, latest) are bad rows: mostly a wrong ``unit``."""

    column: Name
    unit: Literal["seconds", "milliseconds", "microseconds"]
    earliest: dt.date = dt.date(1990, 1, 1)
    latest: dt.date = dt.date(2100, 1, 1)

    @property
    def microseconds_per_unit(self) -> int:
        return {"seconds": 1_000_000, "milliseconds": 1_000, "microseconds": 1}[self.unit]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """``column operator value``, for example ``rating >= 4``."""

    column: str
    operator: str
    value: float | str

    @classmethod
    def parse(cls, expression: str) -> Comparison:
        match = _COMPARISON.match(expression)
        if match is None:
            raise ValueError(
                f"a label is `column operator value`. Received: {expression!r}. Allowed operators: >= <= == != > <; "
                "allowed values: a number or 'text' in single quotes, for example `rating >= 4`"
            )
        column, operator, value = match.groups()
        return cls(column, operator, value[1:-1] if value.startswith("'") else float(value))


class Split(_Model):
    """How rows become train, validation and test.

    ``rule: time`` cuts the event-time axis, either at quantiles (``train``, ``validation``, ``test`` fractions) or at
    the given dates; a row never trains a model that is tested on an earlier one. ``rule: random`` draws each row
    independently; it flatters every model (the future leaks into training) and exists for comparison only.
    """

    rule: Literal["time", "random"] = "time"
    train: float = pydantic.Field(0.8, gt=0, lt=1)
    validation: float = pydantic.Field(0.1, gt=0, lt=1)
    test: float = pydantic.Field(0.1, gt=0, lt=1)
    validation_from: dt.datetime | None = None
    test_from: dt.datetime | None = None
    seed: int = pydantic.Field(0, ge=0)

    @pydantic.model_validator(mode="after")
    def _check(self) -> Split:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-9:
            raise ValueError(f"train + validation + test must be 1. Received: {total:g}")
        if (self.validation_from is None) != (self.test_from is None):
            raise ValueError("validation_from and test_from go together. Received: one of them")
        if self.validation_from and self.rule == "random":
            raise ValueError("cut-off dates need rule: time. Received: rule: random")
        if self.validation_from and self.test_from <= self.validation_from:
            raise ValueError(
                f"test_from must be after validation_from. Received: {self.test_from} <= {self.validation_from}"
            )
        return self


class Vocabulary(_Model):
    """Ids by frequency in the training split: 0 missing, then ``num_oov_indices`` ids, then values by count.

    Attributes:
      min_count: a value seen less often in training is out of vocabulary.
      max_size: keep at most this many values.
      num_oov_indices: out-of-vocabulary values are hashed into this many ids.
    """

    min_count: int = pydantic.Field(1, ge=1)
    max_size: int | None = pydantic.Field(None, ge=1)
    num_oov_indices: int = pydantic.Field(1, ge=1)


class _Categorical(_Model):
    name: Name
    column: Name
    vocabulary: Vocabulary | None = None
    hash_buckets: int | None = pydantic.Field(None, ge=1)

    @pydantic.model_validator(mode="after")
    def _one_encoding(self):
        if self.vocabulary and self.hash_buckets:
            raise ValueError("give vocabulary or hash_buckets. Received: both")
        return self

    @property
    def resolved_vocabulary(self) -> Vocabulary | None:
        """The vocabulary's rule, or None when values are hashed."""
        return None if self.hash_buckets else self.vocabulary or Vocabulary()


class CategoricalFeature(_Categorical):
    """One value -> one id, by vocabulary (default) or by hash."""

    type: Literal["categorical"]


class MultiValuedFeature(_Categorical):
    """Text with separated values -> the first ``max_values`` ids, padded with 0; pooled by their mean embedding."""

    type: Literal["multi_valued"]
    separator: str = pydantic.Field(min_length=1)
    max_values: int = pydantic.Field(8, ge=1)


class NumericFeature(_Model):
    """A number: ``log1p`` first, then ``scaling`` by statistics of the training split; missing = training mean.

    ``quantile_buckets`` turns the number into an id (0 = missing) with ``num_buckets`` buckets of equal mass.
    """

    type: Literal["numeric"]
    name: Name
    column: Name
    log1p: bool = False
    scaling: Literal["none", "standardise", "min_max", "quantile_buckets"] = "standardise"
    num_buckets: int = pydantic.Field(10, ge=2)


class HistoryFeature(_Model):
    """The user's last ``max_length`` values of the categorical feature ``of`` strictly before the event, oldest first.

    Shares the vocabulary (and so the embedding table) of ``of``. In a serving request it is a list of values.
    """

    type: Literal["history"]
    name: Name
    of: Name
    max_length: int = pydantic.Field(20, ge=1)


Feature = Annotated[
    CategoricalFeature | MultiValuedFeature | NumericFeature | HistoryFeature, pydantic.Field(discriminator="type")
]


class UserGroup(_Model):
    """A user-profile attribute that AdGate reads and every report is sliced by.

    Ids: 0 unknown; then one id per interval of ``boundaries`` ([b0, b1), ...) or per entry of ``values``, then other.
    """

    name: Name
    column: Name
    boundaries: tuple[float, ...] | None = pydantic.Field(None, min_length=1)
    values: tuple[str, ...] | None = pydantic.Field(None, min_length=1)

    @pydantic.model_validator(mode="after")
    def _check(self) -> UserGroup:
        if (self.boundaries is None) == (self.values is None):
            raise ValueError("a user group has either boundaries (numbers) or values (text). Received: both or none")
        if self.boundaries and list(self.boundaries) != sorted(set(self.boundaries)):
            raise ValueError(f"boundaries must increase. Received: {list(self.boundaries)}")
        if self.values and len(set(self.values)) != len(self.values):
            raise ValueError(f"values must differ. Received: {list(self.values)}")
        return self

    @property
    def labels(self) -> tuple[str, ...]:
        """A readable label per id."""
        if self.values is not None:
            return (UNKNOWN_GROUP, *self.values, OTHER_GROUP)
        edges = [f"{edge:g}" for edge in self.boundaries]
        between = [f"{low}-{high}" for low, high in zip(edges, edges[1:], strict=False)]
        return (UNKNOWN_GROUP, f"<{edges[0]}", *between, f">={edges[-1]}")


class FeatureSpec(_Model):
    """A data set: its tables, its label, its split, its features and its user groups.

    Attributes:
      label: what a click is, for example ``rating >= 4``.
      intensity_label: optional stronger signal, held out from training, to judge click confidence with.
      sample_weight: optional column of weights >= 0.
    """

    name: Name
    description: str = ""
    tables: Tables
    user_key: Name
    item_key: Name
    event_time: EventTime
    label: str
    intensity_label: str | None = None
    sample_weight: Name | None = None
    split: Split = Split()
    features: tuple[Feature, ...] = pydantic.Field(min_length=1)
    user_groups: tuple[UserGroup, ...] = ()

    @pydantic.model_validator(mode="after")
    def _check(self) -> FeatureSpec:
        self._check_columns()
        self._check_names()
        self._check_uses()
        self._check_groups()
        return self

    def _check_columns(self) -> None:
        seen: dict[str, str] = {}
        for role, table in self.tables.items():
            self._check_key(role, table)
            for name in table.column_names:
                if name in seen and not (role != "log" and name == table.key and seen[name] == "log"):
                    raise ValueError(f"column names must be unique across tables. Received: {name!r} in {seen[name]} and {role}")
                seen.setdefault(name, role)
        for key in ("user_key", "item_key"):
            if getattr(self, key) not in self.tables.log.column_names:
                raise ValueError(_not_a_column(key, getattr(self, key), self.tables.log.column_names))

    def _check_key(self, role: str, table: Table) -> None:
        expected = {"log": None, "user": self.user_key, "item": self.item_key}[role]
        if table.key != expected:
            raise ValueError(f"tables.{role}.key must be {expected!r}. Received: {table.key!r}")
        if expected is not None and expected not in table.column_names:
            raise ValueError(_not_a_column(f"tables.{role}.key", expected, table.column_names))
        if role != "log" and table.format == "tfds":
            raise ValueError(f"only the log may have format tfds. Received: tables.{role}.format: tfds")

    def _check_names(self) -> None:
        names = [feature.name for feature in self.features] + [group.name for group in self.user_groups]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"feature and user group names must be unique. Received: {name!r} twice")
            if name in RECORD_FIELDS:
                raise ValueError(f"{', '.join(RECORD_FIELDS)} are reserved. Received: a feature named {name!r}")

    def _check_uses(self) -> None:
        columns = list(self.column_types)
        for what, name in self._column_uses():
            if name not in columns:
                raise ValueError(_not_a_column(what, name, columns))
        held_out = {use: name for use, name in self._column_uses() if use in ("label", "intensity_label", "sample_weight", "event_time")}
        for feature in (*self.features, *self.user_groups):
            for use, name in held_out.items():
                if getattr(feature, "column", None) == name:
                    raise ValueError(
                        f"a column used as {use} cannot be a model input. Received: {name!r} in {feature.name!r}"
                    )
        self._check_types()

    def _column_uses(self) -> list[tuple[str, str]]:
        uses = [("label", self.label_comparison.column), ("event_time", self.event_time.column)]
        if self.intensity_label:
            uses.append(("intensity_label", self.intensity_comparison.column))
        if self.sample_weight:
            uses.append(("sample_weight", self.sample_weight))
        inputs = [feature for feature in (*self.features, *self.user_groups) if not isinstance(feature, HistoryFeature)]
        return uses + [(feature.name, feature.column) for feature in inputs]

    def _check_types(self) -> None:
        types = self.column_types
        if types[self.event_time.column] == "string":
            raise ValueError("the event time column must be int64 or float. Received: string")
        for feature in self.features:
            if isinstance(feature, HistoryFeature):
                self._check_history(feature)
            elif isinstance(feature, NumericFeature) == (types[feature.column] == "string"):
                if isinstance(feature, NumericFeature):
                    raise ValueError(f"numeric feature {feature.name!r} needs int64 or float. Received: string")
            elif not isinstance(feature, NumericFeature) and types[feature.column] == "float":
                raise ValueError(f"{feature.type} feature {feature.name!r} needs string or int64. Received: float")
        for use, comparison in (("label", self.label_comparison), ("intensity_label", self.intensity_comparison)):
            if comparison and isinstance(comparison.value, str) != (types[comparison.column] == "string"):
                raise ValueError(f"{use} compares a {types[comparison.column]} column with {comparison.value!r}")

    def _check_history(self, history: HistoryFeature) -> None:
        choices = [
            feature.name
            for feature in self.features
            if isinstance(feature, CategoricalFeature) and feature.column in self.tables.log.column_names
        ]
        if history.of not in choices:
            raise ValueError(
                f"history {history.name!r} needs a categorical feature of the log. Received: of={history.of!r}. Allowed: {choices}"
            )

    def _check_groups(self) -> None:
        profile = self.tables.user or self.tables.log
        allowed = [name for name in profile.column_names if name != self.item_key]
        for group in self.user_groups:
            if group.column not in allowed:
                raise ValueError(
                    f"user group {group.name!r} must be a user-profile column. Received: {group.column!r}. Allowed: {allowed}"
                )
            is_text = self.column_types[group.column] == "string"
            if is_text != (group.values is not None):
                raise ValueError(
                    f"user group {group.name!r}: text columns take values, numbers take boundaries. "
                    f"Received: column type {self.column_types[group.column]}"
                )

    @property
    def column_types(self) -> dict[str, str]:
        """Column name -> type, over all tables."""
        return {column.name: column.type for _, table in self.tables.items() for column in table.columns}

    @property
    def label_comparison(self) -> Comparison:
        return Comparison.parse(self.label)

    @property
    def intensity_comparison(self) -> Comparison | None:
        return Comparison.parse(self.intensity_label) if self.intensity_label else None

    @property
    def raw_inputs(self) -> tuple[RawInput, ...]:
        """What a serving request carries: the columns of features and user groups, and the histories."""
        inputs: dict[str, RawInput] = {}
        for feature in (*self.features, *self.user_groups):
            if isinstance(feature, HistoryFeature):
                inputs[feature.name] = RawInput(feature.name, "string", is_list=True)
            else:
                inputs.setdefault(feature.column, RawInput(feature.column, self.column_types[feature.column]))
        return tuple(inputs.values())

    @property
    def vocabularies(self) -> dict[str, Vocabulary]:
        """Name of each vocabulary (that of its feature) -> its rule."""
        features = [feature for feature in self.features if isinstance(feature, _Categorical)]
        return {feature.name: feature.resolved_vocabulary for feature in features if feature.resolved_vocabulary}

    def feature(self, name: str) -> Feature:
        return next(feature for feature in self.features if feature.name == name)

    def model_inputs(self, vocabulary_lengths: Mapping[str, int]) -> ModelInputs:
        """What models see, given the number of values in each vocabulary."""
        categorical = [self._categorical_input(feature, vocabulary_lengths) for feature in self.features]
        numeric = [feature.name for feature in self.features if isinstance(feature, NumericFeature)]
        bucketised = {entry.name for entry in categorical if entry}
        return ModelInputs(
            categorical=tuple(entry for entry in categorical if entry),
            numeric=tuple(name for name in numeric if name not in bucketised),
            groups=tuple(GroupInput(group.name, group.labels) for group in self.user_groups),
        )

    def _categorical_input(self, feature: Feature, lengths: Mapping[str, int]) -> CategoricalInput | None:
        if isinstance(feature, HistoryFeature):
            of = self._categorical_input(self.feature(feature.of), lengths)
            return CategoricalInput(feature.name, of.vocabulary, of.vocabulary_size, feature.max_length)
        if isinstance(feature, NumericFeature):
            is_id = feature.scaling == "quantile_buckets"
            return CategoricalInput(feature.name, feature.name, 1 + feature.num_buckets) if is_id else None
        rule = feature.resolved_vocabulary
        size = 1 + (feature.hash_buckets if rule is None else rule.num_oov_indices + lengths[feature.name])
        max_values = feature.max_values if isinstance(feature, MultiValuedFeature) else None
        return CategoricalInput(feature.name, feature.name, size, max_values)

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, defaults written out."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify the spec's content."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def parse_spec(content: Mapping[str, Any], source: str) -> FeatureSpec:
    """Builds a spec from YAML content. ``source`` is named in errors.

    Raises:
      SpecError: names each offending key's path, what was received and, for an unknown key, the allowed keys.
    """
    try:
        # JSON mode keeps strictness and still reads YAML lists as tuples and text as dates.
        return FeatureSpec.model_validate_json(json.dumps(content, default=str))
    except pydantic.ValidationError as error:
        raise SpecError(explain_validation_error(error, FeatureSpec, source)) from error


def load_spec(path: str | pathlib.Path) -> FeatureSpec:
    """Reads a spec from a YAML file.

    Raises:
      FileNotFoundError: no such file.
      SpecError: the file is not YAML, or breaks a rule of the spec.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"a feature spec is a YAML file. Received: {path}, which does not exist")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise SpecError(f"{path}: a feature spec is a mapping of keys. Received: {type(content).__name__}")
    return parse_spec(content, str(path))


def explain_validation_error(error: pydantic.ValidationError, model: type[pydantic.BaseModel], source: str) -> str:
    """One line per problem: the key's path, the rule, ``Received`` and, for unknown keys, what is allowed."""
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"]) or "(whole spec)"
        if problem["type"] == "extra_forbidden":
            allowed = ", ".join(_allowed_keys(model, problem["loc"][:-1]))
            lines.append(f"{path}: unknown key. Received: {problem['loc'][-1]!r}. Allowed: {allowed}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            received = "" if "Received" in message or isinstance(problem["input"], dict) else f". Received: {problem['input']!r}"
            lines.append(f"{path}: {message}{received}")
    return f"{source} is not valid:\n  " + "\n  ".join(lines)


def _allowed_keys(model: Any, location: tuple[Any, ...]) -> list[str]:
    """The keys allowed at ``location``, found by walking the JSON schema."""
    schema = model.model_json_schema(by_alias=True)
    definitions = schema.get("$defs", {})

    def resolve(node: dict[str, Any]) -> dict[str, Any]:
        while True:
            if "$ref" in node:
                node = definitions[node["$ref"].rsplit("/", 1)[-1]]
            elif "anyOf" in node:
                node = next(option for option in node["anyOf"] if option.get("type") != "null")
            elif "allOf" in node:
                node = node["allOf"][0]
            else:
                return node

    node = resolve(schema)
    for part in location:
        if isinstance(part, int):
            node = resolve(node["items"])
        elif part in node.get("properties", {}):
            node = resolve(node["properties"][part])
        else:  # The tag of a discriminated union stands in the path behind the list index.
            node = resolve({"$ref": node["discriminator"]["mapping"][part]})
    return sorted(node["properties"])


def _not_a_column(what: str, name: str, allowed: list[str]) -> str:
    return f"{what} must be a declared column. Received: {name!r}. Allowed: {', '.join(allowed)}"
