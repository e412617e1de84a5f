"""Registries: built-in names are imported late, a user's own stand beside them."""

import sys

import pytest

from clsd_tf.plugins.registry import Registry


def fruit():
    return Registry("fruit", {"apple": "json:dumps", "pear": "a_module_that_is_not_there:pear"})


def test_built_in_objects_are_imported_when_they_are_asked_for():
    registry = Registry("codec", {"late": "encodings.rot_13:rot13_map"})
    sys.modules.pop("encodings.rot_13", None)
    assert "late" in registry
    assert "encodings.rot_13" not in sys.modules
    assert registry["late"] is sys.modules["encodings.rot_13"].rot13_map


def test_a_registered_object_is_found_and_listed_behind_the_built_in_ones():
    registry = fruit()

    @registry.register("cherry")
    def cherry():
        return "red"

    assert registry["cherry"] is cherry
    assert list(registry) == ["apple", "pear", "cherry"]
    assert len(registry) == 3


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match=r"fruit of this name is registered already. Received: 'apple'"):
        fruit().register("apple")(object())


def test_an_unknown_name_is_refused_with_the_known_ones_and_the_flag_for_others():
    message = r"unknown fruit. Received: 'plum'. Allowed: apple, pear; those of your own module with --plugin=<module>"
    with pytest.raises(ValueError, match=message):
        fruit()["plum"]


def test_a_removed_name_may_be_registered_again():
    registry = fruit()
    del registry["apple"]
    assert "apple" not in registry
    registry.register("apple")("mine")
    assert registry["apple"] == "mine"
