"""The same commands give the same bits as when ``golden_small.json`` was recorded, and a difference is found.

Recorded by ``python -m benchmarks.golden_results --size=small``; to be recorded anew only where results are meant to
change.
"""

import copy
import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks import golden_record, golden_steps

ROOT = pathlib.Path(__file__).parent.parent
RECORD = pathlib.Path(__file__).with_name("golden_small.json")
CROSS_FIT = "train clsd_cross_fit"


@pytest.fixture
def recorded():
    return json.loads(RECORD.read_text(encoding="utf-8"))


def differing(recorded, found):
    return {part: difference for part, difference in golden_record.compare(recorded, found).items() if difference}


def run_comparison(work_dir, record):
    command = [sys.executable, "-m", "benchmarks.golden_results", f"--work_dir={work_dir}", f"--compare={record}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_the_same_commands_give_what_they_gave_and_a_changed_record_is_noticed(recorded, tmp_path):
    done = run_comparison(tmp_path / "work", RECORD)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("same") >= len(recorded["parts"])
    recorded["parts"]["study"]["exact"]["rows"] += 1
    changed = tmp_path / "changed.json"
    golden_record.write(changed, recorded)
    done = run_comparison(tmp_path / "work", changed)
    assert done.returncode == 1
    assert "kept study" in done.stdout
    assert [line for line in done.stdout.splitlines() if "study" in line and "differs: exact.rows" in line]


def test_a_record_has_no_difference_to_itself_and_is_written_as_it_is(recorded, tmp_path):
    assert not differing(recorded, copy.deepcopy(recorded))
    golden_record.write(tmp_path / "again.json", recorded)
    assert (tmp_path / "again.json").read_text() == RECORD.read_text()


@pytest.mark.parametrize(
    ("part", "kind", "change", "difference"),
    [
        ("dataset", "exact", {"records": "0"}, "exact.records recorded"),
        (CROSS_FIT, "bits", {"best_weights": "0"}, "bits.best_weights recorded"),
        (CROSS_FIT, "numbers", {"calibration": None}, "numbers.calibration recorded"),
        ("export and predict", "numbers", {"first": [0.5]}, "numbers.first recorded"),
        ("evaluate", "numbers", {"more": 1}, "numbers.more recorded None, found 1"),
    ],
)
def test_a_change_is_named(recorded, part, kind, change, difference):
    found = copy.deepcopy(recorded)
    found["parts"][part][kind].update(change)
    ((name, text),) = differing(recorded, found).items()
    assert name == part
    assert text.startswith(difference)


def test_the_last_bit_of_a_number_counts(recorded):
    found = copy.deepcopy(recorded)
    entry = found["parts"][CROSS_FIT]["numbers"]["history"][1]
    entry["val_auc"] += 2**-53
    ((_, text),) = differing(recorded, found).items()
    assert text.startswith("numbers.history[1].val_auc recorded 0.")


def test_a_part_that_is_missing_differs(recorded):
    found = copy.deepcopy(recorded)
    del found["parts"]["study"]
    assert differing(recorded, found) == {"study": "only recorded"}
    assert differing(found, recorded) == {"study": "not recorded"}


def test_another_platform_may_differ_a_little_but_not_in_the_dataset(recorded):
    found = copy.deepcopy(recorded)
    found["platform"]["processor"] = "another"
    found["parts"][CROSS_FIT]["bits"]["best_weights"] = "0"
    entry = found["parts"][CROSS_FIT]["numbers"]["history"][0]
    entry["loss"] += 0.9 * golden_record.TOLERANCE
    assert not differing(recorded, found)
    entry["loss"] += 0.2 * golden_record.TOLERANCE
    found["parts"]["dataset"]["exact"]["fingerprint"] = "0"
    assert list(differing(recorded, found)) == ["dataset", CROSS_FIT]


def test_results_of_other_code_are_not_kept(tmp_path):
    (tmp_path / "begun_by.json").write_text('{"size": "small", "code": "0"}', encoding="utf-8")
    with pytest.raises(golden_steps.StepFailedError, match=r"begun by .*Choose another --work_dir"):
        golden_steps.run(tmp_path, "small")
