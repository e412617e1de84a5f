"""Processes of ``pipelines.train`` that form a cluster on the loopback."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import runpy
import socket
import sys
import time


def run_command(arguments: list[str], tf_config: str, output: str) -> None:
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ["TF_CONFIG"] = tf_config
    sys.argv = ["train", *arguments]
    runpy.run_module("pipelines.train", run_name="__main__")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("localhost", 0))
        return [listener.getsockname()[1] for listener in listeners]


@dataclasses.dataclass
class Task:
    """A process of the cluster, and what it prints."""

    process: multiprocessing.process.BaseProcess
    output: pathlib.Path

    @property
    def text(self) -> str:
        return self.output.read_text(encoding="utf-8") if self.output.exists() else ""

    def status(self, timeout_seconds: float) -> int | None:
        """Its exit status; None if it still runs after this time."""
        self.process.join(timeout_seconds)
        return self.process.exitcode


def wait_until(condition, tasks, timeout_seconds=120):
    """Waits for ``condition()``; fails if the time is up or a task fails before."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        failed = [task.text for task in tasks if task.process.exitcode]
        assert not failed, failed[0]
        assert time.monotonic() < deadline, [task.text for task in tasks]
        time.sleep(0.01)


@contextlib.contextmanager
def started(arguments: list[str], directory: pathlib.Path, **counts: int):
    """Starts ``counts`` tasks of each type; yields (type, index) -> task, and kills those that are left."""
    # Forked from a server that has imported TensorFlow, but not used it: starting takes a second instead of five.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clsd_tf", "tensorflow", "clsd_tf.training.run"])
    ports = iter(free_ports(sum(counts.values())))
    cluster = {name: [f"localhost:{next(ports)}" for _ in range(count)] for name, count in counts.items()}
    tasks = {}
    for name, addresses in cluster.items():
        for index in range(len(addresses)):
            tf_config = json.dumps({"cluster": cluster, "task": {"type": name, "index": index}})
            output = directory / f"{name}_{index}_{ports_tag(addresses)}.log"
            process = context.Process(target=run_command, args=(arguments, tf_config, str(output)))
            process.start()
            tasks[name, index] = Task(process, output)
    try:
        yield tasks
    finally:
        for task in tasks.values():
            task.process.kill()
            task.process.join()


def ports_tag(addresses: list[str]) -> str:
    return addresses[0].rsplit(":", 1)[1]
