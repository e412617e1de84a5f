"""The public KuaiRand release, laid out for its feature spec: the days, the columns, and what is refused."""

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import feature_specs
from pipelines.beam.dataset import BuildConfig, build_dataset
from pipelines.convert_kuairand import EARLIER_LOG, LOG, USERS, VIDEOS, convert, user_sequences

_DAY_MS = 86_400_000
_APRIL_24 = 1_650_765_600_000  # 10 o'clock in China.
_LOG_COLUMNS = "user_id,video_id,date,hourmin,time_ms,is_click,is_like,long_view,play_time_ms,is_rand,tab"
_DATES = [20220424, *range(20220425, 20220431), *range(20220501, 20220507)]


@pytest.fixture
def release(tmp_path):
    """A release of 13 days, 24 April to 6 May, with 8 impressions a day by four users, and 20 April before."""
    path = tmp_path / "release"
    path.mkdir()
    for name, days in ((EARLIER_LOG, [(-4, 20220420)]), (LOG, enumerate(_DATES))):
        rows = [
            f"{row % 4},{100 + row % 3},{date},1000,{_APRIL_24 + day * _DAY_MS + row},{row % 2},{row // 7},"
            f"{row % 4 // 3},{row}000,0,1"
            for day, date in days
            for row in range(8)
        ]
        (path / name).write_text("\n".join([_LOG_COLUMNS, *rows]) + "\n", encoding="utf-8")
    spec = feature_specs.get_spec("kuairand")
    for name, table, keys in ((USERS, spec.tables.user, range(4)), (VIDEOS, spec.tables.item, range(100, 103))):
        values = {"string": "1", "int64": "7", "float": "2.5"}
        lines = [",".join(table.column_names)]
        lines += [",".join([str(key), *(values[column.type] for column in table.columns[1:])]) for key in keys]
        (path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_days_of_the_study_are_kept_and_the_spec_builds_from_them(release, tmp_path):
    assert convert(release, tmp_path / "kuairand") == 8 * 11
    log = pyarrow.parquet.read_table(tmp_path / "kuairand" / "log.parquet")
    assert sorted(set(log.column("date").to_pylist())) == _DATES[1:-1]
    assert log.column_names == _LOG_COLUMNS.split(",")
    for name, original in (("users.csv", USERS), ("videos.csv", VIDEOS)):
        assert (tmp_path / "kuairand" / name).read_bytes() == (release / original).read_bytes()
    spec = feature_specs.get_spec("kuairand")
    counts = build_dataset(spec, BuildConfig(input_dir=str(tmp_path / "kuairand")), tmp_path / "dataset")
    assert counts.get("user_state_profile_missing", 0) == 0  # Every sequence ends before the log begins.
    assert [counts["splits"][split]["rows"] for split in ("train", "validation", "test")] == [8 * 8, 8, 16]


def test_a_missing_file_is_named_and_nothing_is_written(release, tmp_path):
    (release / VIDEOS).unlink()
    with pytest.raises(ValueError, match=f"without {VIDEOS}"):
        convert(release, tmp_path / "kuairand")
    assert not (tmp_path / "kuairand").exists()


def test_a_log_without_these_days_is_refused(release, tmp_path):
    log = (release / LOG).read_text(encoding="utf-8")
    (release / LOG).write_text(log.replace(",2022", ",2021"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"impressions from 20220425 to 20220505\. Received: none"):
        convert(release, tmp_path / "kuairand")
    assert not (tmp_path / "kuairand").exists()


def test_sequences_are_the_last_videos_before_the_log_begins(release, tmp_path):
    convert(release, tmp_path / "kuairand")
    # On each of 20 and 24 April user k sees videos 100 + k % 3 and 100 + (k + 4) % 3. User 0 does not play the first;
    # user 3 watches every video for long and likes the second.
    assert pyarrow.parquet.read_table(tmp_path / "kuairand" / "user_sequences.parquet").to_pylist() == [
        {
            "user_id": user,
            "last_time_ms": _APRIL_24 + user + 4,
            "watch_seq": watched,
            "like_seq": liked,
            "long_watch_seq": for_long,
        }
        for user, watched, liked, for_long in (
            (0, [101, 101], [], []),
            (1, [101, 102, 101, 102], [], []),
            (2, [102, 100, 102, 100], [], []),
            (3, [100, 101, 100, 101], [101, 101], [100, 101, 100, 101]),
        )
    ]


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 9), st.booleans(), st.booleans(), st.integers(0, 2)), max_size=150
    )
)
@settings(max_examples=100, deadline=None)
def test_sequences_equal_a_naive_loop(impressions):
    names = ("user_id", "time_ms", "is_like", "long_view", "play_time_ms")
    columns = {name: pa.array([int(row[index]) for row in impressions], pa.int64()) for index, name in enumerate(names)}
    videos = pa.array(range(len(impressions)), pa.int64())  # So that each can be traced to its row.
    result = user_sequences(pa.table({**columns, "video_id": videos})).to_pylist()
    watched = sorted((user, time, video) for video, (user, time, *_, played) in enumerate(impressions) if played)
    assert [row["user_id"] for row in result] == sorted({user for user, _, _ in watched})
    for row in result:
        own = [video for user, _, video in watched if user == row["user_id"]]
        assert row["last_time_ms"] == impressions[own[-1]][1]
        assert row["watch_seq"] == own[-50:]
        assert row["like_seq"] == [video for video in own if impressions[video][2]][-50:]
        assert row["long_watch_seq"] == [video for video in own if impressions[video][3]][-50:]
