"""The simulated feed."""

import numpy as np
import pyarrow.csv
import pytest

from pipelines.feed import FeedConfig, simulate_feed

FILES = ("log.csv", "users.csv", "items.csv")


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        simulate_feed(FeedConfig(num_rows=500, num_users=20, num_items=10, seed=seed), tmp_path / name)
    for file in FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()


def test_more_rows_than_a_chunk_are_written_in_time_order(tmp_path):
    simulate_feed(FeedConfig(num_rows=100_001, num_users=50, num_items=20), tmp_path / "feed")
    times = pyarrow.csv.read_csv(tmp_path / "feed" / "log.csv").column("time_ms").to_numpy()
    assert len(times) == 100_001
    assert (np.diff(times) >= 0).all()


def test_accidental_clicks_are_read_less_and_only_clicks_are_read(tmp_path):
    simulate_feed(FeedConfig(num_rows=20_000, seed=5), tmp_path / "feed")
    log = pyarrow.csv.read_csv(tmp_path / "feed" / "log.csv")
    clicked = log.column("click").to_numpy() == 1
    seconds = log.column("read_seconds").to_numpy()
    assert (seconds[~clicked] == 0).all()
    # Genuine clicks have a median of exp(3.5) = 33 s, accidental ones of exp(1.2) = 3 s: both kinds are there.
    assert (seconds[clicked] > 20).mean() > 0.3
    assert (seconds[clicked] < 6).mean() > 0.1


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match=r"num_users must be at least 1. Received: 0"):
        FeedConfig(num_users=0)
