"""Which directory names are versions: those that TF Serving reads as int64, for every reader of ours alike."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clsd_tf.serving.servable import version_directory
from clsd_tf.serving.versions import MAX_VERSION, version_number, versions_on_disk


@pytest.mark.parametrize(
    ("name", "number"),
    [("7", 7), ("00000123", 123), ("0" * 30 + "7", 7), ("-5", -5), (" 7 ", 7), ("9223372036854775807", MAX_VERSION),
     ("-9223372036854775808", -MAX_VERSION - 1), ("9223372036854775808", None), ("-9223372036854775809", None),
     ("9999999999999999999", None), ("9" * 255, None), ("v1", None), ("0.1", None), ("1e3", None), ("", None),
     ("-", None), ("- 5", None), ("+5", None), ("\u0661", None), ("\u00b2", None), ("\u00a07", None), ("1_000", None)],
)  # fmt: skip
def test_version_names_are_those_that_int64_parses(name, number):
    assert version_number(name) == number


@given(st.integers())
def test_every_int64_is_a_version_and_no_other_number(number):
    assert version_number(str(number)) == (number if -(2**63) <= number < 2**63 else None)


def model_with(directory, *names):
    for name in names:
        (directory / name).mkdir()
        (directory / name / "saved_model.pb").touch()
    return directory


def test_versions_ascend_by_number_and_files_are_none(tmp_path):
    model_with(tmp_path, "10", "9", "-1", "9999999999999999999", ".11.incomplete-0a1b2c3d")
    (tmp_path / "12").touch()
    assert list(versions_on_disk(tmp_path)) == [-1, 9, 10]
    assert versions_on_disk(tmp_path)[9] == tmp_path / "9"
    assert versions_on_disk(tmp_path / "absent") == {}


def test_of_two_names_of_one_number_the_last_counts(tmp_path):
    assert versions_on_disk(model_with(tmp_path, "7", "007", "07")) == {7: tmp_path / "7"}


def test_the_largest_version_with_a_model_is_taken(tmp_path):
    model_with(tmp_path, "2", "10", "9999999999999999999")
    (tmp_path / "11").mkdir()
    assert version_directory(tmp_path) == tmp_path / "10"


def test_a_model_whose_only_names_are_beyond_int64_has_no_version(tmp_path):
    with pytest.raises(FileNotFoundError, match="numbered versions"):
        version_directory(model_with(tmp_path, "9999999999999999999"))
