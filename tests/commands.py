"""Commands in processes of their own, forked from a server that has imported what takes every command seconds.

As ``python -m MODULE ARGUMENTS``: the module runs as ``__main__``, with its own output, directory, environment and exit
status. Real starts are in test_end_to_end and wherever a test is about imports.
"""

import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile

# TensorFlow and Beam are imported but not used: forked processes must not find their threads missing.
_PRELOADED = [
    "clsd_tf.commands.quiet_start",
    "clsd_tf.evaluation.report",
    "clsd_tf.statistics.report",
    "export.servable.saved_model",
    "export.clients.serving_client",
    "pipelines.beam.dataset",
    "pipelines.public_data.feed",
]
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(_PRELOADED)


def _run(module, arguments, directory, environment, files):
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def start_command(module, *arguments, cwd=None, env=None):
    """Starts a command -> a function that waits for its end and returns it as a ``subprocess.CompletedProcess``."""
    scratch = tempfile.TemporaryDirectory()
    files = [pathlib.Path(scratch.name) / name for name in ("stdout", "stderr")]
    texts = [str(argument) for argument in arguments]
    process = FORK_SERVER.Process(target=_run, args=(module, texts, str(cwd or os.getcwd()), env or {}, files))
    process.start()

    def finish(timeout=120):
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired([module, *texts], timeout)
        with scratch:
            output, errors = (file.read_text(encoding="utf-8") if file.exists() else "" for file in files)
        return subprocess.CompletedProcess([module, *texts], process.exitcode, output, errors)

    return finish


def run_command(module, *arguments, cwd=None, env=None):
    """Runs a command to its end -> ``subprocess.CompletedProcess``."""
    return start_command(module, *arguments, cwd=cwd, env=env)()
