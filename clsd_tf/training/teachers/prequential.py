"""The teacher ``prequential``: each row is scored by a model that had trained up to the day before."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from clsd_tf.commands.console import console
from clsd_tf.commands.interruption import Sigterm, TrainingInterruptedError
from clsd_tf.data import input_pipeline
from clsd_tf.data.input_pipeline import RowValues
from clsd_tf.training.assembly import EVALUATION_BATCH_SIZE, build_model
from clsd_tf.training.checkpoints import Checkpoints, random_generators
from clsd_tf.training.teachers.job import TeacherJob

_DAY_MICROSECONDS = 86_400_000_000


def prequential(job: TeacherJob) -> RowValues:
    """Scores each row by one model that had trained, in one pass, on the days before it.

    Days are spans of 24 hours from the first event. A killed job keeps the days that are done. The training split is
    held in memory.

    Args:
      job: without settings of its own.

    Returns:
      Scores in [0, 1]; NaN for the first day, which no model precedes: its clicks count 1.

    Raises:
      ValueError: the training split has one day.
    """
    dataset, config, inputs = job.dataset, job.config, job.dataset.inputs
    names = [*(entry.name for entry in inputs.categorical), *(group.name for group in inputs.groups), *inputs.numeric]
    columns = input_pipeline.read_columns(dataset, "train", [*names, "label", "sample_weight", "event_time", "row_id"])
    days = (columns["event_time"] - columns["event_time"].min()) // _DAY_MICROSECONDS
    if days.max() == 0:
        raise ValueError(
            "teacher=prequential needs a training split of two days or more. Received: one day. Use teacher=cross_fit"
        )
    model = build_model(config, inputs)
    scores = tf.Variable(np.full(len(days), np.nan, np.float32))
    days_done = tf.Variable(0, dtype=tf.int64)
    checkpoints = Checkpoints(
        job.directory / "models" / "days",
        to_keep=1,
        model=model,
        random_generators=random_generators(model),
        scores=scores,
        days_done=days_done,
    )
    checkpoints.restore()
    with Sigterm() as sigterm:
        for day in np.unique(days)[int(days_done) :]:
            rows = np.random.default_rng((config.seed, day)).permutation(np.flatnonzero(days == day))
            features = {name: columns[name][rows] for name in names}
            if day > 0:
                ctr = model.predict(features, batch_size=EVALUATION_BATCH_SIZE, verbose=0)
                scores.scatter_nd_update(rows[:, np.newaxis], ctr)
            model.fit(
                features,
                columns["label"][rows],
                sample_weight=columns["sample_weight"][rows],
                batch_size=config.batch_size,
                shuffle=False,  # They are, in an order that a resumed job finds again.
                verbose=0,
                callbacks=[_StopOnSigterm(sigterm)],
            )
            checkpoints.save(int(days_done.assign_add(1)))
            if job.title is not None:
                console.print(f"{job.title}: teacher scored {len(rows):,} rows of day {int(day) + 1}", soft_wrap=True)
    return RowValues(columns["row_id"], scores.numpy())


class _StopOnSigterm(tf.keras.callbacks.Callback):
    _supports_tf_logs = True

    def __init__(self, sigterm: Sigterm):
        super().__init__()
        self._sigterm = sigterm

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        if self._sigterm.received:
            raise TrainingInterruptedError(
                "stopped by SIGTERM: the days that the teacher has scored are saved. "
                "Start the same command again to go on"
            )
