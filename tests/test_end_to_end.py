"""The whole job by its commands: simulated feed -> dataset -> run -> report -> reloaded servable -> scores."""

import json
import os
import subprocess
import sys

import pyarrow.csv
from commands import run_command

TINY = ["embeddings.dim=4", "hidden_units=[16]", "max_epochs=2", "method.teacher=self", "method.loss_warmup_steps=20"]


# Without colours and line breaks that depend on the terminal.
ENVIRONMENT = {"COLUMNS": "200", "NO_COLOR": "1"}


def run(*arguments):
    done = run_command(*arguments, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_raw_log_to_scores_by_commands(tmp_path):
    feed, dataset, work, servables = (tmp_path / name for name in ("feed", "dataset", "work", "servables"))
    run("pipelines.simulate_feed", f"--raw_dir={feed}", "--num_rows=8000", "--num_users=200", "--num_items=80")
    built = run("pipelines.build_dataset", "--spec=simulated_feed", f"--input_dir={feed}", f"--dataset_dir={dataset}")
    assert "6,400" in built  # 80 % of 8,000 rows train.
    on_run = (f"--dataset_dir={dataset}", f"--work_dir={work}")
    trained = run("pipelines.train", *on_run, *(f"--set={setting}" for setting in TINY))
    assert "with validation AUC" in trained
    evaluated = run("pipelines.evaluate", *on_run)
    overall = json.loads((work / "evaluation_test.json").read_text())["overall"]
    assert overall["rows"] == 800
    assert overall["auc"] > 0.55  # The feed has taste and popularity to learn; 0.5 is chance.
    assert f"{overall['auc']:.4f}" in evaluated
    assert "<svg" in (work / "report.html").read_text()
    exported = run("export.main", *on_run, f"--servable_dir={servables}", "--name=feed")
    assert "published" in exported
    scores = tmp_path / "scores.csv"
    sample = dataset / "serving_sample.parquet"
    run("export.predict", f"--servable={servables / 'feed'}", f"--input={sample}", f"--output={scores}")
    assert pyarrow.csv.read_csv(scores).num_rows == 800


def test_a_users_mistake_is_one_clear_line_and_status_1(tmp_path):
    command = [sys.executable, "-m", "pipelines.train", f"--dataset_dir={tmp_path}", f"--work_dir={tmp_path / 'w'}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: a dataset directory is complete when it holds _SUCCESS. Received:")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
