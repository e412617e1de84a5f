"""Building from TensorFlow Datasets."""

import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from shop import build, records, values_of, vocabulary

import feature_specs
from clsd_tf.storage.dataset_dir import SPLITS
from feature_specs.overrides import override_source

# --- TensorFlow Datasets ---------------------------------------------------------------------------------------------


NUM_RATINGS = 60


class FilmRatings(tfds.core.GeneratorBasedBuilder):
    """Ratings with the features of MovieLens that feature_specs/movielens_100k_tfds.yaml reads."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "user_id": tfds.features.Text(),
                    "movie_id": tfds.features.Text(),
                    "user_rating": tf.float32,
                    "timestamp": tf.int64,
                    "raw_user_age": tf.float32,
                    "user_gender": tf.bool,
                    "user_occupation_text": tfds.features.Text(),
                    "movie_genres": tfds.features.Sequence(tfds.features.ClassLabel(names=["drama", "comedy", "noir"])),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for k in range(NUM_RATINGS):
            yield k, rating(k)


def rating(k):
    """Rating k: users 0 to 5 of ages 10, 20, ..., 60, a minute apart in 1997; 1 to 5 stars in turn."""
    return {
        "user_id": str(k % 6),
        "movie_id": str(k % 4),
        "user_rating": 1.0 + k % 5,
        "timestamp": 880_000_000 + 60 * k,
        "raw_user_age": 10.0 * (1 + k % 6),
        "user_gender": k % 6 < 2,
        "user_occupation_text": ("artist", "writer")[k % 2],
        "movie_genres": [(), (0,), (1, 2), (2, 0)][k % 4],
    }


@pytest.fixture(scope="module")
def film_dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    tfds.builder("film_ratings", data_dir=path / "data").download_and_prepare()
    spec = override_source(feature_specs.get_spec("movielens_100k_tfds"), "tfds:film_ratings")
    return build(spec, path / "data", path / "dataset")


def test_tfds_source_gives_every_rating_once(film_dataset):
    rows = [record for split in SPLITS for record in records(film_dataset, split)]
    assert len({record["row_id"][0] for record in rows}) == NUM_RATINGS
    assert film_dataset.counts["tables"]["log"] == {"rows": 60, "bad": {}}
    # 60 ratings in time order: 48, 6 and 6. Labels: 4 or 5 of 1..5 stars in turn; 5 is intense.
    stars = [1 + k % 5 for k in range(NUM_RATINGS)]
    for split, part in (("train", stars[:48]), ("validation", stars[48:54]), ("test", stars[54:])):
        found = records(film_dataset, split)
        assert len(found) == len(part)
        assert sum(record["label"][0] for record in found) == sum(star >= 4 for star in part)
        assert sum(record["intensity_label"][0] for record in found) == sum(star == 5 for star in part)


def test_tfds_source_counts_age_groups(film_dataset):
    # Boundaries 18, 25, 35, 45, 50, 56; ages 10 to 60, 8 training ratings each.
    groups = film_dataset.counts["splits"]["train"]["groups"]["age_group"]
    rows = {label: entry["rows"] for label, entry in groups.items()}
    assert rows == {
        "unknown": 0,
        "<18": 8,  # 10
        "18-25": 8,  # 20
        "25-35": 8,  # 30
        "35-45": 8,  # 40
        "45-50": 0,
        "50-56": 8,  # 50
        ">=56": 8,  # 60
    }


def test_tfds_features_become_the_texts_of_their_values(film_dataset):
    assert sorted(vocabulary(film_dataset, "gender")) == ["false", "true"]
    assert sorted(vocabulary(film_dataset, "occupation")) == ["artist", "writer"]
    assert sorted(vocabulary(film_dataset, "genre")) == ["0", "1", "2"]
    known, films = vocabulary(film_dataset, "genre"), vocabulary(film_dataset, "item")
    genres = {"0": [], "1": ["0"], "2": ["1", "2"], "3": ["2", "0"]}
    for record in records(film_dataset, "train"):
        [film] = values_of(record["item"], films, 1)
        assert values_of(record["genre"], known, 1) == genres[film]
