"""Tables of a study: paired differences, families of tests, and what Markdown and HTML make of them."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from clsd_tf.metrics.table import metrics_in
from clsd_tf.study.tables import (
    GridTables,
    compare,
    group_table,
    markdown_table,
    overall,
    render_groups_markdown,
    render_html,
    render_markdown,
    summary_table,
)
from clsd_tf.study.tables import tests_table as table_of_tests  # Under its own name pytest would run it.

BCE = [0.70, 0.72, 0.71]
CLSD = [0.71, 0.75, 0.715]
# Differences .01, .03, .005: mean .015, sd sqrt(.000175) = .013229, standard error .007638.
DIFFERENCE, STANDARD_ERROR = 0.015, 0.0076376


def measured(method, values, *, metric="auc", data="feed", backbone="lr", part="overall", first_seed=1):
    key = {"data": data, "backbone": backbone, "method": method, "slice": part, "metric": metric}
    return [{**key, "seed": seed, "value": value} for seed, value in enumerate(values, start=first_seed)]


def row_of(rows, method, metric="auc", part="overall"):
    (row,) = [row for row in rows if (row.method, row.metric, row.place[2]) == (method, metric, part)]
    return row


# Comparison.


def test_differences_to_the_baseline_are_paired_by_seed():
    rows = compare([*measured("bce", BCE), *reversed(measured("clsd", CLSD))])  # In whatever order they come.
    bce, clsd = row_of(rows, "bce"), row_of(rows, "clsd")
    assert (bce.mean, bce.num_seeds) == (pytest.approx(0.71), 3)
    assert bce.std == pytest.approx(0.01)
    assert clsd.mean == pytest.approx(0.725)
    assert clsd.difference.mean == pytest.approx(DIFFERENCE)
    assert clsd.difference.standard_error == pytest.approx(STANDARD_ERROR, abs=1e-6)
    expected = stats.ttest_rel(CLSD, BCE)
    assert clsd.difference.t_p_value == pytest.approx(expected.pvalue)
    assert clsd.difference.confidence_interval == pytest.approx(expected.confidence_interval())
    # Eight sign flips, of which two sum to .045 or -.045.
    assert clsd.difference.permutation_p_value == 0.25
    # (.725 - .5) / (.71 - .5) - 1.
    assert clsd.lift == pytest.approx(0.225 / 0.21 - 1)


def test_the_baseline_is_compared_with_nothing():
    bce = row_of(compare([*measured("bce", BCE), *measured("clsd", CLSD)]), "bce")
    assert bce.difference is bce.holm_p is bce.lift is None


def test_only_seeds_that_both_have_are_paired():
    # Seeds 1 to 3 of the baseline; seeds 2 to 4 of clsd. A guard stopped the others.
    clsd = row_of(compare([*measured("bce", BCE), *measured("clsd", [0.75, 0.715, 0.9], first_seed=2)]), "clsd")
    assert clsd.num_seeds == 3
    assert clsd.mean == pytest.approx((0.75 + 0.715 + 0.9) / 3)
    assert clsd.difference.num_pairs == 2
    assert clsd.difference.mean == pytest.approx((0.03 + 0.005) / 2)
    # RelaImpr of the pairs: baseline (.72 + .71) / 2.
    assert clsd.lift == pytest.approx((0.7325 - 0.5) / (0.715 - 0.5) - 1)


def test_without_a_common_seed_there_is_no_difference():
    rows = compare([*measured("bce", [0.7]), *measured("clsd", [0.75], first_seed=2), *measured("x", [0.8])])
    assert row_of(rows, "clsd").difference is None
    assert row_of(rows, "clsd").holm_p is None
    assert row_of(rows, "x").difference.num_pairs == 1
    assert row_of(rows, "x").std is None
    assert row_of(rows, "x").holm_p is None  # One pair has no test.


def test_runs_are_compared_with_the_baseline_of_their_own_place():
    results = [
        *measured("bce", [0.7]), *measured("bce", [0.6], data="other"), *measured("bce", [0.5], backbone="fm"),
        *measured("bce", [0.4], part="age_group=<18"), *measured("bce", [0.3], metric="pcoc"),
        *measured("clsd", [0.8]), *measured("clsd", [0.8], data="other"), *measured("clsd", [0.8], backbone="fm"),
        *measured("clsd", [0.8], part="age_group=<18"), *measured("clsd", [0.8], metric="pcoc"),
    ]  # fmt: skip
    found = [row.difference.mean for row in compare(results) if row.method == "clsd"]
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


@given(
    st.lists(
        st.tuples(st.sampled_from(["bce", "a", "b"]), st.integers(1, 6), st.floats(0.5, 0.875, width=16)),
        max_size=30,
        unique_by=lambda entry: entry[:2],
    )
)
def test_every_comparison_equals_scipys_paired_test_of_the_common_seeds(entries):
    rows = compare([row for method, seed, value in entries for row in measured(method, [value], first_seed=seed)])
    by_method = {method: {seed: value for name, seed, value in entries if name == method} for method in ("bce", "a")}
    common = sorted(by_method["bce"].keys() & by_method["a"].keys())
    if not by_method["a"]:
        assert not [row for row in rows if row.method == "a"]
        return
    found = row_of(rows, "a")
    assert found.mean == pytest.approx(np.mean(list(by_method["a"].values())))
    assert (found.difference is None) == (not common)
    if len(common) > 1:
        one, other = ([by_method[method][seed] for seed in common] for method in ("a", "bce"))
        assert found.difference.mean == pytest.approx(np.mean(one) - np.mean(other), abs=1e-12)
        if np.std(np.subtract(one, other)) > 1e-6:
            assert found.difference.t_p_value == pytest.approx(stats.ttest_rel(one, other).pvalue, rel=1e-6)


def test_relaimpr_is_that_of_aucs_alone():
    names = [metric.name for metric in metrics_in("study")]
    aucs, others = [name for name in names if "auc" in name], [name for name in names if "auc" not in name]
    assert len(aucs) == 7
    assert len(others) == 6
    for metric in (*aucs, *others):
        found = row_of(
            compare([*measured("bce", [0.6], metric=metric), *measured("x", [0.7], metric=metric)]), "x", metric
        )
        assert found.lift == (pytest.approx(1.0) if metric in aucs else None), metric  # .2 / .1 - 1.


# Families of tests.


def test_a_family_is_one_metric_of_one_grid_over_all_data_backbones_and_methods():
    clear, weak = [0.80, 0.821, 0.811], [0.71, 0.75, 0.715]
    rows = compare(
        [
            *measured("bce", BCE), *measured("clear", clear), *measured("weak", weak),
            *measured("bce", BCE, backbone="fm"), *measured("weak", weak, backbone="fm"),
            *measured("bce", BCE, metric="pcoc"), *measured("clear", clear, metric="pcoc"),
        ]
    )  # fmt: skip
    p_clear, p_weak = (stats.ttest_rel(values, BCE).pvalue for values in (clear, weak))
    assert p_clear < p_weak
    auc = [row for row in rows if row.metric == "auc" and row.difference is not None]
    # Three tests: the smallest p counts three times, the next twice, and none below the one before it.
    expected = [3 * p_clear, min(1.0, 2 * p_weak), min(1.0, 2 * p_weak)]
    assert [row.holm_p for row in auc] == pytest.approx(expected)
    assert row_of(rows, "clear", "pcoc").holm_p == pytest.approx(p_clear)  # Alone in its family.


def test_the_slices_of_a_table_are_families_of_their_own():
    results = [
        row
        for part in ("overall", "age_group=<18", "age_group=18-30")
        for method, values in (("bce", BCE), ("clsd", CLSD))
        for row in measured(method, values, part=part)
    ]
    p_value = stats.ttest_rel(CLSD, BCE).pvalue
    assert [row.holm_p for row in compare(results) if row.method == "clsd"] == pytest.approx([p_value] * 3)


# Tables.


@pytest.fixture
def rows():
    return compare(
        [
            *measured("bce", BCE), *measured("bce", [1.0, 1.1, 0.9], metric="pcoc"),
            *measured("clsd", CLSD), *measured("clsd", [0.9, 1.0, 0.8], metric="pcoc"),
            *measured("bce", [0.6, 0.62, 0.61], part="age_group=<18"),
            *measured("clsd", [0.7, 0.72, 0.71], part="age_group=<18"),
            *measured("bce", [0.1, 0.1, 0.1], metric="click_noise_floor", part="age_group=<18"),
            *measured("clsd", [0.2, 0.2, 0.2], metric="click_noise_floor", part="age_group=<18"),
        ]
    )  # fmt: skip


def test_the_summary_has_a_line_of_means_and_one_of_differences(rows):
    columns, lines = summary_table(overall(rows))
    assert columns == ["data", "backbone", "method", "AUC", "PCOC"]  # Metrics that were measured.
    assert lines[0] == ["feed", "lr", "bce", "0.7100 (0.0100)", "1.0000 (0.1000)"]
    assert lines[1] == ["feed", "lr", "clsd", "0.7250 (0.0218)", "0.9000 (0.1000)"]
    # All differences of PCOC are -.1: three stars.
    assert lines[2] == ["", "", "minus bce", "+0.0150 +- 0.0076", "-0.1000 +- 0.0000***"]
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("p_value", "stars"),
    [(0.2, ""), (0.0501, ""), (0.0499, "*"), (0.0101, "*"), (0.0099, "**"), (0.00101, "**"), (0.00099, "***")],
)
def test_stars_stand_for_adjusted_p_values(p_value, stars):
    # With two pairs t = mean / error has one degree of freedom: p = 1 - 2 / pi * atan(t).
    error = 0.1 / np.tan((1 - p_value) * np.pi / 2)
    _, lines = summary_table(compare([*measured("bce", [0.7, 0.7]), *measured("clsd", [0.8 - error, 0.8 + error])]))
    assert lines[-1][-1] == f"+0.1000 +- {error:.4f}{stars}"


def test_a_metric_that_is_not_defined_is_a_dash():
    rows = compare([*measured("bce", [0.7]), *measured("clsd", [0.8]), *measured("bce", [0.5], metric="gauc")])
    _, lines = summary_table(rows)
    assert lines == [
        ["feed", "lr", "bce", "0.7000", "0.5000"],
        ["feed", "lr", "clsd", "0.8000", "-"],
        ["", "", "minus bce", "+0.1000 +- n/a", "-"],
    ]


def test_the_tests_table_has_a_line_for_each_comparison_of_a_tested_metric(rows):
    columns, lines = table_of_tests(overall(rows))
    expected = stats.ttest_rel(CLSD, BCE)
    low, high = expected.confidence_interval()
    (line,) = lines  # PCOC is shown, not tested.
    assert dict(zip(columns, line, strict=True)) == {
        "data": "feed",
        "backbone": "lr",
        "method": "clsd",
        "metric": "AUC",
        "difference": "+0.0150 +- 0.0076",
        "95 % interval": f"[{low:+.4f}, {high:+.4f}]",
        "RelaImpr": "+7.14%",
        "p (t)": f"{expected.pvalue:.4f}",
        "p (permutation)": "0.2500",
        "p (t, Holm)": f"{expected.pvalue:.4f}",
        "p (permutation, Holm)": "0.2500",
        "pairs": "3",
        "± over users": "",
    }


def test_both_tests_are_adjusted_for_the_comparisons_of_their_metric():
    changes = {"clsd": [0.01, 0.02, 0.03], "x": [0.02, 0.01, -0.03], "y": [0.01, 0.01, 0.02]}
    results = measured("bce", BCE)
    for method, change in changes.items():
        results += measured(method, [value + added for value, added in zip(BCE, change, strict=True)])
    found = {row.method: row for row in compare(results)}
    # All signs equal: 2 of 8 flips, times 3; mixed signs, no difference at all: every flip.
    assert [found[name].difference.permutation_p_value for name in changes] == [0.25, 1.0, 0.25]
    assert [found[name].holm_permutation_p for name in changes] == [0.75, 1.0, 0.75]
    smallest = min(found[name].difference.t_p_value for name in changes)
    assert min(found[name].holm_p for name in changes) == pytest.approx(min(1.0, 3 * smallest))


def test_any_method_may_be_the_baseline():
    rows = compare([*measured("bce", BCE), *measured("clsd", CLSD)], baseline="clsd")
    assert row_of(rows, "clsd").difference is None
    assert row_of(rows, "bce").difference.mean == pytest.approx(-DIFFERENCE)
    _, lines = summary_table(rows)
    assert [line[2] for line in lines] == ["bce", "minus clsd", "clsd"]


def test_a_method_of_which_runs_were_stopped_says_how_many_seeds_it_has():
    _, lines = summary_table(compare([*measured("bce", BCE), *measured("clsd", [0.73], first_seed=3)]))
    assert [line[2] for line in lines] == ["bce", "clsd (1 of 3 seeds)", "minus bce"]
    assert lines[-1][-1].startswith("+0.0200")  # Seed 3 alone, though the mean over bce's seeds is as high.


def test_errors_over_users_stand_with_the_comparison_they_are_of():
    results = [*measured("bce", BCE), *measured("clsd", CLSD), *measured("clsd", CLSD, part="age_group=<18")]
    rows = compare(results, {("feed", "lr", "clsd", "auc"): 0.01234, ("feed", "fm", "clsd", "auc"): 9.0})
    assert [row.user_error for row in rows] == [None, 0.01234, None]
    columns, (line,) = table_of_tests(overall(rows))
    assert dict(zip(columns, line, strict=True))["± over users"] == "0.0123"


def test_a_comparison_of_one_pair_has_no_p_value():
    _, lines = table_of_tests(compare([*measured("bce", [0.7]), *measured("clsd", [0.8])]))
    assert lines == [["feed", "lr", "clsd", "AUC", "+0.1000 +- n/a", "", "+50.00%", "", "", "", "", "1", ""]]


def test_tiny_p_values_are_not_written_as_0():
    values = [value + 0.1 + 1e-7 * seed for seed, value in enumerate(BCE)]
    columns, (line,) = table_of_tests(compare([*measured("bce", BCE), *measured("clsd", values)]))
    found = dict(zip(columns, line, strict=True))["p (t)"]
    assert float(found) == pytest.approx(stats.ttest_rel(values, BCE).pvalue, rel=0.5)
    assert 0 < float(found) < 1e-4


def test_groups_have_means_and_differences_in_one_line(rows):
    columns, lines = group_table(rows)
    assert columns == ["data", "backbone", "group", "method", "AUC", "click noise floor"]
    assert lines == [
        ["feed", "lr", "age_group=<18", "bce", "0.6100 (0.0100)", "0.1000 (0.0000)"],
        # Weighting bends low predictions: the lowest scores of such a method tell nothing of accidental clicks.
        ["feed", "lr", "age_group=<18", "clsd", "0.7100 (0.0100); +0.1000 +- 0.0000***", ""],
    ]


def test_without_user_groups_there_is_no_group_table(rows):
    assert group_table(overall(rows))[1] == []
    assert "### Grid" not in render_groups_markdown({}, [GridTables("Grid", overall(rows))])


# Markdown and HTML.

FACTS = {"command": "python -m pipelines.study", "seeds": "1 to 3, paired"}
NOTES = ["feed lr both seed 2 was stopped: mean ctr must not fall"]


def cells_of(line):
    """Cells of a Markdown line, as a renderer reads them."""
    cells = re.split(r"(?<!\\)\|", line.strip())[1:-1]
    return [re.sub(r"\\([*|])", r"\1", cell.strip()) for cell in cells]


@given(st.lists(st.lists(st.text("ab*|_ <", min_size=1), min_size=2, max_size=2), min_size=1))
def test_markdown_tables_keep_their_shape_and_their_text(lines):
    text = markdown_table(["one", "two"], lines)
    head, rule, *body = text.splitlines()
    assert cells_of(head) == ["one", "two"]
    assert cells_of(rule) == ["---", "---"]
    assert [cells_of(line) for line in body] == [[cell.strip() for cell in line] for line in lines]
    assert not re.search(r"(?<!\\)\*", text)  # Nothing starts emphasis.


def test_markdown_has_facts_notes_and_the_tables_of_each_grid(rows):
    text = render_markdown(FACTS, [GridTables("First grid", rows, NOTES), GridTables("Second grid", overall(rows))])
    assert "* command: python -m pipelines.study" in text
    assert text.count("* feed lr both seed 2 was stopped: mean ctr must not fall") == 1
    first, second = text.split("### First grid")[1].split("### Second grid")
    for part in (first, second):
        assert "| feed | lr | bce | 0.7100 (0.0100) | 1.0000 (0.1000) |" in part
        assert "|  |  | minus bce | +0.0150 +- 0.0076 | -0.1000 +- 0.0000\\*\\*\\* |" in part
        assert "Tests:" in part
    assert "age_group=<18" not in text


def test_user_groups_have_a_document_of_their_own(rows):
    text = render_groups_markdown(FACTS, [GridTables("First grid", rows), GridTables("Second grid", overall(rows))])
    assert "* command: python -m pipelines.study" in text
    assert "| feed | lr | age_group=<18 | bce | " in text.split("### First grid")[1]
    assert "Second grid" not in text


def test_the_page_is_one_file_that_loads_nothing(rows):
    page = render_html("mine", FACTS, [GridTables("First grid", rows, NOTES), GridTables("Second grid", overall(rows))])
    assert "<script" not in page
    assert not re.search(r"(src|href)=\"(https?:)?//", page)
    assert page.count("<svg") == 2  # AUC, the one tested metric, of each grid.
    for text in ("mine", "1 to 3, paired", "First grid", "0.7100 (0.0100)", "was stopped: mean ctr must not fall"):
        assert text in page
    assert page.count("<h3>User groups</h3>") == 1


def test_the_page_escapes_what_comes_from_the_study(rows):
    hostile = compare([*measured("<b>bold", [0.7]), *measured("bce", [0.6])])
    page = render_html("<i>name", {"<u>fact": "<u>value"}, [GridTables("<h1>title", hostile, ["<p>note"])])
    for text in ("<b>bold", "<i>name", "<u>fact", "<u>value", "<h1>title", "<p>note"):
        assert text not in page
        assert text.replace("<", "&lt;").replace(">", "&gt;") in page


def test_a_grid_without_comparisons_has_a_table_and_no_plot():
    page = render_html("mine", {}, [GridTables("Grid", compare(measured("bce", [0.7])))])
    assert "<svg" not in page
    assert "0.7000" in page
