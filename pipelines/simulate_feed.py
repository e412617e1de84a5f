"""Writes a simulated feed: impressions, users, items, and why each click was made.

Example:
  clsd simulate-feed --raw_dir=/tmp/feed --num_rows=50000 --click_bait_share=0.1
  clsd build --spec=simulated_feed --input_dir=/tmp/feed --dataset_dir=/tmp/feed_dataset

Only a simulation knows why each click was made. The ground truth is written beside the log, and no dataset holds it:
truth.parquet (per row of the log: probability of genuine interest, cause of the click) and truth.json (the true
parameters). Rows are streamed, so any number fits in memory. The spec simulated_pairs reads the same files and sees
nothing but the ids of user and item. Age groups are <18, 18-30, 30-45, 45-60 and >=60.
"""

import pathlib
import time

import rich.progress
from absl import flags

from clsd_tf.commands import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from clsd_tf.spec.validation import parse_yaml
from pipelines.public_data.feed import FeedConfig, parse_feed_config, simulate_feed

_DEFAULT = FeedConfig()
_RAW_DIR = flags.DEFINE_string("raw_dir", None, "Directory to write; must not exist.", required=True)
_SETTINGS = [
    flags.DEFINE_integer("num_rows", _DEFAULT.num_rows, "Impressions in the log, >= 1."),
    flags.DEFINE_integer("num_users", _DEFAULT.num_users, "Users, each with a profile, >= 1."),
    flags.DEFINE_integer("num_items", _DEFAULT.num_items, "Items, >= 1."),
    flags.DEFINE_integer("rank", _DEFAULT.rank, "Dimensions of interest, >= 1."),
    flags.DEFINE_float("interest_scale", _DEFAULT.interest_scale, "Weight of the match of user and item in the logit."),
    flags.DEFINE_float("click_bait_share", _DEFAULT.click_bait_share, "Share of items with a misleading title."),
    flags.DEFINE_float(
        "click_bait_rate", _DEFAULT.click_bait_rate, "Probability that a misleading title alone draws a click."
    ),
    flags.DEFINE_float(
        "popularity_exponent",
        _DEFAULT.popularity_exponent,
        "Zipf exponent of impressions per item; 0: all items get the same.",
    ),
    flags.DEFINE_integer("seed", _DEFAULT.seed, "The same seed gives the same files."),
]
_SETTINGS_PER_AGE_GROUP = [
    flags.DEFINE_list(
        "base_logit",
        [str(value) for value in _DEFAULT.base_logit],
        "Base logit of genuine interest: one value, or one per age group. -2 is a probability of 0.12.",
    ),
    flags.DEFINE_list(
        "accidental_click_rate",
        [str(value) for value in _DEFAULT.accidental_click_rate],
        "Probability of a click by a slip: one value, or one per age group.",
    ),
]


def config_of_flags() -> FeedConfig:
    """The feed that the flags describe.

    Raises:
      SpecError: a value out of range.
    """
    content = {flag.name: flag.value for flag in _SETTINGS}
    for flag in _SETTINGS_PER_AGE_GROUP:
        content[flag.name] = [parse_yaml(text, f"--{flag.name}") for text in flag.value]
    return parse_feed_config(content, "the feed")


def main(argv) -> None:
    config, raw_dir = config_of_flags(), pathlib.Path(_RAW_DIR.value)
    start = time.monotonic()
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.TimeElapsedColumn())
    with rich.progress.Progress(
        *columns, console=console.console, transient=True, disable=not console.console.is_terminal
    ) as bar:
        task = bar.add_task("simulate impressions", total=config.num_rows)
        simulate_feed(config, raw_dir, on_chunk=lambda num_rows: bar.advance(task, num_rows))
    seconds = time.monotonic() - start
    console.console.print(f"[green]done[/] simulate {config.num_rows:,} impressions [dim]{seconds:.1f} s[/]")
    console.console.print(
        f"log.csv, users.csv and items.csv in {raw_dir}; the ground truth in truth.parquet and truth.json",
        soft_wrap=True,
    )


if __name__ == "__main__":
    console.run(main)
