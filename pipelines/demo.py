"""Runs the whole job on MovieLens-100k, from raw files to a served model.

Example:
  clsd demo --demo_dir=demo

`make demo` runs this. Each step is an ordinary command, printed before it runs. A step whose result is there already is
kept, so a second run is fast; `make clean-demo` starts over. Without network the simulated feed takes the place of
MovieLens.
"""

import pathlib
import shlex
import subprocess
import sys
import time

import pyarrow.parquet
from absl import flags

from clsd_tf.commands import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from clsd_tf.serving.servable import version_directory
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import read_json
from clsd_tf.study.tables import compare, overall, summary_table

_DEMO_DIR = flags.DEFINE_string("demo_dir", "demo", "Directory for everything the demo writes.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Number of paired seeds.", 1)

_SERVED = "study/runs/time_split/deepfm/clsd/seed_1"  # The run that is reported, exported and queried.


class CommandFailedError(RuntimeError):
    """A step of the demo ended with an error; its message stands above."""


def run_step(title: str, result: pathlib.Path, *arguments: str) -> None:
    """Runs ``python -m <arguments>`` unless ``result`` is there.

    Args:
      title: printed above the command.
      result: file or directory that the command writes last.
      arguments: module and flags.

    Raises:
      CommandFailedError: the command failed.
    """
    console.console.rule(f"[bold]{title}", align="left")
    if result.exists():
        console.console.print(f"kept {result}")
        return
    arguments = (*arguments, *(f"--plugin={module}" for module in console.plugins()))
    console.console.print(f"$ python -m {shlex.join(arguments)}", style="dim", soft_wrap=True)
    done = subprocess.run([sys.executable, "-m", *arguments], check=False)
    if done.returncode:
        raise CommandFailedError(f"{title} failed with status {done.returncode}; its message stands above")


def fetch_tables(demo: pathlib.Path) -> tuple[str, pathlib.Path]:
    """Fetches MovieLens, or simulates a feed where that cannot be fetched.

    Args:
      demo: directory of everything the demo writes.

    Returns:
      Name of the spec, and directory of its tables.
    """
    movielens, feed = demo / "movielens_100k", demo / "simulated_feed"
    if not feed.exists():
        try:
            run_step("Fetch MovieLens-100k", movielens, "pipelines.fetch_movielens", f"--raw_dir={movielens}")
            return "movielens_100k", movielens
        except CommandFailedError:
            console.console.print("[yellow]MovieLens-100k is out of reach: going on with the simulated feed[/]")
    run_step("Simulate a feed", feed, "pipelines.simulate_feed", f"--raw_dir={feed}", "--num_rows=100000")
    return "simulated_feed", feed


def run_job(demo: pathlib.Path) -> str:
    """Runs every step.

    Args:
      demo: directory of everything the demo writes.

    Returns:
      Name of the spec.
    """
    spec, tables = fetch_tables(demo)
    dataset, random_dataset = demo / "dataset", demo / "dataset_random_split"
    build = ("pipelines.build_dataset", f"--spec={spec}", f"--input_dir={tables}")
    run_step("Build the dataset, split by time", dataset, *build, f"--dataset_dir={dataset}")
    run_step(
        "Build it again with a random split, for comparison only",
        random_dataset,
        *build,
        "--split_rule=random",
        f"--dataset_dir={random_dataset}",
    )
    _run_studies(demo, dataset, random_dataset)
    run, servables = demo / _SERVED, demo / "servable"
    on_run = (f"--dataset_dir={dataset}", f"--work_dir={run}")
    run_step("Evaluate one run by age group", run / "report.html", "pipelines.evaluate", *on_run)
    run_step(
        "Export it for TF Serving",
        servables / "models.config",
        "export.main",
        *on_run,
        f"--servable_dir={servables}",
        f"--name={spec}",
    )
    # Its result says nothing: it is there even if a rule failed.
    contract = demo / "contract.json"
    contract.unlink(missing_ok=True)
    run_step(
        "Check it against the rules of TF Serving",
        contract,
        "export.contract",
        str(servables / spec),
        f"--json={contract}",
    )
    scores = demo / "scores.csv"
    run_step(
        "Query the servable",
        scores,
        "export.predict",
        f"--servable={servables / spec}",
        f"--input={dataset / 'serving_sample.parquet'}",
        f"--output={scores}",
    )
    return spec


def _run_studies(demo: pathlib.Path, dataset: pathlib.Path, random_dataset: pathlib.Path) -> None:
    run_step(
        "Train with BCE and with click confidence, paired seeds",
        demo / "study" / "results.parquet",
        "pipelines.study",
        "--study=demo",
        f"--study_dir={demo / 'study'}",
        f"--dataset_dir=time_split={dataset}",
        f"--dataset_dir=random_split={random_dataset}",
        f"--seeds={_SEEDS.value}",
    )


def print_summary(demo: pathlib.Path, spec: str) -> None:
    """Prints the study's table, the check of the servable, and where everything lies.

    Args:
      demo: directory of everything the demo wrote.
      spec: its name, of ``run_job``.
    """
    console.console.rule("[bold]Summary", align="left")
    version = version_directory(demo / "servable" / spec)
    verified = read_json(version / "assets.extra" / "manifest.json")["verification"]
    worst = max(verified["max_difference"].values())
    results = pyarrow.parquet.read_table(demo / "study" / "results.parquet").to_pylist()
    title = f"{spec}, test split: mean (std) over seeds; difference to bce +- standard error"
    console.print_table(title, *summary_table(overall(compare(results)), "study_console"))
    console.console.print(
        f"Train/serve equality: {verified['rows']:,} rows through every signature differ by at most {worst:.1e}",
        soft_wrap=True,
    )
    bad = sum(sum(table["bad"].values()) for table in DatasetDir(demo / "dataset").counts["tables"].values())
    artifacts = [
        ("dataset", f"{demo / 'dataset'} ({bad:,} bad rows)"),
        ("runs, TensorBoard", f"{demo / 'study'} (tensorboard --logdir {demo / 'study'})"),
        ("study", f"{demo / 'study' / 'report.html'}, tables.md and results.parquet"),
        ("report of one run", str(demo / _SERVED / "report.html")),
        ("servable", f"{version} (make serve)"),
        ("model card", str(version / "assets.extra" / "model_card.md")),
        ("scores", str(demo / "scores.csv")),
    ]
    console.print_table("Where everything lies", ["artifact", "path"], artifacts)


def main(argv) -> None:
    start = time.monotonic()
    demo = pathlib.Path(_DEMO_DIR.value)
    spec = run_job(demo)
    print_summary(demo, spec)
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    console.console.print(f"Finished in {minutes} min {seconds} s")


if __name__ == "__main__":
    console.run(main)
