"""Versions of a servable: numbers that several processes choose, labels in models.config, rollback, deletion."""

import http.server
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent import futures
from typing import ClassVar

import grpc
import pytest
from commands import run_command
from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

from clsd_tf.storage.files import locked, write_json
from export.publishing import promotion
from export.publishing.listing import list_versions
from export.publishing.manifest import MANIFEST_FILE, file_entries
from export.publishing.models_config import ModelsConfig, require_room_for
from export.publishing.promotion import PromotionError, promote, rollback, version_before
from export.publishing.retention import prune
from export.publishing.server_status import ServerStatusError, wait_until_available
from export.publishing.versions import ModelVersions

ROOT = pathlib.Path(__file__).parent.parent
_OTHER_MODEL = """
  config {
    name: "other"
    base_path: "/srv/other"
    model_platform: "tensorflow"
    model_version_policy { all {} }
    version_labels { key: "x" value: 9 }
    logging_config { sampling_config { sampling_rate: 0.5 } }
  }
"""


@pytest.fixture
def feed(tmp_path):
    """A model in models.config beside another one; without versions."""
    entry = 'config { name: "feed" base_path: "/models/feed" model_platform: "tensorflow" }'
    (tmp_path / "models.config").write_text(f"# Ours.\nmodel_config_list {{ {_OTHER_MODEL} {entry} }}\n")
    return ModelVersions(tmp_path, "feed")


def publish(versions, *numbers):
    """Versions of one small file and a manifest, an hour old."""
    for number in numbers:
        with versions.staged(number) as (_, staging):
            (staging / "saved_model.pb").write_bytes(b"graph %d" % number)
            (staging / "assets.extra").mkdir()
            verification = {"max_difference": {"a": 1e-8, "b": 3e-8}}
            manifest = {"model_name": versions.name, "version": number, "files": file_entries(staging)}
            write_json(staging / MANIFEST_FILE, {**manifest, "created": "then", "verification": verification})
        hour_ago = time.time() - 3600
        os.utime(versions.path / str(number), (hour_ago, hour_ago))


def entries(versions):
    text = (versions.servable_dir / "models.config").read_text()
    config = text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    return {entry.name: entry for entry in config.model_config_list.config}


def served(versions):
    """(loaded versions, labels) of the entry."""
    entry = entries(versions)["feed"]
    return list(entry.model_version_policy.specific.versions), dict(entry.version_labels)


# Numbers.


def test_numbers_are_seconds_that_only_rise(feed, monkeypatch):
    with feed.staged() as (first, _):
        assert abs(first - time.time()) < 5
    monkeypatch.setattr(time, "time", lambda: 1000.0)  # The clock was set back.
    with feed.staged() as (second, _):
        assert second == first + 1
    publish(feed, first + 50)
    with feed.staged() as (third, _):
        assert third == first + 51
    assert list(feed.published()) == [first, second, first + 50, third]


def test_the_numbers_of_deleted_staged_and_hand_made_versions_are_used(feed):
    later = int(time.time()) + 1000
    publish(feed, 7, later)
    with feed.exclusive():
        feed.delete(later)
    with feed.staged() as (number, _):
        assert number == later + 1
        with feed.staged() as (other, _):
            assert other == later + 2
    (feed.path / f"00{later + 9}").mkdir()
    with feed.staged() as (number, _):
        assert number == later + 10


def test_an_explicit_number_is_used_once(feed):
    publish(feed, 7, 8)
    with feed.exclusive():
        feed.delete(8)
    with pytest.raises(FileExistsError, match=r"must not exist yet\. Received: .*feed/7"):
        publish(feed, 7)
    with pytest.raises(FileExistsError, match=r"never again after its deletion. Received: 8 of feed"):
        publish(feed, 8)
    with feed.staged(9), pytest.raises(FileExistsError, match="Received: 9 of feed, which another one is writing"):
        publish(feed, 9)
    for wrong in (0, -1, 2**63):
        with pytest.raises(ValueError, match=r"Received: "), feed.staged(wrong):
            pass


def test_a_failed_export_uses_no_explicit_number_and_leaves_nothing(feed):
    def fail():
        with feed.staged(7) as (_, staging):
            (staging / "half").write_bytes(b"")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(feed.path.iterdir()) == []
    publish(feed, 7)
    assert list(feed.published()) == [7]


def test_what_killed_exports_left_goes_with_the_next_and_what_is_being_written_stays(feed):
    publish(feed, 1)
    (feed.path / ".5.incomplete-00ff").mkdir()
    (feed.path / ".1.incomplete-00ff").mkdir()
    with feed.staged(6) as (_, living):
        publish(feed, 5)
        prune(feed, 9)
        hidden = {child.name for child in feed.path.iterdir() if child.name.startswith(".")}
        assert hidden == {living.name}
    (feed.path / ".4.incomplete-00ff").mkdir()
    prune(feed, 9)
    assert sorted(child.name for child in feed.path.iterdir()) == ["1", "5", "6", "history.jsonl"]


_PUBLISH = """
import pathlib, sys
from export.publishing.versions import ModelVersions
versions = ModelVersions(pathlib.Path(sys.argv[1]), "feed")
sys.stdin.readline()
for _ in range(10):
    with versions.staged() as (number, staging):
        (staging / "saved_model.pb").write_text(f"{sys.argv[2]} {number}")
    print(number)
"""


def test_processes_that_publish_at_once_get_different_numbers(feed):
    """Every process waits for a line, so that all start together."""
    command = [sys.executable, "-c", _PUBLISH, str(feed.servable_dir)]
    processes = [
        subprocess.Popen([*command, str(writer)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for writer in range(4)
    ]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    written = {
        int(number): writer for writer, process in enumerate(processes) for number in process.communicate()[0].split()
    }
    assert len(written) == 40
    assert sorted(written) == list(feed.published())
    for number, path in feed.published().items():
        assert (path / "saved_model.pb").read_text() == f"{written[number]} {number}"
    assert sorted(entry["version"] for entry in feed.history()) == sorted(written)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".", "..", "-", "a b", "é", "a\n"])
def test_a_name_is_one_component_of_paths_and_urls(tmp_path, name):
    with pytest.raises(ValueError, match="letters, digits"):
        ModelVersions(tmp_path, name)


# Labels.


def test_the_first_label_pins_the_versions_and_leaves_other_models_alone(feed):
    publish(feed, 1, 2)
    other = entries(feed)["other"]
    done = promote(feed, "stable")
    assert (done.version, done.previous, done.is_waiting, done.loaded) == (2, None, False, (2,))
    assert served(feed) == ([2], {"stable": 2})
    assert entries(feed)["other"] == other
    assert entries(feed)["feed"].base_path == "/models/feed"
    assert (feed.servable_dir / "models.config").read_text().startswith("# Ours.\n")


def test_a_label_moves_only_to_a_version_that_the_server_was_told_to_load_before(feed):
    publish(feed, 1, 2)
    promote(feed, "stable", 1)
    waiting = promote(feed, "stable", 2)
    assert waiting.is_waiting
    assert served(feed) == ([1, 2], {"stable": 1})
    moved = promote(feed, "stable", 2)
    assert not moved.is_waiting
    assert served(feed) == ([1, 2], {"stable": 2})  # 1 stays loaded for a rollback.


def test_a_canary_becomes_stable_and_is_rolled_back_in_one_step_each(feed):
    publish(feed, 1, 2, 3)
    promote(feed, "stable", 1)
    assert promote(feed, "canary", 2).loaded == (1, 2)
    assert served(feed) == ([1, 2], {"stable": 1, "canary": 2})
    assert not promote(feed, "stable", 2).is_waiting
    back = rollback(feed, "stable")
    assert (back.version, back.previous, back.is_waiting) == (1, 2, False)
    assert served(feed) == ([1, 2], {"stable": 1, "canary": 2})


def test_a_version_that_was_rolled_back_or_whose_canary_ended_is_no_longer_loaded(feed):
    # Else it would stay the largest loaded version, which gets the requests without a label.
    publish(feed, 1, 2)
    promote(feed, "stable", 1)
    promote(feed, "canary", 2)
    promote(feed, "canary", 1)
    assert served(feed) == ([1], {"stable": 1, "canary": 1})
    promote(feed, "stable", 2)
    promote(feed, "stable", 2)
    rollback(feed, "stable")
    assert served(feed) == ([1], {"stable": 1, "canary": 1})


def test_rollbacks_go_back_step_by_step_and_then_stop(feed):
    publish(feed, 1, 2, 3, 4)
    for version in (1, 2, 3):
        while promote(feed, "stable", version).is_waiting:
            pass
    assert served(feed) == ([2, 3], {"stable": 3})  # One step back is always loaded.
    assert rollback(feed, "stable").version == 2
    assert served(feed) == ([1, 2], {"stable": 2})
    assert rollback(feed, "stable").version == 1
    assert served(feed) == ([1], {"stable": 1})
    with pytest.raises(PromotionError, match="Received: stable, which named 1 only"):
        rollback(feed, "stable")
    while promote(feed, "stable", 4).is_waiting:
        pass
    while (back := rollback(feed, "stable")).is_waiting:
        pass
    assert back.version == 1
    assert [(entry["action"], entry["previous"], entry["version"]) for entry in feed.history() if "label" in entry] == [
        ("promote", None, 1), ("promote", 1, 2), ("promote", 2, 3), ("rollback", 3, 2), ("rollback", 2, 1),
        ("promote", 1, 4), ("rollback", 4, 1),
    ]  # fmt: skip


def moves(*steps):
    names = ("action", "previous", "version")
    return [{"label": "stable", **dict(zip(names, step, strict=True))} for step in steps]


@pytest.mark.parametrize(
    ("history", "current", "expected"),
    [
        ([], 1, None),
        (moves(("promote", None, 1)), 1, None),
        (moves(("promote", None, 1), ("promote", 1, 2), ("promote", 2, 1)), 1, 2),
        (moves(("promote", None, 1), ("promote", 1, 2)), 3, 2),  # Killed before the history of 3 was written.
        (moves(("promote", None, 1), ("promote", 1, 2)), 1, None),  # The same, of a rollback.
        (moves(("promote", None, 1), ("promote", 5, 6)), 6, 5),  # 5 was written by hand.
        ([{"label": "canary", "action": "promote", "previous": None, "version": 8}], 1, None),
        ([{"action": "publish", "version": 8}], 1, None),
    ],
)
def test_what_a_label_named_before(history, current, expected):
    assert version_before(history, "stable", current) == expected


def test_a_promotion_again_changes_nothing(feed):
    publish(feed, 1)
    promote(feed, "stable")
    before = (feed.servable_dir / "models.config").read_bytes(), feed.history()
    assert promote(feed, "stable").previous == 1
    assert ((feed.servable_dir / "models.config").read_bytes(), feed.history()) == before


def damage(path):
    (path / "saved_model.pb").write_bytes(b"graph ?")


def remove_manifest(path):
    (path / MANIFEST_FILE).unlink()


def cut_off(path):
    file = path / MANIFEST_FILE
    file.write_text(file.read_text()[:-20])


def entries_without_sizes(path):
    write_json(path / MANIFEST_FILE, {"model_name": "feed", "version": 2, "files": {"saved_model.pb": {"sha256": ""}}})


def list_of_nothing(path):
    write_json(path / MANIFEST_FILE, [])


def odd_verification(path):
    write_json(path / MANIFEST_FILE, {"verification": {"max_difference": {"a": "small"}}})


_UNREADABLE = [
    (cut_off, "the manifest cannot be read: JSONDecodeError"),
    (entries_without_sizes, r"the manifest cannot be read: files\.saved_model\.pb\.bytes: Field required"),
    (list_of_nothing, "the manifest cannot be read: the whole: Input should be"),
    (odd_verification, r"the manifest cannot be read: verification\.max_difference\.a: Input should be a valid number"),
]


def other_model(path):
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    write_json(path / MANIFEST_FILE, {**manifest, "model_name": "else"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage, "saved_model.pb has another SHA-256"),
        (remove_manifest, "no manifest"),
        (other_model, "the manifest is that of else 2"),
        *_UNREADABLE,
    ],
)
def test_a_version_that_is_not_as_its_manifest_says_gets_no_label(feed, change, message):
    publish(feed, 1, 2)
    promote(feed, "stable", 1)
    before = (feed.servable_dir / "models.config").read_bytes()
    change(feed.path / "2")
    with pytest.raises(PromotionError, match=message):
        promote(feed, "stable", 2)
    with pytest.raises(PromotionError, match=message):
        promote(feed, "canary", 2)
    assert (feed.servable_dir / "models.config").read_bytes() == before


@pytest.fixture
def while_files_are_checked(feed, monkeypatch):
    """Has a function called after the files of a version were checked; [whether the lock was free then]."""
    check, is_free, then = promotion.problems_of, [], []

    def watched(name, directory):
        problems = check(name, directory)
        with locked(feed.servable_dir, wait=False) as held:
            is_free.append(held)
        for act in then:
            act()
        return problems

    monkeypatch.setattr(promotion, "problems_of", watched)
    return is_free, then


def test_files_are_checked_without_the_lock_and_the_version_must_still_be_there_after(feed, while_files_are_checked):
    is_free, then = while_files_are_checked
    publish(feed, 1, 2, 3)
    for version in (2, 1, 1):
        promote(feed, "stable", version)
    assert is_free == [True] * 3
    then.append(lambda: shutil.rmtree(feed.path / "2"))
    with pytest.raises(PromotionError, match=r"Received: 2 of feed. Allowed: 1, 3"):
        rollback(feed, "stable")
    then[:] = [lambda: shutil.rmtree(feed.path / "3")]
    with pytest.raises(PromotionError, match=r"Received: 3 of feed. Allowed: 1"):
        promote(feed, "canary")
    assert served(feed)[1] == {"stable": 1}


def test_a_rollback_of_a_label_that_is_moved_meanwhile_is_refused(feed, while_files_are_checked):
    publish(feed, 1, 2, 3)
    for version in (1, 2, 2, 3):
        promote(feed, "stable", version)

    def move_on():
        then.clear()
        promote(feed, "stable", 3)

    _, then = while_files_are_checked
    then.append(move_on)
    with pytest.raises(PromotionError, match="a rollback to 1; now it leads to 2"):
        rollback(feed, "stable")
    assert served(feed)[1] == {"stable": 3}


def test_a_rollback_to_a_damaged_version_is_refused(feed):
    publish(feed, 1, 2)
    for version in (1, 2, 2):
        promote(feed, "stable", version)
    damage(feed.path / "1")
    with pytest.raises(PromotionError, match="another SHA-256"):
        rollback(feed, "stable")
    assert served(feed)[1] == {"stable": 2}


def test_promotions_that_make_no_sense_are_refused(feed):
    with pytest.raises(PromotionError, match=r"Received: None of feed. Allowed: none, export one first"):
        promote(feed, "stable")
    publish(feed, 1)
    with pytest.raises(PromotionError, match=r"Received: 5 of feed. Allowed: 1"):
        promote(feed, "stable", 5)
    for label in ("", "a-b", "a b", "é"):
        with pytest.raises(ValueError, match="letters, digits and _ only"):
            promote(feed, label)
    with pytest.raises(ValueError, match="Allowed: none, since nothing was promoted"):
        rollback(feed, "stable")
    stranger = ModelVersions(feed.servable_dir, "stranger")
    publish(stranger, 1)
    with pytest.raises(ValueError, match="Received: 0 for 'stranger'"):
        promote(stranger, "stable")


# models.config.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_config_list { config { nome: 'feed' } }", "ModelServerConfig text proto"),
        ("custom_model_config { type_url: 'x/google.protobuf.Empty' }", "Received: custom_model_config"),
        ("model_config_list { config { name: 'feed' } config { name: 'feed' } }", "Received: 2 for 'feed'"),
        ("model_config_list { config { name: 'other' } # why\n }", "comments in the middle"),
        ("model_config_list { config { name: 'feed' base_path: '/m/other' } }", "Received: /m/other for 'feed'"),
    ],
)
def test_a_config_that_would_lose_something_is_refused_before_any_work(tmp_path, text, message):
    path = tmp_path / "models.config"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        require_room_for(path, "feed", None)
    assert path.read_text() == text


def test_comments_above_and_number_signs_in_text_are_kept(tmp_path):
    path = tmp_path / "models.config"
    path.write_text('# One.\n\n  # Two.\nmodel_config_list { config { name: \'a#b\' base_path: "/x#\\"#y" } }\n')
    config = ModelsConfig(path)
    config.set_model("feed", None)
    config.write()
    assert ModelsConfig(path).entry("feed").base_path == "/models/feed"
    assert path.read_text().startswith("# One.\n\n  # Two.\nmodel_config_list {")
    assert ModelsConfig(path).entry("a#b").base_path == '/x#"#y'


def test_a_config_that_is_not_changed_is_not_written(tmp_path):
    path = tmp_path / "models.config"
    path.write_text("model_config_list{config{name:'feed',base_path:'/m/feed',model_platform:'tensorflow'}} # end")
    config = ModelsConfig(path)
    for serving_base_path in (None, "/m", "/m/"):
        config.set_model("feed", serving_base_path)
        assert config.text() is None
    config.set_model("feed", "/srv")
    assert config.entry("feed").base_path == "/srv/feed"


# Deletion.


def test_old_versions_go_except_those_that_are_needed(feed):
    publish(feed, 1, 2, 3, 4, 5, 6, 7)
    for version in (2, 3, 3):
        promote(feed, "stable", version)
    pruned = prune(feed, 2)
    assert pruned.deleted == (1, 4, 5)
    assert dict(pruned.kept) == {2: "in models.config", 3: "in models.config"}
    assert list(feed.published()) == [2, 3, 6, 7]
    assert [entry["version"] for entry in feed.history() if entry["action"] == "delete"] == [1, 4, 5]


def test_the_goal_of_a_rollback_stays_though_it_is_not_loaded(feed):
    publish(feed, 1, 2, 3)
    promote(feed, "canary", 2)
    promote(feed, "canary", 1)
    promote(feed, "canary", 1)
    assert served(feed) == ([1], {"canary": 1})
    assert dict(prune(feed, 1).kept) == {1: "in models.config", 2: "a rollback leads to it"}


def test_young_versions_and_the_newest_stay(feed):
    publish(feed, 1, 2, 3)
    os.utime(feed.path / "2")
    pruned = prune(feed, 1)
    assert (pruned.deleted, dict(pruned.kept)) == ((1,), {2: "younger than 10 minutes"})
    assert list(feed.published()) == [2, 3]
    with pytest.raises(ValueError, match=r"keep at least 1. Received: 0"):
        prune(feed, 0)


def test_the_age_of_a_version_counts_from_its_publication(feed):
    """Not from the last change of its directory, which verification may follow for long."""
    hour_ago = time.time() - 3600
    for number in (1, 2):
        with feed.staged(number) as (_, staging):
            os.utime(staging, (hour_ago, hour_ago))
    assert dict(prune(feed, 1).kept) == {1: "younger than 10 minutes"}


def test_files_are_deleted_without_the_lock(feed, monkeypatch):
    publish(feed, 1, 2)
    remove, is_free = shutil.rmtree, []

    def watched(path, **how):
        with locked(feed.servable_dir, wait=False) as held:
            is_free.append(held)
        remove(path, **how)

    monkeypatch.setattr(shutil, "rmtree", watched)
    assert prune(feed, 1).deleted == (1,)
    assert is_free == [True]
    assert sorted(child.name for child in feed.path.iterdir()) == ["2", "history.jsonl"]


@pytest.mark.parametrize(
    ("policy", "kept"), [("", []), ("latest { num_versions: 3 }", [2, 3]), ("all {}", [1, 2, 3]),
                         ("specific { versions: 1 }", [1])]
)  # fmt: skip
def test_versions_that_any_entry_loads_stay(feed, policy, kept):
    publish(feed, 1, 2, 3, 4)
    twin = f'config {{ name: "twin" base_path: "/models/feed/" model_version_policy {{ {policy} }} }}'
    (feed.servable_dir / "models.config").write_text(f"model_config_list {{ {twin} }}")
    prune(feed, 1)
    assert list(feed.published()) == [*kept, 4]


def test_what_a_killed_deletion_left_is_removed_and_its_number_stays_used(feed):
    publish(feed, 1, 2)
    (feed.path / "2").rename(feed.path / ".2.deleted-00ff")
    assert list(feed.published()) == [1]
    prune(feed, 1)
    assert sorted(child.name for child in feed.path.iterdir()) == ["1", "history.jsonl"]
    with pytest.raises(FileExistsError, match="used once"):
        publish(feed, 2)


# The list and the command.


def test_the_list_says_what_is_loaded_labeled_and_damaged(feed):
    publish(feed, 1, 2)
    promote(feed, "stable", 1)
    damage(feed.path / "2")
    newest, oldest = list_versions(feed, check=True)
    assert (oldest.version, oldest.labels, oldest.is_loaded, oldest.problems) == (1, ("stable",), True, ())
    assert (newest.version, newest.labels, newest.is_loaded) == (2, (), False)
    assert newest.problems == ("saved_model.pb has another SHA-256 than the manifest says",)
    assert (newest.created, newest.max_difference, newest.auc) == ("then", 3e-8, None)
    assert {state.problems for state in list_versions(feed)} == {None}


def test_the_list_gives_the_auc_of_cards_that_can_be_read(feed):
    publish(feed, 1, 2)
    (feed.path / "1" / "assets.extra" / "model_card.json").write_text("{")
    write_json(feed.path / "2" / "assets.extra" / "model_card.json", {"overall": {"metrics": {"auc": {"value": 0.71}}}})
    assert [state.auc for state in list_versions(feed)] == [0.71, None]


@pytest.mark.parametrize(("change", "message"), _UNREADABLE)
def test_the_list_names_a_manifest_that_cannot_be_read_and_goes_on(feed, change, message):
    publish(feed, 1, 2)
    change(feed.path / "2")
    for check in (True, False):
        newest, oldest = list_versions(feed, check=check)
        assert re.match(message, *newest.problems)
        assert (newest.created, newest.max_difference) == (None, None)
        assert (oldest.created, oldest.problems) == ("then", () if check else None)


def test_the_list_of_a_model_without_manifest_or_entry(tmp_path):
    versions = ModelVersions(tmp_path, "old")
    (tmp_path / "old" / "3").mkdir(parents=True)
    (state,) = list_versions(versions, check=True)
    assert (state.created, state.num_bytes, state.is_loaded, state.problems) == (None, 0, False, ("no manifest",))
    assert (state.max_difference, state.auc) == (None, None)


def run(versions, *arguments):
    return run_command("export.manage", *arguments, f"--servable_dir={versions.servable_dir}", "--name=feed")


def test_the_command_says_when_a_label_has_to_wait(feed):
    publish(feed, 1, 2)
    promote(feed, "stable", 1)
    done = run(feed, "promote", "--label=stable")
    assert done.returncode == 0
    assert "stable still names 1" in done.stdout
    assert "requests without a label go to 2" in done.stdout


_READS_LATE = ["", "END", "LOADING", "AVAILABLE"]


class Status(http.server.BaseHTTPRequestHandler):
    """A server that goes through states, and then stays in the last; "" is 404. ``on_question`` is called before."""

    asked: ClassVar[list[str]] = []
    states: ClassVar[list[str]] = []
    error = ""
    on_question = staticmethod(lambda: None)

    def do_GET(self):
        type(self).on_question()
        self.asked.append(self.path)
        state = self.states[min(len(self.asked), len(self.states)) - 1]
        self.send_response(200 if state else 404)
        self.end_headers()
        status = {"error_code": "UNKNOWN" if self.error else "OK", "error_message": self.error}
        entry = {"version": "2", "state": state, "status": status}
        self.wfile.write(json.dumps({"model_version_status": [entry]} if state else {"error": "none"}).encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def status_server(monkeypatch):
    monkeypatch.setattr(Status, "asked", [])
    monkeypatch.setattr(Status, "states", _READS_LATE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Status) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_command_waits_for_a_server_before_the_label_moves(feed, status_server):
    publish(feed, 1, 2)
    promote(feed, "stable", 1)
    done = run(feed, "promote", "--label=stable", f"--server={status_server}")
    assert done.returncode == 0, done.stderr
    assert Status.asked == ["/v1/models/feed/versions/2"] * 4
    assert served(feed) == ([1, 2], {"stable": 2})
    assert "stable names 2 (before: 1)" in done.stdout


def test_a_version_that_is_published_while_a_label_waits_does_not_get_it(feed, status_server, monkeypatch):
    publish(feed, 1, 2)
    promote(feed, "stable", 1)
    monkeypatch.setattr(Status, "states", ["AVAILABLE"])
    monkeypatch.setattr(Status, "on_question", lambda: publish(feed, 3))
    done = run(feed, "promote", "--label=stable", f"--server={status_server}")
    assert done.returncode == 0, done.stderr
    assert served(feed) == ([1, 2], {"stable": 2})
    assert list(feed.published()) == [1, 2, 3]


def test_a_server_that_does_not_know_the_version_in_time_ends_the_wait(status_server):
    with pytest.raises(ServerStatusError, match=rf"Received from {status_server}: NOT_FOUND, for -1 seconds"):
        wait_until_available(status_server, "feed", 2, timeout_seconds=-1)


def test_a_version_that_failed_to_load_ends_the_wait_at_once_with_the_reason(status_server, monkeypatch):
    monkeypatch.setattr(Status, "states", ["END"])
    monkeypatch.setattr(Status, "error", "no such op: Frob")
    with pytest.raises(ServerStatusError, match=r"Received from http.*: END, no such op: Frob\. The label has not"):
        wait_until_available(status_server, "feed", 2)
    assert len(Status.asked) == 1


def test_who_is_no_model_server_ends_the_wait_at_once():
    grpc_server = grpc.server(futures.ThreadPoolExecutor(1))
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    grpc_server.start()
    with pytest.raises(ServerStatusError, match=r"UNAVAILABLE.*gRPC: 8500, REST: 8501"):
        wait_until_available(f"http://127.0.0.1:{port}", "feed", 2)
    grpc_server.stop(None)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(ServerStatusError, match=r"Received: UNAVAILABLE.*refused"):
            wait_until_available(f"http://127.0.0.1:{closed.getsockname()[1]}", "feed", 2)
    for address in ("file:///etc", "localhost:8501", "http://localhost", "https://localhost:1"):
        with pytest.raises(ValueError, match=f"Received: '{address}'. Allowed: http://HOST:PORT"):
            wait_until_available(address, "feed", 2)


def test_the_command_refuses_in_one_line(feed):
    done = run(feed, "dance")
    assert done.returncode == 1
    assert "Received: dance. Allowed: list, promote, rollback, prune" in done.stderr
    assert "Traceback" not in done.stderr
