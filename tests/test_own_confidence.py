"""A teacher and a weighting function of a user's own: registered under a name, and called by it in a config."""

import shutil

import numpy as np
import pytest
import tensorflow as tf

from clsd_tf.data.input_pipeline import RowValues, read_columns
from clsd_tf.methods.clsd.confidence import WeightingFunction
from clsd_tf.methods.clsd.config import WEIGHTING_FUNCTIONS
from clsd_tf.methods.teachers import TEACHERS
from clsd_tf.spec.validation import SpecError
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.run import train
from clsd_tf.training.teachers.stored import stored_scores

pytestmark = pytest.mark.usefixtures("deterministic")


@pytest.fixture
def registered():
    """(registry, name, object) -> registers it for one test."""
    added = []

    def register(registry, name, value):
        registry.register(name)(value)
        added.append((registry, name))

    yield register
    for registry, name in added:
        del registry[name]


@pytest.fixture
def history_of(feed_dataset, tiny, tmp_path):
    """Assignments -> history of a run of all clicks weighted globally, from the first step on."""

    def history_of(name, *assignments):
        config = tiny(
            "backbone=lr", "max_epochs=1", "method.lambda=1", "method.mu=0", "method.loss_warmup_steps=0", *assignments
        )
        return train(feed_dataset, config, WorkDir(tmp_path / name), title=None)

    return history_of


def test_a_teacher_of_ones_own_scores_every_row(feed_dataset, tiny, registered, tmp_path):
    dataset = DatasetDir(shutil.copytree(feed_dataset.path, tmp_path / "dataset"))
    asked = []

    def by_parity(job):
        asked.append(job)
        row_ids = read_columns(job.dataset, "train", ["row_id"])["row_id"]
        return RowValues(row_ids, np.where(row_ids % 2, 0.75, 0.25).astype(np.float32))

    registered(TEACHERS, "by_parity", by_parity)
    settings = ["method.lambda=1", "method.mu=0", "method.global_weighting=mean_one", "method.loss_warmup_steps=0"]
    config = tiny("backbone=lr", "method.teacher=by_parity", "batch_size=3200", "max_epochs=1", *settings)
    runs = [WorkDir(tmp_path / name) for name in ("one", "two")]
    (entry,), again = (train(dataset, config, work_dir, title=None) for work_dir in runs)
    assert [entry] == again
    scores = stored_scores(runs[0], dataset)
    np.testing.assert_array_equal(scores.values, np.where(scores.row_ids % 2, 0.75, 0.25))
    rows = read_columns(dataset, "train", ["label", "sample_weight"])
    mean = np.average(scores.values, weights=rows["label"] * rows["sample_weight"])
    assert entry["max_click_confidence"] == pytest.approx(0.75 / mean, rel=1e-5)
    assert entry["min_click_confidence"] == pytest.approx(0.25 / mean, rel=1e-5)
    (job,) = asked  # The second run finds the scores.
    assert (job.config.method.name, job.config.backbone, dict(job.settings), job.files) == ("bce", "lr", {}, ())


def test_a_weighting_function_of_ones_own_trains_as_a_built_in_one_of_the_same_formula(history_of, registered):
    def own(score, reference, spread, kappa):
        return 1.0 + kappa * tf.math.divide_no_nan(score - reference, spread)

    registered(WEIGHTING_FUNCTIONS, "own", WeightingFunction(own, needs_spread=True))
    standardized = history_of("built_in", "method.global_weighting=standardized", "method.kappa=0.5")
    assert history_of("own", "method.global_weighting=own", "method.kappa=0.5") == standardized
    assert history_of("ratio", "method.global_weighting=ratio", "method.kappa=0.5") != standardized


def test_what_is_not_normalized_counts_as_it_is(history_of, registered):
    twice = WeightingFunction(lambda score, *_: 2.0 * tf.ones_like(score), is_normalized=False)
    registered(WEIGHTING_FUNCTIONS, "twice", twice)
    (entry,) = history_of("twice", "method.global_weighting=twice")
    assert entry["min_click_confidence"] == entry["max_click_confidence"] == 2.0


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("method.teacher=mine", r"unknown teacher\. Received: 'mine'\. Allowed: self, .* with --plugin=<module>"),
        *(
            (f"method.{part}_weighting=mine", r"unknown weighting function\. Received: 'mine'\. Allowed: additive, .*"
             r"standardized; those of your own module with --plugin=<module>")
            for part in ("global", "local")
        ),
    ],
)  # fmt: skip
def test_a_name_that_no_plug_in_has_registered_is_refused(tiny, assignment, message):
    with pytest.raises(SpecError, match=message):
        tiny(assignment)
