"""A run that goes on from an earlier one: what is carried over, what begins anew, what is refused."""

import json
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf
from shop import vocabulary

from clsd_tf.data import input_pipeline
from clsd_tf.methods.clsd.guards import ConfidenceGuardError
from clsd_tf.optimizers.row_sparse import embedding_tables
from clsd_tf.spec.feature_spec import parse_spec
from clsd_tf.storage.dataset_dir import DatasetDir, DatasetLayout
from clsd_tf.storage.files import ArtifactError, read_json
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import build_model, load_model, predict_logits, restored_model
from clsd_tf.training.best_epoch import best_weights
from clsd_tf.training.claim import claim
from clsd_tf.training.lineage import TrainedOn
from clsd_tf.training.run import train
from clsd_tf.training.warm_start import warm_start

pytestmark = pytest.mark.usefixtures("deterministic")

_SETTINGS = (
    "batch_size=32",
    "max_epochs=1",
    "patience_epochs=null",
    "method.loss_warmup_steps=2",
    "method.normalizer_momentum=0.9",
    "method.ad_gate.features=[user_city, age_group]",
)


@pytest.fixture(scope="module")
def config(tiny):
    return tiny(*_SETTINGS)


@pytest.fixture(scope="module")
def first_run(shop_days, config, tmp_path_factory):
    """A run on the first day, with AdGate that reads a vocabulary which grows; its dataset is gone. Read-only."""
    work_dir = WorkDir(tmp_path_factory.mktemp("runs") / "first")
    dataset = DatasetDir(shutil.copytree(shop_days[0].path, work_dir.path.with_name("dataset")))
    train(dataset, config, work_dir, title=None)
    shutil.rmtree(dataset.path)
    return work_dir


@pytest.fixture(scope="module")
def started(shop_days, config, first_run):
    """(model of the second day that begins anew, the same after its warm start, the earlier model)."""
    fresh, warm = (build_model(config, shop_days[1].inputs) for _ in range(2))
    warm_start(warm, config, shop_days[1], first_run)
    earlier = build_model(config, shop_days[0].inputs)
    newest = tf.train.latest_checkpoint(str(first_run.checkpoints))
    tf.train.Checkpoint(model=earlier).restore(newest).expect_partial().assert_existing_objects_matched()
    return fresh, warm, earlier


# What is carried over.


def slots(optimizer, rows):
    """The slots of the tables: variables with a row for each id."""
    return [variable.numpy() for variable in optimizer.variables if variable.shape[:1] == [rows]]


def tables(dataset, names):
    """Name -> rows of its ids, put together by hand: missing, out of vocabulary, then values."""
    entries = {entry.vocabulary: entry.vocabulary_size for entry in dataset.inputs.categorical}
    sizes = entries | {group.name: len(group.labels) for group in dataset.inputs.groups}
    starts = dict(zip(names, np.cumsum([0, *(sizes[name] for name in names)]), strict=False))
    return {name: np.arange(starts[name], starts[name] + sizes[name]) for name in names}


@pytest.mark.parametrize(
    ("part", "optimizer", "num_slots", "names"),
    [
        ("backbone", "optimizer", 1, ["user", "item", "user_city", "item_tags", "user_age"]),
        ("ad_gate", "ad_gate_optimizer", 2, ["user_city", "age_group"]),
    ],
)
def test_known_ids_keep_weights_and_slots_and_new_ones_begin_anew(
    shop_days, started, part, optimizer, num_slots, names
):
    before, now = (tables(dataset, names) for dataset in shop_days[:2])
    totals = [sum(map(len, rows.values())) for rows in (before, now)]
    assert totals[1] > totals[0]
    fresh, warm, earlier = (
        [
            *(weight.numpy() for weight in getattr(model, part).trainable_variables if weight.shape[0] == total),
            *slots(getattr(model, optimizer), total),
        ]
        for model, total in zip(started, (totals[1], totals[1], totals[0]), strict=True)
    )
    assert len(warm) == len(earlier) == 1 + num_slots
    for name in names:
        old, new = before[name], now[name]
        for index in range(1 + num_slots):
            np.testing.assert_array_equal(warm[index][new[: len(old)]], earlier[index][old])
            np.testing.assert_array_equal(warm[index][new[len(old) :]], fresh[index][new[len(old) :]])
    assert np.abs(warm[1]).sum() > 0
    assert len(now["user_city"]) == len(before["user_city"]) + 1


def test_everything_else_is_carried_over_with_its_slots(started):
    _, warm, earlier = started
    steps = int(earlier.optimizer.iterations)
    assert steps == 8  # 240 rows in batches of 32.
    old, new = earlier.training_state, warm.training_state
    assert new.keys() == {"backbone", "optimizer", "moving means", "AdGate", "optimizer of AdGate"}
    for part, variables in new.items():
        same = [(a.numpy(), b.numpy()) for a, b in zip(old[part], variables, strict=True) if a.shape == b.shape]
        for before, now in same:
            np.testing.assert_array_equal(before, now)
        assert len(same) == len(variables) - {"backbone": 1, "optimizer": 1, "AdGate": 1, "optimizer of AdGate": 2}.get(
            part, 0
        )
    assert any(np.any(variable.numpy() != 0) for variable in new["moving means"])


def test_before_training_it_predicts_as_the_earlier_run_where_all_values_are_known(shop_days, started, first_run):
    _, warm, _ = started
    earlier = restored_model(first_run, TrainedOn.read(first_run).inputs)
    known = 0
    for features, _, _ in input_pipeline.batches(shop_days[1], "train", batch_size=64):
        is_known = tf.ones([len(features["item"])], tf.bool)
        for entry in shop_days[0].inputs.categorical:
            inside = features[entry.name] < entry.vocabulary_size
            is_known &= inside if inside.shape.rank == 1 else tf.reduce_all(inside, axis=1)
        rows = {name: tf.boolean_mask(values, is_known) for name, values in features.items()}
        np.testing.assert_array_equal(warm.logits(rows), earlier.logits(rows))
        known += len(rows["item"])
    assert 50 < known < shop_days[1].num_rows("train")


def test_it_goes_on_from_the_weights_that_the_earlier_run_serves(shop_days, first_run, config, tmp_path):
    # As if an earlier epoch had been the best: weights that no checkpoint holds.
    work_dir = WorkDir(shutil.copytree(first_run.path, tmp_path / "run"))
    best = restored_model(work_dir, shop_days[0].inputs)
    for variable in best.backbone.trainable_variables:
        variable.assign_add(0.1 * tf.ones_like(variable))
    best_weights(best).write(str(work_dir.best_weights))
    served = predict_logits(load_model(work_dir, shop_days[0]), shop_days[0], "test")
    model = build_model(config, shop_days[0].inputs)
    warm_start(model, config, shop_days[0], work_dir)
    np.testing.assert_array_equal(predict_logits(model, shop_days[0], "test"), served)
    warm_start(model, config, shop_days[0], first_run)
    assert np.abs(predict_logits(model, shop_days[0], "test") - served).min() > 0.01
    assert int(model.optimizer.iterations) == 8


def test_rows_of_ftrl_go_on_from_the_served_weights_not_from_those_of_the_last_step(shop_days, tiny, tmp_path):
    ftrl = "{embeddings: {kind: ftrl, l1: 0.001, l2: 0.01, learning_rate: 0.05}}"
    settings = [*_SETTINGS, "method=bce", "backbone=fm", f"optimizer={ftrl}"]
    work_dir, config = WorkDir(tmp_path / "run"), tiny(*settings)
    train(shop_days[0], config, work_dir, title=None)
    best = restored_model(work_dir, shop_days[0].inputs)
    [served] = embedding_tables(best.backbone)
    served.assign_add(0.1 * tf.ones_like(served))
    best_weights(best).write(str(work_dir.best_weights))
    model = build_model(config, shop_days[0].inputs)
    warm_start(model, config, shop_days[0], work_dir)
    [table] = embedding_tables(model.backbone)
    has_learned = model.optimizer.variables[-2].numpy() != np.float32(1e-8)  # Of the accumulator.
    assert 20 < has_learned.sum() < has_learned.size
    variables = model.backbone.trainable_variables
    model.optimizer.apply_gradients([(tf.zeros_like(variable), variable) for variable in variables])
    np.testing.assert_allclose(table, served, rtol=1e-4)


# Runs.


def test_a_run_goes_on_with_its_own_settings_and_with_the_count_of_steps(shop_days, first_run, tiny, tmp_path):
    # 8 steps before and 8 of this run: loss warm-up ends within it, though it is longer than this run alone.
    config = tiny(*_SETTINGS, "learning_rate=0.01", "method.loss_warmup_steps=12")
    history = train(shop_days[1], config, WorkDir(tmp_path / "run"), title=None, init_from=first_run)
    assert history[0]["competes"]
    assert history[0]["max_click_confidence"] > 1
    with pytest.raises(ValueError, match=r"loss_warmup_steps .* Received: 12. Allowed: less than 8"):
        train(shop_days[1], config, WorkDir(tmp_path / "anew"), title=None)


def test_guards_and_ema_teacher_begin_with_what_a_run_that_weighted_no_clicks_has_become(shop_days, tiny, tmp_path):
    settings = [*_SETTINGS[:-1], "method.mu=0", "method.teacher=ema"]
    earlier = WorkDir(tmp_path / "earlier")
    history = train(shop_days[0], tiny(*settings, "method.lambda=0"), earlier, title=None)
    config = tiny(*settings, "method.lambda=0.5")
    model = build_model(config, shop_days[1].inputs)
    warm_start(model, config, shop_days[1], earlier)
    seen = {"mean_ctr": tf.constant(0.01), "click_rate": tf.constant(0.4), "click_share": tf.constant(1.0)}
    model.guard_state.update(**seen, drift=tf.constant(0.0), is_warming_up=tf.constant(False), has_warmup=True)
    assert history[-1]["mean_ctr"] > 0.2
    with pytest.raises(ConfidenceGuardError, match=f"Received: 0.0100 after {history[-1]['mean_ctr']:.4f}"):
        model.guard_state.check(config.method.guards, 1)
    state = model.training_state
    for slow, fast in zip(state["EMA teacher"], state["backbone"], strict=True):
        np.testing.assert_array_equal(slow, fast)


# What is refused.


def test_a_learning_rate_that_has_fallen_to_0_in_earlier_runs_is_refused(shop_days, first_run, tiny, tmp_path):
    config, work_dir = tiny(*_SETTINGS, "optimizer={schedule: linear, lr_decay_steps: 8}"), WorkDir(tmp_path / "run")
    with pytest.raises(ValueError, match=r"would be 0 throughout. Received: 8, .* from step 8. Allowed: more than 8"):
        train(shop_days[1], config, work_dir, title=None, init_from=first_run)
    assert not work_dir.config.exists()


@pytest.mark.parametrize("which", ["checkpoint", "best weights"])
def test_a_run_whose_files_are_damaged_is_refused_with_the_remedy(shop_days, first_run, config, tmp_path, which):
    damaged = WorkDir(shutil.copytree(first_run.path, tmp_path / "damaged"))
    path = damaged.best_weights if which == "best weights" else damaged.checkpoints / "ckpt-8"
    os.truncate(f"{path}.data-00000-of-00001", 100)
    message = rf"the weights of a run must be readable. Received: {path}: .*Put the files back"
    with pytest.raises(ArtifactError, match=message):
        train(shop_days[1], config, WorkDir(tmp_path / "run"), title=None, init_from=damaged)
    if which == "best weights":
        with pytest.raises(ArtifactError, match=message):
            load_model(damaged, shop_days[0])


def test_without_a_checkpoint_a_run_needs_the_earlier_one_again(shop_days, first_run, config, tmp_path):
    work_dir = WorkDir(tmp_path / "run")
    claim(work_dir, config, shop_days[1], first_run)
    with pytest.raises(ArtifactError, match=rf"None. Allowed: {first_run.fingerprint}. Give that --init_from again"):
        train(shop_days[1], config, work_dir, title=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("backbone=dnn", "backbone. Received: 'dnn'. Allowed: 'deepfm'"),
        ("embeddings.dim=5", "embeddings.dim. Received: 5. Allowed: 4"),
        ("hidden_units=[9]", r"hidden_units. Received: \[9\]. Allowed: \[8\]"),
        ("embeddings.unified_buckets=50", "unified_buckets. Received: 50. Allowed: None"),
        ("optimizer.embeddings.kind=ftrl", "kind. Received: 'ftrl'. Allowed: 'adagrad'"),
        ("method=bce", "method. Received: 'bce'. Allowed: 'clsd'"),
        ("method.mu=0", "method.mu > 0. Received: False. Allowed: True"),
        ("method.ad_gate.features=[age_group]", r"method.ad_gate.features. Received: \['age_group'\]"),
        ("method.ad_gate.bound=0.2", "method.ad_gate.bound. Received: 0.2. Allowed: 0.3"),
    ],
)
def test_a_model_that_is_built_differently_is_refused(shop_days, first_run, tiny, tmp_path, change, message):
    work_dir = WorkDir(tmp_path / "run")
    with pytest.raises(ArtifactError, match=message):
        train(shop_days[1], tiny(*_SETTINGS, change), work_dir, title=None, init_from=first_run)
    assert not work_dir.config.exists()


def test_a_dataset_that_did_not_grow_from_the_run_s_is_refused(shop_days, first_run, config, tmp_path):
    shutil.copytree(shop_days[1].path, tmp_path / "dataset")
    layout = DatasetLayout(tmp_path / "dataset")
    first, second, *rest = vocabulary(shop_days[1], "item")
    layout.vocabulary("item").write_text("".join(f"{value}\n" for value in (second, first, *rest)))
    statistics = read_json(layout.statistics)
    statistics["numeric"]["item_price"]["mean"] += 1
    layout.statistics.write_text(json.dumps(statistics))
    layout.mark_complete(shop_days[1].spec)
    with pytest.raises(ArtifactError) as error:
        train(DatasetDir(layout.root), config, WorkDir(tmp_path / "run"), title=None, init_from=first_run)
    assert "vocabulary of item. Received: 9 values. Allowed: the 8 of the run in their order" in str(error.value)
    assert "statistics of item_price. Received: " in str(error.value)
    assert "vocabulary of user_city" not in str(error.value)


def test_another_spec_is_refused(shop_content, shop_days, first_run, config, tmp_path):
    shop_content["label"] = "clicked == 0"
    shop_content["features"][0]["hash_buckets"] = 11
    del shop_content["features"][4]
    layout = DatasetLayout(shutil.copytree(shop_days[1].path, tmp_path / "dataset"))
    spec = parse_spec(shop_content, "shop")
    layout.spec.write_text(spec.to_json())
    layout.mark_complete(spec)
    with pytest.raises(ArtifactError) as error:
        train(DatasetDir(layout.root), config, WorkDir(tmp_path / "run"), title=None, init_from=first_run)
    for text in (
        "label. Received: 'clicked == 0'. Allowed: 'clicked == 1'",
        "user.hash. Received: {'buckets': 11",
        "input item_price. Received: None. Allowed: a number",
    ):
        assert text in str(error.value)


def test_a_run_that_has_not_finished_is_refused(shop_days, first_run, config, tmp_path):
    unfinished = WorkDir(shutil.copytree(first_run.path, tmp_path / "unfinished"))
    unfinished.success.unlink()
    with pytest.raises(ArtifactError, match="a work directory is complete when it holds _SUCCESS"):
        train(shop_days[1], config, WorkDir(tmp_path / "run"), title=None, init_from=unfinished)
