"""Speed of the input pipeline without a model, and what the end of an epoch costs ``fit``.

Example:
  python -m benchmarks.input_pipeline --directory=/tmp/generated

Writes a dataset of generated records (26 ids a row) to --directory, unless it is there, and reads its training split
shuffled, from files that the page cache holds and from memory. Two floors are measured in the same run: reading the
records without parsing them, and copying as many bytes as the parsed rows have.
"""

import pathlib

from absl import flags

# isort: off
from clsd_tf.commands import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.

# isort: on
from benchmarks.generated_dataset import generated_dataset
from benchmarks.input_rates import (
    copied_rows_per_second,
    epoch_end_overhead,
    pipeline_examples_per_second,
    records_per_second,
)

_DIRECTORY = flags.DEFINE_string("directory", None, "Where generated datasets are kept.", required=True)
_ROWS = flags.DEFINE_integer("rows", 2_000_000, "Rows of the training split.", 1000)
_VOCABULARY_SIZE = flags.DEFINE_integer("vocabulary_size", 10_000, "Ids of each of the 26 features.", 2)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4096, "Rows per batch.", 1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements; medians are shown.", 1)


def main(argv) -> None:
    dataset = generated_dataset(
        pathlib.Path(_DIRECTORY.value), num_rows=_ROWS.value, vocabulary_size=_VOCABULARY_SIZE.value
    )
    arguments = {"batch_size": _BATCH_SIZE.value, "repeats": _REPEATS.value}
    read = records_per_second(dataset, **arguments)
    copied = copied_rows_per_second(dataset, repeats=_REPEATS.value)
    rows = [("records read in order, not parsed", f"{read:,.0f}", "", "")]
    rows.append(("parsed rows copied", f"{copied:,.0f}", "", ""))
    for name, max_cache_bytes in (("pipeline from files", 0), ("pipeline from memory", 2**62)):
        rate = pipeline_examples_per_second(dataset, max_cache_bytes=max_cache_bytes, **arguments)
        rows.append((name, f"{rate:,.0f}", f"{rate / read:.2f}", f"{rate / copied:.3f}"))
    title = f"{_ROWS.value:,} rows, {len(dataset.inputs.categorical)} ids, batch {_BATCH_SIZE.value}"
    console.print_table(title, ["", "rows/s", "of reading", "of copying"], rows)
    overhead = epoch_end_overhead(dataset, batch_size=_BATCH_SIZE.value)
    console.console.print(f"fit's epoch over the time until its last batch: {1.0 + overhead:.4f}")


if __name__ == "__main__":
    console.run(main)
