"""The manifest of a version: its files with checksums, and what a check against them finds."""

import hashlib

import pytest

from clsd_tf.storage.files import write_json
from export.publishing.manifest import MANIFEST_FILE, check_files, file_entries


@pytest.fixture
def version(tmp_path):
    """A directory with files as a version has them, an empty one among them."""
    for name, content in {
        "saved_model.pb": b"graph",
        "variables/variables.index": b"",
        "assets.extra/tf_serving_warmup_requests": b"warm" * 1000,
        "assets.extra/manifest.json": b"{}",
    }.items():
        path = tmp_path / "7" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "7"


def test_entries_are_sizes_and_checksums_of_all_files_but_the_manifest(version):
    entries = file_entries(version)
    assert set(entries) == {
        "saved_model.pb", "variables/variables.index", "assets.extra/tf_serving_warmup_requests"
    }  # fmt: skip
    assert entries["saved_model.pb"] == {"bytes": 5, "sha256": hashlib.sha256(b"graph").hexdigest()}
    # SHA-256 of nothing (FIPS 180-4 examples).
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert entries["variables/variables.index"] == {"bytes": 0, "sha256": empty}


def test_an_untouched_version_has_no_problems(version):
    assert check_files(version, {"files": file_entries(version)}) == []


def test_every_kind_of_damage_is_named(version):
    manifest = {"files": file_entries(version)}
    (version / "saved_model.pb").write_bytes(b"grap!")
    (version / "variables" / "variables.index").unlink()
    (version / "assets.extra" / "tf_serving_warmup_requests").write_bytes(b"warm")
    (version / "new").write_bytes(b"")
    assert check_files(version, manifest) == [
        "missing: variables/variables.index",
        "not in the manifest: new",
        "assets.extra/tf_serving_warmup_requests has 4 bytes, the manifest says 4,000",
        "saved_model.pb has another SHA-256 than the manifest says",
    ]


def test_a_broken_link_is_a_file_that_the_manifest_does_not_know(version):
    manifest = {"files": file_entries(version)}
    (version / "link").symlink_to("nowhere")
    assert check_files(version, manifest) == ["not in the manifest: link"]
    (version / "saved_model.pb").unlink()
    (version / "saved_model.pb").symlink_to("nowhere")
    assert check_files(version, manifest) == ["missing: saved_model.pb", "not in the manifest: link"]


def test_a_manifest_without_files_is_a_problem(version):
    write_json(version / MANIFEST_FILE, {"model_name": "m"})
    (problem,) = check_files(version, {"model_name": "m"})
    assert "lists no files" in problem


def test_paths_of_a_manifest_are_never_followed(version):
    manifest = {"files": file_entries(version) | {"../outside": {"bytes": 1, "sha256": "0"}}}
    (version.parent / "outside").write_bytes(b"1")
    assert check_files(version, manifest) == ["missing: ../outside"]
