"""Trains day by day; each day is first scored by the model of the day before.

Example:
  clsd build --spec=feed --input_dir=raw/2026-11-02 --dataset_dir=datasets/2026-11-02 \\
    --grow_from=datasets/2026-11-01
  clsd train-daily --datasets=datasets/{date} --work_dirs=runs/{date} --first_date=2026-11-01 \\
    --last_date=2026-11-02 --set max_epochs=1

The model then goes on training on that day. The datasets, one a day (UTC), each grown from the one before, must be
there. Prints how well each day was predicted before any run trained on it (progressive validation), and leaves it as
days.json and days.html in the work directory of the last day, with its lineage. When it was killed, the same command
goes on; days that are done stay as they are.

Runs train on the training splits alone, and validation rows stop and calibrate them. Since every row of a day is a test
of the model before it, the datasets need no large test split: say split: {rule: random, train: 0.98, validation: 0.01,
test: 0.01} in the spec. Days of one epoch suit --set method.teacher=self, which needs no models beforehand.
"""

import datetime as dt
from typing import Any

from absl import flags

from clsd_tf.commands import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from clsd_tf.continual.daily_training import days_between, days_table, train_daily
from clsd_tf.continual.report import render_days
from clsd_tf.metrics.table import metrics_in
from clsd_tf.storage.files import read_json, write_json, write_text
from clsd_tf.training.assembly import make_deterministic
from clsd_tf.training.config import load_config

_DATASETS = flags.DEFINE_string("datasets", None, "Dataset directories, {date} for the day.", required=True)
_WORK_DIRS = flags.DEFINE_string("work_dirs", None, "Work directories, {date} for the day.", required=True)
_FIRST_DATE = flags.DEFINE_string("first_date", None, "First day, YYYY-MM-DD.", required=True)
_LAST_DATE = flags.DEFINE_string("last_date", None, "Last day, YYYY-MM-DD.", required=True)
_CONFIG = flags.DEFINE_string("config", None, "YAML file with settings; the rest keeps its default.")
_SET = flags.DEFINE_multi_string("set", [], "key=value, applied on top of --config; may be repeated.")


def _date(flag: flags.FlagHolder) -> dt.date:
    try:
        return dt.datetime.strptime(flag.value, "%Y-%m-%d").date()
    except ValueError as error:
        raise ValueError(f"--{flag.name} must be a date YYYY-MM-DD. Received: {flag.value!r}") from error


def _validation(day: dict[str, Any]) -> str:
    if not day["prequential"]:
        return "no run before it to validate"
    overall = day["prequential"]["overall"]
    shown = [metric for metric in metrics_in("days") if metric.name in overall]
    return ", ".join(f"{metric.heading} {console.format_number(overall[metric.name])}" for metric in shown)


def main(argv) -> None:
    config = load_config(_CONFIG.value, _SET.value)
    days = days_between(_date(_FIRST_DATE), _date(_LAST_DATE), _DATASETS.value, _WORK_DIRS.value)
    console.warn(config.warning)
    make_deterministic()
    done = []
    for day in train_daily(days, config):
        done.append(day)
        console.console.print(
            f"{day['date']}: {_validation(day)}; {day['trained_rows']:,} rows trained", soft_wrap=True
        )
    last = days[-1].work_dir
    write_json(last.days, done)
    lineage = read_json(last.lineage)
    write_text(last.days_report, render_days(done, lineage))
    console.print_table("Each day, predicted by the model of the day before", *days_table(done))
    runs = [*lineage["ancestors"], {"work_fingerprint": last.fingerprint, **lineage["run"]}]
    columns = ["run", "dataset", "trained rows", "first event", "last event"]
    keys = ("work_fingerprint", "dataset_fingerprint", "rows", "first_event", "last_event")
    console.print_table("Lineage", columns, [[run[key] for key in keys] for run in runs])
    console.console.print(f"{last.days} and {last.days_report}", soft_wrap=True)


if __name__ == "__main__":
    console.run(main)
