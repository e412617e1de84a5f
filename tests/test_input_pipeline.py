"""The training input: every row once, in an order that seed and epoch decide, with values found by row id."""

import pathlib
import shutil
import zlib

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import fitted

from benchmarks.generated_dataset import generated_dataset
from clsd_tf.data import input_pipeline
from clsd_tf.data.examples import parse_records
from clsd_tf.data.input_pipeline import RowValues, Shard
from clsd_tf.methods.method_model import MethodModel
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.work_dir import WorkDir


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


# --- Where rows come from, and where an epoch begins ----------------------------------------------------------------

IN_MEMORY, FROM_FILES = 2**30, 0


@pytest.fixture(params=[IN_MEMORY, FROM_FILES], ids=["in_memory", "from_files"])
def max_cache_bytes(request):
    return request.param


@pytest.fixture(scope="module")
def many_files(tmp_path_factory):
    """5,003 rows in 7 files: a window of rows spans files, and no size divides another."""
    path = tmp_path_factory.mktemp("many")
    return generated_dataset(path, num_rows=5003, vocabulary_size=50, num_categorical=2, num_shards=7)


@pytest.fixture(scope="module")
def named_layout(tmp_path_factory):
    path = tmp_path_factory.mktemp("named")
    return generated_dataset(path, num_rows=500, vocabulary_size=9, num_categorical=2, num_numeric=1, layout="named")


@pytest.fixture
def small_windows(monkeypatch):
    """As a dataset of many millions of rows would be: blocks of 64 rows, windows of 1,000."""
    monkeypatch.setattr(input_pipeline, "_BLOCK_ROWS", 64)
    monkeypatch.setattr(input_pipeline, "_WINDOW_ROWS", 1000)


def assert_same_batches(received, expected):
    for one, other in zip(received, expected, strict=True):
        tf.nest.map_structure(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("name", ["feed_dataset", "shop_dataset", "many_files", "named_layout"])
def test_rows_held_in_memory_come_as_rows_read_from_files(name, request, small_windows):
    # The shop's files are compressed, and hold features of several values.
    dataset = request.getfixturevalue(name)
    arguments = {"batch_size": 64, "seed": 3, "first_epoch": 1, "num_epochs": 3}
    in_memory, from_files = (
        list(input_pipeline.training_epochs(dataset, **arguments, max_cache_bytes=size).as_numpy_iterator())
        for size in (IN_MEMORY, FROM_FILES)
    )
    assert len(in_memory) == 2 * -(-dataset.num_rows("train") // 64)
    assert_same_batches(in_memory, from_files)


def test_the_cache_holds_what_fits_its_bytes_to_the_byte(many_files, tmp_path, monkeypatch):
    # 2 ids and 3 integers of 8 bytes, 4 floats of 4: once the files are gone, only what was held can be walked.
    size = 5003 * (5 * 8 + 4 * 4)
    shutil.copytree(many_files.path, tmp_path / "copy")
    copy = DatasetDir(tmp_path / "copy")
    held, read = (first_epoch(copy, max_cache_bytes=limit) for limit in (size, size - 1))
    shutil.rmtree(copy.layout.records)
    assert len(np.concatenate(row_ids(held))) == 5003
    with pytest.raises(tf.errors.NotFoundError):
        row_ids(read)


@pytest.mark.parametrize("batch_size", [97, 1000, 1024, 6000])
def test_the_order_of_rows_does_not_depend_on_the_batch_size(many_files, small_windows, batch_size, max_cache_bytes):
    arguments = {"seed": 4, "num_epochs": 2, "max_cache_bytes": max_cache_bytes}
    one = np.concatenate(row_ids(first_epoch(many_files, **arguments)))
    other = row_ids(first_epoch(many_files, batch_size=batch_size, **arguments))
    np.testing.assert_array_equal(np.concatenate(other), one)
    assert [len(batch) for batch in other] == ([batch_size] * (5003 // batch_size) + [5003 % batch_size]) * 2


def test_the_order_is_the_same_on_every_machine(many_files):
    # Written down on 2026-11-27 with TensorFlow 2.21: a run that moves to another machine must find its rows again.
    found = np.concatenate(row_ids(first_epoch(many_files, num_epochs=2)))
    assert found[:6].tolist() == [2526, 685, 3951, 4386, 4564, 2432]
    assert zlib.crc32(found.astype("<i8").tobytes()) == 3351735159


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch_size=st.integers(300, 2500), epoch=st.integers(0, 2), step=st.integers(0, 100), in_memory=st.booleans())
def test_an_epoch_begun_at_any_step_goes_on_as_one_begun_at_its_start(
    many_files, small_windows, batch_size, epoch, step, in_memory
):
    per_epoch = -(-5003 // batch_size)
    step %= per_epoch
    arguments = {"batch_size": batch_size, "num_epochs": 3, "max_cache_bytes": IN_MEMORY if in_memory else FROM_FILES}
    whole = row_ids(first_epoch(many_files, **arguments))
    resumed = row_ids(first_epoch(many_files, first_epoch=epoch, first_step=step, **arguments))
    assert_same_batches(resumed, whole[epoch * per_epoch + step :])


def test_what_a_resumed_epoch_skips_is_not_parsed(many_files, tmp_path, small_windows):
    # Records that are none, in what the first ten batches hold: whoever parsed them would fail.
    first_ten = set(np.concatenate(row_ids(first_epoch(many_files, batch_size=100))[:10]).tolist())
    shutil.copytree(many_files.path, tmp_path / "copy")
    copy = DatasetDir(tmp_path / "copy")
    for path in copy.record_files("train"):
        serialized = list(tf.data.TFRecordDataset(path).as_numpy_iterator())
        rows = parse_records(tf.constant(serialized), copy.inputs, "packed")["row_id"].numpy()
        with tf.io.TFRecordWriter(path) as writer:
            for row, record in zip(rows.tolist(), serialized, strict=True):
                writer.write(b"no record" if row in first_ten else record)
    arguments = {"batch_size": 100, "max_cache_bytes": FROM_FILES}
    resumed = row_ids(first_epoch(copy, first_step=10, **arguments))
    assert_same_batches(resumed, row_ids(first_epoch(many_files, first_step=10, **arguments)))
    with pytest.raises(tf.errors.InvalidArgumentError):
        row_ids(first_epoch(copy, first_step=9, **arguments))


def test_the_parts_of_three_workers_make_up_the_batch_of_one(many_files, small_windows):
    assert_parts_make_up_the_batch(many_files, 3, batch_size=700, first_step=1, max_cache_bytes=FROM_FILES)


@pytest.mark.long
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch_size=st.integers(300, 2500), count=st.integers(1, 4), step=st.integers(0, 2), in_memory=st.booleans())
def test_the_workers_parts_make_up_the_batch_of_one_worker(
    many_files, small_windows, batch_size, count, step, in_memory
):
    step = min(step, -(-5003 // batch_size) - 1)
    arguments = {"batch_size": batch_size, "num_epochs": 2, "first_step": step}
    arguments["max_cache_bytes"] = IN_MEMORY if in_memory else FROM_FILES
    assert_parts_make_up_the_batch(many_files, count, **arguments)


def assert_parts_make_up_the_batch(many_files, count, **arguments):
    whole = list(first_epoch(many_files, **arguments).as_numpy_iterator())
    parts = [
        list(first_epoch(many_files, shard=Shard(index, count), **arguments).as_numpy_iterator())
        for index in range(count)
    ]
    together = [
        tf.nest.map_structure(lambda *x: np.concatenate(x), *of_workers) for of_workers in zip(*parts, strict=True)
    ]
    assert_same_batches(together, whole)
    for of_workers in zip(*parts, strict=True):
        sizes = [len(labels) for _, labels, _ in of_workers]
        assert max(sizes) - min(sizes) <= 1


def test_a_worker_gets_an_empty_part_of_a_batch_of_fewer_rows_than_workers(many_files):
    # 5,003 = 5 * 1,000 + 3 rows for 4 workers: floor(i * 3 / 4) is 0, 0, 1, 2, 3.
    arguments = {"batch_size": 1000, "max_cache_bytes": FROM_FILES}
    last = [row_ids(first_epoch(many_files, shard=Shard(index, 4), **arguments))[-1] for index in range(4)]
    assert [len(part) for part in last] == [0, 1, 1, 1]
    np.testing.assert_array_equal(np.concatenate(last), row_ids(first_epoch(many_files, **arguments))[-1])


@pytest.mark.parametrize(("index", "count"), [(-1, 2), (2, 2), (0, 0)])
def test_a_shard_that_is_not_one_of_its_count_is_refused(index, count):
    with pytest.raises(ValueError, match=rf"in \[0, count\)\. Received: index={index}, count={count}\. A single"):
        Shard(index, count)


@pytest.mark.parametrize("step", [-1, 20])
def test_a_first_step_outside_its_epoch_is_refused(many_files, step):
    with pytest.raises(ValueError, match=rf"batch of its epoch\. Received: {step}\. Allowed: 0 to 19; after the last"):
        first_epoch(many_files, first_step=step)


@pytest.mark.parametrize("epoch", [-1, 1])
def test_a_first_epoch_that_is_not_one_of_all_is_refused(many_files, epoch):
    with pytest.raises(ValueError, match=rf"in \[0, num_epochs\)\. Received: first_epoch={epoch}, num_epochs=1"):
        first_epoch(many_files, first_epoch=epoch)


# --- How well rows are mixed -----------------------------------------------------------------------------------------


def places(dataset, **arguments):
    """For each row of an epoch in file order: its place in the epoch."""
    order = np.concatenate(row_ids(first_epoch(dataset, batch_size=4000, **arguments)))
    return np.argsort(order)


@pytest.mark.long
def test_a_window_mixes_as_a_shuffle_buffer_of_200000_rows(tmp_path, monkeypatch):
    """At a tenth of the size: windows of 52,429 rows against a buffer of 20,000, one file whose order matters."""
    dataset = generated_dataset(tmp_path, num_rows=262_145, vocabulary_size=3, num_categorical=1, num_shards=1)
    monkeypatch.setattr(input_pipeline, "_WINDOW_ROWS", input_pipeline._WINDOW_ROWS // 10 + 1)
    rows = tf.data.Dataset.range(262_145).shuffle(20_000, seed=1).batch(262_145)
    buffered = np.argsort(next(rows.as_numpy_iterator()))
    ours = places(dataset)
    moved, moved_by_buffer = (np.std(place - np.arange(len(place))) for place in (ours, buffered))
    assert moved > moved_by_buffer
    # Neighbours in the log are alike: how many of them share a batch of 400?
    shared, shared_by_buffer = (np.mean(np.diff(place // 400) == 0) for place in (ours, buffered))
    assert shared < shared_by_buffer < 0.02
    # Within a window, no place is likelier than another: the mean place of its first half is that of its second.
    window = ours[:52_000]
    standard_error = 52_429 / np.sqrt(12) * np.sqrt(2 / 26_000)
    assert abs(window[:26_000].mean() - window[26_000:].mean()) < 4 * standard_error


@pytest.mark.parametrize("compressed", [False, True])
def test_windows_of_large_rows_hold_fewer(tmp_path, monkeypatch, compressed):
    """One file of 1,200 rows: in windows of 400 rows none leaves its third, whether files are compressed or not."""
    arguments = {"num_rows": 1200, "vocabulary_size": 50, "num_categorical": 9, "num_shards": 1}
    dataset = generated_dataset(tmp_path, **arguments, compressed=compressed)
    plain = generated_dataset(tmp_path, **arguments)
    record_bytes = pathlib.Path(plain.record_files("train")[0]).stat().st_size / 1200
    monkeypatch.setattr(input_pipeline, "_WINDOW_BYTES", int(400.5 * record_bytes))
    for max_cache_bytes in (IN_MEMORY, FROM_FILES):
        found = places(dataset, max_cache_bytes=max_cache_bytes)
        np.testing.assert_array_equal(found // 400, np.arange(1200) // 400)
        assert (found != np.arange(1200)).any()


def test_each_epoch_takes_the_files_in_another_order(many_files, small_windows):
    # Rows 0 to 714 are the first file's. Without that, an epoch would end with the same files as all others.
    means = [places(many_files, first_epoch=epoch, num_epochs=epoch + 1)[:714].mean() for epoch in range(4)]
    assert max(means) - min(means) > 1000


# --- Labels ----------------------------------------------------------------------------------------------------------


def test_several_labels_come_by_name_and_none_is_a_feature(feed_dataset):
    arguments = {"batch_size": 500, "seed": 1, "first_epoch": 0, "num_epochs": 1}
    one = input_pipeline.training_epochs(feed_dataset, **arguments)
    both = input_pipeline.training_epochs(feed_dataset, **arguments, labels=("label", "intensity_label"))
    for (features, label, _), (_, labels, _) in zip(one, both, strict=True):
        np.testing.assert_array_equal(labels["label"], label)
        assert np.all(labels["intensity_label"] <= labels["label"])  # Of a feed, only clicks can be intense.
        assert not {"label", "intensity_label"} & features.keys()
    assert 0 < np.concatenate([labels["intensity_label"] for _, labels, _ in both]).mean() < 1


# --- The autotune trap -----------------------------------------------------------------------------------------------


def test_no_dataset_that_fit_walks_is_tuned_at_run_time(feed_dataset, tiny, by_row, tmp_path, monkeypatch):
    # When an epoch ends, Keras' fit would wait for autotune to wake up: seconds, measured with TensorFlow 2.21.
    walked = {"fit": [], "predict": []}
    for name, found in walked.items():
        plain = getattr(MethodModel, name)

        def noting(self, batches, *args, plain=plain, found=found, **kwargs):
            found.append(batches)
            return plain(self, batches, *args, **kwargs)

        monkeypatch.setattr(MethodModel, name, noting)
    scores = RowValues(by_row.row_ids, np.full(len(by_row.row_ids), 0.5, np.float32))
    config = tiny("backbone=lr", "method.teacher=cross_fit", "max_epochs=1")
    fitted(
        feed_dataset,
        config,
        WorkDir(tmp_path / "run"),
        title=None,
        row_weights=by_row,
        teacher_scores={"teacher_score": scores},
    )
    for found in walked.values():
        assert found
        assert [batches.options().autotune.enabled for batches in found] == [False] * len(found)


def test_no_pass_is_tuned_at_run_time(feed_dataset, max_cache_bytes):
    passes = [input_pipeline.batches(feed_dataset, "train", batch_size=64, shuffle_seed=seed) for seed in (None, 1)]
    for batched in (first_epoch(feed_dataset, max_cache_bytes=max_cache_bytes), *passes):
        assert batched.options().autotune.enabled is False
