"""Ranks user-profile features by how much click confidence differs with them.

Example:
  clsd rank-profile-features --dataset_dir=demo/dataset --work_dir=demo/clsd

Local confidence is corrected for users whose clicks score higher or lower than those of others. The ranking tells
which features these users differ by: analysis of variance, over each feature, of the users' mean of 1 - score. It reads
clicks of the training split with the teacher's scores, or of the validation split with the model's predictions where
the run has none. Ranked are all user groups and all single-valued features of the user table.

What to do with it: train with the few features at the top whose p (Holm) is small and whose omega squared is worth it
(.01 is a small effect, .06 a medium one), for example
  clsd train ... --set 'method.ad_gate.features=[age_group, occupation]'
Of a feature and a group made from the same column, take one. Prints a table; leaves profile_features.json in the work
directory.
"""

import numpy as np
from absl import flags

from clsd_tf.commands import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from clsd_tf.data.input_pipeline import read_columns
from clsd_tf.evaluation.scores import split_scores
from clsd_tf.methods.clsd.profile_features import HEADLINES, rank_features, table_rows
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.files import write_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.teachers.stored import stored_scores

_DATASET_DIR = flags.DEFINE_string("dataset_dir", None, "Dataset directory the run was trained on.", required=True)
_WORK_DIR = flags.DEFINE_string("work_dir", None, "Work directory of a finished run.", required=True)


def candidate_features(dataset: DatasetDir) -> list[str]:
    """Lists the features that local confidence may be corrected by.

    Args:
      dataset: whose spec declares them.

    Returns:
      Names of the user groups, then of the single-valued features of the user table.

    Raises:
      ValueError: the spec declares none of both.
    """
    names = [*(group.name for group in dataset.inputs.groups), *dataset.inputs.user_features]
    if not names:
        raise ValueError(
            "profile features are user groups and features of the user table. Received: a spec with neither. "
            "Declare user_groups in the spec and build the dataset again"
        )
    return names


def main(argv) -> None:
    dataset, work_dir = DatasetDir(_DATASET_DIR.value), WorkDir(_WORK_DIR.value)
    names = candidate_features(dataset)
    work_dir.require_complete(dataset)
    split = "train" if stored_scores(work_dir, dataset) is not None else "validation"
    with console.step(f"rank {len(names)} profile features on clicks of {split}") as note:
        columns = read_columns(dataset, split, ["label", "sample_weight", "user_hash", *names])
        scores, source = split_scores(work_dir, dataset, split)
        kept = (columns["label"] > 0.5) & (columns["sample_weight"] > 0) & np.isfinite(scores)
        features = {name: columns[name][kept] for name in names}
        note(source)
        ranking = rank_features(1.0 - scores[kept], columns["user_hash"][kept], features)
    path = work_dir.path / "profile_features.json"
    facts = {"split": split, "scores": source, "dataset_fingerprint": dataset.fingerprint}
    write_json(path, {**facts, "features": ranking})
    console.print_table(
        f"users' mean of 1 - score, {split} clicks", [heading for _, heading in HEADLINES], table_rows(ranking)
    )
    console.console.print(str(path), soft_wrap=True)


if __name__ == "__main__":
    console.run(main)
