"""Generated datasets: what readers find in them, and that the labels can be learned from the ids."""

import numpy as np
import pytest
import tensorflow as tf

from benchmarks.generated_dataset import NUM_CATEGORICAL, generated_dataset
from clsd_tf.data.input_pipeline import read_columns
from clsd_tf.metrics import pointwise
from clsd_tf.storage.dataset_dir import SPLITS


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    path = tmp_path_factory.mktemp("generated")
    return generated_dataset(path, num_rows=40_000, vocabulary_size=11, num_numeric=2, num_shards=3)


def test_it_holds_the_rows_and_ids_that_were_asked_for(generated):
    names = [f"category_{index}" for index in range(NUM_CATEGORICAL)]
    seen = []
    for split, num_rows in zip(SPLITS, (40_000, 2_000, 2_000), strict=True):
        columns = read_columns(generated, split, [*names, "row_id", "label", "number_1"])
        assert len(columns["row_id"]) == generated.num_rows(split) == num_rows
        assert columns["label"].sum() == generated.counts["splits"][split]["clicks"]
        for name in names:
            assert set(columns[name]) == set(range(1, 11))
        seen += columns["row_id"].tolist()
    assert sorted(seen) == list(range(44_000))
    assert len(generated.record_files("train")) == 3
    assert len(generated.inputs.categorical) == NUM_CATEGORICAL
    assert {entry.vocabulary_size for entry in generated.inputs.categorical} == {11}


def test_its_labels_depend_on_its_ids(generated):
    # Naive Bayes of the training split, at the test split: far above chance.
    names = [f"category_{index}" for index in range(NUM_CATEGORICAL)]
    train, test = (read_columns(generated, split, [*names, "label"]) for split in ("train", "test"))
    score = np.zeros(len(test["label"]))
    for name in names:
        rows, clicks = (np.bincount(train[name], weights, 11) for weights in (None, train["label"]))
        score += np.log((clicks + 1.0) / (rows - clicks + 1.0))[test[name]]
    assert pointwise.auc(test["label"], score) > 0.65


def test_it_is_the_same_each_time_and_not_made_twice(generated, tmp_path):
    again = generated_dataset(tmp_path, num_rows=40_000, vocabulary_size=11, num_numeric=2, num_shards=3)
    for one, other in zip(generated.record_files("train"), again.record_files("train"), strict=True):
        assert tf.io.gfile.GFile(one, "rb").read() == tf.io.gfile.GFile(other, "rb").read()
    made = again.layout.success.stat().st_mtime_ns
    generated_dataset(tmp_path, num_rows=40_000, vocabulary_size=11, num_numeric=2, num_shards=3)
    assert again.layout.success.stat().st_mtime_ns == made


def test_impossible_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a row per shard and 2 ids.*Received: num_rows=5, num_shards=8"):
        generated_dataset(tmp_path, num_rows=5, vocabulary_size=10)
