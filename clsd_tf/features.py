"""The feature spec: what a data set contains, declared once in YAML and read by every stage.

Strict, frozen pydantic models; no TensorFlow. Labels, weights, event time and keys are other types than features, so
they cannot become a model input. ``FeatureSpec.model_inputs`` is what a backbone may see.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import pydantic

from clsd_tf.feature_types import (
    CategoricalFeature,
    Feature,
    HistoryFeature,
    IdFeature,
    MultiValuedFeature,
    NumericFeature,
    UserGroup,
    Vocabulary,
)
from clsd_tf.model_inputs import RECORD_FIELDS, CategoricalInput, GroupInput, ModelInputs, RawInput
from clsd_tf.tables import Comparison, EventTime, Name, Split, Table, Tables
from clsd_tf.validation import SpecError, StrictModel, explain_validation_error, parse_yaml_mapping


class FeatureSpec(StrictModel):
    """A data set: its tables, its label, its split, its features and its user groups.

    Attributes:
      label: what a click is, for example ``rating >= 4``.
      intensity_label: optional stronger signal, held out from training, to judge click confidence with.
      intensity_value: optional numeric column of the log that grows with interest (seconds read), held out likewise.
      sample_weight: optional column of weights >= 0.
      user_id_salt_env: optional name of the environment variable that holds a secret salt. The user key of log and user
        table is then replaced by a salted hash as soon as it is read, so that no id stands in any file that is written.
        A serving request then carries the hashed id too: ``clsd_tf.hashing.hash_user_ids`` with the same salt.
    """

    name: Name
    description: str = ""
    tables: Tables
    user_key: Name
    item_key: Name
    event_time: EventTime
    label: str
    intensity_label: str | None = None
    intensity_value: Name | None = None
    sample_weight: Name | None = None
    user_id_salt_env: Name | None = None
    split: Split = Split()
    features: tuple[Feature, ...] = pydantic.Field(min_length=1)
    user_groups: tuple[UserGroup, ...] = ()

    @pydantic.model_validator(mode="after")
    def _check(self) -> FeatureSpec:
        self._check_names()
        self._check_columns()
        self._check_uses()
        self._check_raw_names()
        self._check_groups()
        return self

    def _check_columns(self) -> None:
        seen: dict[str, str] = {}
        for role, table in self.tables.items():
            self._check_key(role, table)
            for name in table.column_names:
                if name in seen and not (role != "log" and name == table.key and seen[name] == "log"):
                    raise ValueError(
                        f"column names must be unique across tables. Received: {name!r} in {seen[name]} and {role}"
                    )
                seen.setdefault(name, role)
        for key in ("user_key", "item_key"):
            if getattr(self, key) not in self.tables.log.column_names:
                raise ValueError(_not_a_column(key, getattr(self, key), self.tables.log.column_names))

    def _check_key(self, role: str, table: Table) -> None:
        expected = {"log": None, "user": self.user_key, "item": self.item_key}[role]
        if table.key != expected:
            raise ValueError(f"tables.{role}.key must be {expected!r}. Received: {table.key!r}")
        if expected is not None:
            self._check_key_column(role, expected, table)
        if role != "log" and table.format == "tfds":
            raise ValueError(f"only the log may have format tfds. Received: tables.{role}.format: tfds")

    def _check_key_column(self, role: str, key: str, table: Table) -> None:
        if key not in table.column_names:
            raise ValueError(_not_a_column(f"tables.{role}.key", key, table.column_names))
        log = self.tables.log
        if key in log.column_names and log.column(key).type != table.column(key).type:
            raise ValueError(
                f"{key} must have one type in all tables. "
                f"Received: {log.column(key).type} in log, {table.column(key).type} in {role}"
            )

    def _check_names(self) -> None:
        names = [feature.name for feature in self.features] + [group.name for group in self.user_groups]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"feature and user group names must be unique. Received: {name!r} twice")
            if name in RECORD_FIELDS:
                raise ValueError(f"{', '.join(RECORD_FIELDS)} are reserved. Received: a feature named {name!r}")

    def _check_raw_names(self) -> None:
        # Raw inputs stand beside the record's fields while rows are joined, and histories beside columns.
        for entry in self.raw_inputs:
            if entry.name in (*RECORD_FIELDS, "event_time", "ctr"):
                raise ValueError(
                    f"a feature's column may not be called {entry.name!r}. Give it another name (source_name)"
                )
            if entry.is_list and entry.name in self.column_types:
                raise ValueError(f"a history may not have the name of a column. Received: {entry.name!r}")

    def _check_uses(self) -> None:
        # What describes an event stands in the log; what a model may see, in any table.
        for use, name in self._held_out_columns.items():
            if name not in self.tables.log.column_names:
                raise ValueError(_not_a_column(use, name, self.tables.log.column_names))
        for feature in (*self.features, *self.user_groups):
            column = getattr(feature, "column", None)
            if column is not None and column not in self.column_types:
                raise ValueError(_not_a_column(feature.name, column, list(self.column_types)))
            if column in self.sensitive_columns:
                raise ValueError(
                    f"a sensitive column cannot be a model input. Received: {column!r} in {feature.name!r}"
                )
            for use, name in self._held_out_columns.items():
                if column == name:
                    raise ValueError(
                        f"a column used as {use} cannot be a model input. Received: {name!r} in {feature.name!r}"
                    )
        self._check_types()

    @property
    def _held_out_columns(self) -> dict[str, str]:
        """Use -> column, for what no model may see."""
        columns = {"label": self.label_comparison.column, "event_time": self.event_time.column}
        if self.intensity_label:
            columns["intensity_label"] = self.intensity_comparison.column
        if self.intensity_value:
            columns["intensity_value"] = self.intensity_value
        if self.sample_weight:
            columns["sample_weight"] = self.sample_weight
        return columns

    def _check_types(self) -> None:
        types = self.column_types
        if self.user_id_salt_env and types[self.user_key] != "string":
            raise ValueError(f"a hashed user_key must be a string. Received: {self.user_key}: {types[self.user_key]}")
        if types[self.event_time.column] == "string":
            raise ValueError("the event time column must be int64 or float. Received: string")
        if self.intensity_value and types[self.intensity_value] == "string":
            raise ValueError("the intensity_value column must be int64 or float. Received: string")
        for feature in self.features:
            if isinstance(feature, HistoryFeature):
                self._check_history(feature)
                continue
            allowed = ("int64", "float") if isinstance(feature, NumericFeature) else ("string", "int64")
            if types[feature.column] not in allowed:
                raise ValueError(
                    f"{feature.type} feature {feature.name!r} needs {' or '.join(allowed)}. "
                    f"Received: {types[feature.column]}"
                )
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
                f"history {history.name!r} needs a categorical feature of the log. "
                f"Received: of={history.of!r}. Allowed: {choices}"
            )

    def _check_groups(self) -> None:
        profile = self.tables.user or self.tables.log
        allowed = [name for name in profile.column_names if name != self.item_key]
        for group in self.user_groups:
            if group.column not in allowed:
                raise ValueError(
                    f"user group {group.name!r} must be a user-profile column. "
                    f"Received: {group.column!r}. Allowed: {allowed}"
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
    def sensitive_columns(self) -> frozenset[str]:
        """Columns whose values may stand in no dead letter, statistic or log."""
        columns = (column for _, table in self.tables.items() for column in table.columns)
        return frozenset(column.name for column in columns if column.sensitive)

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
        features = [feature for feature in self.features if isinstance(feature, IdFeature)]
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
            user_features=self._user_features,
        )

    @property
    def _user_features(self) -> tuple[str, ...]:
        """Single-valued features that tell of the user's profile, never of the user's id: what AdGate may read."""
        if self.tables.user is None:
            return ()
        profile = {name for name in self.tables.user.column_names if name != self.user_key}
        single_valued = (CategoricalFeature, NumericFeature)
        return tuple(x.name for x in self.features if isinstance(x, single_valued) and x.column in profile)

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
    content = parse_yaml_mapping(path.read_text(encoding="utf-8"), str(path))
    return parse_spec(content, str(path))


def _not_a_column(what: str, name: str, allowed: list[str]) -> str:
    return f"{what} must be a declared column. Received: {name!r}. Allowed: {', '.join(allowed)}"
