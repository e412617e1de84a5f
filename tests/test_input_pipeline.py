"""The training input: every row once, in an order that seed and epoch decide, with values found by row id."""

import numpy as np
import pytest
import tensorflow as tf

from clsd_tf import input_pipeline
from clsd_tf.input_pipeline import RowValues


def row_ids(batched):
    """Row ids of each batch."""
    return [features["row_id"] for features, _, _ in batched.as_numpy_iterator()]


def first_epoch(dataset, **changes):
    arguments = {"batch_size": 256, "seed": 1, "first_epoch": 0, "num_epochs": 1, **changes}
    return input_pipeline.training_epochs(dataset, **arguments)


@pytest.fixture(scope="module")
def train_ids(feed_dataset):
    return input_pipeline.read_columns(feed_dataset, "train", ["row_id"])["row_id"]


@pytest.fixture(scope="module")
def by_row(feed_dataset, train_ids):
    """A different value for each row: its id / 10, listed in another order than the rows'."""
    shuffled = np.random.default_rng(0).permutation(train_ids)
    return RowValues(shuffled, (shuffled / 10).astype(np.float32))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("shuffle_seed", [None, 5])
def test_a_pass_yields_every_row_once(feed_dataset, split, shuffle_seed):
    batched = input_pipeline.batches(feed_dataset, split, batch_size=300, shuffle_seed=shuffle_seed)
    expected = input_pipeline.read_columns(feed_dataset, split, ["row_id"])["row_id"]
    received = row_ids(batched)
    assert len(expected) == feed_dataset.num_rows(split) == len(set(expected))
    assert sorted(np.concatenate(received)) == sorted(expected)
    assert {len(batch) for batch in received[:-1]} <= {300}
    assert len(received[-1]) == (len(expected) - 1) % 300 + 1


def test_without_a_seed_rows_keep_the_file_order(feed_dataset, train_ids):
    batched = input_pipeline.batches(feed_dataset, "train", batch_size=256)
    for _ in range(2):
        np.testing.assert_array_equal(np.concatenate(row_ids(batched)), train_ids)


def test_a_shuffle_seed_gives_another_order_in_each_pass_and_the_same_in_each_run(feed_dataset, train_ids):
    one = input_pipeline.batches(feed_dataset, "train", batch_size=256, shuffle_seed=5)
    passes = [np.concatenate(row_ids(one)) for _ in range(2)]
    again = input_pipeline.batches(feed_dataset, "train", batch_size=256, shuffle_seed=5)
    np.testing.assert_array_equal(passes, [np.concatenate(row_ids(again)) for _ in range(2)])
    assert (passes[0] != passes[1]).any()
    assert (passes[0] != train_ids).any()
    other = input_pipeline.batches(feed_dataset, "train", batch_size=256, shuffle_seed=6)
    assert (np.concatenate(row_ids(other)) != passes[0]).any()


def test_features_hold_inputs_groups_and_row_id_and_nothing_held_out(feed_dataset):
    features, labels, weight = next(iter(input_pipeline.batches(feed_dataset, "train", batch_size=32)))
    inputs = feed_dataset.inputs
    names = {entry.name for entry in inputs.categorical} | set(inputs.numeric) | {group.name for group in inputs.groups}
    assert set(features) == names | {"row_id"}
    for entry in inputs.categorical:
        assert features[entry.name].dtype == tf.int64
        assert features[entry.name].shape == ([32] if entry.max_values is None else [32, entry.max_values])
        assert tf.reduce_max(features[entry.name]) < entry.vocabulary_size
    assert {features[name].dtype for name in inputs.numeric} == {tf.float32}
    for values in (labels, weight):
        assert values.dtype == tf.float32
        assert values.shape == [32]
    assert set(labels.numpy()) == {0.0, 1.0}


def test_labels_stay_with_their_rows_when_shuffled(feed_dataset):
    columns = input_pipeline.read_columns(feed_dataset, "train", ["row_id", "label"])
    label_of = dict(zip(columns["row_id"], columns["label"], strict=True))
    for features, labels, _ in first_epoch(feed_dataset).as_numpy_iterator():
        assert [label_of[row] for row in features["row_id"]] == list(labels)


def test_an_epoch_holds_every_row_once_and_no_batch_spans_two_epochs(feed_dataset, train_ids):
    received = row_ids(first_epoch(feed_dataset, num_epochs=2))
    per_epoch = -(-len(train_ids) // 256)
    assert len(received) == 2 * per_epoch
    epochs = [np.concatenate(received[:per_epoch]), np.concatenate(received[per_epoch:])]
    for epoch in epochs:
        assert sorted(epoch) == sorted(train_ids)
    assert (epochs[0] != epochs[1]).any()


def test_starting_at_epoch_1_gives_the_second_epoch_of_a_run_from_0(feed_dataset, train_ids):
    from_0 = row_ids(first_epoch(feed_dataset, num_epochs=3))
    from_1 = row_ids(first_epoch(feed_dataset, first_epoch=1, num_epochs=3))
    per_epoch = len(from_0) // 3
    np.testing.assert_array_equal(np.concatenate(from_1), np.concatenate(from_0[per_epoch:]))
    assert len(from_1) == 2 * per_epoch


def test_another_seed_gives_another_order(feed_dataset):
    one, other = (np.concatenate(row_ids(first_epoch(feed_dataset, seed=seed))) for seed in (1, 2))
    assert (one != other).any()


def test_seeds_share_no_epoch(feed_dataset):
    # The second epoch of one seed must not be the first of the next: runs of several seeds are to be independent.
    second_of_seed_1 = first_epoch(feed_dataset, seed=1, first_epoch=1, num_epochs=2)
    first_of_seed_2 = first_epoch(feed_dataset, seed=2)
    assert (np.concatenate(row_ids(second_of_seed_1)) != np.concatenate(row_ids(first_of_seed_2))).any()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_depends_on_seed_and_epoch_alone(feed_dataset, seed):
    orders = []
    for global_seed in (1, 2):
        tf.random.set_seed(global_seed)
        orders.append(np.concatenate(row_ids(first_epoch(feed_dataset, seed=seed))))
    np.testing.assert_array_equal(orders[0], orders[1])


def test_teacher_scores_are_found_by_row_id_not_by_position(feed_dataset, by_row):
    batched = input_pipeline.with_teacher_scores(first_epoch(feed_dataset), by_row)
    seen = 0
    for features, _, _ in batched.as_numpy_iterator():
        np.testing.assert_allclose(features["teacher_score"], features["row_id"] / 10, rtol=1e-6)
        assert features["teacher_score"].dtype == np.float32
        seen += len(features["row_id"])
    assert seen == len(by_row.row_ids)


def test_a_row_without_a_teacher_score_gets_nan(feed_dataset, by_row):
    # NaN stops training at once; any number would silently pass for a score.
    known = RowValues(by_row.row_ids[1:], by_row.values[1:])
    batched = input_pipeline.with_teacher_scores(first_epoch(feed_dataset), known)
    pairs = [(features["row_id"], features["teacher_score"]) for features, _, _ in batched.as_numpy_iterator()]
    ids, scores = (np.concatenate(column) for column in zip(*pairs, strict=True))
    assert ids[np.isnan(scores)].tolist() == [by_row.row_ids[0]]


def test_row_weights_multiply_the_sample_weights_by_row_id(feed_dataset, by_row):
    # Twice, so that the second finds weights other than 1: (id / 10)^2.
    batched = first_epoch(feed_dataset)
    for _ in range(2):
        batched = input_pipeline.with_row_weights(batched, by_row)
    plain = first_epoch(feed_dataset)
    for (features, labels, weight), (_, plain_labels, plain_weight) in zip(
        batched.as_numpy_iterator(), plain.as_numpy_iterator(), strict=True
    ):
        np.testing.assert_allclose(weight, plain_weight * np.square(features["row_id"] / 10), rtol=1e-5)
        np.testing.assert_array_equal(labels, plain_labels)


def test_read_columns_keeps_rows_aligned(feed_dataset):
    columns = input_pipeline.read_columns(feed_dataset, "test", ["row_id", "label", "user_hash", "recent_items"])
    assert {len(values) for values in columns.values()} == {feed_dataset.num_rows("test")}
    assert columns["recent_items"].shape == (feed_dataset.num_rows("test"), 5)
    again = input_pipeline.read_columns(feed_dataset, "test", ["label"])["label"]
    np.testing.assert_array_equal(columns["label"], again)
    assert columns["label"].sum() == feed_dataset.counts["splits"]["test"]["clicks"]


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_1_is_refused(feed_dataset, batch_size):
    with pytest.raises(ValueError, match=rf"batch_size must be at least 1\. Received: {batch_size}"):
        input_pipeline.batches(feed_dataset, "train", batch_size=batch_size)


def test_a_batch_size_below_1_is_refused_for_training_epochs(feed_dataset):
    with pytest.raises(ValueError, match=r"batch_size must be at least 1\. Received: 0"):
        first_epoch(feed_dataset, batch_size=0)


def test_an_unknown_split_is_refused(feed_dataset):
    with pytest.raises(ValueError, match=r"train, validation, test\. Received: 'dev'"):
        input_pipeline.batches(feed_dataset, "dev", batch_size=8)


def test_rows_kept_in_memory_come_in_the_order_of_rows_read_from_files(feed_dataset):
    seed = tf.constant(3, tf.int64)

    def epoch(source):
        tf.random.set_seed(7)
        return list(source(feed_dataset, 64)(seed).as_numpy_iterator())

    in_memory, from_files = epoch(input_pipeline._from_memory), epoch(input_pipeline._from_files)
    assert len(in_memory) == len(from_files) > 2
    for one, other in zip(in_memory, from_files, strict=True):
        assert set(one) == set(other)
        for name, values in one.items():
            np.testing.assert_array_equal(values, other[name], err_msg=name)
