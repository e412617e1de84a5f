"""Scores a file of raw rows with a servable, in this process.

Example:
  clsd predict --servable=demo/servable/movielens --input=demo/dataset/serving_sample.parquet \\
      --output=scores.csv

No server is needed. --servable is a version directory, or a model's directory, whose newest version is taken. Input and
output are CSV, JSON lines or Parquet, by their ending. The input needs a column per raw input of the model
(--help_inputs lists them); in CSV a history is text separated by |. The output holds the input's columns and ctr.
"""

import pathlib

from absl import flags

from clsd_tf.commands import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from clsd_tf.serving.servable import LocalServable
from export.clients.file_scoring import score_file

_SERVABLE = flags.DEFINE_string("servable", None, "Version directory, or directory of a model.", required=True)
_INPUT = flags.DEFINE_string("input", None, "Rows to score: .csv, .jsonl or .parquet.")
_OUTPUT = flags.DEFINE_string("output", None, "File to write: .csv, .jsonl or .parquet; must not exist.")
_HELP_INPUTS = flags.DEFINE_bool("help_inputs", False, "List the model's raw inputs and stop.")


def main(argv) -> None:
    servable = LocalServable(pathlib.Path(_SERVABLE.value))
    if _HELP_INPUTS.value:
        rows = [
            (entry.name, f"list of {entry.dtype}" if entry.is_list else entry.dtype) for entry in servable.raw_inputs
        ]
        console.print_table(f"Raw inputs of {servable.path}", ["name", "type"], rows)
        return
    if not (_INPUT.value and _OUTPUT.value):
        raise ValueError(f"--input and --output are required. Received: input={_INPUT.value}, output={_OUTPUT.value}")
    with console.step(f"score {_INPUT.value}") as say:
        num_rows = score_file(servable, pathlib.Path(_INPUT.value), pathlib.Path(_OUTPUT.value))
        say(f"{num_rows:,} rows")
    console.console.print(f"scores of {servable.path} in {_OUTPUT.value}", soft_wrap=True)


if __name__ == "__main__":
    console.run(main)
