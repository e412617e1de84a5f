"""Checks what TF Serving will make of a SavedModel directory, whoever wrote it.

Example:
  clsd contract demo/servable/movielens
  clsd contract demo/servable/movielens/1700000000 --json=contract.json

The path is a model's base directory, which holds numbered versions, or one version. Prints each rule: pass, warning,
fail or not applicable, what was found, and why it matters. Exits with status 1 if a rule failed. Loads and runs the
model in this process, with requests from its warm-up file or made up from its graph: check only what you would serve.
"""

import logging
import pathlib
import sys

import rich.markup
from absl import flags

from clsd_tf.commands import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from clsd_tf.storage.files import write_json
from export.contract_rules import check_servable, failures, summary

_JSON = flags.DEFINE_string("json", None, "File for the same as JSON.")
_BATCHING_FILE = flags.DEFINE_string(
    "batching_parameters_file", None, "As of TF Serving; by default batching_params.pbtxt of each version."
)
_COLORS = {"pass": "green", "warning": "yellow", "fail": "bold red", "not applicable": "dim"}
_WIDTH = max(map(len, _COLORS))


def main(argv) -> None:
    if len(argv) != 2:
        raise ValueError(f"one path is needed: a model's base directory or one version. Received: {len(argv) - 1}")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # Graphs load as in TF Serving, deprecated in Python.
    path = pathlib.Path(argv[1])
    results = check_servable(path, pathlib.Path(_BATCHING_FILE.value) if _BATCHING_FILE.value else None)
    if _JSON.value:
        content = {"path": str(path), "summary": summary(results), "results": [entry.to_dict() for entry in results]}
        write_json(pathlib.Path(_JSON.value), content)
    _print(path, results)
    if failures(results):
        sys.exit(1)


def _print(path: pathlib.Path, results) -> None:
    shown = object()
    for result in results:
        if result.version != shown:
            shown = result.version
            heading = f"version {shown}" if shown else "base directory"
            console.console.print(f"\n[bold]{rich.markup.escape(heading)}[/]", soft_wrap=True)
        finding = result.finding
        color, rule = _COLORS[finding.status], result.rule
        text = rich.markup.escape(f"{rule.title} ({rule.id}): {finding.found}")
        console.console.print(f"[{color}]{finding.status:{_WIDTH}}[/] {text}", soft_wrap=True)
        console.console.print(f"{'':{_WIDTH}} [dim]{rich.markup.escape(rule.why)}[/]", soft_wrap=True)
    counts = ", ".join(f"{count} {status}" for status, count in summary(results).items())
    console.console.print(f"\n{rich.markup.escape(str(path))}: {counts}", soft_wrap=True)


if __name__ == "__main__":
    console.run(main)
