"""This project as a competitor of benchmarks.training: what `pipelines.train` runs, without validation and checkpoints.

The same pipeline of batches, model, optimizer and Keras ``fit``, with the callbacks that act on steps but the progress
bar; deterministic, as that command is.
"""

import importlib.metadata
import tempfile

import tensorflow as tf

from benchmarks.rounds import Ready, Task, Worker
from clsd_tf.commands import quiet_start  # noqa: F401 - as commands do.
from clsd_tf.data.input_pipeline import training_epochs
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import build_model, make_deterministic
from clsd_tf.training.callbacks import Scalars, StopOnNonFiniteLoss
from clsd_tf.training.config import TrainConfig, load_config
from clsd_tf.training.fit import steps_per_epoch

_PROFILED_STEPS = 5


def task_config(task: Task) -> TrainConfig:
    """Raises SpecError where the trainer does not know a setting."""
    return load_config(
        None,
        [
            "method=bce",
            "backbone=deepfm",
            f"embeddings.dim={task.embedding_dim}",
            f"hidden_units={list(task.hidden_units)}",
            f"batch_size={task.batch_size}",
            f"learning_rate={task.learning_rate}",
            *task.settings,
        ],
    )


def main() -> None:
    worker = Worker()
    task = worker.task
    tf.config.threading.set_intra_op_parallelism_threads(task.num_threads)
    tf.config.threading.set_inter_op_parallelism_threads(task.num_threads)
    make_deterministic()
    config = task_config(task)
    dataset = DatasetDir(task.dataset_dir)
    batches = training_epochs(
        dataset,
        batch_size=config.batch_size,
        seed=config.seed,
        first_epoch=0,
        num_epochs=1,
        max_cache_bytes=config.max_cache_bytes,
    )
    worker.begin_model()
    model = build_model(config, dataset.inputs)

    steps = steps_per_epoch(dataset, config)
    scratch = tempfile.TemporaryDirectory()
    callbacks = [StopOnNonFiniteLoss(), Scalars(WorkDir(scratch.name), batch_size=config.batch_size)]
    if task.profile_dir is not None:
        middle = (steps // 2 + 1, min(steps, steps // 2 + _PROFILED_STEPS))  # Behind those that trace and fill caches.
        callbacks.append(tf.keras.callbacks.TensorBoard(task.profile_dir, write_graph=False, profile_batch=middle))

    def train() -> tuple[int, float]:
        history = model.fit(batches, steps_per_epoch=steps, verbose=0, callbacks=callbacks)
        return dataset.num_rows("train"), history.history["bce"][0]

    versions = {name: importlib.metadata.version(name) for name in ("tensorflow", "tf-keras")}
    parameters = sum(variable.shape.num_elements() for variable in model.backbone.trainable_variables)
    with scratch:
        worker.serve(train, Ready(parameters, versions))


if __name__ == "__main__":
    main()
