"""By what rules a build is refused, from counts alone."""

import pytest

from pipelines.rows.outcome import BadInputError, account, require_unique_keys, table_counts


def counts_of(read, written, dead):
    log = {"rows": read, "bad": {"not_int64:clicked": dead}}
    return {"tables": {"log": log}, "splits": {"train": {"rows": written - 1}, "test": {"rows": 1}}}


def test_every_row_that_was_read_is_accounted_for():
    found = account(counts_of(20, 12, 3), {"duplicates_dropped": 4, "left_out": 1})
    assert found == {"read": 20, "written": 12, "dead_lettered": 3, "duplicates_dropped": 4, "left_out": 1}


@pytest.mark.parametrize("read", [19, 21])
def test_a_row_too_many_or_too_few_ends_the_build(read):
    with pytest.raises(RuntimeError, match=f"rows were lost. Received: {read} rows read"):
        account(counts_of(read, 12, 3), {"duplicates_dropped": 4, "left_out": 1})


def test_a_file_that_ends_early_is_refused_by_name():
    with pytest.raises(
        BadInputError, match=r"readable to its end\. Received: tables\.log, a/b\.gz: cut off, after row 7"
    ):
        table_counts({"log/rows": 7, "log/unreadable/a/b.gz: cut off, after row 7": 1}, ["log"])


def test_repeated_keys_of_all_users_are_counted_and_the_first_pair_is_shown(shop_spec):
    found = {"user/duplicates/9/12": 1, "user/duplicates/3/4": 2, "user_profile_missing": 5}
    with pytest.raises(BadInputError, match=r"row 3 of u\.csv and row 4 of u\.csv with the same user_id \(3 such"):
        require_unique_keys(found, shop_spec, {("user", 0): "u.csv"})
