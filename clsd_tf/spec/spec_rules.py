"""The rules of a feature spec, one function each: the name is the rule, the docstring its reason.

A rule returns if the spec keeps it and raises ValueError if not. ``RULES`` lists them in the order in which they are
checked: a rule may rely on those before it. To add one: a function and its place in ``RULES``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from clsd_tf.spec.declared_spec import DeclaredSpec
from clsd_tf.spec.id_features import CategoricalFeature, IdFeature
from clsd_tf.spec.past_features import HistoryFeature, WindowFeature
from clsd_tf.spec.record_fields import RESERVED_NAMES, RESERVED_RAW_NAMES
from clsd_tf.spec.tables import Comparison


def _not_a_column(what: str, name: str, allowed: Iterable[str]) -> ValueError:
    return ValueError(f"{what} must be a declared column. Received: {name!r}. Allowed: {', '.join(allowed)}")


# --- Names and tables ------------------------------------------------------------------------------------------------


def names_are_unique(spec: DeclaredSpec) -> None:
    """Inputs and reports are found by name."""
    names = [entry.name for entry in spec.entries]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"feature and user group names must be unique. Received: {name!r} twice")


def names_are_not_reserved(spec: DeclaredSpec) -> None:
    """A record holds features and record fields side by side."""
    for entry in spec.entries:
        if entry.name in RESERVED_NAMES:
            raise ValueError(f"{', '.join(RESERVED_NAMES)} are reserved. Received: a feature named {entry.name!r}")


def tables_are_joined_by_their_key(spec: DeclaredSpec) -> None:
    """Rows meet by the spec's keys."""
    for role, table in spec.tables.items():
        expected = spec.key_of(role)
        if table.key != expected:
            raise ValueError(f"tables.{role}.key must be {expected!r}. Received: {table.key!r}")
        if expected is not None and expected not in table.column_names:
            raise _not_a_column(f"tables.{role}.key", expected, table.column_names)


def keys_have_one_type(spec: DeclaredSpec) -> None:
    """Text never equals a number, so no row would find its profile."""
    log = spec.tables.log
    for role, table in spec.tables.items():
        key = table.key
        if key in log.column_names and log.column(key).type != table.column(key).type:
            raise ValueError(
                f"{key} must have one type in all tables. "
                f"Received: {log.column(key).type} in log, {table.column(key).type} in {role}"
            )


def only_the_log_comes_from_tfds(spec: DeclaredSpec) -> None:
    """TFDS gives one table."""
    for role, table in spec.tables.items():
        if role != "log" and table.format == "tfds":
            raise ValueError(f"only the log may have format tfds. Received: tables.{role}.format: tfds")


def state_tables_have_valid_from(spec: DeclaredSpec) -> None:
    """Without it nobody knows which of a key's rows held at an event's time."""
    for role, table in spec.tables.items():
        if table.valid_from is None and role.endswith("_state"):
            raise ValueError(f"tables.{role} must have valid_from. Received: none. Or declare it as a profile table")


def the_log_has_no_valid_from(spec: DeclaredSpec) -> None:
    """An event's time is declared once."""
    if spec.tables.log.valid_from:
        raise ValueError("the log's time is event_time. Received: tables.log.valid_from. Remove it")


def valid_from_is_a_number_of_its_table(spec: DeclaredSpec) -> None:
    """It is compared with event times."""
    for role, table in spec.tables.items():
        allowed = [column.name for column in table.columns if column.type != "string" and column.name != table.key]
        if table.valid_from and table.valid_from.column not in allowed:
            raise ValueError(
                f"tables.{role}.valid_from must be an int64 or float column of its table, not the key. "
                f"Received: {table.valid_from.column!r}. Allowed: {allowed}"
            )


def column_names_are_unique(spec: DeclaredSpec) -> None:
    """Joined rows hold the columns of all tables."""
    seen: dict[str, str] = {}
    for role, table in spec.tables.items():
        for name in table.column_names:
            is_key = role != "log" and name == table.key and seen.get(name) == "log"
            if name in seen and not is_key:
                raise ValueError(
                    f"column names must be unique across tables. Received: {name!r} in {seen[name]} and {role}"
                )
            seen.setdefault(name, role)


def keys_are_columns_of_the_log(spec: DeclaredSpec) -> None:
    """An event is one of a user and an item."""
    for use, name in (("user_key", spec.user_key), ("item_key", spec.item_key)):
        if name not in spec.tables.log.column_names:
            raise _not_a_column(use, name, spec.tables.log.column_names)


# --- What a model may see --------------------------------------------------------------------------------------------


def the_log_describes_events(spec: DeclaredSpec) -> None:
    """Labels, weights and times are of the event, not of a profile."""
    for use, name in spec.held_out_columns.items():
        if name not in spec.tables.log.column_names:
            raise _not_a_column(use, name, spec.tables.log.column_names)


def inputs_are_columns(spec: DeclaredSpec) -> None:
    """Features and user groups read columns that a table declares."""
    for entry in spec.entries:
        if entry.reads_column and entry.raw_name not in spec.column_types:
            raise _not_a_column(entry.name, entry.raw_name, spec.column_types)


def inputs_are_not_sensitive(spec: DeclaredSpec) -> None:
    """Vocabularies and statistics would show the values."""
    for entry in spec.entries:
        if entry.reads_column and entry.raw_name in spec.sensitive_columns:
            raise ValueError(
                f"a sensitive column cannot be a model input. Received: {entry.raw_name!r} in {entry.name!r}"
            )


def inputs_are_not_held_out(spec: DeclaredSpec) -> None:
    """A model that sees its label, or what follows from it, has nothing to learn."""
    valid_from = {role: table.valid_from for role, table in spec.tables.items()}
    never_inputs = spec.held_out_columns | {
        f"tables.{role}.valid_from": time.column for role, time in valid_from.items() if time
    }
    for entry in spec.entries:
        for use, name in never_inputs.items():
            if entry.reads_column and entry.raw_name == name:
                raise ValueError(
                    f"a column used as {use} cannot be a model input. Received: {name!r} in {entry.name!r}"
                )


def sensitive_columns_are_not_in_datasets(spec: DeclaredSpec) -> None:
    """Times, weights and intensity values stand in records; features of past events hold values, or what they tell."""
    uses = {
        "event_time": spec.event_time.column,
        "sample_weight": spec.sample_weight,
        "intensity_value": spec.intensity_value,
    }
    labels = {comparison.column for comparison in (spec.label_comparison, spec.intensity_comparison) if comparison}
    for window in spec.features_of(WindowFeature):
        uses[f"{window.name}.value"] = window.value
    for feature in spec.past_features:
        if (where := feature.where_comparison) and where.column not in labels:
            uses[f"{feature.name}.where"] = where.column
    for use, column in uses.items():
        if column in spec.sensitive_columns:
            raise ValueError(f"a sensitive column cannot be in a dataset. Received: {column!r} as {use}")


def sensitive_user_keys_are_salted(spec: DeclaredSpec) -> None:
    """Records tell users apart by a hash, which trying ids undoes where there is no salt."""
    if spec.user_key in spec.sensitive_columns and spec.user_id_salt_env is None:
        raise ValueError(
            "a sensitive user_key needs user_id_salt_env: records tell users apart by a hash, which is undone by "
            f"trying ids where there is no salt. Received: {spec.user_key!r} without"
        )


# --- Types -----------------------------------------------------------------------------------------------------------


def hashed_user_keys_are_text(spec: DeclaredSpec) -> None:
    """A salted hash is text."""
    found = spec.column_types[spec.user_key]
    if spec.user_id_salt_env and found != "string":
        raise ValueError(f"a hashed user_key must be a string. Received: {spec.user_key}: {found}")


def event_times_are_numbers(spec: DeclaredSpec) -> None:
    """Times in text have no order that is sure."""
    if spec.column_types[spec.event_time.column] == "string":
        raise ValueError("the event time column must be int64 or float. Received: string")


def intensity_values_are_numbers(spec: DeclaredSpec) -> None:
    """They are ranked."""
    if spec.intensity_value and spec.column_types[spec.intensity_value] == "string":
        raise ValueError("the intensity_value column must be int64 or float. Received: string")


def features_have_a_type_that_they_can_read(spec: DeclaredSpec) -> None:
    """Each kind of feature reads numbers or what can be an id."""
    for feature in spec.features:
        if feature.reads_column and spec.column_types[feature.raw_name] not in feature.column_types:
            raise ValueError(
                f"{feature.type} feature {feature.name!r} needs {' or '.join(feature.column_types)}. "
                f"Received: {spec.column_types[feature.raw_name]}"
            )


def past_events_are_chosen_by_the_log(spec: DeclaredSpec) -> None:
    """``where`` compares a column of the events themselves with a value of its type."""
    for feature in spec.past_features:
        if where := feature.where_comparison:
            if where.column not in spec.tables.log.column_names:
                raise _not_a_column(f"where of {feature.name!r}", where.column, spec.tables.log.column_names)
            _check_type(f"where of {feature.name!r}", where, spec)


def histories_are_of_events(spec: DeclaredSpec) -> None:
    """A profile's column says the same of every event of a user."""
    of_event = {spec.user_key, *(name for name, side in spec.sides.items() if side != "user")}
    choices = [feature.name for feature in spec.features_of(CategoricalFeature) if feature.column in of_event]
    for history in spec.features_of(HistoryFeature):
        if history.of not in choices:
            raise ValueError(
                f"history {history.name!r} needs a categorical feature of the log or of an item table. "
                f"Received: of={history.of!r}. Allowed: {choices}"
            )


def means_of_windows_are_of_numbers(spec: DeclaredSpec) -> None:
    """Text has no mean."""
    numbers = [column.name for column in spec.tables.log.columns if column.type != "string"]
    for window in spec.features_of(WindowFeature):
        if window.value is not None and window.value not in numbers:
            raise ValueError(
                f"value of {window.name!r} must be an int64 or float column of the log. "
                f"Received: {window.value!r}. Allowed: {numbers}"
            )


def labels_are_compared_with_their_type(spec: DeclaredSpec) -> None:
    """Text never equals a number, so the label would be constant."""
    _check_type("label", spec.label_comparison, spec)
    if spec.intensity_comparison:
        _check_type("intensity_label", spec.intensity_comparison, spec)


def _check_type(use: str, comparison: Comparison, spec: DeclaredSpec) -> None:
    declared = spec.column_types[comparison.column]
    if isinstance(comparison.value, str) != (declared == "string"):
        raise ValueError(f"{use} compares a {declared} column with {comparison.value!r}")


# --- Features, user groups and expectations --------------------------------------------------------------------------


def shared_ids_are_of_a_feature_that_has_its_own(spec: DeclaredSpec) -> None:
    """Ids are shared in one step, never along a chain."""
    features = spec.features_of(IdFeature)
    allowed = [feature.name for feature in features if not feature.shares]
    for feature in features:
        if feature.shares and feature.shares not in allowed:
            raise ValueError(
                f"{feature.name!r} can share the ids of a categorical or multi-valued feature that has its own. "
                f"Received: shares={feature.shares!r}. Allowed: {allowed}"
            )


def raw_inputs_are_not_named_like_record_fields(spec: DeclaredSpec) -> None:
    """They stand beside each other while rows are joined."""
    for entry in spec.raw_inputs:
        if entry.name in RESERVED_RAW_NAMES:
            raise ValueError(f"a feature's column may not be called {entry.name!r}. Give it another name (source_name)")


def features_of_past_events_are_not_named_like_columns(spec: DeclaredSpec) -> None:
    """They stand beside columns in requests."""
    for feature in spec.features:
        if not feature.reads_column and feature.name in spec.column_types:
            raise ValueError(f"a {feature.type} may not have the name of a column. Received: {feature.name!r}")


def user_groups_are_of_user_profiles(spec: DeclaredSpec) -> None:
    """Users, not events, are in groups; without a user table the log describes users."""
    profiles = list(spec.user_tables.values()) or [spec.tables.log]
    names = dict.fromkeys(name for table in profiles for name in table.column_names)
    allowed = [name for name in names if name != spec.item_key]
    for group in spec.user_groups:
        if group.column not in allowed:
            raise ValueError(
                f"user group {group.name!r} must be a user-profile column. "
                f"Received: {group.column!r}. Allowed: {allowed}"
            )


def user_groups_fit_the_type_of_their_column(spec: DeclaredSpec) -> None:
    """Numbers have intervals, text has values."""
    for group in spec.user_groups:
        found = spec.column_types[group.column]
        if (found == "string") != (group.values is not None):
            raise ValueError(
                f"user group {group.name!r}: text columns take values, numbers take boundaries. "
                f"Received: column type {found}"
            )


def expectations_are_of_inputs(spec: DeclaredSpec) -> None:
    """Statistics, which expectations are compared with, are made of what models may see."""
    allowed = [entry.name for entry in spec.raw_inputs if entry.name in spec.column_types]
    for name in spec.expectations:
        if name not in allowed:
            raise ValueError(
                f"expect is for columns of features and user groups. Received: {name!r}. Allowed: {allowed}"
            )


def user_ids_are_expected_to_be_there(spec: DeclaredSpec) -> None:
    """Statistics hold no user ids."""
    expectation = spec.expectations.get(spec.user_key)
    if expectation and (expectation.has_range or expectation.values):
        raise ValueError(f"of user ids only max_missing can be expected. Received: more for {spec.user_key!r}")


RULES: tuple[Callable[[DeclaredSpec], None], ...] = (
    names_are_unique,
    names_are_not_reserved,
    tables_are_joined_by_their_key,
    keys_have_one_type,
    only_the_log_comes_from_tfds,
    state_tables_have_valid_from,
    the_log_has_no_valid_from,
    valid_from_is_a_number_of_its_table,
    column_names_are_unique,
    keys_are_columns_of_the_log,
    the_log_describes_events,
    inputs_are_columns,
    inputs_are_not_sensitive,
    inputs_are_not_held_out,
    sensitive_columns_are_not_in_datasets,
    sensitive_user_keys_are_salted,
    hashed_user_keys_are_text,
    event_times_are_numbers,
    intensity_values_are_numbers,
    features_have_a_type_that_they_can_read,
    past_events_are_chosen_by_the_log,
    histories_are_of_events,
    means_of_windows_are_of_numbers,
    labels_are_compared_with_their_type,
    shared_ids_are_of_a_feature_that_has_its_own,
    raw_inputs_are_not_named_like_record_fields,
    features_of_past_events_are_not_named_like_columns,
    user_groups_are_of_user_profiles,
    user_groups_fit_the_type_of_their_column,
    expectations_are_of_inputs,
    user_ids_are_expected_to_be_there,
)
