"""Trains a CTR model on a dataset directory, by default with click confidence.

Example:
  clsd train --dataset_dir=demo/dataset --work_dir=demo/clsd --set method.mu=0.5
  tensorboard --logdir demo/clsd/tensorboard

The loss is BCE during loss warm-up; from then on clicks are weighted by their confidence (CLSD).

A killed run goes on at the batch behind its newest checkpoint, and ends with the same bits as one that was not killed:
start the same command again. There is a checkpoint at each epoch's end and every checkpoint_every_minutes,
checkpoint_every_steps on top. SIGTERM finishes the running step, saves, and ends with status 75; Ctrl-C ends at once.

On several machines, start the same command in each, with --strategy=multi_worker (in lockstep: batch_size stays the
number of rows per step over all, and the result that of one process) or --strategy=parameter_server (asynchronous), the
environment variable TF_CONFIG, and directories that all of them see. With multi_worker a process that dies ends the
others; start all again. With parameter_server a worker may die; a ps may not.

Defaults are printed with --print_config; every one can be set in a YAML file (--config) or by --set key=value, for
example --set method=bce, --set backbone=dcnv2, --set method.teacher=self, --set method.loss_warmup_steps=500.
"""

import json

from absl import flags

from clsd_tf.commands import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from clsd_tf.distributed.strategies import STRATEGIES, create_strategy, is_chief, is_server, serve
from clsd_tf.methods import method_of
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import make_deterministic
from clsd_tf.training.best_epoch import kept_epoch
from clsd_tf.training.config import load_config
from clsd_tf.training.run import train

_DATASET_DIR = flags.DEFINE_string("dataset_dir", None, "Dataset directory to train on.")
_WORK_DIR = flags.DEFINE_string("work_dir", None, "Directory for checkpoints, events, history and best weights.")
_INIT_FROM = flags.DEFINE_string("init_from", None, "Work directory of a finished run to go on from, say yesterday's.")
_CONFIG = flags.DEFINE_string("config", None, "YAML file with settings; the rest keeps its default.")
_SET = flags.DEFINE_multi_string("set", [], "key=value, applied on top of --config; may be repeated.")
_STRATEGY = flags.DEFINE_enum(
    "strategy",
    "none",
    STRATEGIES,
    "How training is spread. none: one process. mirrored: all GPUs of this machine. multi_worker: start this command "
    "once per machine, with the same --work_dir on a disk that they share and TF_CONFIG in the environment; all in "
    "lockstep, batch_size rows per step in all, the same result as one process. parameter_server: likewise, also for "
    "the tasks ps and worker; asynchronous, for machines that come and go.",
)
_PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Print the resolved config and stop.")


def main(argv) -> None:
    config = load_config(_CONFIG.value, _SET.value)
    if _PRINT_CONFIG.value:
        print(json.dumps(config.to_dict(), indent=1))
        return
    if not (_DATASET_DIR.value and _WORK_DIR.value):
        raise ValueError(
            "--dataset_dir and --work_dir are required. "
            f"Received: dataset_dir={_DATASET_DIR.value}, work_dir={_WORK_DIR.value}"
        )
    console.warn(config.warning)
    make_deterministic()
    work_dir = WorkDir(_WORK_DIR.value)
    if is_server(_STRATEGY.value):
        serve(_STRATEGY.value, is_over=lambda: work_dir.is_complete)
        return
    # Of a complete run, the other processes may be gone.
    strategy = None if work_dir.is_complete else create_strategy(_STRATEGY.value)
    init_from = WorkDir(_INIT_FROM.value) if _INIT_FROM.value else None
    history = train(DatasetDir(_DATASET_DIR.value), config, work_dir, init_from=init_from, strategy=strategy)
    if not is_chief(strategy):
        return
    kept, objective = kept_epoch(history, config), method_of(config.method).objective
    console.console.print(
        f"kept epoch {kept['epoch'] + 1} with validation {objective.title} {kept[objective.log_name]:.4f}; "
        f"run in {work_dir.path}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    console.run(main)
