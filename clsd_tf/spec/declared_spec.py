"""Fields of a feature spec and the facts that follow from them, before its rules are checked."""

from __future__ import annotations

from typing import Literal, TypeVar

import pydantic

from clsd_tf.spec.expectations import DriftLimits, Expectation
from clsd_tf.spec.feature_types import Feature
from clsd_tf.spec.id_features import IdFeature, Vocabulary
from clsd_tf.spec.model_inputs import RawInput, RecordLayout
from clsd_tf.spec.past_features import FromPastEvents
from clsd_tf.spec.tables import ColumnType, Comparison, EventTime, Name, Split, Table, Tables
from clsd_tf.spec.user_groups import UserGroup
from clsd_tf.spec.validation import StrictModel

Side = Literal["user", "item", "context"]
Kind = TypeVar("Kind")


class DeclaredSpec(StrictModel):
    """The fields of a ``FeatureSpec``, which says what they mean, and the facts that they imply."""

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

    # --- Tables and columns

    def key_of(self, role: str) -> str | None:
        """Names the key of the tables of a role.

        Args:
          role: as ``Tables`` calls its tables.

        Returns:
          A column; None for the log.
        """
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
    def column_types(self) -> dict[str, ColumnType]:
        """Column name -> type, over all tables."""
        return {column.name: column.type for _, table in self.tables.items() for column in table.columns}

    @property
    def time_columns(self) -> dict[str, EventTime]:
        """Column name -> how its times are written, over all tables."""
        times = [self.event_time, *(table.valid_from for _, table in self.tables.items() if table.valid_from)]
        return {time.column: time for time in times}

    @property
    def expectations(self) -> dict[str, Expectation]:
        """Column name -> what is expected of it, for columns that declare it."""
        columns = [column for _, table in self.tables.items() for column in table.columns]
        return {column.name: column.expect for column in columns if column.expect}

    @property
    def sensitive_columns(self) -> frozenset[str]:
        """Columns whose values may stand in no dead letter, statistic or log."""
        columns = (column for _, table in self.tables.items() for column in table.columns)
        return frozenset(column.name for column in columns if column.sensitive)

    @property
    def label_comparison(self) -> Comparison:
        """By which a row is a click."""
        return Comparison.parse(self.label)

    @property
    def intensity_comparison(self) -> Comparison | None:
        """By which a row is an intense one; None where the spec declares no intensity label."""
        return Comparison.parse(self.intensity_label) if self.intensity_label else None

    @property
    def held_out_columns(self) -> dict[str, str]:
        """Use -> column, for what no model may see."""
        label, intensity = self.label_comparison, self.intensity_comparison
        columns = {
            "label": label.column,
            "event_time": self.event_time.column,
            "intensity_label": intensity and intensity.column,
            "intensity_value": self.intensity_value,
            "sample_weight": self.sample_weight,
        }
        return {use: column for use, column in columns.items() if column}

    @property
    def sides(self) -> dict[str, Side]:
        """Column or raw input -> what it tells of: the user, the item, or the event that joins them.

        Tables of users and items and their keys tell of these; other columns of the log, which may describe either or
        the moment, are context. What is made of the user's past events is the user's.
        """
        sides: dict[str, Side] = {feature.name: "user" for feature in self.past_features}
        sides |= dict.fromkeys(self.tables.log.column_names, "context")
        for table in self.user_tables.values():
            sides |= dict.fromkeys(table.column_names, "user")
        for table in self.item_tables.values():
            sides |= dict.fromkeys(table.column_names, "item")
        sides |= {self.user_key: "user", self.item_key: "item"}
        return sides

    # --- Features

    @property
    def entries(self) -> tuple[Feature | UserGroup, ...]:
        """The features, then the user groups."""
        return (*self.features, *self.user_groups)

    def feature(self, name: str) -> Feature:
        """Finds a feature by its ``name``, which must be one of the spec's.

        Returns:
          The feature.
        """
        return next(feature for feature in self.features if feature.name == name)

    def features_of(self, kind: type[Kind]) -> tuple[Kind, ...]:
        """Finds the features of a kind.

        Args:
          kind: their class, or one that they inherit from.

        Returns:
          In the order of the spec.
        """
        return tuple(feature for feature in self.features if isinstance(feature, kind))

    @property
    def past_features(self) -> tuple[FromPastEvents, ...]:
        """The features that are made of the user's past events."""
        return tuple(feature for feature in self.features if isinstance(feature, FromPastEvents))

    @property
    def raw_inputs(self) -> tuple[RawInput, ...]:
        """Contents of a serving request: the columns of features and user groups, the histories and the windows."""
        types = self.column_types
        return tuple(dict.fromkeys(entry.raw_input(types) for entry in self.entries))

    @property
    def vocabularies(self) -> dict[str, Vocabulary]:
        """Name of each vocabulary (that of its feature) -> its rule."""
        rules = {feature.name: feature.resolved_vocabulary for feature in self.features_of(IdFeature)}
        return {name: rule for name, rule in rules.items() if rule}

    def id_source(self, feature: IdFeature) -> IdFeature:
        """Finds the feature whose ids ``feature`` has.

        Returns:
          The one that it shares, or itself.
        """
        return next(found for found in self.features_of(IdFeature) if found.name == (feature.shares or feature.name))
