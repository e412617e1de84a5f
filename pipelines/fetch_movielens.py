"""Fetches MovieLens-100k (with user profiles) into a directory.

Example:
  clsd fetch-movielens --raw_dir=demo/raw

GroupLens forbids redistribution, so the files are taken from the RecBole package on the Python package index at run
time (`pip download --no-deps recbole==1.2.1`, 2 MB, nothing is installed) and checked against a known digest.
Read GroupLens' terms of use before using the data for more than research.
"""

import pathlib

from absl import flags

from clsd_tf.commands import console
from pipelines.public_data.movielens import fetch

_RAW_DIR = flags.DEFINE_string("raw_dir", None, "Directory to write; must not exist.", required=True)


def main(argv) -> None:
    raw_dir = pathlib.Path(_RAW_DIR.value)
    with console.step("fetch MovieLens-100k"):
        fetch(raw_dir)
    console.console.print(f"tables in {raw_dir}")


if __name__ == "__main__":
    console.run(main)
