"""Clusters: what TF_CONFIG may say, which rows go where, and real processes that train together."""

import contextlib
import json
import pathlib
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import tensorflow as tf
from clusters import started, wait_until
from commands import start_command
from runs import fitted

from clsd_tf.commands.interruption import EXIT_CODE
from clsd_tf.distributed.strategies import (
    Cluster,
    ClusterError,
    chiefs_value,
    create_strategy,
    distributed,
    in_turn,
    is_chief,
    is_server,
)
from clsd_tf.storage.files import read_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import load_model
from clsd_tf.training.run import train

# TF_CONFIG.


def config(cluster, task_type="worker", index=0):
    return json.dumps({"cluster": cluster, "task": {"type": task_type, "index": index}})


TWO = {"worker": ["a:1", "b:1"]}
SERVED = {"chief": ["c:1"], "ps": ["p:1"], "worker": ["a:1", "b:1"]}


@pytest.mark.parametrize(
    ("strategy", "text", "message"),
    [
        ("multi_worker", None, "needs the environment variable TF_CONFIG in every process. Received: none"),
        ("multi_worker", "", "Received: none"),
        ("multi_worker", "{not json", "must be JSON with cluster, task.type and task.index. Received: '{not json'"),
        ("multi_worker", "[]", "must be JSON with cluster"),
        ("multi_worker", "{}", "must be JSON with cluster"),
        ("multi_worker", '{"cluster": {"worker": 3}, "task": {"type": "worker", "index": 0}}', "must be JSON with"),
        ("multi_worker", '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker"}}', "must be JSON with"),
        ("multi_worker", config(TWO, "master"), "no tasks of this type. Received: master. Allowed: chief, worker"),
        ("multi_worker", config(SERVED), "no tasks of this type. Received: ps"),
        (
            "multi_worker",
            config(TWO, index=2),
            "Received: worker 2 of a cluster with 2 worker. Count task.index from 0",
        ),
        ("multi_worker", config(TWO, index=-1), "Received: worker -1"),
        ("multi_worker", config(TWO, "chief"), "Received: chief 0 of a cluster with 2 worker"),
        ("multi_worker", config({"worker": ["a:1"]}), "needs two workers or more. Received: 1"),
        ("multi_worker", config({"chief": ["c:1", "d:1"], "worker": ["a:1"]}), "at most one chief. Received: 2 chief"),
        ("parameter_server", config(TWO), "needs one chief, and a worker and a ps or more. Received: 2 worker"),
        ("parameter_server", config({"chief": ["c:1"], "ps": ["p:1"]}, "chief"), "TF_CONFIG's cluster: worker"),
        ("parameter_server", config({**SERVED, "chief": []}, "ps"), "Received: 0 chief, 1 ps, 2 worker"),
        ("parameter_server", config({**SERVED, "evaluator": ["e:1"]}, "ps"), "Received: evaluator"),
    ],
)
def test_a_cluster_that_cannot_work_is_refused_with_what_to_do(monkeypatch, strategy, text, message):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if text is not None:
        monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ClusterError) as error:
        create_strategy(strategy)
    assert message in str(error.value)


def test_workers_and_parameter_servers_serve_and_the_chief_does_not(monkeypatch):
    for task_type, serves in (("chief", False), ("worker", True), ("ps", True)):
        monkeypatch.setenv("TF_CONFIG", config(SERVED, task_type))
        assert is_server("parameter_server") is serves
    monkeypatch.setenv("TF_CONFIG", config(TWO))
    assert not is_server("multi_worker")
    assert Cluster.from_environment("multi_worker").num_workers == 2


def test_without_a_strategy_there_is_one_chief_with_all_rows(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", "{not looked at")
    assert create_strategy("none") is None
    assert is_chief(None)
    assert chiefs_value(None, 0.25) == 0.25
    assert in_turn(None, lambda: 3) == 3
    rows = distributed(None, lambda shard, joined: tf.data.Dataset.from_tensors([shard.index, shard.count, joined]))
    assert [row.tolist() for row in rows.as_numpy_iterator()] == [[0, 1, 1]]


def test_a_penalty_on_touched_rows_is_refused_where_replicas_share_a_batch(feed_dataset, tiny, tmp_path):
    config = tiny("embeddings.l2=0.1", "embeddings.l2_rows=touched")
    two_replicas = types.SimpleNamespace(num_replicas_in_sync=2)
    with pytest.raises(ValueError, match=r"Received: embeddings.l2_rows=touched, 2 replicas. Use embeddings.l2"):
        fitted(feed_dataset, config, WorkDir(tmp_path / "run"), title=None, strategy=two_replicas)
    assert not (tmp_path / "run").exists()


# Processes.


@pytest.mark.parametrize(("strategy", "cluster", "task_type"), [
    ("multi_worker", TWO, "worker"),
    ("parameter_server", SERVED, "chief"),
])  # fmt: skip
def test_the_command_of_a_complete_run_ends_without_the_other_processes(
    clsd_run, feed_dataset, tmp_path, strategy, cluster, task_type
):
    work_dir = WorkDir(tmp_path / "run")
    shutil.copytree(clsd_run.work_dir.path, work_dir.path)
    command = arguments(feed_dataset, work_dir, clsd_run.config, strategy)
    finish = start_command("pipelines.train", *command, env={"TF_CONFIG": config(cluster, task_type)})
    with work_dir.exclusive():  # As another one that looks at the same time.
        done = finish(timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kept epoch" in done.stdout


def arguments(dataset, work_dir, train_config, strategy):
    """The command that trains by ``train_config``, which it reads from a file."""
    path = work_dir.path.with_suffix(".yaml")
    path.write_text(json.dumps(train_config.to_dict()), encoding="utf-8")
    return [
        f"--dataset_dir={dataset.path}",
        f"--work_dir={work_dir.path}",
        f"--config={path}",
        f"--strategy={strategy}",
    ]


def assert_same_run(work_dir, expected, dataset):
    """Histories and best weights agree up to the order of float32 sums."""
    history = read_json(work_dir.history)
    assert len(history) == len(expected.history)
    for found, entry in zip(history, expected.history, strict=True):
        assert found.keys() == entry.keys()
        for name, value in entry.items():
            assert found[name] == (None if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)), name
    one, other = (load_model(run, dataset) for run in (work_dir, expected.work_dir))
    for found, weight in zip(one.variables, other.variables, strict=True):
        np.testing.assert_allclose(found, weight, rtol=1e-4, atol=1e-5)


def test_two_workers_train_as_one_process_does_and_the_chief_writes_once(clsd_run, feed_dataset, tmp_path):
    work_dir = WorkDir(tmp_path / "run")
    command = arguments(feed_dataset, work_dir, clsd_run.config, "multi_worker")
    with started(command, tmp_path, worker=2) as tasks:
        for task in tasks.values():
            assert task.status(120) == 0, task.text
    assert_same_run(work_dir, clsd_run, feed_dataset)
    names = {path.name for path in work_dir.path.iterdir()}
    assert names == {path.name for path in clsd_run.work_dir.path.iterdir()}
    assert len(list(work_dir.tensorboard.iterdir())) == 1
    assert "epoch 1: loss" in tasks["worker", 0].text
    assert "epoch 1: loss" not in tasks["worker", 1].text


@pytest.mark.long
def test_two_workers_go_on_from_an_earlier_run_as_one_process_does(clsd_run, feed_dataset, tmp_path, deterministic):
    one, two = WorkDir(tmp_path / "one"), WorkDir(tmp_path / "two")
    history = train(feed_dataset, clsd_run.config, one, title=None, init_from=clsd_run.work_dir)
    command = arguments(feed_dataset, two, clsd_run.config, "multi_worker")
    with started([*command, f"--init_from={clsd_run.work_dir.path}"], tmp_path, worker=2) as tasks:
        for task in tasks.values():
            assert task.status(120) == 0, task.text
    expected = types.SimpleNamespace(work_dir=one, history=history)
    assert_same_run(two, expected, feed_dataset)
    assert read_json(two.lineage) == read_json(one.lineage)


def with_checkpoints(train_config):
    """The same run, which saves every two steps: what is killed has something to go on from."""
    return train_config.model_copy(update={"checkpoint_every_steps": 2})


@pytest.mark.long
def test_a_killed_worker_ends_the_others_with_what_to_do_and_all_go_on_at_the_checkpoint(
    clsd_run, feed_dataset, tmp_path
):
    work_dir = WorkDir(tmp_path / "run")
    command = arguments(feed_dataset, work_dir, with_checkpoints(clsd_run.config), "multi_worker")
    with started(command, tmp_path, worker=2) as tasks:
        wait_until(lambda: tf.train.latest_checkpoint(str(work_dir.checkpoints)), tasks.values())
        tasks["worker", 1].process.kill()
        chief = tasks["worker", 0]
        assert chief.status(60) == 1, chief.text
    message = " ".join(chief.text.split())
    assert "another process of the cluster has ended" in message
    assert "start all workers again, and the run goes on at its newest checkpoint" in message
    assert not work_dir.is_complete
    step = int(tf.train.latest_checkpoint(str(work_dir.checkpoints)).rsplit("-", 1)[1])
    assert 0 < step < 26
    with started(command, tmp_path, worker=2) as tasks:
        for task in tasks.values():
            assert task.status(120) == 0, task.text
    assert_same_run(work_dir, clsd_run, feed_dataset)


@pytest.mark.long
def test_sigterm_to_one_worker_stops_all_after_the_same_step(clsd_run, feed_dataset, tmp_path):
    work_dir = WorkDir(tmp_path / "run")
    command = arguments(feed_dataset, work_dir, with_checkpoints(clsd_run.config), "multi_worker")
    with started(command, tmp_path, worker=2) as tasks:
        wait_until(lambda: tf.train.latest_checkpoint(str(work_dir.checkpoints)), tasks.values())
        tasks["worker", 1].process.terminate()
        assert [task.status(60) for task in tasks.values()] == [EXIT_CODE] * 2, [task.text for task in tasks.values()]
    lines = {task.text.splitlines()[-1] for task in tasks.values()}
    assert len(lines) == 1, lines
    assert "stopped by SIGTERM and saved" in lines.pop()
    with started(command, tmp_path, worker=2) as tasks:
        for task in tasks.values():
            assert task.status(120) == 0, task.text
    assert_same_run(work_dir, clsd_run, feed_dataset)


def test_a_run_with_a_parameter_server_ends_with_all_its_tasks(feed_dataset, tiny, tmp_path):
    work_dir = WorkDir(tmp_path / "run")
    settings = tiny("method=bce", "backbone=lr", "max_epochs=1", "batch_size=512")
    command = arguments(feed_dataset, work_dir, settings, "parameter_server")
    with started(command, tmp_path, ps=1, worker=1, chief=1) as tasks:
        for task in reversed(tasks.values()):
            assert task.status(120) == 0, task.text
    assert work_dir.is_complete
    assert [entry["epoch"] for entry in read_json(work_dir.history)] == [0]


@contextlib.contextmanager
def on_parameter_servers(clsd_run, feed_dataset, directory, max_epochs):
    """(work directory, tasks) of a run of two workers whose first epoch has ended."""
    work_dir = WorkDir(directory / "run")
    settings = clsd_run.config.model_copy(update={"max_epochs": max_epochs, "patience_epochs": None})
    command = arguments(feed_dataset, work_dir, settings, "parameter_server")
    with started(command, directory, ps=1, worker=2, chief=1) as tasks:
        wait_until(work_dir.history.exists, tasks.values())
        yield work_dir, tasks


@pytest.mark.long
def test_a_parameter_server_survives_a_killed_worker_and_its_tasks_end_with_the_run(clsd_run, feed_dataset, tmp_path):
    with on_parameter_servers(clsd_run, feed_dataset, tmp_path, max_epochs=20) as (work_dir, tasks):
        tasks["worker", 1].process.kill()
        assert not work_dir.is_complete
        assert tasks["chief", 0].status(180) == 0, tasks["chief", 0].text
        assert [tasks[name].status(30) for name in (("ps", 0), ("worker", 0))] == [0, 0]
    history = read_json(work_dir.history)
    assert [entry["epoch"] for entry in history] == list(range(20))
    # Asynchronous, so that no two runs are alike: it learns what one process learns, not the same numbers.
    assert history[-1]["bce"] < history[0]["bce"]
    assert history[0]["bce"] == pytest.approx(clsd_run.history[0]["bce"], abs=0.02)
    assert load_model(work_dir, feed_dataset).calibration is not None


@pytest.mark.long
def test_a_killed_parameter_server_ends_the_chief_with_what_to_do(clsd_run, feed_dataset, tmp_path):
    with on_parameter_servers(clsd_run, feed_dataset, tmp_path, max_epochs=50) as (_, tasks):
        tasks["ps", 0].process.kill()
        chief = tasks["chief", 0]
        assert chief.status(120) == 1, chief.text
    assert "start the ps and the chief again" in " ".join(chief.text.split())


@pytest.mark.long
def test_sigterm_to_the_chief_of_parameter_servers_saves_at_the_end_of_its_epoch(clsd_run, feed_dataset, tmp_path):
    with on_parameter_servers(clsd_run, feed_dataset, tmp_path, max_epochs=50) as (work_dir, tasks):
        chief = tasks["chief", 0]
        chief.process.terminate()
        assert chief.status(120) == EXIT_CODE, chief.text
    history = read_json(work_dir.history)
    assert f"stopped by SIGTERM and saved: epoch {len(history) + 1}, 0 of 13 steps done" in " ".join(chief.text.split())


@pytest.mark.long
def test_a_model_fits_on_parameter_servers_without_callbacks_and_with_one_that_sees_nan():
    script = pathlib.Path(__file__).with_name("parameter_servers.py")
    root = str(script.parent.parent)
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True, text=True, timeout=120, check=False, cwd=root, env={"PYTHONPATH": root},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-2] == "epochs without callbacks: 2"
    assert lines[-1].startswith("diverged: the loss must be finite. Received: loss=nan at step 3.")
