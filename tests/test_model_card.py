"""The model card of a version: true numbers, a command that trains the same again, and words that hold for the run."""

import shlex
import shutil

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from clsd_tf.data import input_pipeline
from clsd_tf.evaluation.evaluate import evaluate
from clsd_tf.storage.files import read_json, write_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import load_model, predict
from clsd_tf.training.config import load_config
from export.publishing.versions import CARD_JSON, read_auc
from export.servable.card_text import render_card
from export.servable.card_types import CARD_MARKDOWN, ModelCard
from export.servable.model_card import training_command, write_model_card

VERIFICATION = {"rows": 5, "warmup_records": 4, "max_difference": {"serving_default/ctr": 1e-8, "rank/ctr": 3e-8}}


@pytest.fixture(scope="module")
def model(clsd_run, feed_dataset):
    return load_model(clsd_run.work_dir, feed_dataset)


@pytest.fixture(scope="module")
def write(model, feed_dataset, clsd_run):
    def write_card(directory, quantization=None, work_dir=clsd_run.work_dir):
        facts = {"profile": {"calibration": True}, "quantization": quantization, "verification": VERIFICATION}
        return write_model_card(directory, model, feed_dataset, work_dir, model_name="feed", version=7, **facts)

    return write_card


@pytest.fixture(scope="module")
def written(write, tmp_path_factory):
    """(directory, card)"""
    directory = tmp_path_factory.mktemp("card")
    return directory, write(directory)


def test_the_json_is_the_card_that_its_schema_describes(written):
    directory, card = written
    assert ModelCard.model_validate_json((directory / CARD_JSON).read_text()) == card
    assert read_auc(directory) == card.overall.metrics["auc"].value > 0.5


def test_the_card_of_a_run_that_goes_on_names_the_runs_before(write, written, clsd_run, tmp_path):
    assert "--init_from" not in written[1].training.command
    lineage, earlier = read_json(clsd_run.work_dir.lineage), []
    for name in ("0123456789abcdef", "fedcba9876543210"):
        earlier.append({**lineage["run"], "work_fingerprint": name, "rows": 1234})
    work_dir = WorkDir(shutil.copytree(clsd_run.work_dir.path, tmp_path / "run"))
    write_json(work_dir.lineage, {**lineage, "ancestors": earlier})
    (tmp_path / "card").mkdir()
    card = write(tmp_path / "card", work_dir=work_dir)
    assert [run.model_dump() for run in card.training.earlier_runs] == earlier
    assert card.training.command == written[1].training.command + " --init_from=EARLIER_WORK_DIR"
    text = (tmp_path / "card" / CARD_MARKDOWN).read_text()
    assert text.index("| 0123456789abcdef | ") < text.index("| fedcba9876543210 | ")
    assert "| 1,234 |" in text


def test_the_same_run_gives_the_same_bytes(written, write, tmp_path):
    write(tmp_path)
    for name in (CARD_JSON, CARD_MARKDOWN):
        assert (tmp_path / name).read_bytes() == (written[0] / name).read_bytes()


def test_metrics_are_those_of_the_evaluation_overall_and_of_each_group(written, model, feed_dataset):
    _, card = written
    expected = evaluate(model, feed_dataset, "test")
    assert card.split == "test"
    slices = {("overall", ""): (card.overall, expected["overall"])}
    assert set(card.groups) == {group.name for group in feed_dataset.inputs.groups}
    for group, labels in card.groups.items():
        assert set(labels) == set(expected["groups"][group])
        slices |= {(group, label): (entry, expected["groups"][group][label]) for label, entry in labels.items()}
    for received, entry in slices.values():
        assert (received.rows, received.clicks, received.ece) == (entry["rows"], entry["clicks"], entry["ece"])
        assert received.users >= 20
        assert {name: measured.value for name, measured in received.metrics.items()} == {
            name: entry[name] for name in received.metrics
        }


def test_the_interval_of_auc_is_that_of_resampled_users(written, model, feed_dataset):
    """scikit-learn's AUC over users drawn with replacement, against the interval on the card."""
    columns = input_pipeline.read_columns(feed_dataset, "test", ["label", "user_hash"])
    ctr = predict(model, feed_dataset, "test")
    users, random = np.unique(columns["user_hash"]), np.random.default_rng(1)
    rows_of = {user: np.flatnonzero(columns["user_hash"] == user) for user in users}
    drawn = []
    for _ in range(300):
        rows = np.concatenate([rows_of[user] for user in random.choice(users, len(users))])
        drawn.append(roc_auc_score(columns["label"][rows], ctr[rows]))
    found = written[1].overall.metrics["auc"]
    assert found.value == pytest.approx(roc_auc_score(columns["label"], ctr))
    margin = stats.t.ppf(0.975, len(users) - 1) * np.std(drawn, ddof=1)
    assert found.interval == pytest.approx((found.value - margin, found.value + margin), abs=0.2 * margin)


def test_calibration_is_measured_without_and_with(written, model, feed_dataset):
    expected = evaluate(model, feed_dataset, "test")
    found = written[1].calibration
    assert (found.method, found.user_group) == ("platt", "age_group")
    for part, key in ((found.before, "uncalibrated"), (found.after, "overall")):
        assert part == {name: expected[key][name] for name in ("pcoc", "ece", "log_loss")}


def test_the_data_names_splits_and_files_but_no_place(written, feed_dataset, feed_dir):
    directory, card = written
    built = read_json(feed_dataset.layout.manifest)
    assert card.data.dataset_fingerprint == feed_dataset.fingerprint
    assert {name: split.model_dump() for name, split in card.data.splits.items()} == built["splits"]
    assert [(entry.table, entry.sha256) for entry in card.data.inputs] == [
        (entry["table"], entry["sha256"]) for entry in built["inputs"]
    ]
    for name in (CARD_JSON, CARD_MARKDOWN):
        text = (directory / name).read_text()
        for place in (feed_dir.parent, feed_dataset.path, directory):
            assert str(place) not in text


def test_input_files_lose_their_directories(feed_dataset, clsd_run, model, tmp_path, monkeypatch):
    moved = read_json(feed_dataset.layout.manifest)
    names = ["/home/me/log.csv", "gs://bucket/day=1/log.csv", "C:\\data\\log.csv"]
    inputs = [{"table": "log", "file": name, "bytes": 1, "sha256": "0"} for name in names]
    write_json(tmp_path / "manifest.json", {**moved, "inputs": inputs})
    monkeypatch.setattr(feed_dataset.layout, "manifest", tmp_path / "manifest.json")
    card = write_model_card(
        tmp_path, model, feed_dataset, clsd_run.work_dir,
        model_name="feed", version=7, profile={}, quantization=None, verification=VERIFICATION,
    )  # fmt: skip
    assert [entry.file for entry in card.data.inputs] == ["log.csv"] * 3


@pytest.mark.parametrize(
    "assignments",
    [
        [],
        ["method=bce", "backbone=lr", "learning_rate=1e-05", "patience_epochs=null"],
        [
            "method.lambda=0.25",
            "method.mu=0.5",
            "method.ad_gate.features=[age_group, gender]",
            "method.guards.min_ctr_ratio=0",
        ],
        ["backbone=my.module:factory", 'backbone_arguments={units: [3, 4], name: "it\'s $HOME; a b"}'],
        ["calibration.method=isotonic", "calibration.user_group=age group"],
    ],
)
def test_the_command_trains_with_the_same_config(assignments):
    config = load_config(None, assignments).to_dict()
    words = shlex.split(training_command(config))
    assert words[:5] == ["python", "-m", "pipelines.train", "--dataset_dir=DATASET_DIR", "--work_dir=WORK_DIR"]
    settings = words[6::2]
    assert words[5::2] == ["--set"] * len(settings)
    assert len(settings) >= len(assignments)
    assert load_config(None, settings).to_dict() == config


def test_only_what_differs_from_the_defaults_is_in_the_command():
    config = load_config(None, ["method.mu=0.5"]).to_dict()
    assert training_command(config).endswith("--work_dir=WORK_DIR --set method.mu=0.5")


def changed(card, *assignments, **data):
    config = load_config(None, assignments).to_dict()
    training = card.training.model_copy(update={"config": config})
    return card.model_copy(update={"training": training, "data": card.data.model_copy(update=data)})


def test_the_words_are_those_of_the_run(written):
    _, card = written
    plain = render_card(changed(card, "method=bce", intensity_label=None))
    assert "Every click counted the same" in plain
    assert "Clicks by mistake count as clicks" in plain
    assert "whether clicks were satisfying is not measured" in plain
    assert "Click confidence is a model's own prediction" not in plain
    confident = render_card(changed(card, "method.lambda=0.25", "method.mu=0.5"))
    assert "0.25 from global confidence (ratio), 0.5 from local confidence (additive" in confident
    assert "0.25 as in ordinary training" in confident
    assert "Nobody has judged whether a click was meant" in confident
    assert "Not for serving" in render_card(changed(card, "method.placebo=shuffled_confidence"))
    assert "ctr is not the probability of a click" in render_card(changed(card, "method.clicks=intense"))
    without = render_card(card.model_copy(update={"groups": {}}))
    assert "differences between groups of users are not measured" in without
    for text in (plain, confident, without):
        assert "Not for decisions about people" in text


def test_the_tables_show_values_with_their_intervals(written):
    directory, card = written
    text = (directory / CARD_MARKDOWN).read_text()
    auc = card.overall.metrics["auc"]
    assert f"{auc.value:.4f} ({auc.interval[0]:.4f} to {auc.interval[1]:.4f})" in text
    headings, _, *rows = [line for line in text.split("## Measured")[1].split("## ")[0].splitlines() if line[:1] == "|"]
    assert len(rows) == 1 + sum(map(len, card.groups.values()))
    assert {row.count("|") for row in rows} == {headings.count("|")}


def test_quantization_is_told_with_its_cost(write, tmp_path):
    cost = {"tables": "int8", "bytes_before": 4000, "bytes_after": 1200, "auc_before": 0.71234, "auc_after": 0.71201}
    write(tmp_path, cost)
    text = (tmp_path / CARD_MARKDOWN).read_text()
    assert "Embedding tables in int8: 4,000 bytes became 1,200, AUC 0.71234 became 0.71201." in text
    assert "Signatures: rank, serving_default" in text.replace("\\", "")
    assert "3.0e-08" in text


def test_text_of_a_spec_cannot_become_markup(written):
    _, card = written
    hostile = "<script>|[x](http://y)`\n# no"
    text = render_card(
        changed(card, description=hostile, label=hostile, feature_spec=hostile).model_copy(
            update={"groups": {hostile: {hostile: card.overall}}}
        )
    )
    for line in text.splitlines():
        assert line != "# no"
        outside_code = "".join(line.split("`")[::2]) if line.startswith("* ") else line
        assert "<script>" not in outside_code.replace("\\<", "")
        assert "[x](" not in outside_code.replace("\\[", "")
