"""A small shop with known rows, and how tests build it and read back what was built."""

import functools

import pytest
import tensorflow as tf

from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import read_json
from pipelines.beam.dataset import BadInputError, BuildConfig, build_dataset, inspect_data

T0 = 1_700_000_000
LOG = ["user_id", "item_id", "time", "clicked", "seconds", "weight"]
NUM_EVENTS = 200  # A minute apart, so a time split of 80/10/10 is events 0-159, 160-179, 180-199.


def events():
    """Log rows: user k mod 10, item k mod 7; every third is a click, every sixth an intense one."""
    return [
        {
            "user_id": f"u{k % 10}",
            "item_id": f"i{k % 7}",
            "time": T0 + 60 * k,
            "clicked": int(k % 3 == 0),
            "seconds": 30.0 if k % 6 == 0 else 1.5,
            "weight": 0.5 if k % 2 else 1.0,
        }
        for k in range(NUM_EVENTS)
    ]


def users():
    return [{"user_id": f"u{k}", "age": 15 + 5 * k, "city": ("Rome", "Oslo", "Paris")[k % 3]} for k in range(10)]


def items():
    return [{"item_id": f"i{k}", "tags": ("a|b", "b", "")[k % 3], "price": 1.5 * k} for k in range(7)]


def write_csv(path, rows, header):
    lines = [",".join(header)]
    lines += [row if isinstance(row, str) else ",".join(str(row[name]) for name in header) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_shop(directory, log=None, user_rows=None, item_rows=None, log_header=LOG):
    """Writes the three tables of the shop; a row may be given as its raw line."""
    directory.mkdir(exist_ok=True)
    write_csv(directory / "log.csv", events() if log is None else log, log_header)
    write_csv(directory / "users.csv", users() if user_rows is None else user_rows, ["user_id", "age", "city"])
    write_csv(directory / "items.csv", items() if item_rows is None else item_rows, ["item_id", "tags", "price"])
    return directory


def build(spec, raw, output, **config):
    build_dataset(spec, BuildConfig(input_dir=str(raw), **config), output)
    return DatasetDir(output)


def refused(spec, raw, tmp_path, error=BadInputError, **config):
    """The message of a build that must fail, after a check that it left nothing that looks finished."""
    output = tmp_path / "out" / "dataset"
    with pytest.raises(error) as caught:
        build_dataset(spec, BuildConfig(input_dir=str(raw), **config), output)
    assert not output.exists()
    if output.parent.exists():
        left = {path.name for path in output.parent.iterdir()}
        assert left <= {"dataset.dead_letter.parquet"}
    return str(caught.value)


def records_of_file(path, columns, compression=""):
    """The records of a shard, as {name: list}, read without the project's code: by the manifest's list of columns."""
    rows = []
    for serialized in tf.data.TFRecordDataset(path, compression).as_numpy_iterator():
        feature = tf.train.Example.FromString(serialized).features.feature
        packed = {"ids": list(feature["ids"].int64_list.value), "numbers": list(feature["numbers"].float_list.value)}
        row = {}
        for kind, values in packed.items():
            for column in columns[kind]:
                row[column["name"]], values = values[: column["values"]], values[column["values"] :]
            assert not values
        rows.append(row)
    return rows


@functools.cache
def records(dataset, split):
    """The records of a split in file order."""
    columns = read_json(dataset.layout.manifest)["records"]
    compression = "GZIP" if dataset.record_files(split)[0].endswith(".gz") else ""
    return [row for path in dataset.record_files(split) for row in records_of_file(path, columns, compression)]


def lines_of(dataset, split):
    """The line of log.csv that each record of a split comes from."""
    return [record["row_id"][0] for record in records(dataset, split)]


def vocabulary(dataset, name):
    return lines_of_vocabulary(dataset.path, name)


def lines_of_vocabulary(directory, name):
    return (directory / "vocabularies" / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def inspected(spec, raw, directory):
    """(counts, statistics) of a build that stops before it encodes."""
    directory.mkdir()
    return inspect_data(spec, BuildConfig(input_dir=str(raw)), directory)


def values_of(ids, values, num_oov):
    """Ids back to text: None where out of vocabulary; padding left out."""
    return [values[index - 1 - num_oov] if index > num_oov else None for index in ids if index]
