"""The feature spec: what a data set contains, declared once in YAML and read by every stage.

Strict, frozen pydantic models; no TensorFlow. Labels, weights, event time and keys are other types than features, so
they cannot become a model input. ``FeatureSpec.model_inputs`` is what a backbone may see.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import pydantic

from clsd_tf.spec.expectations import DriftLimits, Expectation
from clsd_tf.spec.feature_types import (
    CategoricalFeature,
    Feature,
    FromPastEvents,
    HistoryFeature,
    IdFeature,
    MultiValuedFeature,
    NumericFeature,
    UserGroup,
    Vocabulary,
    WindowFeature,
)
from clsd_tf.spec.model_inputs import RECORD_FIELDS, CategoricalInput, GroupInput, ModelInputs, RawInput, RecordLayout
from clsd_tf.spec.tables import Comparison, EventTime, Name, Split, Table, Tables
from clsd_tf.spec.validation import SpecError, StrictModel, explain_validation_error, parse_yaml_mapping


class FeatureSpec(StrictModel):
    """A data set: its tables, its label, its split, its features and its user groups.

    Attributes:
      label: what a click is, for example ``rating >= 4``.
      intensity_label: optional stronger signal, held out from training, to judge click confidence with.
      intensity_value: optional numeric column of the log that grows with interest (seconds read), held out likewise.
      sample_weight: optional column of weights in [0, 1,000,000].
      duplicates: what becomes of events of one user, item and time: the one of the lowest row id stays, all stay, or
        the build fails. They are counted in any case.
      record_layout: of the TFRecords: all integers of a row in one entry (fast), or an entry for each name.
      user_id_salt_env: optional name of the environment variable that holds a secret salt. The user key of log and user
        table is then replaced by a salted hash as soon as it is read, so that no id stands in any file that is written.
        A serving request then carries the hashed id too: ``clsd_tf.data.hashing.hash_user_ids`` with the same salt.
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
    drift: DriftLimits = DriftLimits()
    duplicates: Literal["keep_first", "keep_all", "fail"] = "keep_first"
    record_layout: RecordLayout = "packed"

    @pydantic.model_validator(mode="after")
    def _check(self) -> FeatureSpec:
        self._check_names()
        self._check_columns()
        self._check_uses()
        self._check_shares()
        self._check_raw_names()
        self._check_groups()
        self._check_expectations()
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
        expected = self.key_of(role)
        if table.key != expected:
            raise ValueError(f"tables.{role}.key must be {expected!r}. Received: {table.key!r}")
        if expected is not None:
            self._check_key_column(role, expected, table)
        if role != "log" and table.format == "tfds":
            raise ValueError(f"only the log may have format tfds. Received: tables.{role}.format: tfds")
        self._check_valid_from(role, table)

    def _check_valid_from(self, role: str, table: Table) -> None:
        valid_from = table.valid_from
        if valid_from is None:
            if role.endswith("_state"):
                raise ValueError(
                    f"tables.{role} must have valid_from. Received: none. Or declare it as a profile table"
                )
            return
        if role == "log":
            raise ValueError("the log's time is event_time. Received: tables.log.valid_from. Remove it")
        allowed = [column.name for column in table.columns if column.type != "string" and column.name != table.key]
        if valid_from.column not in allowed:
            raise ValueError(
                f"tables.{role}.valid_from must be an int64 or float column of its table, not the key. "
                f"Received: {valid_from.column!r}. Allowed: {allowed}"
            )

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
        for feature in self.features:
            if isinstance(feature, FromPastEvents) and feature.name in self.column_types:
                raise ValueError(f"a {feature.type} may not have the name of a column. Received: {feature.name!r}")

    def _check_uses(self) -> None:
        # What describes an event stands in the log; what a model may see, in any table.
        for use, name in self._held_out_columns.items():
            if name not in self.tables.log.column_names:
                raise ValueError(_not_a_column(use, name, self.tables.log.column_names))
        never_inputs = self._held_out_columns | {
            f"tables.{role}.valid_from": table.valid_from.column
            for role, table in self.tables.items()
            if table.valid_from
        }
        for feature in (*self.features, *self.user_groups):
            if isinstance(feature, FromPastEvents):
                continue
            column = feature.column
            if column not in self.column_types:
                raise ValueError(_not_a_column(feature.name, column, list(self.column_types)))
            if column in self.sensitive_columns:
                raise ValueError(
                    f"a sensitive column cannot be a model input. Received: {column!r} in {feature.name!r}"
                )
            for use, name in never_inputs.items():
                if column == name:
                    raise ValueError(
                        f"a column used as {use} cannot be a model input. Received: {name!r} in {feature.name!r}"
                    )
        self._check_sensitive()
        self._check_types()

    def _check_sensitive(self) -> None:
        # Times, weights and intensity values stand in records; features of past events hold values, or what they tell.
        uses = {
            "event_time": self.event_time.column,
            "sample_weight": self.sample_weight,
            "intensity_value": self.intensity_value,
        }
        labels = {self.label_comparison.column, self.intensity_comparison and self.intensity_comparison.column}
        for feature in self.features:
            if isinstance(feature, WindowFeature):
                uses[f"{feature.name}.value"] = feature.value
            if isinstance(feature, FromPastEvents) and feature.where_comparison:
                column = feature.where_comparison.column
                uses[f"{feature.name}.where"] = None if column in labels else column
        for use, column in uses.items():
            if column in self.sensitive_columns:
                raise ValueError(f"a sensitive column cannot be in a dataset. Received: {column!r} as {use}")
        if self.user_key in self.sensitive_columns and self.user_id_salt_env is None:
            raise ValueError(
                "a sensitive user_key needs user_id_salt_env: records tell users apart by a hash, which is undone by "
                f"trying ids where there is no salt. Received: {self.user_key!r} without"
            )

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
            if isinstance(feature, FromPastEvents):
                self._check_past_events(feature)
                continue
            allowed = ("int64", "float") if isinstance(feature, NumericFeature) else ("string", "int64")
            if types[feature.column] not in allowed:
                raise ValueError(
                    f"{feature.type} feature {feature.name!r} needs {' or '.join(allowed)}. "
                    f"Received: {types[feature.column]}"
                )
        for use, comparison in (("label", self.label_comparison), ("intensity_label", self.intensity_comparison)):
            self._check_comparison(use, comparison)

    def _check_comparison(self, use: str, comparison: Comparison | None) -> None:
        types = self.column_types
        if comparison and isinstance(comparison.value, str) != (types[comparison.column] == "string"):
            raise ValueError(f"{use} compares a {types[comparison.column]} column with {comparison.value!r}")

    def _check_past_events(self, feature: HistoryFeature | WindowFeature) -> None:
        log, where = self.tables.log, feature.where_comparison
        if where and where.column not in log.column_names:
            raise ValueError(_not_a_column(f"where of {feature.name!r}", where.column, log.column_names))
        self._check_comparison(f"where of {feature.name!r}", where)
        if isinstance(feature, HistoryFeature):
            self._check_history(feature)
        elif feature.value is not None:
            numbers = [column.name for column in log.columns if column.type != "string"]
            if feature.value not in numbers:
                raise ValueError(
                    f"value of {feature.name!r} must be an int64 or float column of the log. "
                    f"Received: {feature.value!r}. Allowed: {numbers}"
                )

    def _check_history(self, history: HistoryFeature) -> None:
        of_event = {name for table in (self.tables.log, *self.item_tables.values()) for name in table.column_names}
        choices = [
            feature.name
            for feature in self.features
            if isinstance(feature, CategoricalFeature) and feature.column in of_event
        ]
        if history.of not in choices:
            raise ValueError(
                f"history {history.name!r} needs a categorical feature of the log or of an item table. "
                f"Received: of={history.of!r}. Allowed: {choices}"
            )

    def _check_shares(self) -> None:
        allowed = [entry.name for entry in self.features if isinstance(entry, IdFeature) and not entry.shares]
        for feature in self.features:
            if isinstance(feature, IdFeature) and feature.shares and feature.shares not in allowed:
                raise ValueError(
                    f"{feature.name!r} can share the ids of a categorical or multi-valued feature that has its own. "
                    f"Received: shares={feature.shares!r}. Allowed: {allowed}"
                )

    def _check_groups(self) -> None:
        profiles = list(self.user_tables.values()) or [self.tables.log]
        allowed = list(
            dict.fromkeys(name for table in profiles for name in table.column_names if name != self.item_key)
        )
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

    def key_of(self, role: str) -> str | None:
        """The key of the tables of that role; None for the log."""
        return {"log": None, "user": self.user_key, "item": self.item_key}[role.removesuffix("_state")]

    @property
    def user_tables(self) -> dict[str, Table]:
        """Role -> table, of those with the user's key."""
        return {role: table for role, table in self.tables.items() if role in ("user", "user_state")}

    @property
    def item_tables(self) -> dict[str, Table]:
        """Role -> table, of those with the item's key."""
        return {role: table for role, table in self.tables.items() if role in ("item", "item_state")}

    @property
    def time_columns(self) -> dict[str, EventTime]:
        """Column name -> how its times are written, over all tables."""
        tables = [table for _, table in self.tables.items() if table.valid_from]
        return {self.event_time.column: self.event_time} | {x.valid_from.column: x.valid_from for x in tables}

    def _check_expectations(self) -> None:
        # Statistics, which expectations are compared with, are made of what models may see.
        allowed = [entry.name for entry in self.raw_inputs if entry.name in self.column_types]
        for name, expectation in self.expectations.items():
            if name not in allowed:
                raise ValueError(
                    f"expect is for columns of features and user groups. Received: {name!r}. Allowed: {allowed}"
                )
            if name == self.user_key and (expectation.has_range or expectation.values):
                raise ValueError(f"of user ids only max_missing can be expected. Received: more for {name!r}")

    @property
    def expectations(self) -> dict[str, Expectation]:
        """Column name -> what is expected of it, for columns that declare it."""
        columns = [column for _, table in self.tables.items() for column in table.columns]
        return {column.name: column.expect for column in columns if column.expect}

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
        """What a serving request carries: the columns of features and user groups, the histories and the windows."""
        inputs: dict[str, RawInput] = {}
        for feature in (*self.features, *self.user_groups):
            if isinstance(feature, HistoryFeature):
                inputs[feature.name] = RawInput(feature.name, "string", is_list=True)
            elif isinstance(feature, WindowFeature):
                inputs[feature.name] = RawInput(feature.name, "float")
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

    def id_source(self, feature: IdFeature) -> IdFeature:
        """The feature whose ids it has: the one that it shares, or itself."""
        return self.feature(feature.shares) if feature.shares else feature

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
        """Features of one id or number that tell of the user's profile, never of the user's id: for AdGate."""
        profile = {name for table in self.user_tables.values() for name in table.column_names if name != self.user_key}
        single_valued = (CategoricalFeature, NumericFeature)
        found = [x for x in self.features if isinstance(x, single_valued) and x.column in profile]
        return tuple(x.name for x in found if isinstance(x, NumericFeature) or self.id_source(x).ids_per_value == 1)

    def _categorical_input(self, feature: Feature, lengths: Mapping[str, int]) -> CategoricalInput | None:
        if isinstance(feature, HistoryFeature):
            of = self._categorical_input(self.feature(feature.of), lengths)
            return dataclasses.replace(of, name=feature.name, max_values=feature.max_length, history_of=feature.of)
        if isinstance(feature, NumericFeature):
            is_id = feature.scaling == "quantile_buckets"
            return CategoricalInput(feature.name, feature.name, 1 + feature.num_buckets) if is_id else None
        source = self.id_source(feature)
        rule, hashing = source.resolved_vocabulary, source.resolved_hash
        size = 1 + (rule.num_oov_indices + lengths[source.name] if rule else hashing.buckets)
        max_values = feature.max_values if isinstance(feature, MultiValuedFeature) else None
        if rule:
            return CategoricalInput(feature.name, source.name, size, max_values)
        combiner = "product" if hashing.method == "quotient_remainder" else "sum"
        return CategoricalInput(feature.name, source.name, size, max_values, source.ids_per_value, combiner)

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


def meaning_differences(spec: FeatureSpec, previous: FeatureSpec) -> list[str]:
    """What gives values another meaning in ``spec`` than in ``previous``, for the features and user groups of both.

    Values of vocabularies aside, and what decides which values a vocabulary gets.
    """
    old = {entry.name: _meaning(entry) for entry in (*previous.features, *previous.user_groups)}
    new = {entry.name: _meaning(entry) for entry in (*spec.features, *spec.user_groups)}
    return [
        f"{name}.{key}. Received: {new[name].get(key)!r}. Allowed: {old[name].get(key)!r}"
        for name in new
        if name in old
        for key in sorted(new[name].keys() | old[name].keys())
        if new[name].get(key) != old[name].get(key)
    ]


def _meaning(entry: Feature | UserGroup) -> dict[str, Any]:
    match entry:
        case IdFeature():
            rule = entry.resolved_vocabulary
            meaning = entry.model_dump(exclude={"name", "vocabulary", "hash_buckets", "hash", "max_values"})
            meaning["vocabulary.num_oov_indices"] = rule.num_oov_indices if rule else None
            return {**meaning, "hash": entry.resolved_hash.model_dump() if entry.resolved_hash else None}
        case HistoryFeature():
            return {"type": entry.type, "of": entry.of}
        case NumericFeature() | UserGroup():
            return entry.model_dump(exclude={"name"})
