"""The simulated feed: the log follows its equations, and no dataset holds the ground truth beside it."""

import fnmatch
import json
import pathlib
import shutil

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
from commands import run_command
from hypothesis import given, settings
from hypothesis import strategies as st

import feature_specs
from clsd_tf.data.input_pipeline import read_columns
from clsd_tf.spec.validation import SpecError
from clsd_tf.storage.dataset_dir import SPLITS, DatasetDir
from pipelines.beam.dataset import BuildConfig, build_dataset
from pipelines.public_data.feed import AGE_BOUNDARIES, AGE_GROUPS, FeedConfig, parse_feed_config, simulate_feed

FILES = ("log.csv", "users.csv", "items.csv", "truth.parquet", "truth.json")
CAUSES = ("is_genuine", "is_accidental_click", "is_click_bait_click")

# Every group has rates of its own; 12 of 60 items are click-bait.
CONFIG = FeedConfig(
    num_rows=60_000,
    num_users=1_000,
    num_items=60,
    base_logit=(-3.0, -2.0, -1.0, 0.0, -2.5),
    accidental_click_rate=(0.3, 0.05, 0.1, 0.2, 0.0),
    click_bait_share=0.2,
    click_bait_rate=0.4,
    popularity_exponent=0.0,
    seed=4,
)


class Feed:
    """The files of a feed as NumPy columns."""

    def __init__(self, path):
        self.path = path
        self.users, self.items, self.log = (
            columns(pyarrow.csv.read_csv(path / f"{name}.csv")) for name in ("users", "items", "log")
        )
        self.truth = columns(pyarrow.parquet.read_table(path / "truth.parquet"))
        self.parameters = json.loads((path / "truth.json").read_text())
        ages = dict(zip(self.users["user_id"], self.users["age"], strict=True))
        self.groups = np.array([group_of(ages[user]) for user in self.log["user_id"]])

    @property
    def logits(self):
        probability = self.truth["genuine_probability"]
        return np.log(probability) - np.log1p(-probability)


def columns(table):
    return {name: table.column(name).to_numpy() for name in table.column_names}


def group_of(age):
    return 0 if age < 18 else 1 if age < 30 else 2 if age < 45 else 3 if age < 60 else 4


def simulated(path, **settings):
    simulate_feed(FeedConfig(**settings), path)
    return Feed(path)


def assert_rate(outcomes, probability):
    """The share of True is ``probability`` (one, or one per outcome) within 4 standard errors."""
    variance = np.sum(np.broadcast_to(probability * (1 - np.asarray(probability)), outcomes.shape))
    assert len(outcomes) > 100
    assert abs(np.sum(outcomes - probability)) <= 4 * np.sqrt(variance), (outcomes.mean(), np.mean(probability))


@pytest.fixture(scope="module")
def feed(tmp_path_factory):
    path = tmp_path_factory.mktemp("feed") / "raw"
    simulate_feed(CONFIG, path)
    return Feed(path)


# --- Files -----------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        simulate_feed(FeedConfig(num_rows=500, num_users=20, num_items=10, seed=seed), tmp_path / name)
    for file in FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()


def test_more_rows_than_a_chunk_are_written_in_time_order_and_reported(tmp_path):
    written = []
    simulate_feed(FeedConfig(num_rows=100_001, num_users=50, num_items=20), tmp_path / "feed", written.append)
    times = pyarrow.csv.read_csv(tmp_path / "feed" / "log.csv").column("time_ms").to_numpy()
    assert written == [100_000, 1]
    assert len(times) == 100_001
    assert (np.diff(times) > 0).all()  # 100,001 impressions in 10 days: 8.6 seconds apart.
    truth = pyarrow.parquet.ParquetFile(tmp_path / "feed" / "truth.parquet")
    assert truth.num_row_groups == 2  # Written chunk by chunk.
    # The header is row 1 of the log.
    np.testing.assert_array_equal(truth.read(["row_id"]).column(0).to_numpy(), np.arange(2, 100_003))


def test_an_existing_directory_is_refused(feed):
    with pytest.raises(FileExistsError, match="must not exist yet"):
        simulate_feed(CONFIG, feed.path)


def test_the_true_parameters_are_written_by_age_group(feed):
    assert parse_feed_config(feed.parameters["config"], "truth.json") == CONFIG
    assert list(AGE_GROUPS) == ["<18", "18-30", "30-45", "45-60", ">=60"]
    counts = np.bincount([group_of(age) for age in feed.users["age"]], minlength=5)
    assert feed.parameters["age_groups"] == {
        label: {"num_users": count, "base_logit": base_logit, "accidental_click_rate": rate}
        for label, count, base_logit, rate in zip(
            AGE_GROUPS, counts.tolist(), (-3.0, -2.0, -1.0, 0.0, -2.5), (0.3, 0.05, 0.1, 0.2, 0.0), strict=True
        )
    }
    assert feed.parameters["num_click_bait_items"] == 12


@pytest.mark.parametrize("name", ["simulated_feed", "simulated_pairs"])
def test_the_age_groups_are_those_of_the_specs(name):
    group = feature_specs.get_spec(name).user_groups[0]
    assert (group.name, group.column, group.boundaries) == ("age_group", "age", AGE_BOUNDARIES)


# --- What every feed obeys -------------------------------------------------------------------------------------------

rates = st.floats(0, 1)


@settings(max_examples=25, deadline=None)
@given(
    num_rows=st.integers(1, 300),
    num_users=st.integers(1, 20),
    num_items=st.integers(1, 20),
    rank=st.integers(1, 5),
    interest_scale=st.floats(0, 1e6),
    base_logit=st.tuples(*[st.floats(-1e3, 1e3)] * 5),
    accidental_click_rate=st.tuples(*[rates] * 5),
    click_bait_share=rates,
    click_bait_rate=rates,
    popularity_exponent=st.floats(0, 10),
    seed=st.integers(0, 2**32),
)
def test_a_click_has_one_cause_and_only_clicks_are_read_and_only_genuine_ones_liked(tmp_path_factory, **config):
    feed = simulated(tmp_path_factory.mktemp("any") / "feed", **config)
    causes = np.sum([feed.truth[name] for name in CAUSES], axis=0)
    clicked = feed.log["click"]
    np.testing.assert_array_equal(causes, clicked)
    np.testing.assert_array_equal(feed.log["read_seconds"] > 0, clicked == 1)
    assert (feed.log["liked"] <= feed.truth["is_genuine"]).all()
    assert ((feed.truth["genuine_probability"] >= 0) & (feed.truth["genuine_probability"] <= 1)).all()
    assert len(clicked) == config["num_rows"]


# --- The equations ---------------------------------------------------------------------------------------------------


def test_genuine_clicks_come_with_their_true_probability(feed):
    probability, genuine = feed.truth["genuine_probability"], feed.truth["is_genuine"]
    for low, high in ((0.0, 0.05), (0.05, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 1.0)):
        inside = (low <= probability) & (probability < high)
        assert_rate(genuine[inside], probability[inside])


def test_accidental_clicks_come_at_the_rate_of_the_age_group(feed):
    possible = ~feed.truth["is_genuine"]
    for group, rate in enumerate((0.3, 0.05, 0.1, 0.2, 0.0)):
        assert_rate(feed.truth["is_accidental_click"][possible & (feed.groups == group)], rate)


def test_click_bait_draws_clicks_on_its_items_only(feed):
    click_bait = np.unique(feed.log["item_id"][feed.truth["is_click_bait_click"]])
    assert len(click_bait) == 12  # 20 % of 60.
    possible = np.isin(feed.log["item_id"], click_bait) & ~feed.truth["is_genuine"] & ~feed.truth["is_accidental_click"]
    assert_rate(feed.truth["is_click_bait_click"][possible], 0.4)


def test_click_rates_are_those_of_the_closed_form(tmp_path):
    """Without interest, logit = base_logit + N(0, 0.5^2): the genuine rate is an integral over the item bias."""
    base_logit, slip = (-3.0, -2.0, -1.0, 0.0, 1.0), (0.25, 0.0, 0.5, 0.1, 1.0)
    feed = simulated(
        tmp_path / "feed",
        num_rows=100_000,
        num_users=2_000,
        num_items=20_000,
        interest_scale=0.0,
        base_logit=base_logit,
        accidental_click_rate=slip,
        popularity_exponent=0.0,
    )
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    for group in range(5):
        genuine = np.sum(weights / (1 + np.exp(-base_logit[group] - 0.5 * nodes))) / np.sqrt(2 * np.pi)
        assert_rate(feed.truth["is_genuine"][feed.groups == group], genuine)
        assert_rate(feed.log["click"][feed.groups == group] == 1, 1 - (1 - genuine) * (1 - slip[group]))


def test_without_interest_a_logit_is_base_logit_plus_item_bias(tmp_path):
    feed = simulated(
        tmp_path / "feed", num_rows=20_000, num_items=400, interest_scale=0.0, base_logit=CONFIG.base_logit, seed=1
    )
    bias = feed.logits - np.array(CONFIG.base_logit)[feed.groups]
    by_item = [bias[feed.log["item_id"] == item] for item in np.unique(feed.log["item_id"])]
    assert max(np.ptp(values) for values in by_item) < 1e-9
    biases = np.array([values[0] for values in by_item])
    # Standard errors of 400 draws from N(0, 0.5^2): 0.025 of the mean, 0.018 of the standard deviation.
    assert abs(biases.mean()) < 0.1
    assert abs(biases.std() - 0.5) < 0.07


def test_interest_adds_a_product_of_the_rank_with_unit_variance_times_the_scale(tmp_path):
    shape = {"num_rows": 40_000, "num_users": 60, "num_items": 40, "rank": 3, "popularity_exponent": 0.0, "seed": 2}
    without, with_interest = (simulated(tmp_path / str(scale), interest_scale=scale, **shape) for scale in (0.0, 1.5))
    # u7 -> 7
    users, items = (
        np.array([int(name[1:]) for name in with_interest.log[column]]) for column in ("user_id", "item_id")
    )
    interest = np.full([60, 40], np.nan)
    interest[users, items] = with_interest.logits - without.logits
    assert np.isfinite(interest).all()  # Every pair was shown.
    values = np.linalg.svd(interest, compute_uv=False)
    assert values[2] > 1
    assert values[3] < 1e-9
    # (P . Q) / sqrt(3) has variance 1; 60 + 40 random vectors leave its estimate a standard error of about 0.15.
    assert abs(interest.std() / 1.5 - 1) < 0.25


@pytest.mark.parametrize(("exponent", "shares"), [(0.0, (1 / 3, 1 / 3, 1 / 3)), (1.0, (6 / 11, 3 / 11, 2 / 11))])
def test_impressions_of_items_follow_zipf(tmp_path, exponent, shares):
    feed = simulated(tmp_path / "feed", num_rows=5_000, num_items=3, popularity_exponent=exponent)
    for item, share in enumerate(shares):
        assert_rate(feed.log["item_id"] == f"i{item}", share)


def test_genuine_clicks_are_read_for_long_and_sometimes_liked(feed):
    genuine, clicked = feed.truth["is_genuine"], feed.log["click"] == 1
    # The standard error of the median of a logarithm is 1.25 * 0.8 / sqrt(number): below 0.015 here.
    assert abs(np.log(np.median(feed.log["read_seconds"][genuine])) - 3.5) < 0.06
    assert abs(np.log(np.median(feed.log["read_seconds"][clicked & ~genuine])) - 1.2) < 0.06
    assert_rate(feed.log["liked"][genuine] == 1, 0.05)


def test_feeds_that_differ_in_noise_alone_share_genuine_interest(tmp_path):
    size = {"num_rows": 3_000, "num_users": 50, "num_items": 30, "seed": 6}
    clean = simulated(tmp_path / "clean", accidental_click_rate=(0.0,) * 5, **size)
    noisy = simulated(
        tmp_path / "noisy", accidental_click_rate=(0.4,) * 5, click_bait_share=0.5, click_bait_rate=0.9, **size
    )
    for name in ("users.csv", "items.csv"):
        assert (clean.path / name).read_bytes() == (noisy.path / name).read_bytes()
    for name in ("genuine_probability", "is_genuine"):
        np.testing.assert_array_equal(clean.truth[name], noisy.truth[name])
    genuine = clean.truth["is_genuine"]
    np.testing.assert_array_equal(clean.log["read_seconds"][genuine], noisy.log["read_seconds"][genuine])
    np.testing.assert_array_equal(clean.log["click"], clean.truth["is_genuine"])
    assert noisy.log["click"].mean() > clean.log["click"].mean() + 0.3


def test_more_items_leave_the_users_as_they_are_and_more_users_the_items(tmp_path):
    for name, users, items in (("small", 20, 10), ("more_users", 30, 10), ("more_items", 20, 15)):
        simulate_feed(FeedConfig(num_rows=10, num_users=users, num_items=items), tmp_path / name)
    files = {path.parent.name + "/" + path.name: path.read_bytes() for path in tmp_path.glob("*/*.csv")}
    assert files["small/users.csv"] == files["more_items/users.csv"]
    assert files["small/items.csv"] == files["more_users/items.csv"]


# --- The truth and datasets ------------------------------------------------------------------------------------------


def test_row_ids_of_a_dataset_find_the_truth_of_its_rows(tmp_path):
    feed = simulated(tmp_path / "raw", num_rows=3_000, num_users=40, num_items=25, click_bait_share=0.4)
    assert all(feed.truth[name].sum() > 100 for name in CAUSES)
    spec = feature_specs.get_spec("simulated_pairs")
    build_dataset(spec, BuildConfig(str(tmp_path / "raw")), tmp_path / "dataset")
    dataset = DatasetDir(tmp_path / "dataset")
    names = ["row_id", "label", "intensity_label", "age_group"]
    parts = {split: read_columns(dataset, split, names) for split in SPLITS}
    assert [len(part["row_id"]) for part in parts.values()] == [1_800, 300, 900]
    found = {name: np.concatenate([part[name] for part in parts.values()]) for name in names}
    order = np.argsort(found["row_id"])
    np.testing.assert_array_equal(found["row_id"][order], feed.truth["row_id"])
    clicked = np.any([feed.truth[name] for name in CAUSES], axis=0)
    np.testing.assert_array_equal(found["label"][order] == 1, clicked)
    np.testing.assert_array_equal(found["intensity_label"][order] == 1, feed.log["read_seconds"] >= 20)
    np.testing.assert_array_equal(found["age_group"][order], feed.groups + 1)  # 0 is an unknown age.


def test_pairs_are_ids_of_users_and_items_alone():
    inputs = feature_specs.get_spec("simulated_pairs").model_inputs({"user": 40, "item": 25})
    # All values of the training split have ids, beside those of missing and of new values.
    assert [(entry.name, entry.vocabulary_size) for entry in inputs.categorical] == [("user", 42), ("item", 27)]
    assert inputs.numeric == ()
    assert [group.name for group in inputs.groups] == ["age_group"]


def test_no_spec_reads_the_truth():
    for name in feature_specs.spec_names():
        for _, table in feature_specs.get_spec(name).tables.items():
            assert not [file for file in ("truth.parquet", "truth.json") if fnmatch.fnmatch(file, table.path)]


def test_a_dataset_is_the_same_to_the_byte_without_the_truth(feed_dir, feed_dataset, tmp_path):
    raw = tmp_path / "raw"
    shutil.copytree(feed_dir, raw)
    (raw / "truth.parquet").unlink()
    (raw / "truth.json").unlink()
    build_dataset(feature_specs.get_spec("simulated_feed"), BuildConfig(str(raw)), tmp_path / "dataset")
    assert DatasetDir(tmp_path / "dataset").fingerprint == feed_dataset.fingerprint
    assert contents(tmp_path / "dataset") == contents(feed_dataset.path)


def contents(directory: pathlib.Path):
    """All files but the manifest, which names the moment of the build."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


# --- Settings --------------------------------------------------------------------------------------------------------


def test_one_value_stands_for_all_age_groups():
    for value in (0.3, [0.3], [0.3] * 5):
        assert parse_feed_config({"accidental_click_rate": value}, "feed.yaml").accidental_click_rate == (0.3,) * 5
    assert FeedConfig(base_logit=-1).base_logit == (-1.0,) * 5


def test_the_command_plants_what_its_flags_say(tmp_path):
    changes = ["--base_logit=-1", "--accidental_click_rate=0.1,0,0,0,0.3", "--rank=2", "--popularity_exponent=0"]
    done = run_command("pipelines.simulate_feed", f"--raw_dir={tmp_path / 'feed'}", "--num_rows=50", *changes)
    assert done.returncode == 0, done.stderr
    expected = FeedConfig(
        num_rows=50, base_logit=-1.0, accidental_click_rate=(0.1, 0.0, 0.0, 0.0, 0.3), rank=2, popularity_exponent=0.0
    )
    parameters = json.loads((tmp_path / "feed" / "truth.json").read_text())["config"]
    assert parse_feed_config(parameters, "truth.json") == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"num_users": 0}, "num_users: Input should be greater than or equal to 1. Received: 0"),
        ({"num_rows": 10**11}, "num_rows: Input should be less than or equal to 10000000000. Received: 100000000000"),
        ({"rank": 0}, "rank: Input should be greater than or equal to 1. Received: 0"),
        ({"interest_scale": -1}, "interest_scale: Input should be greater than or equal to 0. Received: -1"),
        ({"click_bait_share": 1.5}, "click_bait_share: Input should be less than or equal to 1. Received: 1.5"),
        ({"click_bait_rate": -0.1}, "click_bait_rate: Input should be greater than or equal to 0. Received: -0.1"),
        ({"popularity_exponent": float("inf")}, "popularity_exponent: Input should be a finite number. Received: inf"),
        (
            {"accidental_click_rate": [0.1, 0.1, 0.1, 0.1, 1.1]},
            "accidental_click_rate.4: Input should be less than or equal to 1. Received: 1.1",
        ),
        ({"base_logit": ["low"]}, "base_logit.0: Input should be a valid number. Received: 'low'"),
        (
            {"base_logit": [-2.0, -1.0]},
            "base_logit: must be one value, or one for each of the 5 age groups <18, 18-30, 30-45, 45-60, >=60. "
            "Received: 2 values",
        ),
        ({"slip_rate": 0.1}, "slip_rate: unknown key. Received: 'slip_rate'. Allowed: accidental_click_rate, "),
    ],
)
def test_bad_settings_are_refused_with_what_is_allowed(content, message):
    with pytest.raises(SpecError) as caught:
        parse_feed_config(content, "feed.yaml")
    assert message in str(caught.value)
    with pytest.raises(ValueError, match=r"validation error"):
        FeedConfig(**content)
