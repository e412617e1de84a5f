"""Warm start from an earlier run: tables grow for new values, all that the model had learned is carried over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from clsd_tf.methods import method_of
from clsd_tf.methods.method_model import MethodModel
from clsd_tf.optimizers.row_sparse import embedding_tables
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import ArtifactError, read_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import build_model
from clsd_tf.training.best_epoch import read_best_weights
from clsd_tf.training.checkpoints import explaining_damage
from clsd_tf.training.config import TrainConfig, parse_config
from clsd_tf.training.lineage import TrainedOn

# A change of these gives weights or slots another meaning, even where their shapes stay the same.
_SETTINGS = ("backbone", "backbone_arguments", "hidden_units")
_EMBEDDING_SETTINGS = ("dim", "unified_buckets")
_OPTIMIZERS = ("embeddings", "dense")


def warm_start(model: MethodModel, config: TrainConfig, dataset: DatasetDir, earlier: WorkDir) -> None:
    """Gives a new model what an earlier run had learned.

    Weights are those that the earlier run serves, of its best epoch. Slots and step counts of the optimizers, and the
    moving means of the loss, are those of its last step. Row i of each vocabulary keeps its weights and slots; rows of
    new values stay as ``model`` has them: what a model that begins anew would have. Under ``unified_buckets`` no row is
    a new value's own: it begins with what its buckets learned from others. The steps go on counting, so Adam's bias
    correction and schedules of the learning rate go on, and neither loss warm-up nor warm-up of the learning rate comes
    again. The learning rate itself is that of ``config``.

    Where weights and slots are of different epochs, slots of ``ftrl``, which determine the weights, are adjusted to
    them. Where the earlier run weighted no clicks, its last mean ctr is what the guards compare with, and the EMA
    teacher begins as the model.

    Args:
      model: built from ``config`` for ``dataset``; changed in place.
      config: of the new run.
      dataset: what the new run trains on.
      earlier: a finished run; its dataset may be gone.

    Raises:
      ArtifactError: the earlier run has not finished, or its files are damaged; its model is built differently; or ids
        and numbers of ``dataset`` have another meaning than those it was trained on. Names what differs.
    """
    trained_on = TrainedOn.read(earlier)
    trained_on.require_same_meaning(dataset)
    earlier_config = parse_config(earlier.resolved_config["train"], str(earlier.config))
    _require_same_architecture(config, earlier_config, earlier)
    old = _restored(earlier, earlier_config, trained_on)
    layouts = _layouts(old, model)
    old_state, new_state = old.training_state, model.training_state
    for part, variables in new_state.items():
        _carry_over(part, old_state.get(part, []), variables, layouts)
    model.optimizer.adjust_slots(embedding_tables(model.backbone))
    model.begin_after(old, last_epoch=read_json(earlier.history)[-1])


def _require_same_architecture(config: TrainConfig, earlier: TrainConfig, work_dir: WorkDir) -> None:
    new, old = _architecture(config), _architecture(earlier)
    problems = [
        f"{key}. Received: {new.get(key)!r}. Allowed: {old.get(key)!r}"
        for key in sorted(new.keys() | old.keys())
        if new.get(key) != old.get(key)
    ]
    if problems:
        raise ArtifactError(
            f"a run goes on from one whose model is built the same. Received: {work_dir.path}, where these differ:\n  "
            + "\n  ".join(problems)
            + "\nTake the same settings, or train anew"
        )


def _architecture(config: TrainConfig) -> dict[str, Any]:
    """Setting -> value, of those that must stay."""
    content = config.to_dict()
    found = {name: content[name] for name in _SETTINGS}
    found |= {f"embeddings.{name}": content["embeddings"][name] for name in _EMBEDDING_SETTINGS}
    found |= {f"optimizer.{name}.kind": content["optimizer"][name]["kind"] for name in _OPTIMIZERS}
    return found | method_of(config.method).architecture(config.method)


def _restored(earlier: WorkDir, config: TrainConfig, trained_on: TrainedOn) -> MethodModel:
    """The earlier model with the state of its last step and its best weights."""
    model = build_model(config, trained_on.inputs)
    newest = tf.train.latest_checkpoint(str(earlier.checkpoints))
    if newest is None:
        raise ArtifactError(
            f"a run goes on from checkpoints of another. Received: {earlier.path}, which has lost them. Put the files "
            "back, or train that run again in a new --work_dir"
        )
    with explaining_damage(newest):
        tf.train.Checkpoint(model=model).restore(newest).expect_partial().assert_existing_objects_matched()
    read_best_weights(model, earlier)
    return model


def _layouts(old: MethodModel, new: MethodModel) -> dict[tuple[int, int], list[tuple[range, range]]]:
    """(rows before, rows now) of each table that holds several vocabularies -> where the rows of each lie."""
    layouts: dict[tuple[int, int], list[tuple[range, range]]] = {}
    for before, now in zip(old.row_ranges, new.row_ranges, strict=True):
        key = sum(map(len, before.values())), sum(map(len, now.values()))
        places = [(before[name], now[name]) for name in before]
        if layouts.setdefault(key, places) != places:
            raise ArtifactError(
                f"tables of one size must hold the same vocabularies to grow. Received: two of {key[0]:,} rows that "
                "differ. Train anew"
            )
    return layouts


def _carry_over(
    part: str,
    old: Sequence[tf.Variable],
    new: Sequence[tf.Variable],
    layouts: Mapping[tuple[int, int], Sequence[tuple[range, range]]],
) -> None:
    if len(old) != len(new):
        raise ArtifactError(
            f"a run goes on from one with the same {part}. Received: {len(new)} variables. Allowed: {len(old)}"
        )
    for before, now in zip(old, new, strict=True):
        if before.shape == now.shape:
            now.assign(before.numpy())
            continue
        places = layouts.get((before.shape[0], now.shape[0])) if before.shape[1:] == now.shape[1:] else None
        if places is None:
            raise ArtifactError(
                f"only tables of ids may grow. Received: {now.name} of {part}, shape {tuple(now.shape)}. "
                f"Allowed: {tuple(before.shape)}. Take the same settings, or train anew"
            )
        now.assign(_grown(before.numpy(), now.numpy(), places))


def _grown(before: np.ndarray, now: np.ndarray, places: Sequence[tuple[range, range]]) -> np.ndarray:
    for old, new in places:
        now[new.start : new.start + len(old)] = before[old.start : old.stop]
    return now
