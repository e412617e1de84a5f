"""Checkpoints on disk, what a run keeps of its epochs, and SIGTERM."""

import json
import os
import resource
import shutil
import signal
import threading

import numpy as np
import pytest
import tensorflow as tf
from runs import fitted

from clsd_tf.backbones import BACKBONES, register_backbone
from clsd_tf.backbones.base import feature_inputs
from clsd_tf.commands.interruption import Sigterm, TrainingInterruptedError, handling_sigterm
from clsd_tf.storage.files import ArtifactError, read_json, write_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import build_model
from clsd_tf.training.checkpoints import CheckpointError, Checkpoints, random_generators
from clsd_tf.training.save_and_stop import SaveAndStop

pytestmark = pytest.mark.usefixtures("deterministic")


# Files.


def checkpoints_of(path, to_keep=2, size=4, **arguments):
    """Checkpoints of one variable, and the variable."""
    variable = tf.Variable(tf.zeros([size]))
    return Checkpoints(path, to_keep=to_keep, values=variable, **arguments), variable


@pytest.fixture
def written(tmp_path):
    """A directory with the checkpoints of steps 10, 20 and 30, of which two are kept; the values are the steps."""
    checkpoints, variable = checkpoints_of(tmp_path / "run")
    assert not checkpoints.restore()
    for step in (10, 20, 30):
        variable.assign(tf.fill([4], float(step)))
        checkpoints.save(step)
    return tmp_path / "run"


def restored(path, **arguments):
    checkpoints, variable = checkpoints_of(path, **arguments)
    assert checkpoints.restore()
    return checkpoints, variable.numpy().tolist()


def steps_on_disk(path):
    return sorted(int(file.stem.removeprefix("ckpt-")) for file in path.glob("ckpt-*.index"))


def test_the_newest_checkpoint_is_restored_and_as_many_stay_as_asked_for(written):
    assert steps_on_disk(written) == [20, 30]
    checkpoints, values = restored(written, to_keep=1)
    assert values == [30.0] * 4
    checkpoints.save(40)
    assert steps_on_disk(written) == [40]


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(bytes(content))


DAMAGES = {
    "no index": lambda path: (path / "ckpt-30.index").unlink(),
    "empty index": lambda path: (path / "ckpt-30.index").write_bytes(b""),
    "half an index": lambda path: os.truncate(path / "ckpt-30.index", 100),
    "no data": lambda path: (path / "ckpt-30.data-00000-of-00001").unlink(),
    "half the data": lambda path: os.truncate(path / "ckpt-30.data-00000-of-00001", 30),
    "a flipped bit in the values": lambda path: flip_a_byte(path / "ckpt-30.data-00000-of-00001"),
    "a flipped bit in the index": lambda path: flip_a_byte(path / "ckpt-30.index"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_the_newest_checkpoint_is_damaged_the_one_before_it_is_taken_and_the_user_told(written, damage, capsys):
    DAMAGES[damage](written)
    checkpoints, values = restored(written)
    assert values == [20.0] * 4
    assert "going on from the one before it. Received: " + str(written / "ckpt-30") in capsys.readouterr().out
    checkpoints.save(25)
    checkpoints.save(30)
    assert steps_on_disk(written) == [25, 30]
    assert restored(written)[1] == [20.0] * 4  # As saved last.


def test_checkpoints_none_of_which_can_be_read_are_refused(written):
    for file in written.glob("*.index"):
        file.write_bytes(b"")
    with pytest.raises(ArtifactError, match=rf"Received: {written}/ckpt-30: .*remove {written} to train from the"):
        checkpoints_of(written)[0].restore()


@pytest.mark.parametrize("content", ["", "half a lis"])
def test_a_list_of_checkpoints_that_cannot_be_read_is_refused(written, content):
    (written / "checkpoint").write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match=rf"must be readable\. Received: .*{written}"):
        checkpoints_of(written)[0].restore()
    assert steps_on_disk(written) == [20, 30]


def test_checkpoints_of_another_state_are_refused(written):
    other = Checkpoints(written, to_keep=2, values=tf.Variable(tf.zeros([4])), more=tf.Variable(0.0))
    with pytest.raises(ArtifactError, match=r"ckpt-30 holds another state"):
        other.restore()
    with pytest.raises(ArtifactError, match=r"must be readable\. Received: .*ckpt-30"):
        checkpoints_of(written, size=5)[0].restore()


@pytest.mark.parametrize("had_one", [True, False])
def test_what_killed_saves_left_is_removed(written, tmp_path, had_one):
    path = written if had_one else tmp_path / "first"
    (path / "ckpt-40_temp").mkdir(parents=True)
    (path / "ckpt-40_temp" / "part-00000-of-00001.data-00000-of-00001").write_bytes(b"half")
    (path / "ckpt-40.data-00000-of-00001").write_bytes(b"all")
    (path / "ckpt-40.index").write_bytes(b"ha")
    checkpoints, _ = checkpoints_of(path)
    assert checkpoints.restore() == had_one
    assert steps_on_disk(path) == ([20, 30] if had_one else [])
    assert not list(path.glob("*40*"))


def test_a_full_disk_ends_the_run_with_advice_and_leaves_the_checkpoints_that_were_there(tmp_path):
    checkpoints, variable = checkpoints_of(tmp_path, size=100_000)
    checkpoints.save(10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # Of each file; Python ignores the signal.
    try:
        variable.assign_add(tf.ones([100_000]))
        with pytest.raises(CheckpointError, match=r"step 20 could not be written to .*free the disk, then start the"):
            checkpoints.save(20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    _, values = restored(tmp_path, size=100_000)
    assert set(values) == {0.0}
    assert not list(tmp_path.glob("*20*"))


def test_a_worker_that_is_not_the_chief_reads_checkpoints_and_leaves_none(written):
    before = sorted(written.iterdir())
    worker, values = restored(written, is_chief=False)
    assert values == [30.0] * 4
    worker.save(40)
    assert sorted(written.iterdir()) == before


# Random layers.


class DropoutInTraining(tf.keras.layers.Layer):
    """Calls its dropout in training only, so that building a model does not."""

    def __init__(self):
        super().__init__()
        self._dropout = tf.keras.layers.Dropout(0.3)

    def call(self, values, training=False):
        return self._dropout(values, training=True) if training else values


@pytest.fixture
def noisy_backbone():
    """A user's own functional model with all kinds of random layers, two of which share one dropout."""

    @register_backbone("noisy")
    def noisy(inputs, **_):
        features = feature_inputs(inputs)
        numbers = [
            tf.cast(tf.reshape(values, [-1, 1]), tf.float32) for values in features.values() if values.shape.rank == 1
        ]
        hidden = tf.keras.layers.Dense(6)(tf.keras.layers.Concatenate()(numbers))
        shared = tf.keras.layers.Dropout(0.4)
        hidden = tf.keras.layers.GaussianNoise(0.3)(shared(tf.keras.layers.Dense(6)(shared(hidden))))
        hidden = DropoutInTraining()(hidden)
        hidden = tf.keras.Sequential([tf.keras.layers.GaussianDropout(0.2), tf.keras.layers.AlphaDropout(0.2)])(hidden)
        return tf.keras.Model(features, tf.keras.layers.Dense(1)(hidden))

    yield "noisy"
    del BACKBONES["noisy"]


def test_random_layers_of_a_users_backbone_go_on_where_they_were(feed_dataset, tiny, noisy_backbone, tmp_path):
    config = tiny(f"backbone={noisy_backbone}", "method=bce")
    features = {entry.name: tf.ones([8] if entry.num_ids is None else [8, entry.num_ids], tf.int64)
                for entry in feed_dataset.inputs.categorical}  # fmt: skip
    features |= {name: tf.ones([8]) for name in feed_dataset.inputs.numeric}

    def model_and_checkpoints():
        model = build_model(config, feed_dataset.inputs)
        generators = random_generators(model)
        assert len(generators) == 5
        return model, Checkpoints(tmp_path, to_keep=1, model=model, random_generators=generators)

    model, checkpoints = model_and_checkpoints()
    seen = [model.logits(features, training=True).numpy() for _ in range(3)]
    assert not np.array_equal(seen[1], seen[2])
    checkpoints.save(3)
    expected = [model.logits(features, training=True).numpy() for _ in range(3)]
    again, checkpoints = model_and_checkpoints()
    assert checkpoints.restore()
    for values in expected:
        np.testing.assert_array_equal(again.logits(features, training=True), values)


# What a run keeps of its epochs.


def keeper_with_model(config, inputs, work_dir, **arguments):
    arguments = {"sigterm": Sigterm(), **arguments}
    keeper = SaveAndStop(work_dir, config, steps_per_epoch=10, **arguments)
    model = build_model(config, inputs)
    keeper.resume(model)
    keeper.set_model(model)
    keeper.on_train_begin()
    return keeper, model


def end_epoch(keeper, model, epoch, *, step, val_auc):
    """Ends an epoch with all weights equal to its number + 1."""
    model.backbone.set_weights([np.full(weight.shape, epoch + 1.0) for weight in model.backbone.get_weights()])
    model.optimizer.iterations.assign(step)
    keeper.on_epoch_end(epoch, {"val_auc": val_auc})


def best_backbone_weights(work_dir):
    saved = tf.train.load_checkpoint(str(work_dir.best_weights))
    return [saved.get_tensor(name) for name in saved.get_variable_to_shape_map() if name.startswith("backbone/")]


def test_epochs_within_loss_warmup_do_not_compete_for_the_best_weights(feed_dataset, tiny, tmp_path):
    work_dir = WorkDir(tmp_path)
    keeper, model = keeper_with_model(tiny("method.loss_warmup_steps=20"), feed_dataset.inputs, work_dir)
    end_epoch(keeper, model, 0, step=10, val_auc=0.9)
    end_epoch(keeper, model, 1, step=20, val_auc=0.95)  # Steps 0 to 19 were warm-up: still plain BCE.
    assert not work_dir.weights_files
    end_epoch(keeper, model, 2, step=30, val_auc=0.6)
    end_epoch(keeper, model, 3, step=40, val_auc=0.5)
    weights = best_backbone_weights(work_dir)
    assert len(weights) == len(model.backbone.weights)
    assert all((weight == 3.0).all() for weight in weights)  # Those of epoch 2.
    assert not model.stop_training  # One epoch without gain: those of the warm-up do not count.


def test_patience_counts_epochs_since_the_best_and_survives_a_resume(feed_dataset, tiny, tmp_path):
    keeper, model = keeper_with_model(tiny(), feed_dataset.inputs, WorkDir(tmp_path))
    for epoch, val_auc in enumerate((0.6, 0.7, 0.7)):  # An equal AUC is no gain.
        end_epoch(keeper, model, epoch, step=10 * (epoch + 1), val_auc=val_auc)
        assert not model.stop_training
    again, model = keeper_with_model(tiny(), feed_dataset.inputs, WorkDir(tmp_path))
    assert again.state.epoch == 3
    assert [entry["val_auc"] for entry in again.state.history] == [0.6, 0.7, 0.7]
    assert all((weight == 3.0).all() for weight in model.backbone.get_weights())
    model.stop_training = False
    end_epoch(again, model, 3, step=40, val_auc=0.65)
    assert again.is_finished
    assert model.stop_training


def test_without_patience_the_last_epoch_is_kept_and_nothing_stops(feed_dataset, tiny, tmp_path):
    work_dir = WorkDir(tmp_path)
    config = tiny("backbone=lr", "patience_epochs=null", "method.loss_warmup_steps=20")
    keeper, model = keeper_with_model(config, feed_dataset.inputs, work_dir)
    for epoch, val_auc in enumerate((0.9, 0.95, 0.7, 0.6, 0.5)):  # Two of them within loss warm-up.
        end_epoch(keeper, model, epoch, step=10 * (epoch + 1), val_auc=val_auc)
        assert max(work_dir.weights_files, default=None) == (epoch if epoch >= 2 else None)
    assert not model.stop_training
    weights = best_backbone_weights(work_dir)
    assert weights
    assert all((weight == 5.0).all() for weight in weights)


def test_a_kill_between_best_weights_and_checkpoint_leaves_those_that_the_checkpoint_means(
    feed_dataset, tiny, tmp_path, monkeypatch
):
    work_dir, config = WorkDir(tmp_path), tiny("backbone=lr", "patience_epochs=5")
    keeper, model = keeper_with_model(config, feed_dataset.inputs, work_dir)
    end_epoch(keeper, model, 0, step=10, val_auc=0.6)
    with monkeypatch.context() as killed:
        killed.setattr(Checkpoints, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            end_epoch(keeper, model, 1, step=20, val_auc=0.7)
    (tmp_path / "best_weights" / "weights-12_temp").mkdir()  # In the middle of writing.
    assert set(work_dir.weights_files) == {0, 1, 12}
    keeper, model = keeper_with_model(config, feed_dataset.inputs, work_dir)
    assert set(work_dir.weights_files) == {0}
    end_epoch(keeper, model, 1, step=20, val_auc=0.5)  # On another machine it may come out differently.
    assert all((weight == 1.0).all() for weight in best_backbone_weights(work_dir))
    assert keeper.state.best_epoch == 0


def test_the_checkpoint_before_a_damaged_one_finds_the_weights_that_were_best_then(feed_dataset, tiny, tmp_path):
    work_dir, config = WorkDir(tmp_path), tiny("backbone=lr", "checkpoints_to_keep=2")
    keeper, model = keeper_with_model(config, feed_dataset.inputs, work_dir)
    for epoch, val_auc in enumerate((0.6, 0.7, 0.8)):
        end_epoch(keeper, model, epoch, step=10 * (epoch + 1), val_auc=val_auc)
    assert set(work_dir.weights_files) == {1, 2}
    assert work_dir.best_weights == work_dir.weights_of(2)
    flip_a_byte(work_dir.checkpoints / "ckpt-30.index")
    keeper, _ = keeper_with_model(config, feed_dataset.inputs, work_dir)
    assert keeper.state.best_epoch == 1
    assert all((weight == 2.0).all() for weight in best_backbone_weights(work_dir))


def test_an_epoch_without_an_auc_is_refused(feed_dataset, tiny, tmp_path):
    keeper, model = keeper_with_model(tiny("backbone=lr"), feed_dataset.inputs, WorkDir(tmp_path))
    with pytest.raises(ValueError, match="validation split needs clicks and non-clicks"):
        end_epoch(keeper, model, 0, step=10, val_auc=None)
    assert not steps_on_disk(WorkDir(tmp_path).checkpoints)


@pytest.mark.parametrize("known_epochs", [0, 1, 3])
def test_history_and_checkpoint_agree_wherever_a_kill_fell_between_them(clsd_run, feed_dataset, tmp_path, known_epochs):
    # The checkpoint is of epoch 2. The file may be an epoch behind it, or missing; an older program left it ahead.
    work_dir = WorkDir(tmp_path / "run")
    shutil.copytree(clsd_run.work_dir.path, work_dir.path)
    if known_epochs:
        write_json(work_dir.history, [*clsd_run.history, {"epoch": 2}][:known_epochs])
    else:
        work_dir.history.unlink()
    _, history = fitted(feed_dataset, clsd_run.config, work_dir, title=None)
    assert history == clsd_run.history == read_json(work_dir.history)


@pytest.mark.parametrize(
    ("setting", "steps"),
    [
        ("checkpoint_every_steps=5", [5, 10, 13, 15, 20, 25, 26]),  # Not of the epoch: of all steps.
        ("checkpoint_every_minutes=1e-9", list(range(1, 27))),
    ],
)
def test_checkpoints_come_when_asked_for_and_do_not_change_the_result(
    clsd_run, feed_dataset, tiny, tmp_path, setting, steps
):
    config = tiny("calibration.user_group=age_group", "checkpoints_to_keep=100", setting)
    work_dir = WorkDir(tmp_path / "run")
    _, history = fitted(feed_dataset, config, work_dir, title=None)
    assert steps_on_disk(work_dir.checkpoints) == steps
    for step in steps:  # Where in the data it is: 13 steps are an epoch.
        saved = tf.train.load_checkpoint(str(work_dir.checkpoints / f"ckpt-{step}"))
        state = json.loads(saved.get_tensor("run/.ATTRIBUTES/py_state"))
        assert (state["epoch"], state["steps_done"]) == divmod(step, 13)
        assert state["history"] == history[: state["epoch"]]
    assert history == clsd_run.history
    expected = tf.train.load_checkpoint(str(clsd_run.work_dir.best_weights))
    found = tf.train.load_checkpoint(str(work_dir.best_weights))
    for name in expected.get_variable_to_shape_map():
        if not name.startswith("_"):
            np.testing.assert_array_equal(found.get_tensor(name), expected.get_tensor(name))


# SIGTERM.


@pytest.fixture
def passed_on():
    """The SIGTERMs that nobody in the process took."""
    received = []
    with handling_sigterm(lambda number, _: received.append(number)):
        yield received


def test_sigterm_is_noted_within_the_context_and_means_what_it_meant_behind_it(passed_on):
    before = signal.getsignal(signal.SIGTERM)

    def interrupted():
        with Sigterm() as sigterm:
            assert not sigterm.received
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert sigterm.received
            raise TrainingInterruptedError

    with pytest.raises(TrainingInterruptedError):
        interrupted()
    assert signal.getsignal(signal.SIGTERM) is before
    assert not passed_on


def test_a_sigterm_that_nobody_looked_at_is_passed_on(passed_on):
    with Sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert passed_on == [signal.SIGTERM]


def test_in_a_thread_a_fit_leaves_signals_alone_and_trains(feed_dataset, tiny, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    found = []
    config = tiny("backbone=lr", "method=bce", "max_epochs=1")
    arguments = (feed_dataset, config, WorkDir(tmp_path / "run"))
    thread = threading.Thread(target=lambda: found.append(fitted(*arguments, title=None)))
    thread.start()
    while thread.is_alive():
        assert signal.getsignal(signal.SIGTERM) is before
        thread.join(0.05)
    ((_, history),) = found
    assert len(history) == 1


def test_a_sigterm_while_an_epoch_ends_waits_for_its_checkpoint(feed_dataset, tiny, tmp_path, passed_on):
    sigterm, work_dir = Sigterm(), WorkDir(tmp_path)
    keeper, model = keeper_with_model(tiny("backbone=lr"), feed_dataset.inputs, work_dir, sigterm=sigterm)
    keeper.on_epoch_begin(0)
    model.optimizer.iterations.assign(10)  # The epoch's last step.
    with pytest.raises(TrainingInterruptedError, match="epoch 2, 0 of 10 steps done"), sigterm:
        last_step_and_end_of_epoch(keeper, work_dir)
    assert steps_on_disk(work_dir.checkpoints) == [10]
    assert [entry["epoch"] for entry in read_json(work_dir.history)] == [0]
    assert not passed_on


def last_step_and_end_of_epoch(keeper, work_dir):
    signal.raise_signal(signal.SIGTERM)
    keeper.on_train_batch_end(9)
    assert not steps_on_disk(work_dir.checkpoints)
    keeper.on_epoch_end(0, {"val_auc": 0.6})
