"""Progressive validation: a model is measured on new data, which it has not seen, before the next one trains on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from clsd_tf.data.transform import oov_ids
from clsd_tf.evaluation.evaluate import measure_with_groups
from clsd_tf.evaluation.scored_rows import score_split
from clsd_tf.metrics.scored_rows import ScoredRows
from clsd_tf.storage.dataset_dir import SPLITS, DatasetDir
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import restored_model
from clsd_tf.training.lineage import TrainedOn, require_unseen


class EarlierModel:
    """The model of a finished run, for datasets that grew from its own.

    A value that the run has not met is out of vocabulary, by the id that the run's own transform gives it: so the
    predictions are those that the run, served, would have given.

    Args:
      work_dir: of the run, whose dataset may be gone.
      dataset: what is to be scored.

    Raises:
      ArtifactError: the run has not finished, or ids and numbers of ``dataset`` have another meaning.
    """

    def __init__(self, work_dir: WorkDir, dataset: DatasetDir):
        trained_on = TrainedOn.read(work_dir)
        trained_on.require_same_meaning(dataset)
        self._model = restored_model(work_dir, trained_on.inputs)
        self._known_ids = {name: tf.constant(ids) for name, ids in _known_ids(trained_on, dataset).items()}
        self._vocabulary_of = {entry.name: entry.vocabulary for entry in dataset.inputs.categorical}

    def predict(self, batches: tf.data.Dataset, verbose: int = 0) -> np.ndarray:
        """Predicts as the run's model does.

        Args:
          batches: of (features, labels, weights), features as the dataset has them.
          verbose: as of ``tf.keras.Model.predict``.

        Returns:
          ctr, float32 [num_rows].
        """
        known = batches.map(lambda features, labels, weight: (self._as_known(features), labels, weight))
        return self._model.predict(known, verbose=verbose)

    def logits(self, features: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Computes logits as the run's model does, before its calibration.

        Args:
          features: of a batch, as the dataset has them.

        Returns:
          float32 [batch].
        """
        return self._model.logits(self._as_known(features))

    def _as_known(self, features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        known = {
            name: tf.gather(self._known_ids[vocabulary], features[name])
            for name, vocabulary in self._vocabulary_of.items()
            if vocabulary in self._known_ids
        }
        return {**features, **known}


def _known_ids(trained_on: TrainedOn, dataset: DatasetDir) -> dict[str, np.ndarray]:
    """Vocabulary -> by the id of a value in ``dataset``, its id in the run, int64 [vocabulary_size]."""
    known_ids = {}
    for name, rule in dataset.spec.vocabularies.items():
        length = trained_on.statistics.vocabulary_lengths[name]
        new_values = tf.constant(dataset.layout.vocabulary_values(name)[length:], tf.string)
        own = np.arange(1 + rule.num_oov_indices + length)
        known_ids[name] = np.concatenate([own, oov_ids(new_values, rule.num_oov_indices).numpy()])
    return known_ids


def validate_progressively(earlier: WorkDir, dataset: DatasetDir) -> dict[str, Any]:
    """Measures an earlier run on all rows of a dataset, of every split, before any run trains on them.

    The calibration, too, is the earlier run's own.

    Args:
      earlier: a finished run.
      dataset: grown from the run's, all of it later than what the run has seen.

    Returns:
      ``scored_by`` and ``dataset_fingerprint``, and the metrics of ``clsd_tf.evaluation.evaluate.evaluate``.

    Raises:
      ArtifactError: the run has not finished, does not fit or has seen rows of the dataset's time.

    Source: Blum, Kalai and Langford (1999), "Beating the hold-out: bounds for k-fold and progressive cross-validation";
    prequential in Dawid (1984).
    """
    require_unseen(earlier, dataset)
    model = EarlierModel(earlier, dataset)
    rows = ScoredRows.concatenated([score_split(model, dataset, split) for split in SPLITS])
    return {**identity(earlier, dataset), **measure_with_groups(rows, dataset.inputs.groups)}


def identity(earlier: WorkDir, dataset: DatasetDir) -> dict[str, str]:
    """Says what a progressive validation was of.

    Args:
      earlier: the run that scored.
      dataset: that was scored.

    Returns:
      Their fingerprints, ``scored_by`` and ``dataset_fingerprint``.
    """
    return {"scored_by": earlier.fingerprint, "dataset_fingerprint": dataset.fingerprint}
