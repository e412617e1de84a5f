"""The rules of a feature spec: each is broken by a spec that keeps the rules before it."""

import inspect

import pytest

from clsd_tf.spec import spec_rules
from clsd_tf.spec.declared_spec import DeclaredSpec
from clsd_tf.spec.feature_base import BaseFeature
from clsd_tf.spec.record_fields import RECORD_FIELDS, RESERVED_NAMES, names_of
from clsd_tf.spec.spec_rules import RULES


def declared(content):
    return DeclaredSpec.model_validate(content, strict=False)


def column(content, name):
    return next(entry for table in content["tables"].values() for entry in table["columns"] if entry["name"] == name)


def feature(content, name):
    return next(entry for entry in content["features"] if entry["name"] == name)


def add(content, **entry):
    content["features"].append({"name": "added", **entry})


def add_window(content, **entry):
    add(content, type="window", **{"aggregate": "count", **entry})


# Rule -> what is done to the shop's spec so that it breaks this rule first.
BREAKS = {
    spec_rules.names_are_unique: lambda shop: add(shop, name="item", type="categorical", column="item_id"),
    spec_rules.names_are_not_reserved: lambda shop: add(shop, name="row_id", type="categorical", column="item_id"),
    spec_rules.tables_are_joined_by_their_key: lambda shop: shop["tables"]["user"].update(key="city"),
    spec_rules.keys_have_one_type: lambda shop: shop["tables"]["user"]["columns"][0].update(type="int64"),
    spec_rules.only_the_log_comes_from_tfds: lambda shop: shop["tables"]["user"].update(format="tfds"),
    spec_rules.state_tables_have_valid_from: lambda shop: shop["tables"].update(user_state=shop["tables"].pop("user")),
    spec_rules.the_log_has_no_valid_from: lambda shop: shop["tables"]["log"].update(valid_from=shop["event_time"]),
    spec_rules.valid_from_is_a_number_of_its_table: lambda shop: shop["tables"]["user"].update(
        valid_from={"column": "city", "unit": "seconds"}
    ),
    spec_rules.column_names_are_unique: lambda shop: shop["tables"]["user"]["columns"].append(
        {"name": "seconds", "type": "float"}
    ),
    spec_rules.keys_are_columns_of_the_log: lambda shop: column(shop, "item_id").update(name="thing"),
    spec_rules.the_log_describes_events: lambda shop: shop.update(label="age == 30"),
    spec_rules.inputs_are_columns: lambda shop: feature(shop, "item").update(column="nothing"),
    spec_rules.inputs_are_not_sensitive: lambda shop: column(shop, "city").update(sensitive=True),
    spec_rules.inputs_are_not_held_out: lambda shop: add(shop, type="numeric", column="seconds"),
    spec_rules.sensitive_columns_are_not_in_datasets: lambda shop: column(shop, "weight").update(sensitive=True),
    spec_rules.sensitive_user_keys_are_salted: lambda shop: (
        column(shop, "user_id").update(sensitive=True),
        shop["features"].pop(0),
    ),
    spec_rules.hashed_user_keys_are_text: lambda shop: (
        shop.update(user_id_salt_env="SALT"),
        [shop["tables"][table]["columns"][0].update(type="int64") for table in ("log", "user")],
    ),
    spec_rules.event_times_are_numbers: lambda shop: column(shop, "time").update(type="string"),
    spec_rules.intensity_values_are_numbers: lambda shop: (
        shop.update(intensity_value="note"),
        shop["tables"]["log"]["columns"].append({"name": "note", "type": "string"}),
    ),
    spec_rules.features_have_a_type_that_they_can_read: lambda shop: add(shop, type="numeric", column="city"),
    spec_rules.past_events_are_chosen_by_the_log: lambda shop: add_window(shop, where="age == 30"),
    spec_rules.histories_are_of_events: lambda shop: feature(shop, "recent_items").update(of="user_city"),
    spec_rules.means_of_windows_are_of_numbers: lambda shop: add_window(shop, aggregate="mean", value="item_id"),
    spec_rules.labels_are_compared_with_their_type: lambda shop: shop.update(label="clicked == 'yes'"),
    spec_rules.shared_ids_are_of_a_feature_that_has_its_own: lambda shop: add(
        shop, type="categorical", column="city", shares="item_price"
    ),
    spec_rules.raw_inputs_are_not_named_like_record_fields: lambda shop: (
        column(shop, "city").update(name="ctr"),
        [entry.update(column="ctr") for entry in (feature(shop, "user_city"), shop["user_groups"][1])],
    ),
    spec_rules.features_of_past_events_are_not_named_like_columns: lambda shop: add_window(shop, name="price"),
    spec_rules.user_groups_are_of_user_profiles: lambda shop: shop["user_groups"][0].update(column="price"),
    spec_rules.user_groups_fit_the_type_of_their_column: lambda shop: shop["user_groups"][0].update(column="city"),
    spec_rules.expectations_are_of_inputs: lambda shop: column(shop, "weight").update(expect={"min": 0}),
    spec_rules.user_ids_are_expected_to_be_there: lambda shop: column(shop, "user_id").update(
        expect={"values": ["u1"]}
    ),
}


def broken_rules(spec):
    """Names of the rules that a spec breaks, up to the first."""
    for rule in RULES:
        try:
            rule(spec)
        except ValueError:
            return rule
    return None


def test_the_shop_keeps_all_rules(shop_content):
    assert broken_rules(declared(shop_content)) is None


@pytest.mark.parametrize("rule", BREAKS, ids=lambda rule: rule.__name__)
def test_each_rule_is_the_first_that_some_spec_breaks(rule, shop_content):
    BREAKS[rule](shop_content)
    assert broken_rules(declared(shop_content)) is rule


def test_every_rule_is_listed_and_has_a_spec_that_breaks_it():
    functions = [function for _, function in inspect.getmembers(spec_rules, inspect.isfunction)]
    written = {function for function in functions if function.__module__ == spec_rules.__name__}
    assert {rule for rule in written if not rule.__name__.startswith("_")} == set(RULES)
    assert list(BREAKS) == list(RULES)


# --- Sides and record fields -----------------------------------------------------------------------------------------


def test_each_column_and_raw_input_tells_of_the_user_the_item_or_the_moment(shop_content):
    shop_content["tables"]["item_state"] = {
        "path": "x.csv", "format": "csv", "key": "item_id",
        "columns": [{"name": "item_id", "type": "string"}, {"name": "since", "type": "int64"}],
        "valid_from": {"column": "since", "unit": "seconds"},
    }  # fmt: skip
    assert declared(shop_content).sides == {
        "recent_items": "user",
        "user_id": "user",
        "age": "user",
        "city": "user",
        "item_id": "item",
        "tags": "item",
        "price": "item",
        "since": "item",
        **dict.fromkeys(["time", "clicked", "seconds", "weight"], "context"),
    }


def test_every_record_field_is_reserved_and_has_one_purpose():
    names = [entry.name for entry in RECORD_FIELDS]
    assert set(names) | {"teacher_score"} == set(RESERVED_NAMES)
    assert names_of("label") == ["label"]
    assert names_of("label", "weight", "row_id", "held_out") == names
    assert names_of("held_out") == ["intensity_label", "intensity_value", "user_hash", "event_time"]


def test_a_kind_of_feature_that_leaves_a_question_open_cannot_be_made():
    class Unfinished(BaseFeature):
        @property
        def raw_name(self):
            return self.name

    with pytest.raises(TypeError, match=r"categorical_input.*counted_as.*meaning"):
        Unfinished(name="x")
