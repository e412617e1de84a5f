"""The confidence report: its measures against scikit-learn and scipy, its intervals against simulation, its page."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from clsd_tf.methods.clsd.confidence_report import (
    global_and_local_confidence,
    measure_confidence,
    render_confidence_report,
    table_rows,
)
from clsd_tf.metrics.noise_floor import click_noise_floor

# Few distinct confidences and values, so that most examples have ties; a value may be missing.
_CLICKS = st.lists(
    st.tuples(
        st.sampled_from([0.5, 0.9, 0.9000001, 1.0, 2.0]),
        st.integers(0, 1),
        st.sampled_from([0.0, 1.5, 3.0, 60.0, float("nan")]),
        st.integers(0, 5),
    ),
    min_size=1,
    max_size=60,
)


def measure(confidence, label=None, value=None, *, groups=None, users=None, num_resamples=2):
    users = np.arange(len(confidence)) if users is None else users
    return measure_confidence(confidence, label, value, groups or {}, users, num_resamples=num_resamples)


def test_forms_by_hand():
    # Mean score .5. Means of the groups .3 and .7.
    scores, ids = np.array([0.2, 0.4, 0.6, 0.8]), np.array([1, 1, 4, 4])
    forms = global_and_local_confidence(scores, {"age_group": (ids, "abcde"), "city_group": (np.zeros(4, int), "a")})
    assert forms["global"] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert forms["local"] == pytest.approx([0.9, 1.1, 0.9, 1.1])


def test_without_user_groups_there_is_no_local_weighting():
    assert list(global_and_local_confidence(np.array([0.2, 0.4]), {})) == ["global"]


def test_forms_refuse_scores_that_give_no_confidence():
    for scores in ([], [0.0, 0.0]):
        with pytest.raises(ValueError, match=rf"score above 0. Received: {len(scores)} clicks"):
            global_and_local_confidence(np.array(scores), {})
    with pytest.raises(ValueError, match=r"scores must be finite. Received: 1 that are not"):
        global_and_local_confidence(np.array([0.5, np.nan]), {})


@given(_CLICKS)
@settings(max_examples=60, deadline=None)
def test_measures_with_ties_equal_scikit_learn_and_scipy(clicks):
    confidence, label, value, users = (np.array(column) for column in zip(*clicks, strict=True))
    found = measure(confidence, label, value, users=users)["overall"]
    assert found["mean_confidence"]["value"] == pytest.approx(confidence.mean())
    assert found["mean_intensity_label"]["value"] == pytest.approx(label.mean())
    if len(set(label)) == 2:
        assert found["auc"]["value"] == pytest.approx(roc_auc_score(label, confidence), abs=1e-12)
    else:
        assert found["auc"] == {"value": None, "interval": None}
    known = ~np.isnan(value)
    if len(set(confidence[known])) > 1 and len(set(value[known])) > 1:
        expected = stats.spearmanr(confidence[known], value[known]).statistic
        assert found["spearman"]["value"] == pytest.approx(expected, abs=1e-12)
    else:
        assert found["spearman"] == {"value": None, "interval": None}


def test_a_group_is_measured_as_if_its_clicks_were_all():
    random = np.random.default_rng(0)
    confidence, label, value = random.random(300), random.integers(0, 2, 300), random.random(300)
    ids, users = random.integers(0, 2, 300), random.integers(0, 40, 300)
    found = measure(confidence, label, value, groups={"city_group": (ids, ("Rome", "Oslo"))}, users=users)
    oslo = ids == 1
    alone = measure(confidence[oslo], label[oslo], value[oslo], users=users[oslo])
    assert found["groups"]["city_group"]["Oslo"] == alone["overall"]
    assert alone["overall"]["num_users"] == len(set(users[oslo]))


def test_groups_of_fewer_than_20_clicks_are_left_out():
    ids = np.repeat([0, 1, 2], [19, 20, 41])
    groups = {"city_group": (ids, ("Rome", "Oslo", "Bern", "Kyiv"))}
    found = measure(np.arange(80.0), np.arange(80) % 2, groups=groups)["groups"]["city_group"]
    assert {label: entry["num_clicks"] for label, entry in found.items()} == {"Oslo": 20, "Bern": 41}


def intervals_that_cover(users_of_intervals):
    """Of 40 samples of 60 users with 8 clicks each, how many 95 % intervals of AUC and Spearman hold the truth.

    Confidence and intensity are traits of the user, independent of one another: AUC is .5 and Spearman 0.
    """
    random = np.random.default_rng(1)
    covered = np.zeros(2, int)
    for _ in range(40):
        users = np.repeat(np.arange(60), 8)
        confidence, label = random.random(60)[users], random.integers(0, 2, 60)[users]
        value = label + 0.1 * random.random(480)
        found = measure(confidence, label, value, users=users_of_intervals(users), num_resamples=100)["overall"]
        for index, (name, truth) in enumerate((("auc", 0.5), ("spearman", 0.0))):
            low, high = found[name]["interval"]
            covered[index] += low <= truth <= high
    return covered


def test_intervals_over_users_cover_the_truth_and_intervals_over_rows_do_not():
    # At 95 % each, 31 or more of 40 cover with probability .9999. Measured: 36 and 34 over users, 18 and 18 over rows.
    assert (intervals_that_cover(lambda users: users) >= 31).all()
    assert (intervals_that_cover(lambda users: np.arange(len(users))) < 28).all()


def test_intervals_of_means_resample_users():
    # Two users: means 0 (3 clicks) and 1 (1 click). A resample has both, or one twice: 1/4, 0 or 1.
    found = measure(np.array([1.0, 1.0, 1.0, 2.0]), np.array([0, 0, 0, 1]), users=[7, 7, 7, 9], num_resamples=100)
    assert found["overall"]["mean_intensity_label"] == {"value": 0.25, "interval": [0.0, 1.0]}
    assert found["overall"]["mean_confidence"] == {"value": 1.25, "interval": [1.0, 2.0]}


def test_equal_seeds_give_equal_reports():
    random = np.random.default_rng(2)
    columns = random.random(100), random.integers(0, 2, 100), random.random(100), {}, random.integers(0, 20, 100)
    first, again, other = (measure_confidence(*columns, num_resamples=30, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert first["overall"]["auc"]["interval"] != other["overall"]["auc"]["interval"]


def test_reliability_bins_are_sorted_and_of_equal_mass():
    # 400 clicks, confidence 0 to 399 in reverse; the upper 100 are intense, the value is 10 * confidence.
    confidence = np.arange(400.0)[::-1]
    bins = measure(confidence, confidence >= 300, 10 * confidence)["overall"]["reliability"]
    assert [entry["num_clicks"] for entry in bins] == [40] * 10
    assert [entry["mean_confidence"] for entry in bins] == [19.5 + 40 * index for index in range(10)]
    assert [entry["mean_intensity_label"] for entry in bins] == [0.0] * 7 + [0.5, 1.0, 1.0]
    assert [entry["mean_intensity_value"] for entry in bins] == [195 + 400 * index for index in range(10)]


def test_reliability_bins_have_20_clicks_or_more():
    for num_clicks, expected in ((5, [5]), (59, [30, 29]), (60, [20, 20, 20])):
        bins = measure(np.arange(float(num_clicks)), np.ones(num_clicks))["overall"]["reliability"]
        assert [entry["num_clicks"] for entry in bins] == expected


@pytest.mark.parametrize("num_intense", [0, 7, 20])
def test_the_interval_of_a_bin_is_wilsons_where_users_have_one_click(num_intense):
    label = np.arange(20) < num_intense
    (only,) = measure(np.ones(20), label)["overall"]["reliability"]
    expected = stats.binomtest(num_intense, 20).proportion_ci(method="wilson")
    assert only["interval"] == pytest.approx([expected.low, expected.high], abs=1e-12)


def test_the_interval_of_a_bin_counts_users_whose_clicks_end_alike_once():
    # 10 users of 3 equal clicks each: as much information as 10 clicks.
    users = np.repeat(np.arange(10), 3)
    (only,) = measure(np.ones(30), users < 4, users=users)["overall"]["reliability"]
    expected = stats.binomtest(4, 10).proportion_ci(method="wilson")
    assert only["mean_intensity_label"] == 0.4
    assert only["interval"] == pytest.approx([expected.low, expected.high], abs=1e-12)


def test_confidence_without_any_intensity_is_refused():
    with pytest.raises(ValueError, match="Received: neither intensity_label nor intensity_value"):
        measure(np.ones(3))


def test_columns_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"equal lengths >= 1.*'intensity_label': 2"):
        measure(np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match=r"equal lengths >= 1.*'city_group': 1"):
        measure(np.ones(3), np.ones(3), groups={"city_group": (np.zeros(1, int), ("Rome",))})
    with pytest.raises(ValueError, match="equal lengths >= 1"):
        measure(np.array([]), np.array([]))
    with pytest.raises(ValueError, match=r"confidence must be finite. Received: 1 that are not"):
        measure(np.array([1.0, np.nan]), np.ones(2))


FACTS = {
    "split": "validation",
    "scores": "predictions of a model",
    "label": "clicked == 1",
    "intensity_label": "seconds >= 20",
    "intensity_value": "seconds",
    "dataset_fingerprint": "0123456789abcdef",
}


def analysed(*, groups=True, label=True):
    random = np.random.default_rng(4)
    scores, ids = random.random(400), random.integers(0, 2, 400)
    intensity = scores + random.normal(0, 0.3, 400)
    groups = {"city_group": (ids, ("Rome", "Oslo"))} if groups else {}
    measured = {
        form: measure(confidence, intensity > 0.6 if label else None, intensity, groups=groups, num_resamples=20)
        for form, confidence in global_and_local_confidence(scores, groups).items()
    }
    return measured, click_noise_floor(scores, groups)


def test_page_holds_the_numbers_and_loads_nothing():
    measured, noise_floor = analysed()
    page = render_confidence_report(measured, noise_floor, FACTS)
    for form in ("global", "local"):
        for entry in (measured[form]["overall"], *measured[form]["groups"]["city_group"].values()):
            for name in ("auc", "spearman", "mean_confidence", "mean_intensity_label"):
                low, high = entry[name]["interval"]
                assert f"<td>{entry[name]['value']:.3f} [{low:.3f}, {high:.3f}]</td>" in page
    assert all(f"<!-- {entry['floor']:.3f} -->" in page for entry in noise_floor["city_group"].values())
    assert page.count("<svg") == 2  # Reliability, and the noise floor of city_group.
    assert "<script" not in page
    assert not re.search(r"(src|href)=\"(https?:)?//", page)


def test_page_without_user_groups_and_without_an_intensity_label():
    measured, noise_floor = analysed(groups=False, label=False)
    page = render_confidence_report(measured, noise_floor, FACTS)
    assert list(measured) == ["global"]
    assert measured["global"]["overall"]["auc"]["value"] is None
    assert page.count("<svg") == 1
    assert "Local confidence" not in page


def test_page_draws_no_noise_floor_of_fewer_than_20_impressions():
    measured, noise_floor = analysed()
    noise_floor["city_group"] |= {"Bern": {"num_rows": 19, "floor": 0.987}, "Kyiv": {"num_rows": 20, "floor": 0.876}}
    page = render_confidence_report(measured, noise_floor, FACTS)
    assert "<!-- 0.876 -->" in page  # How matplotlib notes the text that it draws.
    assert "<!-- 0.987 -->" not in page


def test_page_escapes_what_comes_from_the_spec():
    page = render_confidence_report(*analysed(groups=False), {**FACTS, "label": "<img src=x>"})
    assert "<img src=x>" not in page
    assert "&lt;img src=x&gt;" in page


def test_what_is_measured_is_json_without_nan():
    # One click has no AUC, no rank correlation and no missing value to average.
    for measured in (analysed()[0]["local"], measure(np.ones(1), np.ones(1), np.array([np.nan]))):
        assert json.loads(json.dumps(measured, allow_nan=False)) == measured


def test_table_has_overall_first_and_a_dash_for_what_is_not_defined():
    groups = {"city_group": (np.zeros(20, int), ("Rome",))}
    rows = table_rows(measure(np.ones(20), np.ones(20), groups=groups))
    expected = [20, "1.000 [1.000, 1.000]", "1.000 [1.000, 1.000]", "-", "-"]
    assert rows == [["overall", *expected], ["city_group Rome", *expected]]
