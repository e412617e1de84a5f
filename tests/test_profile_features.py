"""Ranking of profile features: analysis of variance by hand, against scipy, and on planted effects."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from clsd_tf.methods.clsd.profile_features import HEADLINES, rank_features, table_rows
from clsd_tf.metrics.significance import holm


def rank_one(residual, values, users=None):
    """The entry of a single feature; one click a user by default."""
    users = np.arange(len(residual)) if users is None else users
    (entry,) = rank_features(np.asarray(residual), np.asarray(users), {"city": np.asarray(values)})
    return entry


def test_variance_explained_by_hand():
    # Two levels of 10 users with means .2 and .6 around .4: between = 20 * .2^2 = .8. All users lie .1 from the mean of
    # their level: within = 20 * .1^2 = .2. So eta squared = .8 / 1. With noise .2 / 18, omega squared =
    # (.8 - .2 / 18) / (1 + .2 / 18) = 14.2 / 18.2.
    residual = np.repeat([0.1, 0.3, 0.5, 0.7], 5)
    entry = rank_one(residual, np.repeat([3, 8], 10))
    assert entry["eta_squared"] == pytest.approx(0.8)
    assert entry["omega_squared"] == pytest.approx(14.2 / 18.2)
    assert (entry["num_users"], entry["num_levels"]) == (20, 2)
    assert entry["f_p_value"] == pytest.approx(stats.f_oneway(residual[:10], residual[10:]).pvalue)
    # F(1, 18) = .8 / (.2 / 18) = 72.
    assert entry["f_p_value"] == pytest.approx(stats.f.sf(72, 1, 18))
    assert entry["alexander_govern_p_value"] == pytest.approx(
        stats.alexandergovern(residual[:10], residual[10:]).pvalue
    )
    assert entry["holm_p_value"] == entry["alexander_govern_p_value"]


def test_a_user_counts_once_with_the_mean_of_the_users_clicks():
    residual, values = np.repeat([0.1, 0.3, 0.5, 0.7], 5), np.repeat([3, 8], 10)
    # User 0's residual of .1 as the mean of three clicks, in another order and under other names.
    clicks = np.append(residual, [0.0, 0.2])
    users = np.append(np.arange(20), [0, 0]) * 1000 - 7
    order = np.random.default_rng(0).permutation(22)
    many = rank_one(clicks[order], np.append(values, [3, 3])[order], users[order])
    for name, expected in rank_one(residual, values).items():
        assert many[name] == (pytest.approx(expected) if isinstance(expected, float) else expected)


def test_a_user_has_the_value_of_the_first_click():
    residual = np.append(np.repeat([0.1, 0.3, 0.5, 0.7], 5), [0.1])
    values, users = np.append(np.repeat([3, 8], 10), [8]), np.append(np.arange(20), [0])
    assert rank_one(residual, values, users)["eta_squared"] == pytest.approx(0.8)


@given(st.lists(st.floats(0, 1), min_size=30, max_size=90))
@settings(max_examples=40, deadline=None)
def test_eta_squared_is_the_squared_correlation_with_the_means_of_the_levels(residual):
    residual, values = np.array(residual), np.arange(len(residual)) % 3
    entry = rank_one(residual, values)
    level_means = np.array([residual[values == value].mean() for value in range(3)])[values]
    if np.ptp(level_means) > 1e-3:
        assert entry["eta_squared"] == pytest.approx(np.corrcoef(residual, level_means)[0, 1] ** 2, abs=1e-9)
    assert entry["omega_squared"] <= entry["eta_squared"] <= 1


def feed(seed=0):
    """4,000 clicks of 400 users; residuals differ by city (three) and by user."""
    random = np.random.default_rng(seed)
    users, city = random.integers(0, 400, 4000), random.integers(0, 3, 400)
    residual = np.array([0.4, 0.5, 0.6])[city][users] + random.normal(0, 0.1, 400)[users] + random.normal(0, 0.2, 4000)
    return random, users, city, residual


def test_a_planted_feature_comes_first_and_shuffled_and_constant_ones_explain_nothing():
    random, users, city, residual = feed()
    features = {
        "constant": np.ones(4000, int),
        "shuffled": random.permutation(city)[users],
        "shuffled_age": random.integers(13, 75, 400).astype(np.float32)[users],
        "city": city[users],
    }
    ranking = rank_features(residual, users, features)
    found = {entry["feature"]: entry for entry in ranking}
    assert ranking[0]["feature"] == "city"
    # Between users: variance of the cities .2^2 / 6 = .0067; of users .1^2, of the means of 10 clicks .2^2 / 10.
    assert found["city"]["omega_squared"] == pytest.approx(0.0067 / (0.0067 + 0.01 + 0.004), abs=0.06)
    assert found["city"]["holm_p_value"] < 1e-10
    for name in ("shuffled", "shuffled_age"):
        assert found[name]["holm_p_value"] > 0.05
        assert abs(found[name]["omega_squared"]) < 0.02
    assert found["constant"] == {
        **{"feature": "constant", "num_users": 400, "num_levels": 1, "eta_squared": 0.0, "omega_squared": 0.0},
        **{"f_p_value": None, "alexander_govern_p_value": None, "holm_p_value": None},
    }
    assert [entry["holm_p_value"] for entry in ranking] == holm(
        [entry["alexander_govern_p_value"] for entry in ranking]
    )


def test_features_that_tell_nothing_are_found_significant_about_as_often_as_promised():
    # Were clicks taken for independent, the users' own differences would make most of these significant at .05.
    random, users, _, residual = feed(seed=1)
    features = {f"noise_{index}": random.integers(0, 4, 400)[users] for index in range(100)}
    p_values = [entry["alexander_govern_p_value"] for entry in rank_features(residual, users, features)]
    # Binomial(100, .05): 13 or fewer with probability .999.
    assert np.sum(np.array(p_values) < 0.05) <= 13


def test_omega_squared_does_not_grow_with_the_number_of_levels():
    random, users, _, residual = feed(seed=2)
    features = {f"noise_{index}": random.integers(0, 20, 400)[users] for index in range(30)}
    ranking = rank_features(residual, users, features)
    # By chance alone eta squared is about (levels - 1) / (users - 1) = .048.
    assert np.mean([entry["eta_squared"] for entry in ranking]) == pytest.approx(19 / 399, abs=0.01)
    assert np.mean([entry["omega_squared"] for entry in ranking]) == pytest.approx(0.0, abs=0.01)


def test_numbers_are_cut_into_ten_bins_of_equal_numbers_of_users():
    # Users in order of x; residual = bin of ten: the bins explain all but the scatter within, which is none.
    number = np.random.default_rng(0).permutation(200).astype(np.float32)
    entry = rank_one(number // 20, number)
    assert entry["num_levels"] == 10
    assert entry["eta_squared"] == pytest.approx(1.0)


@pytest.mark.parametrize("counts", [[10, 190, 20], [190, 10, 20]])
def test_equal_numbers_stay_in_one_bin_and_missing_ones_get_their_own(counts):
    # 95 % of one number: quantiles alone would not tell it from the other.
    entry = rank_one(np.repeat([0.9, 0.1, 0.5], counts), np.repeat([0.0, 1.0, np.nan], counts))
    assert (entry["num_levels"], entry["num_users"]) == (3, 220)
    assert entry["eta_squared"] == pytest.approx(1.0)


def test_a_feature_that_is_missing_for_all_users_has_one_level():
    assert rank_one(np.arange(20.0), np.full(20, np.nan))["num_levels"] == 1


def test_levels_of_fewer_than_ten_users_are_pooled():
    random = np.random.default_rng(0)
    entry = rank_one(random.random(38), np.repeat([0, 1, 2, 3], [20, 4, 6, 8]))
    assert (entry["num_levels"], entry["num_users"]) == (2, 38)
    # A pool that is as small is left out.
    entry = rank_one(random.random(49), np.repeat([0, 1, 2], [20, 20, 9]))
    assert (entry["num_levels"], entry["num_users"]) == (2, 40)


def test_a_level_whose_users_are_all_alike_leaves_the_test_for_equal_variances():
    entry = rank_one(np.append(np.full(10, 0.1), np.linspace(0, 1, 10)), np.repeat([0, 1], 10))
    assert entry["alexander_govern_p_value"] is None
    assert 0 < entry["f_p_value"] < 0.05
    assert entry["holm_p_value"] == entry["f_p_value"]


def test_users_that_do_not_differ_leave_nothing_to_explain():
    # .1 summed three times over is not .1 * 3 to the last bit.
    users = np.repeat(np.arange(20), np.arange(1, 21))
    entry = rank_one(np.full(len(users), 0.1), users % 2, users)
    assert entry["eta_squared"] == entry["omega_squared"] == 0.0
    assert entry["f_p_value"] is None


def test_columns_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"equal lengths >= 1.*'city': 2"):
        rank_one(np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match="equal lengths >= 1"):
        rank_one([], [])
    with pytest.raises(ValueError, match="Received: 2 that are not"):
        rank_one([np.nan, np.inf, 0.5], np.ones(3))


def test_table_and_json_of_a_ranking():
    _, users, city, residual = feed()
    ranking = rank_features(residual, users, {"city": city[users], "constant": np.ones(4000, int)})
    assert json.loads(json.dumps(ranking, allow_nan=False)) == ranking
    rows = table_rows(ranking)
    assert {len(row) for row in rows} == {len(HEADLINES)}
    assert rows[0][0] == "city"
    assert rows[0][-1] == f"{ranking[0]['holm_p_value']:.1e}"
    assert rows[1][-3:] == [None, None, None]
