"""The feature spec: strictness, every rule, fingerprint, group labels and model inputs; and the Keras guard."""

import copy
import dataclasses
import os
import random
import re
import subprocess
import sys

import pydantic
import pytest
import yaml

import feature_specs
from clsd_tf.spec.feature_spec import FeatureSpec, load_spec, parse_spec
from clsd_tf.spec.id_features import Vocabulary
from clsd_tf.spec.model_inputs import CategoricalInput, GroupInput, ModelInputs, RawInput
from clsd_tf.spec.tables import Comparison
from clsd_tf.spec.user_groups import UserGroup
from clsd_tf.spec.validation import SpecError


def error_of(content):
    """The message with which a spec is refused."""
    with pytest.raises(SpecError) as caught:
        parse_spec(content, "shop.yaml")
    return str(caught.value)


def feature(content, name):
    return next(entry for entry in content["features"] if entry["name"] == name)


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


# --- Strictness ------------------------------------------------------------------------------------------------------


def test_valid_spec_is_accepted(shop_content):
    spec = parse_spec(shop_content, "shop.yaml")
    assert spec.name == "shop"
    assert [feature.type for feature in spec.features] == [
        "categorical",
        "categorical",
        "categorical",
        "multi_valued",
        "numeric",
        "numeric",
        "history",
    ]


def test_error_names_the_source(shop_content):
    del shop_content["label"]
    assert error_of(shop_content).startswith("shop.yaml is not valid:")


def test_unknown_key_at_the_top_names_allowed_keys(shop_content):
    shop_content["lable"] = "clicked == 1"
    message = error_of(shop_content)
    assert "lable: unknown key. Received: 'lable'. Allowed: description, drift, duplicates" in message


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("tables.log.paht", "columns, delimiter, format, key, path, valid_from"),
        ("tables.log.columns.0.typ", "expect, name, sensitive, source_name, type"),
        ("event_time.units", "column, earliest, latest, unit"),
        (
            "split.ratio",
            "gap_days, rule, seed, test, test_events, test_from, train, until, validation, validation_events, "
            "validation_from",
        ),
        ("features.0.categorical.buckets", "column, hash, hash_buckets, name, shares, type, vocabulary"),
        ("features.1.categorical.vocabulary.min_size", "max_size, max_tracked, min_count, num_oov_indices, weighted"),
        ("features.6.history.column", "delay_seconds, max_length, name, of, type, where, within_seconds"),
        ("user_groups.0.borders", "boundaries, column, name, values"),
    ],
)
def test_unknown_nested_key_names_its_path_and_the_allowed_keys(shop_content, path, allowed):
    node = shop_content
    *parents, key = path.split(".")
    for part in parents:
        if part.isdigit():
            node = node[int(part)]
        elif part not in ("categorical", "history"):  # The type of a feature stands in the path only.
            node = node.setdefault(part, {})
    node[key] = "x"
    assert f"{path}: unknown key. Received: '{key}'. Allowed: {allowed}" in error_of(shop_content)


def test_every_problem_is_reported_at_once(shop_content):
    shop_content["lable"] = "x"
    shop_content["tables"]["log"]["format"] = "xlsx"
    message = error_of(shop_content)
    assert "lable: unknown key" in message
    assert "tables.log.format" in message
    assert "'xlsx'" in message
    assert "'csv', 'tsv', 'jsonl', 'parquet', 'avro', 'tfrecord' or 'tfds'" in message


def test_unknown_feature_type_lists_the_known_types(shop_content):
    shop_content["features"][0]["type"] = "category"
    message = error_of(shop_content)
    assert "features.0" in message
    assert "'category'" in message
    for known in ("categorical", "multi_valued", "numeric", "history"):
        assert known in message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("features", 0, "hash_buckets"), "10"),  # Text is not a number.
        (("features", 0, "hash_buckets"), 10.5),
        (("features", 0, "hash_buckets"), 0),
        (("features", 1, "vocabulary", "num_oov_indices"), 0),
        (("features", 1, "vocabulary", "min_count"), 0),
        (("features", 1, "vocabulary", "max_size"), 0),
        (("features", 3, "separator"), ""),
        (("features", 3, "max_values"), 0),
        (("features", 4, "log1p"), "yes"),
        (("features", 4, "scaling"), "log"),
        (("features", 5, "num_buckets"), 1),
        (("features", 6, "max_length"), 0),
        (("features",), []),
        (("user_groups", 0, "boundaries"), []),
        (("user_groups", 1, "values"), []),
        (("event_time", "unit"), "nanoseconds"),
        (("event_time", "earliest"), "yesterday"),
        (("tables", "log", "columns"), []),
        (("tables", "log", "columns", 0, "type"), "int32"),
        (("tables", "log", "columns", 0, "name"), "user id"),
        (("name",), "1st"),
    ],
)
def test_wrong_value_is_refused_with_path_and_received_value(shop_content, path, value):
    node = shop_content
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    message = error_of(shop_content)
    kind = {"features": r"(\.\w+)?"}.get(path[0], "")
    where = r"\.".join(str(part) + (kind if isinstance(part, int) else "") for part in path)
    assert re.search(where, message), message
    assert f"Received: {value!r}" in message


def test_missing_key_is_named_with_its_path(shop_content):
    del shop_content["tables"]["log"]["format"]
    assert "tables.log.format: Field required" in error_of(shop_content)


def test_spec_is_frozen(shop_spec):
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        shop_spec.label = "clicked == 0"
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        shop_spec.features[0].hash_buckets = 3
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        shop_spec.split.train = 0.5


# --- Rules: columns, keys, names -------------------------------------------------------------------------------------


def test_column_in_two_tables_is_refused(shop_content):
    shop_content["tables"]["item"]["columns"][2]["name"] = "age"
    message = error_of(shop_content)
    assert "column names must be unique across tables. Received: 'age' in user and item" in message


def test_column_twice_in_one_table_is_refused(shop_content):
    shop_content["tables"]["log"]["columns"].append({"name": "seconds", "type": "float"})
    assert "declared once. Received: 'seconds' twice" in error_of(shop_content)


@pytest.mark.parametrize("key", ["user_key", "item_key"])
def test_key_that_is_no_log_column_is_refused(shop_content, key):
    role = key.removesuffix("_key")
    shop_content[key] = "nobody"
    shop_content["tables"][role]["key"] = "nobody"
    shop_content["tables"][role]["columns"][0]["name"] = "nobody"
    message = error_of(shop_content)
    assert f"{key} must be a declared column. Received: 'nobody'" in message
    assert "Allowed: user_id, item_id, time, clicked, seconds, weight" in message


@pytest.mark.parametrize(
    ("role", "key", "expected"), [("log", "user_id", None), ("user", None, "user_id"), ("item", "tags", "item_id")]
)
def test_wrong_table_key_is_refused(shop_content, role, key, expected):
    shop_content["tables"][role]["key"] = key
    assert f"tables.{role}.key must be {expected!r}. Received: {key!r}" in error_of(shop_content)


def test_table_key_that_is_no_column_of_the_table_is_refused(shop_content):
    shop_content["tables"]["user"]["columns"][0]["name"] = "id"
    message = error_of(shop_content)
    assert "tables.user.key must be a declared column. Received: 'user_id'. Allowed: id, age, city" in message


def test_key_of_another_type_than_in_the_log_is_refused(shop_content):
    # Keys of two types never match: every profile would be missing.
    shop_content["tables"]["user"]["columns"][0]["type"] = "int64"
    message = error_of(shop_content)
    assert "user_id" in message
    assert "int64" in message
    assert "string" in message


@pytest.mark.parametrize("role", ["user", "item"])
def test_profile_table_from_tfds_is_refused(shop_content, role):
    shop_content["tables"][role]["format"] = "tfds"
    message = error_of(shop_content)
    assert f"only the log may have format tfds. Received: tables.{role}.format: tfds" in message


def test_two_features_of_one_name_are_refused(shop_content):
    feature(shop_content, "user_city")["name"] = "item"
    assert "feature and user group names must be unique. Received: 'item' twice" in error_of(shop_content)


def test_user_group_with_the_name_of_a_feature_is_refused(shop_content):
    shop_content["user_groups"][0]["name"] = "user_age"
    assert "feature and user group names must be unique. Received: 'user_age' twice" in error_of(shop_content)


_RESERVED = [
    "label", "intensity_label", "intensity_value", "sample_weight", "user_hash", "row_id", "event_time", "teacher_score"
]  # fmt: skip


@pytest.mark.parametrize("name", _RESERVED)
def test_feature_with_a_reserved_name_is_refused(shop_content, name):
    feature(shop_content, "user_city")["name"] = name
    message = error_of(shop_content)
    assert f"Received: a feature named {name!r}" in message
    assert f"{', '.join(_RESERVED)} are reserved" in message


def test_user_group_with_a_reserved_name_is_refused(shop_content):
    shop_content["user_groups"][0]["name"] = "row_id"
    assert "Received: a feature named 'row_id'" in error_of(shop_content)


@pytest.mark.parametrize("name", [*_RESERVED, "ctr"])
def test_feature_column_with_a_name_of_the_joined_rows_is_refused(shop_content, name):
    # The joined rows have these columns already: a raw column of the same name would replace the label, for example.
    shop_content["tables"]["log"]["columns"].append({"name": name, "type": "string"})
    shop_content["features"].append({"name": "extra", "type": "categorical", "column": name})
    assert f"{name!r}" in error_of(shop_content)


def test_history_with_the_name_of_a_raw_column_is_refused(shop_content):
    # Both would be the same raw input of a serving request, once a list and once a single value.
    feature(shop_content, "recent_items")["name"] = "city"
    message = error_of(shop_content)
    assert "'city'" in message
    assert "history" in message


# --- Rules: what a column may be used for ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "column"),
    [
        ("label", "clicked"),
        ("intensity_label", "seconds"),
        ("intensity_value", "watched"),
        ("sample_weight", "weight"),
        ("event_time", "time"),
    ],
)
def test_held_out_column_as_feature_is_refused(shop_content, use, column):
    shop_content["tables"]["log"]["columns"].append({"name": "watched", "type": "float"})
    shop_content["intensity_value"] = "watched"
    shop_content["features"].append({"name": "leak", "type": "numeric", "column": column})
    message = error_of(shop_content)
    assert f"a column used as {use} cannot be a model input. Received: {column!r} in 'leak'" in message


def test_label_column_as_user_group_is_refused(shop_content):
    del shop_content["tables"]["user"], shop_content["user_groups"][1]
    shop_content["features"] = [feature(shop_content, "item")]
    shop_content["user_groups"][0]["column"] = "clicked"
    message = error_of(shop_content)
    assert "a column used as label cannot be a model input. Received: 'clicked' in 'age_group'" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("label", "liked == 1"),
        ("intensity_label", "liked > 3"),
        ("intensity_value", "liked"),
        ("sample_weight", "liked"),
    ],
)
def test_use_of_an_undeclared_column_names_the_declared_ones(shop_content, key, value):
    shop_content[key] = value
    message = error_of(shop_content)
    assert f"{key} must be a declared column. Received: 'liked'. Allowed: user_id, item_id, time" in message


def test_feature_of_an_undeclared_column_names_the_declared_ones(shop_content):
    feature(shop_content, "user_city")["column"] = "town"
    message = error_of(shop_content)
    assert "user_city must be a declared column. Received: 'town'. Allowed: user_id" in message
    assert "city" in message


def test_event_time_that_is_no_declared_column_is_refused(shop_content):
    shop_content["event_time"]["column"] = "when"
    assert "event_time must be a declared column. Received: 'when'" in error_of(shop_content)


@pytest.mark.parametrize("use", ["event_time", "label", "intensity_label", "intensity_value", "sample_weight"])
def test_what_describes_an_event_cannot_come_from_a_profile_table(shop_content, use):
    # A user without profile would give a row without event time, label or weight.
    shop_content["tables"]["user"]["columns"].append({"name": "since", "type": "int64"})
    if use == "event_time":
        shop_content["event_time"]["column"] = "since"
    else:
        shop_content[use] = "since" if use in ("intensity_value", "sample_weight") else "since > 0"
    message = error_of(shop_content)
    assert use in message
    assert "'since'" in message


def test_label_column_under_a_second_name_is_no_feature(shop_content):
    # Two columns of the spec that read the same column of the file: the second would leak the label.
    shop_content["tables"]["log"]["columns"].append({"name": "tapped", "type": "int64", "source_name": "clicked"})
    shop_content["features"].append({"name": "leak", "type": "numeric", "column": "tapped"})
    message = error_of(shop_content)
    assert "'clicked'" in message


def test_text_event_time_is_refused(shop_content):
    shop_content["tables"]["log"]["columns"][2]["type"] = "string"
    assert "the event time column must be int64 or float. Received: string" in error_of(shop_content)


def test_text_intensity_value_is_refused(shop_content):
    shop_content["tables"]["log"]["columns"].append({"name": "mood", "type": "string"})
    shop_content["intensity_value"] = "mood"
    assert "the intensity_value column must be int64 or float. Received: string" in error_of(shop_content)


@pytest.mark.parametrize("column", ["seconds", "clicked"])
def test_intensity_value_may_be_the_column_of_another_held_out_use(shop_content, column):
    # Reading for 20 seconds or more is the label, the seconds are the value.
    shop_content["intensity_value"] = column
    assert parse_spec(shop_content, "shop").intensity_value == column


def test_numeric_feature_of_text_is_refused(shop_content):
    feature(shop_content, "user_age")["column"] = "city"
    assert "numeric feature 'user_age' needs int64 or float. Received: string" in error_of(shop_content)


@pytest.mark.parametrize(("name", "kind"), [("user_city", "categorical"), ("item_tags", "multi_valued")])
def test_categorical_feature_of_float_is_refused(shop_content, name, kind):
    feature(shop_content, name)["column"] = "price"
    assert f"{kind} feature {name!r} needs string or int64. Received: float" in error_of(shop_content)


def test_vocabulary_together_with_hash_buckets_is_refused(shop_content):
    feature(shop_content, "item")["hash_buckets"] = 5
    message = error_of(shop_content)
    assert "give one of vocabulary, hash_buckets, hash and shares. Received: vocabulary, hash_buckets" in message


@pytest.mark.parametrize(
    "of",
    [
        "nothing",
        "user_city",  # Its column is in the user table: one value per user, no history.
        "item_tags",  # Not a categorical feature.
        "recent_items",
    ],
)
def test_history_of_anything_but_a_categorical_log_feature_is_refused(shop_content, of):
    feature(shop_content, "recent_items")["of"] = of
    message = error_of(shop_content)
    assert (
        f"history 'recent_items' needs a categorical feature of the log or of an item table. Received: of={of!r}"
        in message
    )
    assert "Allowed: ['user', 'item']" in message


# --- Rules: label, split, event time, groups -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "column", "operator", "value"),
    [
        ("rating >= 4", "rating", ">=", 4.0),
        ("rating<=4.5", "rating", "<=", 4.5),
        ("x == -1", "x", "==", -1.0),
        ("x != 0", "x", "!=", 0.0),
        ("  x > 0 ", "x", ">", 0.0),
        ("x < 10", "x", "<", 10.0),
        ("action == 'buy now'", "action", "==", "buy now"),
        ("action == ''", "action", "==", ""),
    ],
)
def test_label_expression_is_column_operator_value(expression, column, operator, value):
    assert Comparison.parse(expression) == Comparison(column, operator, value)


@pytest.mark.parametrize(
    "expression", ["", "clicked", "clicked = 1", "clicked == one", 'clicked == "1"', "1 == clicked", "a == 1 or b == 1"]
)
def test_bad_label_expression_names_operators_and_an_example(shop_content, expression):
    shop_content["label"] = expression
    message = error_of(shop_content)
    assert f"Received: {expression!r}" in message
    assert "Allowed operators: >= <= == != > <" in message
    assert "`rating >= 4`" in message


def test_bad_intensity_label_expression_is_refused(shop_content):
    shop_content["intensity_label"] = "seconds => 20"
    assert "Received: 'seconds => 20'" in error_of(shop_content)


@pytest.mark.parametrize(("key", "column"), [("label", "clicked"), ("intensity_label", "seconds")])
def test_number_column_compared_with_text_is_refused(shop_content, key, column):
    shop_content[key] = f"{column} == 'yes'"
    message = error_of(shop_content)
    assert f"{key} compares a" in message
    assert "column with 'yes'" in message


def test_text_column_compared_with_a_number_is_refused(shop_content):
    shop_content["tables"]["log"]["columns"][3]["type"] = "string"
    assert "label compares a string column with 1" in error_of(shop_content)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"train": 0.8, "validation": 0.1, "test": 0.2}, "train + validation + test must be 1. Received: 1.1"),
        ({"train": 0.9}, "train + validation + test must be 1. Received: 1.1"),
        ({"train": 0.0, "validation": 0.5, "test": 0.5}, "split.train: Input should be greater than 0. Received: 0.0"),
        ({"train": -0.1}, "Received: -0.1"),
        ({"test": 1.0}, "split.test: Input should be less than 1. Received: 1.0"),
        ({"validation_from": "2024-01-01T00:00:00"}, "validation_from and test_from go together. Received: one"),
        ({"test_from": "2024-01-01T00:00:00"}, "validation_from and test_from go together. Received: one"),
        (
            {"rule": "random", "validation_from": "2024-01-01T00:00:00", "test_from": "2024-02-01T00:00:00"},
            "cut-off dates need rule: time. Received: rule: random",
        ),
        (
            {"validation_from": "2024-02-01T00:00:00", "test_from": "2024-02-01T00:00:00"},
            "test_from must be after validation_from. Received: 2024-02-01 00:00:00+00:00 <= 2024",
        ),
        (
            {"until": "2024-03-01T00:00:00"},
            "until must come after test_from. Received: 2024-03-01 00:00:00+00:00 and No",
        ),
        (
            {
                "validation_from": "2024-01-01T00:00:00",
                "test_from": "2024-02-01T00:00:00",
                "until": "2024-02-01T00:00:00",
            },
            "until must come after test_from. Received: 2024-02-01 00:00:00+00:00 and 2024-02-01",
        ),
        (
            {"rule": "by_user"},
            "split.rule: Input should be 'time', 'random', 'user' or 'last_n_per_user'. Received: 'by_user'",
        ),
        ({"seed": -1}, "split.seed"),
    ],
)
def test_bad_split_is_refused(shop_content, split, message):
    shop_content["split"] = split
    assert message in error_of(shop_content)


def test_cut_off_dates_may_be_yaml_dates_or_date_times(shop_content):
    shop_content["split"] = yaml.safe_load(
        "{validation_from: 2024-01-01, test_from: 2024-02-01 12:30:00, until: 2024-03-01}"
    )
    split = parse_spec(shop_content, "shop").split
    assert split.validation_from.isoformat() == "2024-01-01T00:00:00+00:00"  # UTC unless it says otherwise.
    assert split.test_from.isoformat() == "2024-02-01T12:30:00+00:00"
    assert split.until.isoformat() == "2024-03-01T00:00:00+00:00"


def test_cut_offs_with_and_without_time_zone_are_compared_in_utc(shop_content):
    # 01:00 at +02:00 is 23:00 UTC of the day before: after 22:00, which is UTC.
    shop_content["split"] = {"validation_from": "2024-01-31T22:00:00", "test_from": "2024-02-01T01:00:00+02:00"}
    assert parse_spec(shop_content, "shop").split.test_from.isoformat() == "2024-02-01T01:00:00+02:00"
    shop_content["split"] = {"validation_from": "2024-01-31T23:00:00", "test_from": "2024-02-01T01:00:00+02:00"}
    assert "test_from must be after validation_from" in error_of(shop_content)


def test_event_time_range_that_is_empty_is_refused(shop_content):
    # Every row would be a bad row.
    shop_content["event_time"] |= {"earliest": "2024-01-01", "latest": "2024-01-01"}
    message = error_of(shop_content)
    assert "earliest" in message
    assert "2024-01-01" in message


def test_item_column_as_user_group_is_refused(shop_content):
    shop_content["user_groups"][0]["column"] = "price"
    message = error_of(shop_content)
    assert "user group 'age_group' must be a user-profile column. Received: 'price'" in message
    assert "Allowed: ['user_id', 'age', 'city']" in message


def test_item_key_as_user_group_of_a_wide_log_is_refused(shop_content):
    del shop_content["tables"]["user"], shop_content["user_groups"][0]
    shop_content["features"] = [feature(shop_content, "item")]
    shop_content["user_groups"][0]["column"] = "item_id"
    assert "must be a user-profile column. Received: 'item_id'" in error_of(shop_content)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"column": "age"}, "has either boundaries (numbers) or values (text). Received: both or none"),
        ({"column": "age", "boundaries": [1], "values": ["a"]}, "Received: both or none"),
        ({"column": "age", "boundaries": [30, 18]}, "boundaries must increase. Received: [30.0, 18.0]"),
        ({"column": "age", "boundaries": [18, 18]}, "boundaries must increase. Received: [18.0, 18.0]"),
        ({"column": "city", "values": ["Rome", "Rome"]}, "values must differ. Received: ['Rome', 'Rome']"),
        ({"column": "city", "boundaries": [1, 2]}, "numbers take boundaries. Received: column type string"),
        ({"column": "age", "values": ["18"]}, "numbers take boundaries. Received: column type int64"),
    ],
)
def test_bad_user_group_is_refused(shop_content, group, message):
    shop_content["user_groups"][0] = {"name": "age_group", **group}
    assert message in error_of(shop_content)


@pytest.mark.parametrize("label", ["unknown", "other", ""])
def test_user_group_value_that_stands_for_another_id_is_refused(shop_content, label):
    # "unknown" and "other" are the labels of the first and the last id: reports would merge two groups. "" is missing.
    shop_content["user_groups"][1]["values"] = ["Rome", label]
    assert f"{label!r}" in error_of(shop_content)


def test_group_labels_of_boundaries_name_the_intervals(shop_spec):
    assert shop_spec.user_groups[0].labels == ("unknown", "<18", "18-30.5", "30.5-60", ">=60")


def test_group_labels_of_large_boundaries_differ():
    labels = UserGroup(name="income", column="income", boundaries=(1_000_001.0, 1_000_002.0)).labels
    assert labels == ("unknown", "<1000001", "1000001-1000002", ">=1000002")


def test_group_labels_of_one_boundary_are_two_intervals():
    assert UserGroup(name="old", column="age", boundaries=(40.0,)).labels == ("unknown", "<40", ">=40")


def test_group_labels_of_values_end_with_other(shop_spec):
    assert shop_spec.user_groups[1].labels == ("unknown", "Rome", "Oslo", "other")


# --- What the spec says ----------------------------------------------------------------------------------------------


def test_model_inputs_have_sizes_worked_out_by_hand(shop_spec):
    inputs = shop_spec.model_inputs({"item": 5, "user_city": 3, "item_tags": 7})
    assert inputs == ModelInputs(
        categorical=(
            CategoricalInput("user", "user", 11),  # missing + 10 buckets
            CategoricalInput("item", "item", 8),  # missing + 2 out of vocabulary + 5 values
            CategoricalInput("user_city", "user_city", 5),  # missing + 1 + 3
            CategoricalInput("item_tags", "item_tags", 9, 3),  # missing + 1 + 7, up to 3 of them
            CategoricalInput("user_age", "user_age", 5),  # missing + 4 buckets
            CategoricalInput("recent_items", "item", 8, 3, history_of="item"),  # The vocabulary of item.
        ),
        numeric=("item_price",),
        groups=(
            GroupInput("age_group", ("unknown", "<18", "18-30.5", "30.5-60", ">=60")),
            GroupInput("city_group", ("unknown", "Rome", "Oslo", "other")),
        ),
        user_features=("user_city", "user_age"),
    )
    assert inputs.num_fields == 7  # 6 categorical + 1 numeric; groups are not fields.


def test_model_inputs_survive_their_dict_form(shop_spec):
    inputs = shop_spec.model_inputs({"item": 5, "user_city": 3, "item_tags": 7})
    assert ModelInputs.from_dict(inputs.to_dict()) == inputs


def test_user_features_are_single_values_of_the_profile_and_never_the_user_id(shop_content):
    lengths = {"item": 5, "user_city": 3, "item_tags": 7, "hobbies": 2}
    shop_content["tables"]["user"]["columns"].append({"name": "hobby", "type": "string"})
    shop_content["features"] += [
        {"name": "hobbies", "type": "multi_valued", "column": "hobby", "separator": "|"},
        {"name": "years", "type": "numeric", "column": "age"},
    ]
    inputs = parse_spec(shop_content, "shop").model_inputs(lengths)
    # Not: user (the id), hobbies (several values), anything of the item or the log.
    assert inputs.user_features == ("user_city", "user_age", "years")
    assert ModelInputs.from_dict(inputs.to_dict()) == inputs


def test_without_a_user_table_there_are_no_user_features(shop_content):
    del shop_content["tables"]["user"], shop_content["user_groups"]
    shop_content["features"] = [feature(shop_content, "item")]
    assert parse_spec(shop_content, "shop").model_inputs({"item": 5}).user_features == ()


def test_history_of_a_hashed_feature_shares_its_buckets(shop_content):
    feature(shop_content, "recent_items")["of"] = "user"
    inputs = parse_spec(shop_content, "shop").model_inputs({"item": 5, "user_city": 3, "item_tags": 7})
    assert inputs.categorical[-1] == CategoricalInput("recent_items", "user", 11, 3, history_of="user")


def _with_birth_city(content, **entry):
    content["tables"]["user"]["columns"].append({"name": "birth_city", "type": "string"})
    content["features"].append({"name": "user_birth_city", "column": "birth_city", "type": "categorical", **entry})
    return content


def test_a_feature_may_share_ids_and_table_of_another(shop_content):
    spec = parse_spec(_with_birth_city(shop_content, shares="user_city"), "shop")
    inputs = spec.model_inputs({"item": 5, "user_city": 3, "item_tags": 7})
    by_name = {entry.name: entry for entry in inputs.categorical}
    assert by_name["user_birth_city"] == dataclasses.replace(by_name["user_city"], name="user_birth_city")
    assert list(spec.vocabularies) == ["item", "user_city", "item_tags"]
    assert {"user_city", "user_birth_city"} < set(inputs.user_features)


@pytest.mark.parametrize("shares", ["user_birth_city", "user_age", "recent_items", "nothing"])
def test_only_a_feature_with_ids_of_its_own_can_be_shared(shop_content, shares):
    with pytest.raises(SpecError, match=rf"that has its own\. Received: shares='{shares}'\. Allowed: \['user', 'item'"):
        parse_spec(_with_birth_city(shop_content, shares=shares), "shop")


def test_a_history_knows_what_it_is_made_of_whoever_shares_its_table(shop_content):
    feature(shop_content, "recent_items")["of"] = "user_birth_city"
    _with_birth_city(shop_content, shares="user_city")
    shop_content["tables"]["log"]["columns"].append({"name": "birth_city", "type": "string"})
    shop_content["tables"]["user"]["columns"].pop()
    inputs = parse_spec(shop_content, "shop").model_inputs({"item": 5, "user_city": 3, "item_tags": 7})
    assert {entry.name: (entry.vocabulary, entry.history_of) for entry in inputs.categorical if entry.max_values} == {
        "item_tags": ("item_tags", None),
        "recent_items": ("user_city", "user_birth_city"),
    }


def test_a_spec_that_shares_nothing_has_the_fingerprint_that_it_had_before_sharing_existed(shop_spec):
    assert '"shares"' not in shop_spec.to_json()


def test_a_shared_feature_takes_no_encoding_of_its_own(shop_content):
    with pytest.raises(SpecError, match=r"give one of .* Received: hash_buckets, shares"):
        parse_spec(_with_birth_city(shop_content, shares="user_city", hash_buckets=5), "shop")


def test_raw_inputs_are_the_columns_of_features_and_groups_without_labels_and_time(shop_spec):
    assert shop_spec.raw_inputs == (
        RawInput("user_id", "string"),
        RawInput("item_id", "string"),
        RawInput("city", "string"),  # Once, although a feature and a group read it.
        RawInput("tags", "string"),
        RawInput("price", "float"),
        RawInput("age", "int64"),
        RawInput("recent_items", "string", is_list=True),
    )


def test_vocabularies_leave_hashed_features_out(shop_spec):
    rules = shop_spec.vocabularies
    assert list(rules) == ["item", "user_city", "item_tags"]
    assert rules["item"].num_oov_indices == 2
    assert rules["user_city"] == Vocabulary()


# --- Fingerprint -----------------------------------------------------------------------------------------------------


def test_fingerprint_does_not_depend_on_the_order_of_keys(shop_content, shop_spec):
    def shuffled(node):
        if isinstance(node, dict):
            entries = list(node.items())
            random.Random(5).shuffle(entries)
            return {key: shuffled(value) for key, value in entries}
        return [shuffled(entry) for entry in node] if isinstance(node, list) else node

    assert list(shuffled(shop_content)) != list(shop_content)
    assert parse_spec(shuffled(shop_content), "shop").fingerprint == shop_spec.fingerprint


def test_fingerprint_is_the_same_with_defaults_written_out(shop_content, shop_spec):
    shop_content["split"] = {"rule": "time", "train": 0.8, "validation": 0.1, "test": 0.1, "seed": 0}
    feature(shop_content, "user_age")["log1p"] = False
    assert parse_spec(shop_content, "shop").fingerprint == shop_spec.fingerprint


def test_fingerprint_is_the_same_after_a_round_trip_through_json(shop_spec):
    again = FeatureSpec.model_validate_json(shop_spec.to_json())
    assert again == shop_spec
    assert again.fingerprint == shop_spec.fingerprint
    assert re.fullmatch(r"[0-9a-f]{16}", again.fingerprint)


def test_fingerprint_is_the_same_in_another_process():
    here = feature_specs.get_spec("movielens_100k").fingerprint
    code = "import feature_specs; print(feature_specs.get_spec('movielens_100k').fingerprint)"
    assert run_python(code, PYTHONHASHSEED="77").stdout.strip() == here


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("label",), "clicked != 0"),
        (("split",), {"seed": 1}),
        (("intensity_value",), "seconds"),
        (("event_time", "unit"), "milliseconds"),
        (("features", 0, "hash_buckets"), 11),
        (("features", 6, "max_length"), 4),
        (("user_groups", 0, "boundaries"), [18, 30.5, 61]),
        (("tables", "log", "path"), "log2.csv"),
    ],
)
def test_fingerprint_changes_with_the_content(shop_content, shop_spec, path, value):
    node = shop_content
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    assert parse_spec(shop_content, "shop").fingerprint != shop_spec.fingerprint


def test_fingerprint_changes_with_the_order_of_features(shop_content, shop_spec):
    changed = copy.deepcopy(shop_content)
    changed["features"].reverse()
    assert parse_spec(changed, "shop").fingerprint != shop_spec.fingerprint


# --- Finding specs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", feature_specs.spec_names())
def test_specs_that_come_with_the_package_are_valid(name):
    assert feature_specs.get_spec(name).name == name


def test_the_specs_of_the_readme_come_with_the_package():
    assert {"movielens_100k", "movielens_100k_tfds", "simulated_feed"} <= set(feature_specs.spec_names())


def test_spec_outside_the_package_works_the_same_as_a_name(tmp_path):
    named = feature_specs.get_spec("simulated_feed")
    path = tmp_path / "elsewhere.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(named.to_json())), encoding="utf-8")
    by_path = feature_specs.get_spec(str(path))
    assert by_path == named
    assert by_path.fingerprint == named.fingerprint


def test_relative_path_of_a_spec_is_found(tmp_path, monkeypatch, shop_content, shop_spec):
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(shop_content), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert feature_specs.get_spec("shop.yaml") == shop_spec


def test_unknown_spec_name_lists_the_known_names():
    with pytest.raises(ValueError, match=r"Received: 'movielens'\. Known names:") as caught:
        feature_specs.get_spec("movielens")
    for name in ("movielens_100k", "movielens_100k_tfds", "simulated_feed"):
        assert name in str(caught.value)


def test_load_spec_of_an_absent_file_names_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Received: .*none\.yaml, which does not exist"):
        load_spec(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- a\n- b\n", "must be a mapping of keys to values. Received: list"),
        ("", "name: Field required"),
    ],
)
def test_file_that_holds_no_mapping_is_refused_with_its_path(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    assert message in str(caught.value)
    assert "bad.yaml" in str(caught.value)


# --- Imports and the Keras guard -------------------------------------------------------------------------------------


def test_importing_the_features_imports_no_tensorflow():
    code = (
        "import sys, clsd_tf.spec.feature_spec, feature_specs; "
        "print({'tensorflow', 'keras', 'tf_keras'} & set(sys.modules))"
    )
    result = run_python(code)
    assert result.stdout.strip() == "set()", result.stderr


def test_importing_clsd_tf_selects_legacy_keras():
    code = "import clsd_tf, os; print(os.environ['TF_USE_LEGACY_KERAS'])"
    environment = {name: value for name, value in os.environ.items() if name != "TF_USE_LEGACY_KERAS"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "1", result.stderr


@pytest.mark.parametrize("value", ["0", "false", ""])
def test_import_with_legacy_keras_switched_off_raises_import_error_with_a_remedy(value):
    result = run_python("import clsd_tf", TF_USE_LEGACY_KERAS=value)
    assert result.returncode != 0
    assert "ImportError" in result.stderr
    assert f"Received: TF_USE_LEGACY_KERAS={value}" in result.stderr
    assert "Set the environment variable TF_USE_LEGACY_KERAS=1" in result.stderr


def test_import_after_keras_3_was_touched_raises_import_error_with_a_remedy():
    code = """
import os
os.environ.pop("TF_USE_LEGACY_KERAS", None)
import tensorflow as tf
assert tf.keras.__version__.startswith("3")
import clsd_tf
"""
    result = run_python(code)
    assert result.returncode != 0
    assert "ImportError: clsd_tf was imported too late. Received: tf.keras version 3" in result.stderr
    assert "import clsd_tf before tensorflow's Keras is used" in result.stderr


@pytest.mark.parametrize(
    ("file_format", "delimiter"), [("tsv", ";"), ("parquet", ";"), ("csv", '"'), ("csv", "ab"), ("csv", "\n")]
)
def test_only_csv_has_a_delimiter_of_one_character(shop_content, file_format, delimiter):
    shop_content["tables"]["log"] |= {"format": file_format, "delimiter": delimiter}
    with pytest.raises(SpecError, match="delimiter"):
        parse_spec(shop_content, "shop")
