"""What the training benchmark rests on: floors by hand, competitors in turn on the same task, ratios and tables."""

import ast
import contextlib
import dataclasses
import itertools
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import auc_differences, contest, floors, peer_environments, rounds
from benchmarks.contest import HEADLINE, OURS, PEERS, Result, Target
from benchmarks.rounds import CompetitorError, Ready, Round, Task
from benchmarks.train_ours import task_config
from clsd_tf.data.input_pipeline import read_columns
from clsd_tf.metrics.significance import paired_difference
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.training.assembly import build_model

ROOT = pathlib.Path(__file__).parent.parent
TASK = Task(
    dataset_dir="dataset",
    arrays="arrays.npz",
    num_features=2,
    vocabulary_size=10,
    embedding_dim=1,
    hidden_units=(4, 5),
    batch_size=2,
    learning_rate=0.001,
    num_threads=1,
)
RATES = floors.Rates({"float32": 1000.0, "bfloat16": 4000.0}, 800.0, 1600.0)


# --- Floors ----------------------------------------------------------------------------------------------------------


def test_multiply_adds_by_hand():
    assert floors.mlp_multiply_adds(2, 3, (4, 5)) == 3 * 2 * (3 * 4 + 4 * 5 + 5 * 1)
    assert floors.mlp_multiply_adds(1, 3, ()) == 3 * 3


@pytest.mark.parametrize(
    ("updates", "expected"),
    [
        # Four ids of rows of 8 bytes are looked up; three of them are distinct.
        ("lazy_adam", (4 * 8 + 6 * 3 * 8, 0)),
        ("adagrad", (4 * 8 + 4 * 3 * 8, 0)),
        ("rowwise_adagrad", (4 * 8 + 2 * 3 * (8 + 4), 0)),
        ("dense_adam", (4 * 8, 4 * 20 * 8)),
    ],
)
def test_row_traffic_by_hand(updates, expected):
    assert floors.row_work(updates, np.array([[3, 15], [3, 12]]), embedding_dim=1, num_rows=20) == expected


def test_the_floor_is_the_sum_of_its_parts():
    work = floors.Work(multiply_adds=2000.0, gathered_bytes=400.0, copied_bytes=160.0)
    assert work.seconds(RATES, "float32") == pytest.approx(2.0 + 0.5 + 0.1)
    assert work.seconds(RATES, "bfloat16") == pytest.approx(0.5 + 0.5 + 0.1)


def test_ids_of_different_features_are_different_rows(tmp_path):
    np.savez(tmp_path / "arrays.npz", ids=np.array([[3, 3], [3, 4], [9, 9]]), labels=np.zeros(3, np.float32))
    task = dataclasses.replace(TASK, arrays=str(tmp_path / "arrays.npz"))
    # The batch is the first two rows: row 3 of the first feature, rows 3 and 4 of the second.
    multiply_adds, gathered = 3 * 2 * (2 * 4 + 4 * 5 + 5), 4 * 8 + 6 * 3 * 8
    assert contest.floor_seconds(OURS[0], task, RATES) == pytest.approx(multiply_adds / 1000 + gathered / 800)
    peer = contest.floor_seconds(PEERS["torch-rechub"], task, RATES)
    assert peer == pytest.approx(multiply_adds / 1000 + 4 * 8 / 800 + 4 * 20 * 8 / 1600)


def test_the_shortest_of_several_calls_counts_and_the_first_does_not(monkeypatch):
    durations = iter([0.1, 5.0, 3.0, 4.0, 2.0, 6.0, 7.0, 8.0, 9.0, 9.0])  # The first call traces.
    clock = [0.0]
    monkeypatch.setattr(floors.time, "perf_counter", lambda: clock[0])

    def call():
        clock[0] += next(durations)

    assert floors.shortest_seconds(call) == 2.0
    assert next(durations, None) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measured_products_are_all_computed(dtype):
    # TensorFlow would compute equal products once, and the rate would be as many times too high.
    left, right, products = floors.different_products(dtype, 3, 4, 5)
    graph = products.get_concrete_function(left, right).graph
    assert len({operand.ref() for operand in (*left, *right)}) == 2 * len(left) == 8
    assert [node.type for node in graph.get_operations()].count("MatMul") == 4
    for a, b, product in zip(left, right, products(left, right), strict=True):
        expected = a.numpy().astype(float) @ b.numpy().astype(float)
        np.testing.assert_allclose(product.numpy().astype(float), expected, rtol=0.02, atol=0.1)


# --- Competitors -----------------------------------------------------------------------------------------------------


def test_a_task_arrives_as_it_was_sent():
    task = dataclasses.replace(TASK, settings=("a=[1, 2]", "b=c"), profile_dir="x y")
    assert Task.from_json(task.to_json()) == task
    assert task.table_bytes == 4 * 2 * 10 * 2


def started(tmp_path, *settings):
    task = dataclasses.replace(TASK, arrays=str(tmp_path / "spans.txt"), settings=settings)
    return rounds.running(sys.executable, "tests.tiny_competitor", task)


def test_competitors_train_in_turn_and_report_their_memory(tmp_path):
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(started(tmp_path)) for _ in range(2))
        assert first.ready == Ready(7, {"tiny": "1.0"})
        rounds.take_turns([[first, second], [second, first]])
    for competitor in (first, second):
        assert [entry.loss for entry in competitor.rounds] == [0.5, 0.25]
        assert all(0.05 <= entry.seconds < 5 and entry.rows == 100 for entry in competitor.rounds)
        assert [round(entry.model_bytes / (50 << 20)) for entry in competitor.rounds] == [1, 2]
    spans = [tuple(map(float, line.split())) for line in (tmp_path / "spans.txt").read_text().splitlines()]
    assert len(spans) == 4
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))  # Never two at once.


def test_a_competitor_that_ends_says_why(tmp_path):
    with pytest.raises(CompetitorError, match=r"(?s)status 1: .*no such optimizer"), started(tmp_path, "fails=at once"):
        pass
    with started(tmp_path, "fails=in round 2") as competitor:
        competitor.train_round()
        with pytest.raises(CompetitorError, match=r"(?s)status 1: .*out of memory"):
            competitor.train_round()


def test_a_competitor_that_ends_in_a_round_is_left_out_and_the_others_go_on(tmp_path, capsys):
    task = dataclasses.replace(TASK, arrays=str(tmp_path / "spans.txt"))
    dies, lives = (
        contest.Contender(name, "tests.tiny_competitor", "float32", "lazy_adam", settings)
        for name, settings in (("dies", ("fails=in round 2",)), ("lives", ()))
    )
    results = contest.contest([(dies, task), (lives, task)], tmp_path, rounds=2)
    assert [(entry.contender, len(entry.rounds)) for entry in results] == [(lives, 3)]
    printed = " ".join(capsys.readouterr().out.split())
    assert "dies is left out: ended with status 1" in printed
    assert "out of memory" in printed


def test_what_a_benchmark_starts_keeps_to_its_cores():
    code = (
        "import os, subprocess, sys; from benchmarks.rounds import keep_to_cores; "
        "first = min(os.sched_getaffinity(0)); keep_to_cores(1); child = 'import os; print(os.sched_getaffinity(0))'; "
        "print({first}, subprocess.check_output([sys.executable, '-c', child], text=True))"
    )
    first, of_child = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert of_child == first


def test_every_competitor_reads_the_whole_task():
    shared = {field.name for field in dataclasses.fields(Task)} - {"dataset_dir", "settings", "profile_dir"}
    for peer in PEERS.values():
        tree = ast.parse((ROOT / (peer.module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "task"
        }
        assert used == shared, peer.name


def test_peers_have_environments_with_the_same_torch():
    requirements = [peer_environments.REQUIREMENTS[peer.peer] for peer in PEERS.values()]
    assert [peer.name for peer in PEERS.values()] == list(PEERS)
    assert len({entry for needed in requirements for entry in needed if entry.startswith("torch==")}) == 1
    assert all("==" in needed[0] and "==" in needed[1] for needed in requirements)


@pytest.fixture(scope="module")
def quick_task(tmp_path_factory):
    return contest.make_task(tmp_path_factory.mktemp("rows"), contest.QUICK, 50)


def test_peers_get_the_rows_of_the_dataset(quick_task):
    dataset = DatasetDir(quick_task.dataset_dir)
    columns = read_columns(dataset, "train", ["label", *(entry.name for entry in dataset.inputs.categorical)])
    with np.load(quick_task.arrays) as arrays:
        np.testing.assert_array_equal(arrays["labels"], columns.pop("label"))
        np.testing.assert_array_equal(arrays["ids"], np.stack(list(columns.values()), axis=1))
        assert arrays["ids"].shape == (contest.QUICK.num_rows, quick_task.num_features)


@pytest.mark.parametrize("contender", [*OURS, contest.FROM_DISK], ids=lambda contender: contender.name)
def test_our_model_has_the_sizes_of_the_task(quick_task, contender):
    config = task_config(dataclasses.replace(quick_task, settings=contender.settings))
    assert (config.precision, config.batch_size, config.learning_rate) == (contender.precision, 64, 0.001)
    assert config.optimizer.embeddings.kind == contender.updates
    assert (config.max_cache_bytes == 0) == (contender == contest.FROM_DISK)
    model = build_model(config, DatasetDir(quick_task.dataset_dir).inputs)
    parameters = sum(variable.shape.num_elements() for variable in model.backbone.trainable_variables)
    assert parameters == 26 * 50 * (4 + 1) + (26 * 4 * 8 + 8) + (8 + 1)


# --- Results ---------------------------------------------------------------------------------------------------------


def result(contender, vocabulary_size, *rates, rows=100, model_bytes=320):
    """Timed rounds of these rates, after one that is not timed."""
    task = dataclasses.replace(TASK, vocabulary_size=vocabulary_size)
    entries = [Round(rows, rows / rate, 0.7 - index / 10, model_bytes) for index, rate in enumerate((1.0, *rates))]
    return Result(contender, task, Ready(1234, {"tiny": "1.0"}), tuple(entries))


def test_ratios_are_medians_of_rounds():
    ours, peer = result(HEADLINE, 10, 80.0, 100.0, 40.0), result(PEERS["deepctr-torch"], 10, 40.0, 20.0, 5.0)
    assert ours.times_as_fast_as(peer) == 5.0  # Of 2, 5 and 8: rounds are pairs. Of the medians it would be 4.
    assert ours.step_seconds == TASK.batch_size / 80.0
    assert ours.memory_share == 320 / 160


def test_the_table_is_markdown_with_a_ratio_for_each_peer(tmp_path, monkeypatch):
    monkeypatch.setattr(contest, "floor_seconds", lambda contender, task, rates: 0.01)
    found = [result(HEADLINE, 10, 80.0, 80.0), result(PEERS["deepctr-torch"], 10, 40.0, 40.0)]
    text = contest.markdown_table(contest.result_columns(found), contest.result_rows(found, RATES))
    assert text.splitlines() == [
        "| training | examples/s | over deepctr-torch | ms per step | floor, ms | share of floor "
        "| BCE of first and last round | parameters | memory / table |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| ours, bfloat16, lazy Adam | 80 | 2.00 | 25.0 | 10.0 | 40 % | 0.7000, 0.5000 | 1,234 | 2.00 |",
        "| deepctr-torch | 40 | 1.00 | 50.0 | 10.0 | 20 % | 0.7000, 0.5000 | 1,234 | 2.00 |",
    ]
    assert "tiny 1.0. Rates: 0 (float32), 0 (bfloat16) G multiply-adds/s" in contest.setting(found, RATES)


def test_targets_compare_what_trained_in_the_same_rounds():
    peer, disk = PEERS["deepctr-torch"], contest.FROM_DISK
    of_few = [
        result(HEADLINE, 10, 90.0), result(contest.FLOAT32, 10, 60.0), result(disk, 10, 45.0), result(peer, 10, 30.0)
    ]  # fmt: skip
    of_many = [
        result(HEADLINE, 20, 60.0, model_bytes=1600), result(contest.FLOAT32, 20, 40.0),
        result(contest.ADAGRAD, 20, 70.0, model_bytes=1120), result(contest.ROWWISE, 20, 70.0, model_bytes=640),
        result(peer, 20, 5.0), result(HEADLINE, 10, 66.0), result(contest.FLOAT32, 10, 60.0),
    ]  # fmt: skip
    targets = contest.training_targets(of_few, of_many, 10, 20)
    expected = {
        "ours, bfloat16, lazy Adam: over deepctr-torch (float32, dense Adam), 10 ids": ["3.00", ">= 2.50", "yes"],
        "ours, float32, lazy Adam: over deepctr-torch (float32, dense Adam), 10 ids": ["2.00", ">= 2.50", "NO"],
        "ours, bfloat16, lazy Adam: over deepctr-torch (float32, dense Adam), 20 ids": ["12.00", ">= 10.00", "yes"],
        "ours, float32, lazy Adam: over deepctr-torch (float32, dense Adam), 20 ids": ["8.00", ">= 10.00", "NO"],
        "ours, bfloat16, lazy Adam: step time with 20 ids over that with 10": ["1.10", "<= 1.25", "yes"],
        "ours, float32, lazy Adam: step time with 20 ids over that with 10": ["1.50", "<= 1.25", "NO"],
        "ours, bfloat16, lazy Adam: memory over the tables' bytes, 20 ids": ["5.00", "<= 3.00", "NO"],
        "ours, bfloat16, Adagrad: memory over the tables' bytes, 20 ids": ["3.50", "<= 3.00", "NO"],
        "ours, bfloat16, row-wise Adagrad: memory over the tables' bytes, 20 ids": ["2.00", "<= 3.00", "yes"],
        "ours, bfloat16, lazy Adam, from disk: over from memory, 10 ids": ["0.50", ">= 0.90", "NO"],
    }
    assert {name: rest for name, *rest in (target.row() for target in targets)} == expected


def test_what_was_not_measured_is_not_reached():
    targets = contest.training_targets([result(HEADLINE, 10, 90.0)], [result(HEADLINE, 20, 90.0)], 10, 20)
    assert [target.found for target in targets] == [None] * 6 + [1.0] + [None] * 3
    assert targets[0].row()[1:] == ["not measured", ">= 2.50", "NO"]
    assert not Target("x", None, 1.0, is_upper=True).is_reached


# --- Precision -------------------------------------------------------------------------------------------------------


def test_compared_runs_differ_in_one_setting():
    for treatment, baseline in auc_differences.COMPARISONS:
        settings = [auc_differences.SETTINGS[name] for name in (treatment, baseline)]
        assert sum(one != other for one, other in zip(*settings, strict=True)) == 1


def test_a_difference_of_auc_is_shown_with_its_interval():
    # Differences .001 and .003: mean .002, standard error .001, t quantile 12.7062 for one degree of freedom.
    difference = paired_difference([0.601, 0.703], [0.6, 0.7])
    assert auc_differences.difference_row("a", "b", difference, 0.65) == [
        "a - b",
        "0.65000",
        "+0.00200",
        "-0.01071 to +0.01471",
        "2",
        "NO, NO",
    ]


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        # Standard error .00001 and .0001, times the t quantile 12.7062.
        ([0.00010, 0.00012], "yes, yes"),
        ([-0.00010, -0.00030], "yes, NO"),
        ([-0.00049, -0.00052], "NO, NO"),
    ],
)
def test_a_difference_is_held_against_what_is_accepted(differences, expected):
    difference = paired_difference([0.6 + differences[0], 0.7 + differences[1]], [0.6, 0.7])
    assert auc_differences.difference_row("a", "b", difference, 0.65)[-1] == expected


@pytest.mark.long
def test_the_command_trains_ours_and_prints_its_tables(tmp_path):
    command = [sys.executable, "-m", "benchmarks.training", "--quick", "--peers=", f"--profile={tmp_path / 'profile'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "left out" not in done.stdout
    assert re.search(r"\d of 12 targets reached\Z", done.stdout.strip())
    for contender in (*OURS, contest.FROM_DISK):
        assert done.stdout.count(f"| {contender.name} |") == 2
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
