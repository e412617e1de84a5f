"""Lays out the public KuaiRand-Pure release as the feature spec kuairand reads it.

Example:
  python -m pipelines.convert_kuairand --release_dir=KuaiRand-Pure/data --output_dir=kuairand

The release (https://kuairand.com) holds CSV files. Takes the impressions of the standard policy from 25 April to
5 May 2022, and the user and basic video features as they are: log.parquet, users.csv and videos.csv.
"""

from __future__ import annotations

import pathlib
import shutil

import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from absl import flags

from clsd_tf import console
from clsd_tf.artifacts import staged_directory

_RELEASE_DIR = flags.DEFINE_string("release_dir", None, "Directory with the CSV files of the release.", required=True)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Directory to write; must not exist.", required=True)

LOG, USERS, VIDEOS = "log_standard_4_22_to_5_08_pure.csv", "user_features_pure.csv", "video_features_basic_pure.csv"
_FIRST_DATE, _LAST_DATE = 20220425, 20220505  # Days of China, as the release writes them.


def convert(release_dir: pathlib.Path, output_dir: pathlib.Path) -> int:
    """Writes the three tables; returns the number of impressions.

    Raises:
      ValueError: a file of the release is missing, or the log has no impressions of those days.
    """
    missing = [name for name in (LOG, USERS, VIDEOS) if not (release_dir / name).is_file()]
    if missing:
        raise ValueError(
            f"--release_dir must hold {LOG}, {USERS} and {VIDEOS}. Received: {release_dir}, without "
            f"{', '.join(missing)}. In the release they are in KuaiRand-Pure/data"
        )
    log = pyarrow.csv.read_csv(release_dir / LOG)
    if "date" not in log.column_names:
        raise ValueError(
            f"{LOG} needs a column date. Received: {', '.join(log.column_names)}. Take the file as the release has it"
        )
    dates = log.column("date")
    log = log.filter(pc.and_(pc.greater_equal(dates, _FIRST_DATE), pc.less_equal(dates, _LAST_DATE)))
    if not log.num_rows:
        raise ValueError(
            f"{LOG} must have impressions from {_FIRST_DATE} to {_LAST_DATE}. Received: none. "
            "Take the file as the release has it"
        )
    with staged_directory(output_dir) as staging:
        pyarrow.parquet.write_table(log, staging / "log.parquet")
        shutil.copyfile(release_dir / USERS, staging / "users.csv")
        shutil.copyfile(release_dir / VIDEOS, staging / "videos.csv")
    return log.num_rows


def main(argv) -> None:
    with console.step("convert KuaiRand-Pure") as note:
        note(f"{convert(pathlib.Path(_RELEASE_DIR.value), pathlib.Path(_OUTPUT_DIR.value)):,} impressions")


if __name__ == "__main__":
    console.run(main)
