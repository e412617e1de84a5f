"""Many partitions of users and many units give the dataset that one gives, whatever the number of workers."""

import numpy as np
import pytest
from shop import build

import feature_specs
from clsd_tf.data.examples import packed_columns
from clsd_tf.data.input_pipeline import read_columns
from clsd_tf.statistics.data_statistics import read_data_statistics
from clsd_tf.storage.dataset_dir import SPLITS
from clsd_tf.storage.files import read_json
from pipelines.beam import dataset as build_module
from pipelines.beam import joining

SPEC = feature_specs.get_spec("simulated_feed")


@pytest.fixture(scope="module")
def in_partitions(feed_dir, tmp_path_factory):
    """Beam's arguments -> the feed's dataset, built in about 100 partitions; vocabularies are merged in twos."""

    def built(*beam_arguments):
        path = tmp_path_factory.mktemp("partitions") / "dataset"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build_module, "_BYTES_PER_PARTITION", 2000)
            patch.setattr(joining, "_MAX_PENDING_COUNTS", 2)
            return build(SPEC, feed_dir, path, beam_arguments=beam_arguments)

    return built


@pytest.fixture(scope="module")
def many(in_partitions):
    return in_partitions()


def test_counts_and_vocabularies_are_those_of_one_partition(many, feed_dataset):
    known = ("tables", "splits", "accounting", "duplicates", "validation_from", "test_from")
    assert {name: many.counts[name] for name in known} == {name: feed_dataset.counts[name] for name in known}
    for name in SPEC.vocabularies:
        assert many.layout.vocabulary(name).read_bytes() == feed_dataset.layout.vocabulary(name).read_bytes()


def test_records_are_those_of_one_partition(many, feed_dataset):
    ids, numbers = packed_columns(many.inputs)
    for split in SPLITS:
        one, other = (read_columns(dataset, split, [*ids, *numbers]) for dataset in (feed_dataset, many))
        for name in ids:
            assert np.array_equal(one[name], other[name]), name
        for name in numbers:  # Moments are sums of floats in another order.
            np.testing.assert_allclose(one[name], other[name], rtol=1e-6, err_msg=name)


def test_data_statistics_are_those_of_one_partition(many, feed_dataset):
    one, other = (read_data_statistics(dataset.layout.data_statistics) for dataset in (feed_dataset, many))
    for split in SPLITS:
        assert one[split].segments == other[split].segments
        assert one[split].rows.tolist() == other[split].rows.tolist()
        assert one[split].clicks.tolist() == other[split].clicks.tolist()
        assert [users.estimate for users in one[split].users] == [users.estimate for users in other[split].users]
        for name, column in one[split].columns.items():
            assert column.missing.tolist() == other[split].columns[name].missing.tolist(), name
            if column.distinct:  # Histories have none.
                assert column.distinct.estimate == other[split].columns[name].distinct.estimate, name


@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.long), 3])
def test_the_number_of_workers_changes_no_byte(many, in_partitions, num_workers):
    again = in_partitions(f"--direct_num_workers={num_workers}", "--direct_running_mode=multi_threading")
    assert again.fingerprint == many.fingerprint
    for kept in ("records", "vocabularies"):
        for path in sorted((many.path / kept).iterdir()):
            assert (again.path / kept / path.name).read_bytes() == path.read_bytes(), path.name
    for name in ("data_statistics.json", "statistics.json", "serving_sample.parquet"):
        assert (again.path / name).read_bytes() == (many.path / name).read_bytes(), name
    assert read_json(again.layout.counts) == read_json(many.layout.counts)
