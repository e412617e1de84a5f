"""Scores files of any size with a servable, with Apache Beam.

Example:
  clsd predict-bulk --servable=demo/servable/movielens --input='requests/*.parquet' --output=scored

Reads CSV, TSV, JSON lines, Parquet, Avro or TFRecords of tf.Example, by the names' ending or --format; .gz, .zst and
.bz2 of text. The input needs a column per raw input of the model; other columns reach the output, as text unless the
input is Parquet (of JSON lines and TFRecords those that occur in the first 1,000 rows of a file). --output gets
scores/part-*.parquet, whose rows, by the files' names, are in the order of the input, with the columns ctr and
servable_version; dead_letter.parquet names rows that could not be scored; manifest.json says what was scored by what.
The directory appears under its name only when it is complete. Flags that are not listed here go to Beam, for example
--runner=FlinkRunner; by default DirectRunner uses all cores. For a small file `clsd predict` starts faster.
"""

import pathlib

from absl import flags

from clsd_tf.commands import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from pipelines.beam.bulk_scoring import score_files

_SERVABLE = flags.DEFINE_string("servable", None, "Version directory, or directory of a model.", required=True)
_INPUT = flags.DEFINE_string("input", None, "Path or glob pattern of the rows to score.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write; must not exist.", required=True)
_FORMAT = flags.DEFINE_enum(
    "format", None, ["csv", "tsv", "jsonl", "parquet", "avro", "tfrecord"], "Of the input; by default by its name."
)
_MAX_BAD_FRACTION = flags.DEFINE_float("max_bad_fraction", 0.01, "More bad rows than this fail the job.", 0.0, 1.0)


def main(argv) -> None:
    manifest = score_files(
        pathlib.Path(_SERVABLE.value),
        _INPUT.value,
        pathlib.Path(_OUTPUT.value),
        file_format=_FORMAT.value,
        max_bad_fraction=_MAX_BAD_FRACTION.value,
        beam_arguments=argv[1:],
    )
    rows, bad_rows = manifest["rows"], manifest["bad_rows"]
    if bad_rows:
        console.print_table("Rows that could not be scored", ["reason", "rows"], bad_rows.items())
    console.console.print(
        f"{rows['read']:,} rows read = {rows['scored']:,} scored + {rows['bad']:,} bad; scores in {_OUTPUT.value}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    console.run(main, flags_parser=lambda argv: flags.FLAGS(argv, known_only=True))
