"""Serves models on this machine over TF Serving's gRPC and REST interfaces.

Example:
  clsd serve --servable_dir=demo/servable

Serves the models of <servable_dir>/models.config (labels and version policies included), or without that file the
newest version of every model. New versions and changes of models.config are seen while it runs; a version that cannot
be loaded, or whose warm-up requests fail, leaves the old one serving. Metrics: http://<rest address>/metrics. SIGINT
and SIGTERM stop it after the running requests. It is for development and tests and does not replace TF Serving; it has
no TLS and no authentication: leave --host as it is.
"""

import contextlib
import os
import pathlib
import signal
import sys

import tensorflow as tf
from absl import flags, logging

from clsd_tf.commands import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from export.server.batching import BatchingOptions
from export.server.local_server import LocalServer
from export.server.request_log import RequestLog

_SERVABLE_DIR = flags.DEFINE_string(
    "servable_dir", None, "Directory that holds models.config and one directory per model.", required=True
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
_GRPC_PORT = flags.DEFINE_integer("grpc_port", 8500, "Port of gRPC; 0 takes any free one.", 0, 65535)
_REST_PORT = flags.DEFINE_integer("rest_port", 8501, "Port of REST; 0 takes any free one.", 0, 65535)
_NUM_THREADS = flags.DEFINE_integer("num_threads", None, "Model calls at the same time; default: cores.", 1)
_POLL_SECONDS = flags.DEFINE_float("poll_seconds", 1.0, "How often the directory is looked at.", 0.01)
_MAX_REQUEST_BYTES = flags.DEFINE_integer(
    "max_request_bytes", 16 << 20, "Larger requests are refused; four times as many may wait.", 1
)
_GRACE_SECONDS = flags.DEFINE_float("grace_seconds", 10.0, "Time for running requests when the server stops.", 0.0)
_MAX_BATCH_SIZE = flags.DEFINE_integer(
    "max_batch_size", None, "Rows run together; default: the version's batching_params.pbtxt, else 1000.", 1
)
_BATCH_TIMEOUT_SECONDS = flags.DEFINE_float(
    "batch_timeout_seconds", None, "How long rows wait for others; default: the version's, else 0.", 0.0
)
_MAX_ENQUEUED_BATCHES = flags.DEFINE_integer(
    "max_enqueued_batches",
    None,
    "Batches that may wait; beyond, requests are refused, and no request may have more rows; default: the version's or "
    "64.",
    1,
)
_REQUEST_LOG_DIR = flags.DEFINE_string(
    "request_log_dir",
    None,
    "Where a sample of the requests is logged, each model's in a directory of its name, for validate_data "
    "--requests=<request_log_dir>/<model>; default: nowhere.",
)
_REQUEST_LOG_SAMPLE_RATE = flags.DEFINE_float(
    "request_log_sample_rate", 0.01, "Share of the requests that is logged, above 0.", 0.0, 1.0
)


_SWITCH_SECONDS = 5e-5


def main(argv) -> None:
    logging.set_verbosity(logging.INFO)
    _share_cores(_NUM_THREADS.value or os.cpu_count() or 1)
    with contextlib.ExitStack() as stack:
        request_log = None
        if _REQUEST_LOG_DIR.value:
            log = RequestLog(pathlib.Path(_REQUEST_LOG_DIR.value), _REQUEST_LOG_SAMPLE_RATE.value)
            request_log = stack.enter_context(log)
        _serve(request_log)


def _share_cores(num_threads: int) -> None:
    """Small requests must not wait for threads to wake up, nor for a version that loads."""
    # Requests run side by side, so within an op a second thread has nothing to gain: a third off the slowest answers.
    tf.config.threading.set_inter_op_parallelism_threads(num_threads)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    # Loading is a second of Python, which else would keep the event loop waiting for 5 ms at each of its many steps.
    sys.setswitchinterval(_SWITCH_SECONDS)


def _serve(request_log: RequestLog | None) -> None:
    server = LocalServer(
        pathlib.Path(_SERVABLE_DIR.value),
        host=_HOST.value,
        grpc_port=_GRPC_PORT.value,
        rest_port=_REST_PORT.value,
        batching=BatchingOptions(_MAX_BATCH_SIZE.value, _BATCH_TIMEOUT_SECONDS.value, _MAX_ENQUEUED_BATCHES.value),
        num_threads=_NUM_THREADS.value,
        poll_seconds=_POLL_SECONDS.value,
        max_request_bytes=_MAX_REQUEST_BYTES.value,
        grace_seconds=_GRACE_SECONDS.value,
        request_log=request_log,
    )
    server.start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: server.request_stop())
    console.console.print("A local server for development and tests; it does not replace TF Serving.")
    console.console.print(f"gRPC {server.grpc_address}  REST http://{server.rest_address}", soft_wrap=True)
    server.join()


if __name__ == "__main__":
    console.run(main)
