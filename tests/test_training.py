"""A training run: its work directory, its reproducibility, its resume, and what it refuses."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clsd_tf import input_pipeline, metrics
from clsd_tf.artifacts import ArtifactError, DatasetDir, DatasetLayout, WorkDir, read_json
from clsd_tf.callbacks import CheckpointAndStop, TrainingDivergedError
from clsd_tf.clsd import ClsdConfig
from clsd_tf.hashing import mix_row_ids
from clsd_tf.input_pipeline import RowValues
from clsd_tf.training import (
    TrainConfig,
    build_model,
    cross_fit_scores,
    load_config,
    load_model,
    make_deterministic,
    predict,
    steps_per_epoch,
    train,
)
from clsd_tf.validation import SpecError

WARMUP = 5


def tiny(**changes):
    """A run of two epochs of 13 steps: 3,200 rows in batches of 256."""
    clsd = {"teacher": "self", "loss_warmup_steps": WARMUP, "num_folds": 2, **changes.pop("clsd", {})}
    sizes = {"embedding_dim": 4, "hidden_units": (8,), "batch_size": 256, "max_epochs": 2}
    return TrainConfig(**{**sizes, "clsd": ClsdConfig(**clsd), **changes})


CONFIG = tiny()


@pytest.fixture(scope="module", autouse=True)
def _deterministic():
    """As the training command does: histories and weights are compared bit for bit."""
    make_deterministic()


@pytest.fixture(scope="module")
def finished(feed_dataset, tmp_path_factory):
    """A finished run and the history that ``train`` returned. Read-only."""
    work_dir = WorkDir(tmp_path_factory.mktemp("runs") / "finished")
    return work_dir, train(feed_dataset, CONFIG, work_dir)


@pytest.fixture(scope="module")
def other_dataset(feed_dataset, tmp_path_factory):
    """A valid dataset directory with another fingerprint."""
    path = tmp_path_factory.mktemp("other") / "dataset"
    shutil.copytree(feed_dataset.path, path)
    layout = DatasetLayout(path)
    layout.counts.write_text(json.dumps({**read_json(layout.counts), "note": "another"}), encoding="utf-8")
    layout.mark_complete(feed_dataset.spec)
    return DatasetDir(path)


@pytest.fixture(scope="module")
def train_ids(feed_dataset):
    return input_pipeline.read_columns(feed_dataset, "train", ["row_id"])["row_id"]


def validation_auc(model, dataset):
    columns = input_pipeline.read_columns(dataset, "validation", ["label", "sample_weight"])
    return metrics.auc(columns["label"], predict(model, dataset, "validation"), columns["sample_weight"])


# What a run leaves.


def test_a_work_directory_holds_all_that_later_jobs_need(finished, feed_dataset):
    work_dir, history = finished
    assert work_dir.is_complete
    assert work_dir.resolved_config == {"train": CONFIG.to_dict(), "dataset_fingerprint": feed_dataset.fingerprint}
    assert read_json(work_dir.history) == history
    assert list(work_dir.checkpoints.glob("ckpt-2.index"))
    assert work_dir.best_weights.with_name("weights.index").is_file()
    assert not list(work_dir.path.glob("*incomplete*"))


def test_history_has_finite_numbers_for_each_epoch(finished):
    _, history = finished
    assert [entry["epoch"] for entry in history] == [0, 1]
    names = {"loss", "bce", "ad_gate_loss", "mean_pctr", "min_click_confidence", "max_click_confidence"}
    for entry in history:
        assert names | {"val_auc", "val_log_loss"} <= set(entry)
        assert all(np.isfinite(entry[name]) for name in names | {"val_auc", "val_log_loss"})
        assert np.isfinite(entry["click_confidence/age_group/18-30"])
        # The feed has no user of unknown age: a mean of nothing is written as null.
        assert entry["click_confidence/age_group/unknown"] is None
    assert history[1]["bce"] < history[0]["bce"]


def test_tensorboard_events_hold_the_scalars_of_every_user_group(finished, feed_dataset):
    work_dir, history = finished
    events = EventAccumulator(str(work_dir.tensorboard)).Reload()
    tags = set(events.Tags()["tensors"])
    for group in feed_dataset.inputs.groups:
        for label in group.labels:
            assert f"click_confidence/{group.name}/{label}" in tags
            assert f"ad_gate/{group.name}/{label}" in tags
    for name in ("loss", "val_auc", "click_confidence/age_group/18-30"):
        values = [float(tf.make_ndarray(event.tensor_proto)) for event in events.Tensors(name)]
        assert values == pytest.approx([entry[name] for entry in history])
        assert [event.step for event in events.Tensors(name)] == [13, 26]  # Optimizer steps.


@pytest.fixture(scope="module")
def overfitted(feed_dataset, tmp_path_factory):
    """A run that learns much too fast, and its AUC on validation after each epoch."""
    work_dir = WorkDir(tmp_path_factory.mktemp("runs") / "overfitted")
    config = tiny(method="bce", learning_rate=0.05, max_epochs=12, patience_epochs=2)
    return work_dir, [entry["val_auc"] for entry in train(feed_dataset, config, work_dir)]


def test_load_model_has_the_weights_of_the_best_epoch_not_of_the_last(overfitted, feed_dataset):
    work_dir, aucs = overfitted
    assert max(aucs) > aucs[-1] + 0.001
    assert validation_auc(load_model(work_dir, feed_dataset), feed_dataset) == max(aucs)


def test_a_run_stops_when_patience_runs_out(overfitted):
    _, aucs = overfitted
    assert len(aucs) < 12
    best = int(np.argmax(aucs))
    assert len(aucs) == best + 1 + 2  # Two epochs without a better AUC.


@pytest.fixture(scope="module")
def bce_history(feed_dataset, tmp_path_factory):
    """History of a run with plain BCE; its loss warm-up, longer than the run, must not matter."""
    work_dir = WorkDir(tmp_path_factory.mktemp("runs") / "bce")
    return train(feed_dataset, tiny(method="bce", clsd={"loss_warmup_steps": 1000}), work_dir)


def test_the_same_seed_gives_the_same_history(finished, feed_dataset, tmp_path):
    assert train(feed_dataset, CONFIG, WorkDir(tmp_path / "again")) == finished[1]


def test_methods_share_initial_weights_and_seeds_do_not(feed_dataset):
    def initial(**changes):
        return build_model(tiny(**changes), feed_dataset.inputs).backbone.get_weights()

    clsd, bce, other_seed = initial(), initial(method="bce"), initial(seed=2)
    for one, other in zip(clsd, bce, strict=True):
        np.testing.assert_array_equal(one, other)
    assert any((one != other).any() for one, other in zip(clsd, other_seed, strict=True))


def test_clsd_starts_as_bce_and_departs_from_it_after_loss_warmup(finished, bce_history, feed_dataset, tmp_path):
    bce = bce_history
    assert finished[1][0]["bce"] != bce[0]["bce"]  # 13 steps, of which 5 are warm-up.
    late = tiny(clsd={"loss_warmup_steps": 13})  # All of the first epoch.
    clsd = train(feed_dataset, late, WorkDir(tmp_path / "late"))
    for name in ("loss", "bce", "mean_pctr", "val_log_loss"):
        assert clsd[0][name] == bce[0][name]
        assert clsd[1][name] != bce[1][name]
    assert clsd[0]["max_click_confidence"] == clsd[0]["min_click_confidence"] == 1.0
    assert clsd[1]["min_click_confidence"] < 1.0 < clsd[1]["max_click_confidence"]


# Resume.


def test_a_finished_run_is_left_as_it_is(finished, feed_dataset):
    work_dir, history = finished
    before = {path: path.stat().st_mtime_ns for path in work_dir.path.rglob("*") if path.is_file()}
    assert train(feed_dataset, CONFIG, work_dir) == history
    assert {path: path.stat().st_mtime_ns for path in work_dir.path.rglob("*") if path.is_file()} == before


_CHILD = """
import json, sys
from clsd_tf.artifacts import DatasetDir, WorkDir
from clsd_tf.training import make_deterministic, parse_config, train
make_deterministic()
train(DatasetDir(sys.argv[1]), parse_config(json.loads(sys.argv[2]), "argv"), WorkDir(sys.argv[3]))
"""


def test_a_killed_run_resumes_and_ends_as_an_uninterrupted_one(feed_dataset, tmp_path):
    # Epochs of 100 steps, so that the kill lands before the last of them.
    config = tiny(batch_size=32, max_epochs=3, patience_epochs=3, clsd={"loss_warmup_steps": 150})
    killed = WorkDir(tmp_path / "killed")
    arguments = [str(feed_dataset.path), json.dumps(config.to_dict()), str(killed.path)]
    with subprocess.Popen([sys.executable, "-c", _CHILD, *arguments], stdout=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + 60
        while not (killed.checkpoints / "checkpoint").exists() and time.monotonic() < deadline:
            assert child.poll() is None, "the run ended before its first checkpoint"
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
    assert not killed.is_complete
    assert 1 <= len(read_json(killed.history)) < config.max_epochs

    resumed = train(feed_dataset, config, killed)
    uninterrupted = WorkDir(tmp_path / "uninterrupted")
    assert resumed == train(feed_dataset, config, uninterrupted)
    assert killed.is_complete
    models = [load_model(work_dir, feed_dataset) for work_dir in (killed, uninterrupted)]
    for one, other in zip(*(model.backbone.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(one, other)


# Checkpoints and best weights.


def keeper_with_model(config, inputs, work_dir, **arguments):
    keeper = CheckpointAndStop(work_dir, **{"patience_epochs": 2, "first_counted_step": 0, **arguments})
    model = build_model(config, inputs)
    assert keeper.resume(model) == 0
    keeper.set_model(model)
    return keeper, model


def end_epoch(keeper, model, epoch, *, step, val_auc):
    """Ends an epoch with all weights equal to its number + 1."""
    model.backbone.set_weights([np.full(weight.shape, epoch + 1.0) for weight in model.backbone.get_weights()])
    model.optimizer.iterations.assign(step)
    keeper.on_epoch_end(epoch, {"val_auc": val_auc})


def test_epochs_within_loss_warmup_do_not_compete_for_the_best_weights(feed_dataset, tmp_path):
    work_dir = WorkDir(tmp_path)
    keeper, model = keeper_with_model(CONFIG, feed_dataset.inputs, work_dir, first_counted_step=20)
    end_epoch(keeper, model, 0, step=10, val_auc=0.9)
    end_epoch(keeper, model, 1, step=20, val_auc=0.95)  # Steps 0 to 19 were warm-up: still plain BCE.
    assert not list(tmp_path.rglob("weights.index"))
    end_epoch(keeper, model, 2, step=30, val_auc=0.6)
    end_epoch(keeper, model, 3, step=40, val_auc=0.5)
    saved = tf.train.load_checkpoint(str(work_dir.best_weights))
    names = [name for name in saved.get_variable_to_shape_map() if name.startswith("backbone/")]
    assert len(names) == len(model.backbone.weights)
    assert all((saved.get_tensor(name) == 3.0).all() for name in names)  # Those of epoch 2.
    assert not keeper.is_exhausted  # One epoch without gain: those of the warm-up do not count.


def test_patience_counts_epochs_since_the_best_and_survives_a_resume(feed_dataset, tmp_path):
    keeper, model = keeper_with_model(CONFIG, feed_dataset.inputs, WorkDir(tmp_path))
    for epoch, val_auc in enumerate((0.6, 0.7, 0.7)):  # An equal AUC is no gain.
        end_epoch(keeper, model, epoch, step=10 * (epoch + 1), val_auc=val_auc)
        assert not keeper.is_exhausted
    again = CheckpointAndStop(WorkDir(tmp_path), patience_epochs=2, first_counted_step=0)
    model = build_model(CONFIG, feed_dataset.inputs)
    assert again.resume(model) == 3
    assert [entry["val_auc"] for entry in again.history] == [0.6, 0.7, 0.7]
    assert all((weight == 3.0).all() for weight in model.backbone.get_weights())
    again.set_model(model)
    model.stop_training = False
    end_epoch(again, model, 3, step=40, val_auc=0.65)
    assert again.is_exhausted
    assert model.stop_training


# What stops or refuses a run.


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(feed_dataset, train_ids, tmp_path):
    # An infinite weight on a row of the fifth batch.
    tf.keras.utils.set_random_seed(CONFIG.seed)
    batches = input_pipeline.training_epochs(
        feed_dataset, batch_size=CONFIG.batch_size, seed=CONFIG.seed, first_epoch=0, num_epochs=1
    )
    fifth, _, _ = next(iter(batches.skip(4)))
    weights = np.where(train_ids == fifth["row_id"][0].numpy(), np.inf, 1.0).astype(np.float32)
    work_dir = WorkDir(tmp_path / "run")
    with pytest.raises(TrainingDivergedError, match=r"the loss must be finite. Received: loss=(nan|inf) at step 5\."):
        train(feed_dataset, CONFIG, work_dir, row_weights=RowValues(train_ids, weights))
    assert not work_dir.is_complete
    assert not list(work_dir.checkpoints.glob("*.index"))


def test_a_huge_learning_rate_stops_the_run_with_advice(feed_dataset, tmp_path):
    with pytest.raises(TrainingDivergedError, match="Lower learning_rate"):
        train(feed_dataset, tiny(learning_rate=1e30), WorkDir(tmp_path / "run"))


@pytest.mark.parametrize("steps", [26, 1000])  # 2 epochs of 13 steps.
def test_a_loss_warmup_that_never_ends_is_refused(feed_dataset, tmp_path, steps):
    assert steps_per_epoch(feed_dataset, CONFIG) == 13
    with pytest.raises(ValueError, match=rf"loss_warmup_steps .* Received: {steps}. Allowed: less than 26"):
        train(feed_dataset, tiny(clsd={"loss_warmup_steps": steps}), WorkDir(tmp_path / "run"))


def test_bce_has_no_loss_warmup_to_refuse(bce_history):
    assert len(bce_history) == 2
    assert {entry["max_click_confidence"] for entry in bce_history} == {1.0}


def test_a_refused_config_does_not_claim_the_work_directory(feed_dataset, tmp_path):
    # The user corrects the value and runs the same command again.
    for refused in (tiny(clsd={"loss_warmup_steps": 1000}), tiny(backbone="deep_fm")):
        work_dir = WorkDir(tmp_path / "run")
        with pytest.raises(ValueError, match="Received"):
            train(feed_dataset, refused, work_dir)
        assert not work_dir.config.exists()


def test_another_config_in_the_same_work_directory_is_refused(finished, feed_dataset):
    work_dir, _ = finished
    with pytest.raises(ArtifactError) as error:
        train(feed_dataset, tiny(learning_rate=0.5, seed=3), work_dir)
    message = str(error.value)
    assert "Received: {'learning_rate': 0.5, 'seed': 3}" in message
    assert "Allowed: {'learning_rate': 0.002, 'seed': 1}" in message
    assert "Choose another --work_dir" in message


def test_another_dataset_in_the_same_work_directory_is_refused(finished, other_dataset):
    work_dir, _ = finished
    with pytest.raises(ArtifactError, match="trained on another dataset"):
        train(other_dataset, CONFIG, work_dir)


def test_a_model_is_not_loaded_for_another_dataset(finished, feed_dataset, other_dataset):
    work_dir, _ = finished
    with pytest.raises(ArtifactError) as error:
        load_model(work_dir, other_dataset)
    assert f"Received: {other_dataset.path} with fingerprint {other_dataset.fingerprint}" in str(error.value)
    assert f"Allowed: {feed_dataset.fingerprint}" in str(error.value)


def test_a_model_is_not_loaded_from_an_unfinished_or_absent_run(finished, feed_dataset, tmp_path):
    unfinished = WorkDir(tmp_path / "unfinished")
    shutil.copytree(finished[0].path, unfinished.path)
    unfinished.success.unlink()
    with pytest.raises(ArtifactError, match=r"unfinished, which has none\. Run `python -m pipelines.train`"):
        load_model(unfinished, feed_dataset)
    with pytest.raises(ArtifactError, match="absent, which does not exist"):
        load_model(WorkDir(tmp_path / "absent"), feed_dataset)


# Configs.


def test_without_a_file_the_config_has_its_defaults():
    assert load_config(None, []) == TrainConfig()


def test_a_file_is_read_and_assignments_go_over_it(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("backbone: dnn\nhidden_units: [32, 16]\nclsd: {mu: 0.25, lambda: 0.5}\n", encoding="utf-8")
    config = load_config(str(path), ["clsd.mu=0.125", "seed=7", "hidden_units=[8]"])
    assert config == TrainConfig(backbone="dnn", hidden_units=(8,), seed=7, clsd=ClsdConfig(mu=0.125, lambda_=0.5))


def test_an_empty_file_gives_the_defaults(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("# Nothing yet.\n", encoding="utf-8")
    assert load_config(str(path), []) == TrainConfig()


def test_lambda_is_assigned_under_its_own_name():
    assert load_config(None, ["clsd.lambda=0.3"]).clsd.lambda_ == 0.3


def test_a_config_survives_its_way_through_json():
    config = tiny(clsd={"lambda_": 0.25})
    text = json.dumps(config.to_dict())
    assert json.loads(text)["clsd"]["lambda"] == 0.25
    assert TrainConfig.model_validate_json(text) == config


@pytest.mark.parametrize(
    ("assignment", "fragments"),
    [
        ("learning_rat=0.1", ["learning_rat: unknown key", "Received: 'learning_rat'", "learning_rate", "batch_size"]),
        ("clsd.lamda=0.1", ["clsd.lamda: unknown key", "Received: 'lamda'", "lambda, ", "loss_warmup_steps"]),
        ("batch_size=0", ["batch_size: ", "greater than or equal to 1", "Received: 0"]),
        ("dropout=1.0", ["dropout: ", "less than 1", "Received: 1.0"]),
        ("learning_rate=fast", ["learning_rate: ", "valid number", "Received: 'fast'"]),
        ("method=sgd", ["method: ", "'bce' or 'clsd'", "Received: 'sgd'"]),
        ("clsd.teacher=ema", ["clsd.teacher: ", "'self' or 'cross_fit'", "Received: 'ema'"]),
        ("clsd.mu=0.75", ["clsd: lambda + mu must be at most 1", "Received: 0.5 + 0.75"]),
        ("hidden_units=8", ["hidden_units: ", "Received: 8"]),
        ("seed", ["key=value", "Received: 'seed'", "clsd.mu=0.3"]),
    ],
)
def test_a_bad_assignment_names_key_received_and_allowed(assignment, fragments):
    with pytest.raises(SpecError) as error:
        load_config(None, [assignment])
    for fragment in fragments:
        assert fragment in str(error.value)


def test_errors_in_a_file_name_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("bachbone: dnn\n", encoding="utf-8")
    with pytest.raises(SpecError, match=r"mine\.yaml is not valid:\n  bachbone: unknown key"):
        load_config(str(path), [])


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001"])
def test_a_number_may_have_an_exponent_with_or_without_a_point(text):
    assert load_config(None, [f"learning_rate={text}"]).learning_rate == 0.001


@pytest.mark.parametrize("content", ["- dnn\n", "backbone: [dnn\n", "just text\n"])
def test_a_file_that_is_no_mapping_is_refused_as_a_bad_config(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SpecError, match=r"mine\.yaml"):
        load_config(str(path), ["seed=2"])


def test_an_assignment_below_a_plain_value_is_refused_as_a_bad_config(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 1\n", encoding="utf-8")
    with pytest.raises(SpecError, match="seed"):
        load_config(str(path), ["seed.first=2"])


def test_an_assignment_that_is_no_yaml_is_refused_as_a_bad_config():
    with pytest.raises(SpecError, match="hidden_units"):
        load_config(None, ["hidden_units=[8"])


# The cross-fit teacher.

CROSS_FIT = tiny(max_epochs=1, clsd={"teacher": "cross_fit"})


@pytest.fixture(scope="module")
def cross_fit_run(feed_dataset, tmp_path_factory):
    """A finished run with the cross-fit teacher."""
    work_dir = WorkDir(tmp_path_factory.mktemp("runs") / "cross_fit")
    return work_dir, train(feed_dataset, CROSS_FIT, work_dir)


@pytest.fixture(scope="module")
def folds(train_ids):
    return mix_row_ids(train_ids, CROSS_FIT.seed) % np.uint64(2)


@pytest.fixture(scope="module")
def flipped_dataset(feed_dataset, train_ids, folds, tmp_path_factory):
    """The feed with the labels of every training row of fold 0 turned round, in the records alone."""
    path = tmp_path_factory.mktemp("flipped") / "dataset"
    shutil.copytree(feed_dataset.path, path)
    dataset = DatasetDir(path)
    in_fold_0 = set(train_ids[folds == 0])
    for file in map(pathlib.Path, dataset.record_files("train")):
        records = []
        for serialized in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
            example = tf.train.Example.FromString(serialized)
            feature = example.features.feature
            if feature["row_id"].int64_list.value[0] in in_fold_0:
                feature["label"].float_list.value[0] = 1 - feature["label"].float_list.value[0]
            records.append(example.SerializeToString())
        with tf.io.TFRecordWriter(str(file)) as writer:
            for record in records:
                writer.write(record)
    return dataset


def test_cross_fit_gives_every_training_row_a_score_that_predicts_its_label(cross_fit_run, feed_dataset, train_ids):
    scores = cross_fit_scores(feed_dataset, CROSS_FIT, cross_fit_run[0])
    assert sorted(scores.row_ids) == sorted(train_ids)
    assert ((scores.values > 0) & (scores.values < 1)).all()
    columns = input_pipeline.read_columns(feed_dataset, "train", ["row_id", "label"])
    np.testing.assert_array_equal(columns["row_id"], scores.row_ids)
    assert metrics.auc(columns["label"], scores.values) > 0.52


def test_folds_cut_the_rows_into_halves(folds):
    assert abs((folds == 0).mean() - 0.5) < 0.05


def test_each_row_is_scored_by_a_model_that_never_saw_its_label(
    cross_fit_run, flipped_dataset, feed_dataset, folds, tmp_path
):
    of_feed = cross_fit_scores(feed_dataset, CROSS_FIT, cross_fit_run[0])
    (tmp_path / "run").mkdir()
    of_flipped = cross_fit_scores(flipped_dataset, CROSS_FIT, WorkDir(tmp_path / "run"))
    np.testing.assert_array_equal(of_feed.row_ids, of_flipped.row_ids)
    # Only fold 0's labels differ. Its rows are scored by a model of fold 1's rows: bit for bit the same.
    np.testing.assert_array_equal(of_feed.values[folds == 0], of_flipped.values[folds == 0])
    # Fold 1's rows are scored by a model of fold 0's rows, which has learned the opposite.
    assert (of_feed.values[folds == 1] != of_flipped.values[folds == 1]).mean() > 0.9


def test_cross_fit_scores_are_stored_and_used_again(cross_fit_run, feed_dataset, tmp_path):
    work_dir, _ = cross_fit_run
    assert work_dir.teacher_scores.is_file()
    copy = WorkDir(tmp_path / "copy")
    copy.path.mkdir()
    shutil.copy(work_dir.teacher_scores, copy.teacher_scores)
    stored, expected = (cross_fit_scores(feed_dataset, CROSS_FIT, each) for each in (copy, work_dir))
    np.testing.assert_array_equal(stored.values, expected.values)
    assert not (copy.path / "cross_fit").exists()  # No fold was trained.


def test_finished_folds_are_kept_when_a_run_is_killed_between_folds(cross_fit_run, feed_dataset, tmp_path):
    work_dir, _ = cross_fit_run
    killed = WorkDir(tmp_path / "killed")
    shutil.copytree(work_dir.path / "cross_fit" / "fold_0", killed.path / "cross_fit" / "fold_0")
    before = (killed.path / "cross_fit" / "fold_0" / "_SUCCESS").stat().st_mtime_ns
    scores = cross_fit_scores(feed_dataset, CROSS_FIT, killed)
    expected = cross_fit_scores(feed_dataset, CROSS_FIT, work_dir)
    np.testing.assert_array_equal(scores.values, expected.values)
    assert (killed.path / "cross_fit" / "fold_0" / "_SUCCESS").stat().st_mtime_ns == before


def test_a_cross_fit_run_trains_on_the_out_of_fold_scores(cross_fit_run, feed_dataset, train_ids):
    # AdGate's loss in the first steps is about the mean over clicks of (1 - score)^2: it starts at correction 0 and
    # moves slowly. Own predictions start at .5, where it would be .25.
    work_dir, history = cross_fit_run
    labels = input_pipeline.read_columns(feed_dataset, "train", ["label"])["label"]
    scores = cross_fit_scores(feed_dataset, CROSS_FIT, work_dir).values
    expected = np.square(1 - scores[labels == 1]).mean()
    assert history[0]["ad_gate_loss"] == pytest.approx(expected, rel=0.1)
    assert len(history) == 1
    assert history[0]["val_auc"] > 0.5


def test_a_run_without_user_groups_has_no_ad_gate(feed_dataset):
    inputs = type(feed_dataset.inputs)(feed_dataset.inputs.categorical, feed_dataset.inputs.numeric, ())
    assert build_model(tiny(clsd={"mu": 0.0}), inputs).ad_gate is None
    with pytest.raises(ValueError, match=r"mu > 0 needs an AdGate\. Received: mu=0\.5"):
        build_model(CONFIG, inputs)
