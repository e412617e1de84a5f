"""Writes a feature spec for files that nobody prepared, to be checked and edited.

Example:
  clsd infer-spec --log=raw/log.csv --user=raw/users.csv --item=raw/items.csv --output=my_feed.yaml
  clsd check-spec --spec=my_feed.yaml
  clsd build --spec=my_feed.yaml --dataset_dir=dataset

The format comes from the name's ending (.csv, .tsv, .txt, .jsonl, .parquet, .avro, .tfrecord; text also .gz, .zst,
.bz2), the delimiter from the first lines. A path may be a glob pattern such as 'log/date=*/*.parquet'. Guessed are the
types of the columns, the keys of user and item, the event time and its unit, the label (a column of 0 and 1 or of false
and true named click or label, or the upper part of a rating), how each column becomes a feature, and user groups. What
seems to be known only after the event is left out of the features. A comment behind each guess says what it rests on,
without a value that identifies a person; a guess that is wrong is corrected in the file, or by --user_key, --item_key,
--event_time and --label.
"""

import pathlib

from absl import flags

from clsd_tf.commands import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from clsd_tf.spec.feature_spec import parse_spec
from clsd_tf.spec.validation import parse_yaml_mapping
from pipelines.spec_inference.infer import Choices, InferredSpec, infer_spec
from pipelines.spec_inference.profiles import profile_table, spec_name
from pipelines.spec_inference.to_yaml import flow, to_yaml

_LOG = flags.DEFINE_string("log", None, "Path or glob pattern of the log: one row an event.", required=True)
_USER = flags.DEFINE_string("user", None, "Path or glob pattern of the user table: one row a user.")
_ITEM = flags.DEFINE_string("item", None, "Path or glob pattern of the item table: one row an item.")
_INPUT_DIR = flags.DEFINE_string("input_dir", "", "Directory that the paths are relative to, as in build_dataset.")
_OUTPUT = flags.DEFINE_string("output", "my_feed.yaml", "YAML file to write; must not exist.")
_MAX_ROWS = flags.DEFINE_integer("max_rows", 100_000, "Rows of each table to look at.", 1)
_USER_KEY = flags.DEFINE_string("user_key", None, "Column of the log that identifies the user, if the guess is wrong.")
_ITEM_KEY = flags.DEFINE_string("item_key", None, "Column of the log that identifies the item, if the guess is wrong.")
_EVENT_TIME = flags.DEFINE_string("event_time", None, "Column of the log with the time, if the guess is wrong.")
_LABEL = flags.DEFINE_string(
    "label", None, "Column of 0 and 1, or false and true; or an expression like 'rating >= 4'."
)


def main(argv) -> None:
    if len(argv) > 1:
        raise ValueError(f"only flags are allowed. Received: {' '.join(argv[1:])}. Example: --log=raw/log.csv")
    output = pathlib.Path(_OUTPUT.value)
    if output.exists():
        raise FileExistsError(f"--output must not exist. Received: {output}. Remove it or choose another name")
    paths = {"log": _LOG.value, "user": _USER.value, "item": _ITEM.value}
    tables = {
        role: profile_table(role, path, _INPUT_DIR.value, _MAX_ROWS.value) for role, path in paths.items() if path
    }
    choices = Choices(_USER_KEY.value, _ITEM_KEY.value, _EVENT_TIME.value, _LABEL.value)
    inferred = infer_spec(tables.pop("log"), tables, choices)
    text = to_yaml(inferred, spec_name(output.stem), _MAX_ROWS.value)
    _print(inferred)
    source = f"the spec inferred for {output}, which is not written,"
    spec = parse_spec(parse_yaml_mapping(text, source), source)
    output.write_text(text, encoding="utf-8")
    input_dir = f" --input_dir={_INPUT_DIR.value}" if _INPUT_DIR.value else ""
    console.console.print(f"[green]ok[/] {spec.name} in {output}. Read its comments, then run", soft_wrap=True)
    console.console.print(f"  python -m pipelines.check_spec --spec={output}{input_dir}", soft_wrap=True, markup=False)


def _print(inferred: InferredSpec) -> None:
    rows = [
        (
            role,
            column.name,
            column.type,
            column.num_distinct,
            f"{column.missing:.1%}",
            inferred.use_of(role, column.name),
        )
        for role, table in inferred.tables.items()
        for column in table.columns
    ]
    for role, table in inferred.tables.items():
        for unreadable in table.unreadable:
            console.warn(f"{role}: not looked at behind what cannot be read. {unreadable}")
    console.print_table("Columns", ["table", "column", "type", "distinct", "missing", "use"], rows)
    for key, (value, why) in inferred.settings.items():
        console.console.print(f"{key}: {flow(value)}  ({why})", soft_wrap=True, markup=False)


if __name__ == "__main__":
    console.run(main)
