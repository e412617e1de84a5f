"""Lays out the public KuaiRand-Pure release as the feature spec kuairand reads it.

Example:
  clsd convert-kuairand --release_dir=KuaiRand-Pure/data --output_dir=kuairand

The release (https://kuairand.com) holds CSV files. Takes the impressions of the standard policy from 25 April to
5 May 2022, and the user and basic video features as they are: log.parquet, users.csv and videos.csv. Of the impressions
of 8 to 24 April it makes user_sequences.parquet: each user's last 50 videos watched, liked and watched for long.
"""

from __future__ import annotations

import pathlib
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from absl import flags

from clsd_tf.commands import console
from clsd_tf.storage.files import staged_directory

_RELEASE_DIR = flags.DEFINE_string("release_dir", None, "Directory with the CSV files of the release.", required=True)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Directory to write; must not exist.", required=True)

LOG, EARLIER_LOG = "log_standard_4_22_to_5_08_pure.csv", "log_standard_4_08_to_4_21_pure.csv"
USERS, VIDEOS = "user_features_pure.csv", "video_features_basic_pure.csv"
_VIDEOS_PER_SEQUENCE = 50
_FIRST_DATE, _LAST_DATE = 20220425, 20220505  # Days of China, as the release writes them.


def convert(release_dir: pathlib.Path, output_dir: pathlib.Path) -> int:
    """Writes the four tables.

    Args:
      release_dir: with the CSV files of the release.
      output_dir: directory to write.

    Returns:
      The number of impressions in the log.

    Raises:
      FileExistsError: ``output_dir`` is there already.
      ValueError: a file of the release is missing, or the log has no impressions of those days.
    """
    names = (LOG, EARLIER_LOG, USERS, VIDEOS)
    missing = [name for name in names if not (release_dir / name).is_file()]
    if missing:
        raise ValueError(
            f"--release_dir must hold {', '.join(names)}. Received: {release_dir}, without {', '.join(missing)}. "
            "In the release they are in KuaiRand-Pure/data"
        )
    earlier, later = (_read_log(release_dir / name) for name in (EARLIER_LOG, LOG))
    log = later.filter(pc.and_(_since_first_date(later), pc.less_equal(later.column("date"), _LAST_DATE)))
    if not log.num_rows:
        raise ValueError(
            f"{LOG} must have impressions from {_FIRST_DATE} to {_LAST_DATE}. Received: none. "
            "Take the file as the release has it"
        )
    before = pa.concat_tables([part.filter(pc.invert(_since_first_date(part))) for part in (earlier, later)])
    with staged_directory(output_dir) as staging:
        pyarrow.parquet.write_table(log, staging / "log.parquet")
        pyarrow.parquet.write_table(user_sequences(before), staging / "user_sequences.parquet")
        shutil.copyfile(release_dir / USERS, staging / "users.csv")
        shutil.copyfile(release_dir / VIDEOS, staging / "videos.csv")
    return log.num_rows


def _read_log(path: pathlib.Path) -> pa.Table:
    log = pyarrow.csv.read_csv(path)
    if "date" not in log.column_names:
        raise ValueError(
            f"{path.name} needs a column date. Received: {', '.join(log.column_names)}. "
            "Take the file as the release has it"
        )
    return log


def _since_first_date(log: pa.Table) -> pa.ChunkedArray:
    return pc.greater_equal(log.column("date"), _FIRST_DATE)


def user_sequences(impressions: pa.Table) -> pa.Table:
    """Makes the sequences of users who watched something.

    Args:
      impressions: columns of the log; watched is what was played at all.

    Returns:
      One row per user: ``watch_seq``, ``like_seq`` and ``long_watch_seq``, the last videos watched, liked and watched
      for long, oldest first; and ``last_time_ms``, the time of the last video watched.
    """
    columns = ["user_id", "video_id", "time_ms", "is_like", "long_view"]
    watched = impressions.filter(pc.greater(impressions.column("play_time_ms"), 0)).select(columns)
    order = np.lexsort((watched.column("time_ms").to_numpy(), watched.column("user_id").to_numpy()))  # Stable.
    watched = watched.take(pa.array(order))
    users, sizes = np.unique(watched.column("user_id").to_numpy(), return_counts=True)
    ends = np.cumsum(sizes)  # The row behind each user's last.
    every = np.ones(len(watched), bool)
    liked, for_long = (watched.column(name).to_numpy() == 1 for name in ("is_like", "long_view"))
    return pa.table(
        {
            "user_id": pa.array(users),
            "last_time_ms": watched.column("time_ms").take(pa.array(ends - 1)),
            "watch_seq": _last_videos(watched, ends, every),
            "like_seq": _last_videos(watched, ends, liked),
            "long_watch_seq": _last_videos(watched, ends, for_long),
        }
    )


def _last_videos(watched: pa.Table, ends: np.ndarray, selected: np.ndarray) -> pa.ListArray:
    """Of each user's rows, which end at ``ends``, the last selected videos."""
    selected_before = np.append(0, np.cumsum(selected))
    stops = selected_before[ends]
    starts = np.maximum(np.append(0, stops)[:-1], stops - _VIDEOS_PER_SEQUENCE)
    kept = np.zeros(selected_before[-1] + 1, np.int64)  # +1 at a start, -1 at a stop: 1 within.
    np.add.at(kept, starts, 1)
    np.add.at(kept, stops, -1)
    rows = np.flatnonzero(selected)[np.cumsum(kept)[:-1] > 0]
    videos = watched.column("video_id").take(pa.array(rows)).combine_chunks()
    return pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(stops - starts)), pa.int32()), videos)


def main(argv) -> None:
    with console.step("convert KuaiRand-Pure") as note:
        note(f"{convert(pathlib.Path(_RELEASE_DIR.value), pathlib.Path(_OUTPUT_DIR.value)):,} impressions")


if __name__ == "__main__":
    console.run(main)
