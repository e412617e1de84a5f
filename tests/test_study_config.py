"""Studies in YAML: what they declare, which runs they stand for, where their data lies, and the command itself."""

import json
import pathlib

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
import yaml
from commands import run_command

from clsd_tf.spec.validation import SpecError
from clsd_tf.storage.files import ArtifactError, read_json, write_json
from pipelines.public_data.feed import FeedConfig
from pipelines.studies.config import load_study, parse_study, study_names
from pipelines.studies.data import prepared_data, study_spec

_STUDY = """
seeds: 2
shared: {learning_rate: 0.5, clsd: {teacher: self, kappa: 3.0}}
data:
  - {name: feed, spec: simulated_pairs, simulate: {num_rows: 50}, shared: {learning_rate: 0.25}}
  - {name: films, spec: movielens_100k, fetch: movielens_100k}
backbones:
  - {name: small_fm, set: {backbone: fm, embedding_dim: 2}}
methods:
  - {name: strong, like: global, set: {clsd: {kappa: 9.0}}}
  - {name: plain, set: {dropout: 0.5}}
grids:
  - {title: One, data: [feed, films], backbones: [lr, small_fm], methods: [strong, plain, both]}
"""


@pytest.fixture
def content():
    """Content of a valid study: a fresh copy that the test may change."""
    return yaml.safe_load(_STUDY)


def cells(content, grid=0):
    study = parse_study(content, "study.yaml")
    return list(study.cells(study.grids[grid]))


def error_of(content):
    """The message with which a study is refused."""
    with pytest.raises(SpecError) as error:
        cells(content)
    return str(error.value)


# The grid.


def test_a_grid_is_every_combination_with_the_baseline_first_and_the_placebos_last(content):
    found = cells(content)
    methods = ["bce", "strong", "plain", "both", "strong_shuffled_confidence", "both_permuted_groups"]
    expected = [
        (data, backbone, method, seed)
        for data in ("feed", "films") for backbone in ("lr", "small_fm") for method in methods for seed in (1, 2)
    ]  # fmt: skip
    assert [(cell.data, cell.backbone, cell.method, cell.seed) for cell in found] == expected
    assert all(cell.config.seed == cell.seed for cell in found)


def test_settings_go_from_shared_over_data_and_backbone_to_method(content):
    by_name = {str(cell): cell.config for cell in cells(content)}
    strong = by_name["feed small_fm strong seed 2"]
    # Of the data, the backbone.
    assert (strong.learning_rate, strong.backbone, strong.embeddings.dim) == (0.25, "fm", 2)
    assert (strong.method.kappa, strong.method.lambda_, strong.method.mu) == (
        9.0,
        1.0,
        0.0,
    )  # Its own, and like global.
    assert by_name["films lr both seed 1"].learning_rate == 0.5
    assert by_name["films lr both seed 1"].method.kappa == 3.0
    plain = by_name["films lr plain seed 1"]
    assert (plain.method.name, plain.dropout) == ("bce", 0.5)  # A method is like the baseline unless it says otherwise.
    assert by_name["feed lr strong_shuffled_confidence seed 1"].method.kappa == 9.0


def test_a_grid_may_have_its_own_seeds(content):
    content["grids"][0] |= {"seeds": 3, "methods": ["both"]}
    found = cells(content)
    assert {cell.method for cell in found} == {"bce", "both", "both_shuffled_confidence", "both_permuted_groups"}
    assert {cell.seed for cell in found} == {1, 2, 3}


def test_a_grid_may_compare_with_another_of_its_methods(content):
    content["grids"][0] |= {"methods": ["both"], "baseline": "both_permuted_groups"}
    assert {cell.method for cell in cells(content)} >= {"bce", "both_permuted_groups"}
    content["grids"][0]["baseline"] = "local"
    with pytest.raises(SpecError, match=r"one of its methods\. Received: 'local'\. Allowed: bce, both, both_shuffled"):
        cells(content)


def test_confidence_of_a_method_that_has_none_is_refused(content):
    content["methods"].append({"name": "forgotten", "set": {"method": {"kappa": 5.0}}})
    content["grids"][0]["methods"] = ["forgotten"]
    with pytest.raises(SpecError, match=r"'forgotten' sets kappa of method clsd, but is like bce.*Add like: global"):
        cells(content)


def test_the_baseline_is_there_once_even_if_it_is_listed(content):
    content["grids"][0]["methods"] = ["both", "bce"]
    names = [cell.method for cell in cells(content) if (cell.data, cell.backbone, cell.seed) == ("feed", "lr", 1)]
    assert names == ["bce", "both", "both_shuffled_confidence", "both_permuted_groups"]


# What is refused.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sheds": 2}, "sheds: unknown key. Received: 'sheds'. Allowed: backbones, data, grids, methods, seeds"),
        ({"seeds": 0}, "seeds: Input should be greater than or equal to 1. Received: 0"),
        ({"split": "all"}, "split: Input should be 'train', 'validation' or 'test'. Received: 'all'"),
        ({"grids": []}, "grids: "),
        (
            {"grids": [{"title": "x", "data": ["feeds"], "methods": ["both"]}]},
            "Received: 'feeds'. Allowed: feed, films",
        ),
        ({"grids": [{"title": "x", "data": ["feed"], "method": ["both"]}]}, "grids.0.method: unknown key"),
        ({"grids": [{"title": "x", "data": ["feed"], "methods": ["bath"]}]}, "Received: 'bath'. Allowed: bce, "),
        ({"methods": [{"name": "strong", "like": "golbal"}]}, "unknown method. Received: 'golbal'. Allowed: bce, "),
        ({"methods": [{"name": "strong"}, {"name": "strong"}]}, "names must be unique. Received: strong twice"),
        ({"shared": {"kappa": 2.0}}, "method bce is not valid:\n  kappa: unknown key"),
        ({"shared": {"clsd": {"kappa": 0}}}, "method.kappa: Input should be greater than 0. Received: 0"),
    ],
)
def test_a_bad_study_is_refused(content, changes, message):
    content |= changes
    assert message in error_of(content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"simulate": {"num_row": 5}}, "data.0.simulate.num_row: unknown key. Received: 'num_row'. Allowed: "),
        ({"simulate": {"num_rows": 0}}, "data.0.simulate.num_rows: Input should be greater than or equal to 1"),
        ({"name": "my feed"}, "data.0.name: "),
        ({"name": "films"}, "names must be unique. Received: films twice"),
        ({"fetch": "movielens_100k"}, "give one of fetch, simulate and input. Received: more than one"),
        ({"fetch": "movielens_20m", "simulate": None}, "data.0.fetch: Input should be 'movielens_100k'"),
        ({"inputs": "here"}, "data.0.inputs: unknown key"),
        ({"shared": {"lerning_rate": 0.1}}, "lerning_rate: unknown key"),
    ],
)
def test_bad_data_is_refused(content, changes, message):
    content["data"][0] |= changes
    assert message in error_of(content)


def test_the_error_names_only_methods_that_would_be_accepted(content):
    # A method is like a known one, never like another declared one.
    content["methods"].append({"name": "stronger", "like": "strong"})
    content["grids"][0]["methods"] = ["stronger"]
    message = error_of(content)
    assert "Received: 'strong'. Allowed: bce, " in message
    assert "strong" not in message.split("Allowed: ")[1].split(", ")


def test_a_declared_method_cannot_take_the_name_of_a_known_one(content):
    # The baseline of every table would be another than its name says.
    content["methods"].append({"name": "bce", "like": "focal"})
    assert "'bce'" in error_of(content)


def test_an_unknown_backbone_is_refused_before_anything_is_built(content):
    content["grids"][0]["backbones"] = ["deep_fm"]
    with pytest.raises(ValueError, match=r"unknown backbone\. Received: 'deep_fm'\. Allowed: .*deepfm"):
        cells(content)


# Studies by name and by path.


@pytest.mark.parametrize("name", study_names())
def test_studies_that_come_with_the_package_are_valid(name):
    study = load_study(name)
    for grid in study.grids:
        found = list(study.cells(grid))
        assert found[0].method == "bce"
        for data in {cell.data for cell in found} if name != "demo" else ():  # Its datasets are given.
            assert study_spec(study.data_set(data)).label


def test_a_study_is_read_from_a_path(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_text(_STUDY, encoding="utf-8")
    assert load_study(str(path)) == parse_study(content, "test")


def test_an_unknown_study_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"name or the path of a YAML file\. Received: 'smal'\. Known names: .*small"):
        load_study("smal")
    (tmp_path / "bad.yaml").write_text("seeds: [", encoding="utf-8")
    with pytest.raises(SpecError, match=r"bad\.yaml: not valid YAML"):
        load_study(str(tmp_path / "bad.yaml"))


# Data.


def data_set(content, name):
    return parse_study(content, "study.yaml").data_set(name)


def test_a_simulated_feed_is_one_for_each_seed_and_has_its_truth(content, tmp_path):
    one, other = (prepared_data(data_set(content, "feed"), seed, tmp_path, {}, {}) for seed in (1, 2))
    assert one.dataset_dir != other.dataset_dir
    assert one.truth == str(tmp_path / "data" / "feed_seed_1" / "raw" / "truth.parquet")
    assert prepared_data(data_set(content, "feed"), 1, tmp_path, {}, {}) == one


def test_other_data_is_shared_by_all_seeds(content, tmp_path):
    one, other = (prepared_data(data_set(content, "films"), seed, tmp_path, {}, {}) for seed in (1, 2))
    assert one == other
    assert one.dataset_dir == tmp_path / "data" / "films" / "dataset"
    assert one.truth is None


def test_a_given_dataset_takes_the_place_of_its_source(content, tmp_path):
    for name in ("feed", "films"):
        found = prepared_data(data_set(content, name), 1, tmp_path, {name: tmp_path / "given"}, {})
        assert found == prepared_data(data_set(content, name), 2, tmp_path, {name: tmp_path / "given"}, {})
        assert found.dataset_dir == tmp_path / "given"
        # What was planted in a feed that somebody else simulated is not known.
        assert found.truth is None


def test_a_given_dataset_must_be_built_with_the_spec_that_the_study_declares(content, feed_dataset, tmp_path):
    given = prepared_data(data_set(content, "films"), 1, tmp_path, {"films": feed_dataset.path}, {})
    with pytest.raises(ArtifactError, match=r"films.* of the spec 'simulated_feed'\. Allowed: 'movielens_100k'"):
        given.require_same_source()
    content["data"][1] = {"name": "films"}  # Without a spec it is whatever is given.
    prepared_data(data_set(content, "films"), 1, tmp_path, {"films": feed_dataset.path}, {}).require_same_source()
    with pytest.raises(ValueError, match="Add --dataset_dir=films="):
        prepared_data(data_set(content, "films"), 1, tmp_path, {}, {"films": tmp_path})


def test_a_dataset_from_other_tables_of_the_user_is_refused(content, tmp_path):
    tables = tmp_path / "tables"
    tables.mkdir()
    (tables / "ml-100k.inter").write_text("one", encoding="utf-8")
    found = prepared_data(data_set(content, "films"), 1, tmp_path, {}, {"films": tables})
    found.dataset_dir.mkdir(parents=True)
    write_json(found.dataset_dir.parent / "source.json", found._source)
    found.require_same_source()
    (tables / "ml-100k.inter").write_text("two more", encoding="utf-8")
    with pytest.raises(ArtifactError, match="or from other tables"):
        found.require_same_source()


def test_tables_of_the_users_own_need_a_directory(content, tmp_path):
    del content["data"][1]["fetch"]
    with pytest.raises(ValueError, match=r"no directory for it\. Add --input_dir=films=<.*movielens_100k>"):
        prepared_data(data_set(content, "films"), 1, tmp_path, {}, {})
    content["data"][1]["input"] = "movielens"
    with pytest.raises(ValueError, match="Add --input_dir=movielens="):
        prepared_data(data_set(content, "films"), 1, tmp_path, {}, {"films": tmp_path})
    assert prepared_data(data_set(content, "films"), 1, tmp_path, {}, {"movielens": tmp_path}).truth is None
    assert prepared_data(data_set(content, "films"), 1, tmp_path, {"films": tmp_path}, {}).dataset_dir == tmp_path


def test_two_data_sets_may_share_the_users_tables_and_split_them_differently(content, tmp_path):
    moments = {"validation_from": "1998-03-01", "test_from": "1998-04-01", "until": "1998-04-10"}
    content["data"] = [
        {"name": "tuning", "spec": "movielens_100k", "input": "ml", "split": moments},
        {"name": "final", "spec": "movielens_100k", "input": "ml", "split": {"rule": "random", "seed": 5}},
    ]
    content["grids"][0]["data"] = ["tuning", "final"]
    tuning, final = (data_set(content, name) for name in ("tuning", "final"))
    assert study_spec(tuning).split.until.isoformat() == "1998-04-10T00:00:00+00:00"
    assert (study_spec(final).split.rule, study_spec(final).split.seed) == ("random", 5)
    assert study_spec(tuning).features == study_spec(final).features
    places = {prepared_data(data, 1, tmp_path, {}, {"ml": tmp_path}).dataset_dir for data in (tuning, final)}
    assert len(places) == 2


def test_a_yaml_date_in_a_split_is_read(content):
    content["data"][1]["split"] = yaml.safe_load("{validation_from: 1998-03-01, test_from: 1998-04-01}")
    assert study_spec(data_set(content, "films")).split.test_from.isoformat() == "1998-04-01T00:00:00+00:00"


def test_a_bad_split_names_the_data(content):
    content["data"][1]["split"] = {"tset": 0.5}
    with pytest.raises(SpecError, match=r"films: movielens_100k.*\n  split\.tset: unknown key"):
        study_spec(data_set(content, "films"))


# The command.


_TINY_STUDY = """
seeds: 2
shared: {max_epochs: 1, batch_size: 128, learning_rate: 0.03, clsd: {teacher: self, loss_warmup_steps: 2}}
data:
  - {name: feed, spec: simulated_pairs, simulate: {num_rows: 1500, num_users: 50, num_items: 30, seed: 77}}
methods:
  - {name: stopped, like: local, set: {clsd: {guards: {max_ad_gate_drift: 0.001}}}}
grids:
  - {title: Both seeds, data: [feed], backbones: [fm], methods: [global]}
  - {title: One seed, data: [feed], backbones: [fm], methods: [global, stopped], seeds: 1}
"""


@pytest.fixture(scope="module")
def study_dir(tmp_path_factory):
    """The directory of a study that the command ran, with what it printed. Read-only."""
    path = tmp_path_factory.mktemp("study")
    (path / "tiny.yaml").write_text(_TINY_STUDY, encoding="utf-8")
    done = run_command(
        "pipelines.study",
        f"--study={path / 'tiny.yaml'}",
        f"--study_dir={path / 'study'}",
        "--num_processes=1",
        env={"COLUMNS": "300", "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path / "output.txt").write_text(done.stdout, encoding="utf-8")
    return path / "study"


_SMALLEST_STUDY = """
seeds: 1
shared: {max_epochs: 1}
data:
  - {name: feed}
grids:
  - {title: Smallest, data: [feed], backbones: [lr], methods: [bce]}
"""


def test_the_command_trains_and_writes_its_results(feed_dataset, tmp_path):
    (tmp_path / "smallest.yaml").write_text(_SMALLEST_STUDY, encoding="utf-8")
    done = run_command(
        "pipelines.study",
        f"--study={tmp_path / 'smallest.yaml'}",
        f"--study_dir={tmp_path / 'study'}",
        f"--dataset_dir=feed={feed_dataset.path}",
        "--num_processes=1",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = pyarrow.parquet.read_table(tmp_path / "study" / "results.parquet").to_pylist()
    assert {(row["method"], row["seed"]) for row in results} == {("bce", 1)}
    assert np.isfinite([row["value"] for row in results]).all()
    assert "### Smallest" in (tmp_path / "study" / "tables.md").read_text(encoding="utf-8")


@pytest.mark.long
def test_each_seed_simulates_with_its_own_seed(study_dir):
    planted = [read_json(study_dir / "data" / f"feed_seed_{seed}" / "raw" / "truth.json") for seed in (1, 2)]
    configs = [FeedConfig.model_validate_json(json.dumps(entry["config"])) for entry in planted]
    assert [config.seed for config in configs] == [1, 2]  # Not the 77 of the file.
    assert configs[0].model_copy(update={"seed": 2}) == configs[1]


@pytest.mark.long
def test_results_have_a_row_for_every_number_of_every_run(study_dir):
    results = pyarrow.parquet.read_table(study_dir / "results.parquet")
    assert {field.name: str(field.type) for field in results.schema} == {
        "data": "string", "backbone": "string", "method": "string", "seed": "int64", "slice": "string",
        "metric": "string", "value": "double",
    }  # fmt: skip
    rows = results.to_pylist()
    keys = [tuple(row[name] for name in ("method", "seed", "slice", "metric")) for row in rows]
    assert len(set(keys)) == len(keys)
    runs = {(method, seed) for method, seed, _, _ in keys}
    expected = ("bce", "global", "global_shuffled_confidence")
    assert runs >= {(method, seed) for method in expected for seed in (1, 2)}
    assert not [method for method, _ in runs if method == "stopped"]
    assert {row["metric"] for row in rows if row["slice"] == "overall"} >= {"auc", "genuine_auc", "uncalibrated_pcoc"}
    assert np.isfinite([row["value"] for row in rows]).all()


@pytest.mark.long
def test_tables_and_page_show_placebos_and_stopped_runs(study_dir):
    text = (study_dir / "tables.md").read_text(encoding="utf-8")
    page = (study_dir / "report.html").read_text(encoding="utf-8")
    for shown in (text, page, (study_dir.parent / "output.txt").read_text(encoding="utf-8")):
        assert "global_shuffled_confidence" in shown
    assert "* feed fm stopped was stopped on 1 of 1 seeds; at seed 1: AdGate" in text
    assert "<li>feed fm stopped was stopped on 1 of 1 seeds; at seed 1: AdGate" in page
    assert "age_group=other" in (study_dir / "user_groups.md").read_text(encoding="utf-8")
    assert "age_group=other" in page


@pytest.mark.long
def test_a_grid_shows_its_own_seeds_alone(study_dir):
    one_seed = (study_dir / "tables.md").read_text(encoding="utf-8").split("### One seed")[1]
    means = [line for line in one_seed.splitlines() if line.startswith("| feed | fm | bce |")]
    assert means
    assert "(" not in means[0]  # One seed has no standard deviation.


@pytest.mark.long
def test_only_what_was_asked_for_is_left(study_dir):
    assert {path.name for path in study_dir.iterdir()} == {
        "data",
        "runs",
        "results.parquet",
        "tables.md",
        "user_groups.md",
        "report.html",
    }
    assert len(list(study_dir.glob("runs/feed/fm/*/seed_*/result.json"))) == len(
        list(study_dir.glob("runs/feed/fm/*/seed_*"))
    )
    log = pathlib.Path(study_dir / "data" / "feed_seed_1" / "raw" / "log.csv")
    assert pyarrow.csv.read_csv(log).num_rows == 1500
