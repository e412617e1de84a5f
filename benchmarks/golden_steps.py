"""The commands of ``golden_results``, and the settings they get: the one place to change where those are renamed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

import pyarrow as pa
import pyarrow.parquet

_ROOT = pathlib.Path(__file__).parent.parent
NUM_REQUESTS = 1000
_KILL_SECONDS = 300  # To the first checkpoint.


@dataclasses.dataclass(frozen=True)
class Size:
    """Data and the settings that fit it.

    Attributes:
      spec: name of the feature spec.
      tables: command that writes the tables, without its directory.
      shared: settings of all runs.
      own_teacher: those of the run whose teacher is the model itself.
      cross_fit: those of the run with a teacher of several folds.
      checkpoint_every_steps: of the run that is killed.
      study: content of its YAML file.
    """

    spec: str
    tables: tuple[str, ...]
    shared: tuple[str, ...]
    own_teacher: tuple[str, ...]
    cross_fit: tuple[str, ...]
    checkpoint_every_steps: int
    study: dict[str, Any]

    @property
    def runs(self) -> dict[str, tuple[str, ...]]:
        """Name of a run -> its settings."""
        return {
            "bce": (*self.shared, "method=bce"),
            "clsd_self": (*self.shared, "method=clsd", "clsd.teacher=self", *self.own_teacher),
            "clsd_cross_fit": (*self.shared, "method=clsd", "clsd.teacher=cross_fit", *self.cross_fit),
        }


def _study(seeds: int, shared: dict[str, Any], warmup_steps: int) -> dict[str, Any]:
    """Plain BCE, a method and its two placebos."""
    teacher = {"teacher": "ema", "ema_momentum": 0.9, "loss_warmup_steps": warmup_steps}
    return {
        "seeds": seeds,
        "shared": shared,
        "data": [{"name": "golden"}],
        "methods": [{"name": "both_ema", "like": "both", "set": {"clsd": teacher}}],
        "grids": [{"title": "Methods", "data": ["golden"], "methods": ["both_ema"]}],
    }


_BACKBONES = ("lr", "fm", "dnn", "wide_deep", "dcn", "dcnv2", "finalmlp", "din")  # DeepFM trains everywhere else.
_BACKBONES_GRID = {"title": "Backbones", "data": ["golden"], "methods": ["bce"], "backbones": _BACKBONES, "seeds": 1}
_MOVIELENS_STUDY = _study(2, {"max_epochs": 1}, 50)
_MOVIELENS_STUDY["grids"].append(_BACKBONES_GRID)

# Random numbers, both confidences and moving means: state that a kill could lose.
_STATEFUL = ("dropout=0.1", "clsd.lambda=0.5", "clsd.mu=0.5", "clsd.normaliser_momentum=0.9")
SIZES = {
    "movielens": Size(
        spec="movielens_100k",
        tables=("pipelines.fetch_movielens",),
        shared=("max_epochs=2",),
        own_teacher=_STATEFUL,
        cross_fit=(),
        checkpoint_every_steps=40,
        study=_MOVIELENS_STUDY,
    ),
    "small": Size(
        spec="simulated_feed",
        tables=("pipelines.simulate_feed", "--num_rows=4000", "--num_users=120", "--num_items=60"),
        shared=("max_epochs=2", "batch_size=128", "hidden_units=[16]"),
        own_teacher=(*_STATEFUL, "clsd.loss_warmup_steps=10"),
        cross_fit=("clsd.num_folds=2",),
        checkpoint_every_steps=5,
        study=_study(1, {"max_epochs": 1, "batch_size": 128, "hidden_units": [16]}, 10),
    ),
}


class StepFailedError(RuntimeError):
    """A command ended with an error, or a directory is of no use."""


@dataclasses.dataclass(frozen=True)
class Results:
    """Where the commands leave what they produce."""

    root: pathlib.Path

    @property
    def dataset(self) -> pathlib.Path:
        return self.root / "dataset"

    def run(self, name: str) -> pathlib.Path:
        return self.root / "runs" / name

    @property
    def killed(self) -> pathlib.Path:
        """``clsd_self`` once more, killed in between."""
        return self.run("clsd_self_killed")

    @property
    def evaluation(self) -> pathlib.Path:
        return self.run("clsd_cross_fit") / "evaluation_test.json"

    @property
    def study(self) -> pathlib.Path:
        return self.root / "study" / "results.parquet"

    @property
    def answers(self) -> pathlib.Path:
        return self.root / "answers.parquet"


def run(work_dir: pathlib.Path, size_name: str) -> Results:
    """Runs what has no result yet.

    Raises:
      StepFailedError: a command failed, or other code or another size began ``work_dir``.
    """
    results, size = Results(work_dir.absolute()), SIZES[size_name]
    _claim(results.root, {"size": size_name, "code": _code_digest()})
    tables, dataset_flag = results.root / "tables", f"--dataset_dir={results.dataset}"
    _step(results, "tables", tables, *size.tables, f"--raw_dir={tables}")
    build = ("pipelines.build_dataset", f"--spec={size.spec}", f"--input_dir={tables}", dataset_flag)
    _step(results, "dataset", results.dataset, *build)
    for name, settings in size.runs.items():
        _step(results, name, results.run(name) / "_SUCCESS", *_train(results, results.run(name), settings))
    _killed_run(results, size)
    finished = (dataset_flag, f"--work_dir={results.run('clsd_cross_fit')}")
    _step(results, "evaluation", results.evaluation, "pipelines.evaluate", *finished)
    _run_study(results, size)
    _ask_servable(results, finished)
    return results


def _claim(root: pathlib.Path, wanted: dict[str, str]) -> None:
    """Begins ``root``, or goes on with what the same code has begun there."""
    file = root / "begun_by.json"
    if not file.exists():
        root.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(wanted), encoding="utf-8")
    begun_by = json.loads(file.read_text(encoding="utf-8"))
    if begun_by != wanted:
        raise StepFailedError(
            f"results that are kept must come from the same code and size. Received: {root}, begun by {begun_by}. "
            f"Allowed: {wanted}. Choose another --work_dir"
        )


def _code_digest() -> str:
    """16 hex digits over the Python code that commands run: all but tests and benchmarks."""
    digest = hashlib.sha256()
    for path in sorted(_ROOT.rglob("*.py")):
        parts = path.relative_to(_ROOT).parts
        if parts[0] not in ("tests", "benchmarks") and not any(part.startswith(".") for part in parts):
            digest.update("/".join(parts).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _train(results: Results, work_dir: pathlib.Path, settings: tuple[str, ...]) -> tuple[str, ...]:
    directories = (f"--dataset_dir={results.dataset}", f"--work_dir={work_dir}")
    return ("pipelines.train", *directories, *(f"--set={text}" for text in settings))


def _step(results: Results, title: str, result: pathlib.Path, *arguments: str) -> None:
    """Runs ``python -m <arguments>`` unless ``result`` is there; its output goes to a file."""
    if result.exists():
        print(f"kept {title}", flush=True)
        return
    start, log = time.monotonic(), results.root / f"{title}.log"
    with log.open("a", encoding="utf-8") as output:
        done = subprocess.run([sys.executable, "-m", *arguments], cwd=_ROOT, stdout=output, stderr=output, check=False)
    if done.returncode or not result.exists():
        raise StepFailedError(f"{title} ended with status {done.returncode}:\n{log.read_text(encoding='utf-8')}")
    print(f"done {title} in {time.monotonic() - start:.1f} s", flush=True)


def _killed_run(results: Results, size: Size) -> None:
    """Kills a run once it has a checkpoint, and starts the same command again."""
    setting = f"checkpoint_every_steps={size.checkpoint_every_steps}"
    command = _train(results, results.killed, (*size.runs["clsd_self"], setting))
    was_killed = results.root / "killed_at.txt"
    if not was_killed.exists():
        shutil.rmtree(results.killed, ignore_errors=True)
        with (results.root / "killed.log").open("a", encoding="utf-8") as log:
            process = subprocess.Popen([sys.executable, "-m", *command], cwd=_ROOT, stdout=log, stderr=log)
            _kill_after_checkpoint(process, results.killed)
        was_killed.write_text((results.killed / "checkpoints" / "checkpoint").read_text(encoding="utf-8"))
        print(f"killed {results.killed.name} at {was_killed.read_text(encoding='utf-8').splitlines()[0]}", flush=True)
    _step(results, results.killed.name, results.killed / "_SUCCESS", *command)


def _kill_after_checkpoint(process: subprocess.Popen, work_dir: pathlib.Path) -> None:
    deadline = time.monotonic() + _KILL_SECONDS
    try:
        while not (work_dir / "checkpoints" / "checkpoint").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise StepFailedError(f"no checkpoint came. Received: status {process.poll()}, {work_dir}")
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    if (work_dir / "_SUCCESS").exists():
        raise StepFailedError(f"the run was to be killed before its end. Received: {work_dir}, which is finished")


def _run_study(results: Results, size: Size) -> None:
    declaration = results.root / "study.yaml"
    declaration.write_text(json.dumps(size.study), encoding="utf-8")  # JSON is YAML.
    directories = (f"--study_dir={results.study.parent}", f"--dataset_dir=golden={results.dataset}")
    _step(results, "study", results.study, "pipelines.study", f"--study={declaration}", *directories)


def _ask_servable(results: Results, finished: tuple[str, ...]) -> None:
    servables, requests = results.root / "servables", results.root / "requests.parquet"
    export = ("export.main", *finished, f"--servable_dir={servables}", "--name=golden", "--version=1")
    _step(results, "export", servables / "models.config", *export)
    sample = pyarrow.parquet.read_table(results.dataset / "serving_sample.parquet")
    repeated = pa.concat_tables([sample] * -(-NUM_REQUESTS // sample.num_rows))
    pyarrow.parquet.write_table(repeated.slice(0, NUM_REQUESTS), requests)
    files = (f"--input={requests}", f"--output={results.answers}")
    _step(results, "answers", results.answers, "export.predict", f"--servable={servables / 'golden'}", *files)
