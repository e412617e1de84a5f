"""Writes a simulated feed: a log of impressions with genuine and accidental clicks, users and items.

Example:
  python -m pipelines.simulate_feed --raw_dir=/tmp/feed --num_rows=50000
  python -m pipelines.build_dataset --spec=simulated_feed --input_dir=/tmp/feed --dataset_dir=/tmp/feed_dataset
"""

import pathlib

from absl import flags

from clsd_tf import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from pipelines.feed import FeedConfig, simulate_feed

_RAW_DIR = flags.DEFINE_string("raw_dir", None, "Directory to write; must not exist.", required=True)
_NUM_ROWS = flags.DEFINE_integer("num_rows", FeedConfig.num_rows, "Impressions in the log.", 1)
_NUM_USERS = flags.DEFINE_integer("num_users", FeedConfig.num_users, "Users, each with a profile.", 1)
_NUM_ITEMS = flags.DEFINE_integer("num_items", FeedConfig.num_items, "Items.", 1)
_SEED = flags.DEFINE_integer("seed", FeedConfig.seed, "The same seed gives the same files.", 0)


def main(argv) -> None:
    raw_dir = pathlib.Path(_RAW_DIR.value)
    config = FeedConfig(_NUM_ROWS.value, _NUM_USERS.value, _NUM_ITEMS.value, _SEED.value)
    with console.step(f"simulate {config.num_rows:,} impressions"):
        simulate_feed(config, raw_dir)
    console.console.print(f"log.csv, users.csv and items.csv in {raw_dir}")


if __name__ == "__main__":
    console.run(main)
