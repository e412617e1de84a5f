"""Runners of a Beam pipeline: DirectRunner on all cores by default, or the one that flags name."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, StandardOptions
from apache_beam.portability import python_urns
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

_NEVER_MS = 10**9


class _DirectRunner(FnApiRunner):
    """DirectRunner's own engine by name ("DirectRunner" would first try to download another one), without a flaw.

    Its threads send what they have written every second, even if an element is half-written: pickling one may give way
    to another thread. What arrives is then garbage, and reading it may never end. Without the time limit they send
    after whole elements only.
    """

    def run_via_runner_api(self, pipeline_proto, options):
        for environment in pipeline_proto.components.environments.values():
            if environment.urn == python_urns.EMBEDDED_PYTHON_GRPC:
                environment.payload = json.dumps({"data_buffer_time_limit_ms": _NEVER_MS}).encode()
        return super().run_via_runner_api(pipeline_proto, options)


def make_pipeline(arguments: Sequence[str]) -> beam.Pipeline:
    """A pipeline for the engine that Beam's flags name.

    Args:
      arguments: pipeline options, for example ``["--runner=FlinkRunner"]``. Without any: DirectRunner, a thread per
        core; the hot path is in Arrow and TensorFlow, which release Python's lock.

    Returns:
      An empty pipeline, to be used as a context manager.
    """
    options = PipelineOptions(list(arguments))
    if options.view_as(StandardOptions).runner not in (None, "DirectRunner"):
        return beam.Pipeline(options=options)
    if not any(argument.startswith("--direct_") for argument in arguments):
        direct = options.view_as(DirectOptions)
        direct.direct_num_workers, direct.direct_running_mode = os.cpu_count() or 1, "multi_threading"
    return beam.Pipeline(runner=_DirectRunner(), options=options)


class EvenReshuffle(beam.PTransform):
    """Reshuffles (key, task), keys all different -> tasks, each worker as many.

    Beam's own Reshuffle draws random keys; DirectRunner deals keys out in turn, so these come out even.
    """

    def expand(self, tasks):
        return tasks | beam.GroupByKey() | beam.FlatMapTuple(lambda key, values: values)


def check_beam_arguments(arguments: Sequence[str]) -> None:
    """Refuses flags that neither a command nor Beam knows: Beam itself would drop them with a log line.

    Args:
      arguments: pipeline options, as for ``make_pipeline``.

    Raises:
      ValueError: names the unknown flags.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, conflict_handler="resolve")
    pending = [PipelineOptions]
    while pending:
        options = pending.pop()
        pending += options.__subclasses__()
        if "_add_argparse_args" in vars(options):
            options._add_argparse_args(parser)
    _, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise ValueError(
            f"unknown flags. Received: {' '.join(unknown)}. Allowed: the flags that --help lists, and Beam's options"
        )
