"""A training that is killed, at any moment, goes on at the next batch and ends with the bits of one that was not.

Trainings run in processes of their own, forked from a server that has imported TensorFlow but not used it, so that many
kills take little time. What is compared is all that the last checkpoint holds, the history and the best weights.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import random
import runpy
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from clsd_tf.commands.interruption import EXIT_CODE
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.config import load_config
from clsd_tf.training.run import train

pytestmark = pytest.mark.usefixtures("deterministic")

NUM_KILLS = 20
STEPS_PER_EPOCH = 100  # 3,200 rows.
# All that lives between steps is in use: both optimizers, moving means over clicks, the moving average of the model,
# the guards, dropout, patience.
SETTINGS = [
    "backbone=dnn", "embeddings.dim=4", "hidden_units=[8]", "dropout=0.2", "batch_size=32", "max_epochs=2",
    "patience_epochs=3", "checkpoint_every_steps=7", "method.loss_warmup_steps=50", "method.teacher=ema",
    "method.ema_momentum=0.9", "method.normalizer_momentum=0.9", "method.global_weighting=standardized",
    "method.lambda=0.5", "method.mu=0.5",
]  # fmt: skip


def run_command(arguments: list[str], output: str) -> None:
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv = ["train", *arguments]
    runpy.run_module("pipelines.train", run_name="__main__")


@dataclasses.dataclass
class Command:
    """``pipelines.train``, to be started as often as needed."""

    processes: multiprocessing.context.BaseContext
    dataset: str
    work_dir: WorkDir
    settings: list[str]
    flags: tuple[str, ...] = ()

    @property
    def output(self) -> pathlib.Path:
        return self.work_dir.path.with_suffix(".log")

    @contextlib.contextmanager
    def started(self):
        settings = [f"--set={text}" for text in self.settings]
        arguments = [f"--dataset_dir={self.dataset}", f"--work_dir={self.work_dir.path}", *settings, *self.flags]
        process = self.processes.Process(target=run_command, args=(arguments, str(self.output)))
        process.start()
        try:
            yield process
        finally:
            process.kill()
            process.join()

    def newest(self) -> int:
        """Step of the newest checkpoint, 0 if there is none."""
        path = tf.train.latest_checkpoint(str(self.work_dir.checkpoints))
        return int(path.rsplit("-", 1)[1]) if path else 0

    def wait_for_checkpoints(self, process, count: int) -> None:
        """Waits for ``count`` new checkpoints; fails if the run ends before."""
        deadline = time.monotonic() + 120
        seen = self.newest()
        while count and time.monotonic() < deadline:
            assert process.is_alive(), self.output.read_text(encoding="utf-8")
            time.sleep(0.01)
            if self.newest() > seen:
                seen, count = self.newest(), count - 1
        assert not count, f"no checkpoint came after that of step {seen}"


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clsd_tf", "tensorflow", "clsd_tf.training.run"])
    return context


@pytest.fixture
def command(processes, feed_dataset, tmp_path):
    return lambda *settings, flags=(): Command(
        processes, str(feed_dataset.path), WorkDir(tmp_path / "killed"), [*SETTINGS, *settings], flags
    )


def run_state(work_dir: WorkDir) -> dict:
    checkpoint = tf.train.load_checkpoint(str(work_dir.checkpoints))
    return json.loads(checkpoint.get_tensor("run/.ATTRIBUTES/py_state"))


def tensors(path) -> dict:
    checkpoint = tf.train.load_checkpoint(str(path))
    names = checkpoint.get_variable_to_shape_map()
    # The number of saves depends on the number of kills.
    return {name: checkpoint.get_tensor(name) for name in names if not name.startswith(("save_counter", "_"))}


def assert_same_bits(one: WorkDir, other: WorkDir, note: str = "") -> None:
    assert one.history.read_text() == other.history.read_text(), note
    for path, expected_path in ((one.best_weights, other.best_weights), (one.checkpoints, other.checkpoints)):
        found, expected = tensors(path), tensors(expected_path)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=f"{name} {note}")


@pytest.fixture(scope="module")
def uninterrupted(feed_dataset, tmp_path_factory):
    work_dir = WorkDir(tmp_path_factory.mktemp("uninterrupted") / "run")
    train(feed_dataset, load_config(None, SETTINGS), work_dir, title=None)
    return work_dir


def test_a_run_stopped_by_sigterm_and_killed_in_another_epoch_ends_as_an_uninterrupted_one(
    command, uninterrupted, feed_dataset
):
    stopped = command()
    with stopped.started() as process:
        stopped.wait_for_checkpoints(process, 1)
        process.terminate()
        process.join(60)
        assert process.exitcode == EXIT_CODE == 75
    state = run_state(stopped.work_dir)
    steps_done = state["steps_done"]
    assert state["epoch"] == 0
    assert 7 <= steps_done < STEPS_PER_EPOCH
    assert stopped.newest() == steps_done
    lines = stopped.output.read_text(encoding="utf-8").splitlines()
    assert lines[-1] == (
        f"stopped by SIGTERM and saved: epoch 1, {steps_done} of 100 steps done, in {stopped.work_dir.path}. "
        "Start the same command again to go on"
    )

    with stopped.started() as process:
        while stopped.newest() <= STEPS_PER_EPOCH + 10:
            stopped.wait_for_checkpoints(process, 1)
        process.kill()
        process.join()
    state = run_state(stopped.work_dir)
    assert state["epoch"] == 1
    assert STEPS_PER_EPOCH + state["steps_done"] == stopped.newest() < 2 * STEPS_PER_EPOCH

    train(feed_dataset, load_config(None, SETTINGS), stopped.work_dir, title=None)
    assert_same_bits(stopped.work_dir, uninterrupted)
    assert stopped.work_dir.fingerprint == uninterrupted.fingerprint
    names = tensors(stopped.work_dir.checkpoints)
    for part in ("optimizer", "ad_gate_optimizer", "_teacher_backbone", "_click_means", "guard_state", "_means"):
        assert any(name.startswith(f"model/{part}/") for name in names), part
    assert any(name.startswith("random_generators/") for name in names)


@pytest.mark.long
def test_a_run_that_goes_on_from_another_needs_it_no_longer_once_it_is_killed_in_mid_epoch(
    command, uninterrupted, feed_dataset, tmp_path
):
    earlier = shutil.copytree(uninterrupted.path, tmp_path / "earlier")
    killed = command("max_epochs=1", flags=(f"--init_from={earlier}",))
    with killed.started() as process:
        killed.wait_for_checkpoints(process, 1)
        process.kill()
        process.join()
    steps_done = run_state(killed.work_dir)["steps_done"]
    assert 0 < steps_done < STEPS_PER_EPOCH
    assert killed.newest() == 2 * STEPS_PER_EPOCH + steps_done  # Steps go on counting.
    shutil.rmtree(earlier)
    train(feed_dataset, load_config(None, killed.settings), killed.work_dir, title=None)

    whole, config = WorkDir(tmp_path / "whole"), load_config(None, [*killed.settings, "checkpoint_every_steps=null"])
    train(feed_dataset, config, whole, title=None, init_from=uninterrupted)
    assert_same_bits(killed.work_dir, whole)
    assert killed.work_dir.fingerprint == whole.fingerprint != uninterrupted.fingerprint


@pytest.mark.long
def test_twenty_kills_at_random_moments_change_no_bit(command, feed_dataset, tmp_path):
    settings = ["max_epochs=12", "patience_epochs=null", "method.loss_warmup_steps=500"]
    seed = random.SystemRandom().randrange(10**6)
    moments = random.Random(seed)
    killed = command(*settings)
    for kill in range(NUM_KILLS):
        note = f"kill {kill}, seed {seed}"
        with killed.started() as process:
            if moments.random() < 0.15:
                time.sleep(moments.uniform(0, 3))  # While it starts, restores, or has just begun.
            else:
                killed.wait_for_checkpoints(process, moments.randint(1, 8))
                time.sleep(moments.uniform(0, 0.1))
            assert process.is_alive(), f"the run ended too soon: {note}"
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
    with killed.started() as process:
        process.join(300)
        assert process.exitcode == 0, killed.output.read_text(encoding="utf-8")

    whole = WorkDir(tmp_path / "whole")
    train(feed_dataset, load_config(None, [*SETTINGS, *settings]), whole, title=None)
    assert_same_bits(killed.work_dir, whole, f"seed {seed}")
