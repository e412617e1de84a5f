"""Records what the commands produce, so that after a change of the code they can be shown to give the same bits.

Example:
  python -m benchmarks.golden_results --work_dir=golden --record=golden.json
  python -m benchmarks.golden_results --work_dir=golden_after_the_change --compare=golden.json
  python -m benchmarks.golden_results --work_dir=golden --compare=benchmarks/golden_movielens.json

Builds a dataset, trains (BCE, CLSD with two kinds of teacher, and a run that is killed and started again), evaluates,
runs a study, exports and asks the servable, each by its command, and reads the files that they leave. --size=small does
that on 4,000 simulated rows, in place of MovieLens-100k. A finished step below --work_dir is kept, but a directory that
other code began is refused. Ends with status 1 if anything differs. On another platform than the recorded one numbers
may differ by the tolerance and weights are not compared; the dataset is, to the bit.
"""

import json
import pathlib
import sys

from absl import app, flags

from benchmarks import golden_record, golden_steps

_WORK_DIR = flags.DEFINE_string("work_dir", None, "Directory for everything that the commands write.", required=True)
_RECORD = flags.DEFINE_string("record", None, "JSON file to write what was found to; must not exist.")
_COMPARE = flags.DEFINE_string("compare", None, "JSON file of an earlier --record to compare with.")
_SIZE = flags.DEFINE_enum(
    "size", None, sorted(golden_steps.SIZES), "Data to run on; that of --compare, or movielens, by default."
)


def _print_outcomes(recorded: dict, found: dict) -> bool:
    """Prints a line for each part; whether all are as recorded."""
    other = golden_record.first_difference(recorded["platform"], found["platform"])
    if other:
        print(
            f"another platform than the recorded one ({other}): numbers may differ by {golden_record.TOLERANCE:g}, "
            "digests of weights and scores are not compared"
        )
    outcomes = golden_record.compare(recorded, found)
    same = "same within the tolerance" if other else "same bits"
    width = max(map(len, outcomes))
    for part, difference in outcomes.items():
        print(f"{part:<{width}}  {f'differs: {difference}' if difference else same}")
    return not any(outcomes.values())


def main(argv) -> None:
    if bool(_RECORD.value) == bool(_COMPARE.value):
        raise app.UsageError("give one of --record and --compare")
    recorded = json.loads(pathlib.Path(_COMPARE.value).read_text(encoding="utf-8")) if _COMPARE.value else None
    if _RECORD.value and pathlib.Path(_RECORD.value).exists():
        raise app.UsageError(f"--record must not exist. Received: {_RECORD.value}")
    size = _SIZE.value or (recorded["size"] if recorded else "movielens")
    if recorded and recorded["size"] != size:
        raise app.UsageError(f"--size must be that of --compare. Received: {size}. Allowed: {recorded['size']}")
    try:
        results = golden_steps.run(pathlib.Path(_WORK_DIR.value), size)
    except golden_steps.StepFailedError as error:
        sys.exit(f"error: {error}")
    found = golden_record.read_results(results, size)
    if recorded:
        sys.exit(not _print_outcomes(recorded, found))
    difference = found["parts"][golden_record.KILLED]["exact"]["difference_to_the_unkilled_run"]
    if difference:
        sys.exit(f"the run that was killed differs from the one that was not: {difference}. Nothing was recorded")
    golden_record.write(pathlib.Path(_RECORD.value), found)
    print(f"recorded {len(found['parts'])} parts in {_RECORD.value}")


if __name__ == "__main__":
    app.run(main)
