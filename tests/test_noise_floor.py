"""The click noise floor: by hand, and against a simulation whose rates of accidental clicks are known."""

import numpy as np
import pytest

from clsd_tf.metrics.noise_floor import click_noise_floor, mean_of_lowest


def test_noise_floor_is_the_mean_of_the_lowest_scores():
    # Of 100 scores 1.00 to .01 the lowest 5 have mean .03; of 30 scores .30 to .01 the lowest 2, rounded up, .015.
    scores, ids = np.append(np.arange(100, 0, -1), np.arange(30, 0, -1)) / 100, np.repeat([0, 1], [100, 30])
    found = click_noise_floor(scores, {"city_group": (ids, ("Rome", "Oslo", "Bern"))})["city_group"]
    assert {label: entry["num_rows"] for label, entry in found.items()} == {"Rome": 100, "Oslo": 30}
    assert found["Rome"]["floor"] == pytest.approx(0.03)
    assert found["Oslo"]["floor"] == pytest.approx(0.015)


def test_noise_floor_of_all_rows_is_the_mean_score():
    groups = {"city_group": (np.zeros(40, int), ("Rome",))}
    found = click_noise_floor(np.arange(40.0), groups, share=1.0)
    assert found == {"city_group": {"Rome": {"num_rows": 40, "floor": 19.5}}}


def test_noise_floor_of_a_single_row_is_its_score_and_a_label_without_rows_is_left_out():
    found = click_noise_floor(np.array([0.4]), {"city_group": (np.array([1]), ("Rome", "Oslo"))})
    assert found == {"city_group": {"Oslo": {"num_rows": 1, "floor": 0.4}}}


def test_noise_floor_refuses_a_share_outside_its_range_and_missing_scores():
    for share in (0.0, 1.01):
        with pytest.raises(ValueError, match=rf"\(0, 1\]. Received: {share}"):
            mean_of_lowest(np.ones(3), share)
    with pytest.raises(ValueError, match="Received: 1 that are not"):
        mean_of_lowest(np.array([np.nan, 0.5]))


def test_noise_floor_finds_the_true_rates_of_accidental_clicks():
    # Three groups see the same items; many interest nobody. The group that clicks most by interest slips least.
    rates_of_slips, popularity = np.array([0.03, 0.12, 0.25]), np.array([1.5, 0.0, -1.5])
    random = np.random.default_rng(3)
    ids, items = random.integers(0, 3, 60_000), random.integers(0, 60, 60_000)
    interest = 1 / (1 + np.exp(-(random.normal(-3, 2.5, 60)[items] + popularity[ids])))
    ctr = 1 - (1 - interest) * (1 - rates_of_slips[ids])
    groups = {"age_group": (ids, ("young", "middle", "old"))}
    exact = [entry["floor"] for entry in click_noise_floor(ctr, groups)["age_group"].values()]
    assert all(0 <= floor - rate < 0.01 for floor, rate in zip(exact, rates_of_slips, strict=True))
    # A teacher of click rates per (group, item), taught on the other half of the rows.
    clicked, cells, taught = random.random(60_000) < ctr, ids * 60 + items, np.arange(60_000) % 2 == 0
    rates = np.bincount(cells[taught], clicked[taught], 180) / np.bincount(cells[taught], minlength=180)
    halves = {"age_group": (ids[~taught], ("young", "middle", "old"))}
    learnt = [entry["floor"] for entry in click_noise_floor(rates[cells[~taught]], halves)["age_group"].values()]
    assert learnt == sorted(learnt)
    # The lowest of noisy scores are too low: here .019, .097 and .186.
    assert all(0.6 * rate < low < high for rate, low, high in zip(rates_of_slips, learnt, exact, strict=True))
