"""Row-sparse rules against their dense twins, and what the optimizer of a model does with each variable."""

import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from clsd_tf.data.input_pipeline import batches
from clsd_tf.optimizers.config import OptimizerConfig, TableOptimizerConfig
from clsd_tf.optimizers.row_sparse import RowSparseOptimizer, WarmupSchedule, build_optimizer, embedding_tables
from clsd_tf.optimizers.table_rules import table_rule
from clsd_tf.spec.model_inputs import CategoricalInput, ModelInputs
from clsd_tf.spec.validation import SpecError
from clsd_tf.training.assembly import build_model
from clsd_tf.training.config import load_config

_RATE = 0.05
_ROWS, _DIM = 5, 3
_KINDS = ("lazy_adam", "adagrad", "rowwise_adagrad", "ftrl")


def optimizer_of(table, kind, *, others=(), initial_accumulator=None, **arguments):
    config = {"kind": kind, "initial_accumulator": initial_accumulator}
    rule = table_rule(TableOptimizerConfig(**config, **({"l1": 1.0, "l2": 0.1} if kind == "ftrl" else {})))
    optimizer = RowSparseOptimizer([table], rule, **{"learning_rate": _RATE, **arguments})
    optimizer.build([table, *others])
    return optimizer


def gradients(num_steps, seed=0):
    random = np.random.default_rng(seed)
    # Some small, so that the L1 of FTRL holds entries at 0.
    scale = random.choice([1e-3, 1.0], size=[num_steps, _ROWS, _DIM])
    return (scale * random.normal(size=[num_steps, _ROWS, _DIM])).astype(np.float32)


def slices(gradient, rows):
    return tf.IndexedSlices(tf.constant(gradient), tf.constant(rows, tf.int64), [_ROWS, _DIM])


_TWINS = {
    "lazy_adam": lambda: tf.keras.optimizers.Adam(_RATE),
    "adagrad": lambda: tf.keras.optimizers.Adagrad(_RATE, initial_accumulator_value=1e-8, epsilon=0.0),
    "ftrl": lambda: tf.keras.optimizers.Ftrl(
        _RATE, initial_accumulator_value=1e-8, l1_regularization_strength=1.0, l2_regularization_strength=0.1
    ),
}


@pytest.mark.parametrize("kind", _TWINS)
@pytest.mark.parametrize("is_sparse", [True, False])
def test_a_rule_equals_its_dense_twin_of_keras_when_every_row_is_touched(kind, is_sparse):
    start = np.random.default_rng(1).normal(size=[_ROWS, _DIM]).astype(np.float32)
    start *= kind != "ftrl"  # Keras' forgets where rows start.
    ours, theirs = (tf.Variable(start) for _ in "ab")
    optimizer, twin = optimizer_of(ours, kind), _TWINS[kind]()
    for step, gradient in enumerate(gradients(6)):
        order = np.random.default_rng(step).permutation(_ROWS)
        optimizer.apply_gradients([(slices(gradient[order], order) if is_sparse else tf.constant(gradient), ours)])
        twin.apply_gradients([(tf.constant(gradient), theirs)])
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-7)
    if kind == "ftrl":
        assert 0 < np.mean(ours.numpy() == 0) < 1


def test_ftrl_begins_at_the_initial_rows():
    start = np.random.default_rng(1).normal(size=[_ROWS, _DIM]).astype(np.float32)
    table = tf.Variable(start)
    optimizer = optimizer_of(table, "ftrl", initial_accumulator=0.1)
    optimizer.apply_gradients([(slices(np.zeros([2, _DIM], np.float32), [1, 3]), table)])
    np.testing.assert_allclose(table, start, rtol=1e-5)
    optimizer.apply_gradients([(slices(np.full([1, _DIM], 1e-3, np.float32), [1]), table)])
    # By hand: n hardly changes, so a small gradient g moves a row by -g / (sqrt(.1) / rate + 2 l2).
    np.testing.assert_allclose(start[1] - table.numpy()[1], 1e-3 / (np.sqrt(0.1) / _RATE + 0.2), rtol=0.02)


def test_rowwise_adagrad_keeps_the_mean_square_of_each_row():
    table = tf.Variable(np.ones([_ROWS, _DIM], np.float32))
    optimizer = optimizer_of(table, "rowwise_adagrad", initial_accumulator=0.02)
    expected, accumulator = np.ones([_ROWS, _DIM]), np.full(_ROWS, 0.02)
    for gradient in gradients(5):
        optimizer.apply_gradients([(slices(gradient, range(_ROWS)), table)])
        accumulator += (gradient.astype(np.float64) ** 2).mean(axis=1)
        expected -= _RATE * gradient / np.sqrt(accumulator)[:, None]
    np.testing.assert_allclose(table, expected, rtol=2e-6)
    assert [slot.shape for slot in optimizer.variables if "accumulator" in slot.name] == [[_ROWS]]


def test_rowwise_adagrad_of_one_column_is_adagrad():
    tables = [tf.Variable(np.ones([_ROWS, 1], np.float32)) for _ in "ab"]
    optimizers = [optimizer_of(table, kind) for table, kind in zip(tables, ("adagrad", "rowwise_adagrad"), strict=True)]
    for gradient in gradients(4)[:, :, :1]:
        for table, optimizer in zip(tables, optimizers, strict=True):
            optimizer.apply_gradients([(tf.IndexedSlices(gradient, tf.range(_ROWS)), table)])
    np.testing.assert_allclose(*tables, rtol=1e-6)


@pytest.mark.parametrize("kind", _KINDS)
@settings(max_examples=8, deadline=None)
@given(ids=st.lists(st.lists(st.integers(0, _ROWS - 1), min_size=1, max_size=12), min_size=1, max_size=3))
def test_rows_that_no_batch_touches_keep_value_and_slots_to_the_bit(kind, ids):
    start = np.random.default_rng(2).normal(size=[_ROWS, _DIM]).astype(np.float32)
    table = tf.Variable(start)
    optimizer = optimizer_of(table, kind)
    slots = [slot for slot in optimizer.variables if slot.shape[:1] == [_ROWS]]
    before = [slot.numpy() for slot in slots]
    for batch in ids:
        optimizer.apply_gradients([(slices(np.ones([len(batch), _DIM], np.float32), batch), table)])
    untouched = [row for row in range(_ROWS) if row not in {row for batch in ids for row in batch}]
    for now, then in zip([table, *slots], [start, *before], strict=True):
        np.testing.assert_array_equal(now.numpy()[untouched], then[untouched])
    touched = sorted({row for batch in ids for row in batch})
    assert (table.numpy()[touched] != start[touched]).any(axis=1).all()


@pytest.mark.parametrize("kind", _KINDS)
def test_gradients_of_a_row_that_occurs_often_are_summed_before_the_rule(kind):
    gradient = np.random.default_rng(3).normal(size=[4, _DIM]).astype(np.float32)
    tables = [tf.Variable(np.ones([_ROWS, _DIM], np.float32)) for _ in "ab"]
    optimizer_of(tables[0], kind).apply_gradients([(slices(gradient, [2, 0, 2, 2]), tables[0])])
    summed = np.stack([gradient[1], gradient[0] + gradient[2] + gradient[3]])
    optimizer_of(tables[1], kind).apply_gradients([(slices(summed, [0, 2]), tables[1])])
    np.testing.assert_allclose(*tables, rtol=1e-6)


def test_lazy_adam_corrects_for_the_steps_of_the_run_not_of_the_row():
    # Row 0 in steps 1 and 3. By hand, g = 1: m = .1, then .9 * .1 + .1 = .19; v = .001, then .001999.
    table = tf.Variable(np.zeros([_ROWS, 1], np.float32))
    optimizer = optimizer_of(table, "lazy_adam")
    for row in (0, 1, 0):
        optimizer.apply_gradients([(tf.IndexedSlices(tf.ones([1, 1]), [row]), table)])
    first = _RATE * math.sqrt(1 - 0.999) / (1 - 0.9) * 0.1 / math.sqrt(0.001)
    second = _RATE * math.sqrt(1 - 0.999**3) / (1 - 0.9**3) * 0.19 / math.sqrt(0.001999)
    assert table.numpy()[0, 0] == pytest.approx(-(first + second), rel=1e-4)


def test_the_norm_for_clipping_is_over_summed_rows_and_dense_gradients_together():
    # Row 1 gets 3 twice: 6. With 8 of the dense variable the norm is 10, clipped to 5: all halved.
    table, dense = tf.Variable(tf.zeros([_ROWS, 1])), tf.Variable(tf.zeros([1]))
    optimizer = optimizer_of(table, "adagrad", others=[dense], initial_accumulator=0.25, global_clip_norm=5.0)
    gradient = tf.IndexedSlices(tf.constant([[3.0], [3.0]]), tf.constant([1, 1], tf.int64))
    optimizer.apply_gradients([(gradient, table), (tf.constant([8.0]), dense)])
    assert table.numpy()[1, 0] == pytest.approx(-_RATE * 3 / math.sqrt(9.0 + 0.25), rel=1e-5)
    v_and_m = sorted(slot.numpy()[0] for slot in optimizer.variables if slot.shape == [1])
    assert v_and_m == pytest.approx([0.001 * 4**2, 0.1 * 4], rel=1e-5)


def test_other_variables_follow_adam_or_adamw_and_tables_do_not_decay():
    for weight_decay in (None, 0.1):
        table, ours, theirs = (tf.Variable(tf.ones([_ROWS, _DIM])) for _ in "abc")
        optimizer = optimizer_of(table, "adagrad", others=[ours], weight_decay=weight_decay)
        twin = tf.keras.optimizers.AdamW(_RATE, weight_decay or 0.0)
        for gradient in gradients(4):
            optimizer.apply_gradients([(slices(gradient[:1], [0]), table), (tf.constant(gradient), ours)])
            twin.apply_gradients([(tf.constant(gradient), theirs)])
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        np.testing.assert_array_equal(table[1:], tf.ones([_ROWS - 1, _DIM]))


def test_a_table_may_learn_at_a_rate_of_its_own():
    tables = [tf.Variable(tf.ones([_ROWS, _DIM])) for _ in "ab"]
    for table, ratio in zip(tables, (1.0, 3.0), strict=True):
        optimizer = optimizer_of(table, "adagrad", table_learning_rate_ratio=ratio)
        optimizer.apply_gradients([(slices(gradients(1)[0], range(_ROWS)), table)])
    moved = [1.0 - table.numpy() for table in tables]
    np.testing.assert_allclose(moved[1], 3 * moved[0], rtol=1e-3, atol=1e-7)


# Schedules.


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Warm-up over 4 steps, 0 at step 12: step 8 is half of the way, step 6 a quarter.
        ("constant", {0: 0.25, 3: 1.0, 4: 1.0, 12: 1.0}),
        ("linear", {0: 0.25, 1: 0.5, 3: 1.0, 6: 0.75, 8: 0.5, 12: 0.0, 20: 0.0}),
        ("cosine", {0: 0.25, 3: 1.0, 6: (1 + math.sqrt(0.5)) / 2, 8: 0.5, 12: 0.0, 20: 0.0}),
    ],
)
def test_a_schedule_rises_and_falls_as_it_says(schedule, expected):
    decay = {} if schedule == "constant" else {"lr_decay_steps": 12}
    rate = WarmupSchedule(0.2, OptimizerConfig(schedule=schedule, lr_warmup_steps=4, **decay))
    again = WarmupSchedule.from_config(rate.get_config())
    for step, factor in expected.items():
        assert float(again(tf.constant(step, tf.int64))) == float(rate(tf.constant(step, tf.int64)))
        assert float(rate(tf.constant(step, tf.int64))) == pytest.approx(0.2 * factor, abs=1e-7)


def test_the_schedule_holds_for_tables_and_for_the_rest(feed_dataset, tiny):
    kind = "optimizer.embeddings.kind=lazy_adam"
    config = tiny("method=bce", "backbone=dnn", "optimizer.lr_warmup_steps=1000", "learning_rate=0.001", kind)
    model = build_model(config, feed_dataset.inputs)
    before = [variable.numpy() for variable in model.backbone.trainable_variables]
    gradient = [tf.ones_like(variable) for variable in model.backbone.trainable_variables]
    model.optimizer.apply_gradients(zip(gradient, model.backbone.trainable_variables, strict=True))
    for now, then in zip(model.backbone.trainable_variables, before, strict=True):
        # Adam's first step is the learning rate itself: a thousandth of .001.
        np.testing.assert_allclose(then - now.numpy(), 1e-6, rtol=0.1)


def test_slots_of_ftrl_are_those_that_give_the_rows():
    rule = table_rule(TableOptimizerConfig(kind="ftrl", l1=0.1, l2=0.2))
    rows = tf.constant([[2.0], [-2.0], [0.0], [0.0], [0.01]])
    slots = tf.constant([[4.0], [4.0], [4.0], [4.0], [0.1]]), tf.constant([[5.0], [5.0], [0.7], [0.05], [0.0]])
    accumulator, linear = rule.slots_of(rows, slots, 0.5)
    np.testing.assert_array_equal(accumulator, slots[0])
    # 2 * (sqrt(4) / .5 + 2 * .2) + .1, and .01 * (sqrt(.1) / .5 + 2 * .2) + .1.
    np.testing.assert_allclose(linear, [[-8.9], [8.9], [0.1], [0.05], [-0.1103246]], rtol=1e-6)
    again, _ = rule.update(rows, (accumulator, linear), tf.zeros([5, 1]), 0.5, 1.0)
    np.testing.assert_allclose(again, [[2.0], [-2.0], [0.0], [0.0], [0.01]], rtol=1e-5)


# The optimizer of a model.


def test_tables_are_those_of_field_embeddings_and_of_keras_embedding_layers():
    inputs = ModelInputs((CategoricalInput("item", "item", 7),), (), ())
    ours = build_model(load_config(None, ["method=bce", "backbone=fm"]), inputs).backbone
    assert [table.shape for table in embedding_tables(ours)] == [[7, 11]]
    keras = tf.keras.Sequential([tf.keras.layers.Embedding(9, 2), tf.keras.layers.Dense(1)])
    keras(tf.constant([[1]]))
    assert [table.shape for table in embedding_tables(keras)] == [[9, 2]]
    optimizer = build_optimizer(OptimizerConfig(), 0.01, keras)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(keras(tf.constant([[4, 4]])))
    before = keras.get_weights()[0]
    variables = keras.trainable_variables
    optimizer.build(variables)
    optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
    assert np.flatnonzero((keras.get_weights()[0] != before).any(axis=1)).tolist() == [4]


@pytest.mark.parametrize("kind", [*_KINDS, "adam"])
def test_a_model_learns_by_every_rule_and_keeps_as_many_numbers_as_the_rule_says(feed_dataset, tiny, kind):
    model = build_model(tiny("method=bce", f"optimizer.embeddings.kind={kind}"), feed_dataset.inputs)
    [table] = embedding_tables(model.backbone)
    of_table = [slot for slot in model.optimizer.variables if slot.shape[:1] == table.shape[:1]]
    numbers = sum(slot.shape.num_elements() for slot in of_table) / table.shape.num_elements()
    assert numbers == {"adagrad": 1, "rowwise_adagrad": 1 / table.shape[1]}.get(kind, 2)
    batch, before = next(iter(batches(feed_dataset, "train", batch_size=1024))), table.numpy()
    losses = [float(model.train_step(batch)["bce"]) for _ in range(8)]
    assert losses[-1] < losses[0]  # A mean since the first step.
    assert (table.numpy() != before).any()


def _after_a_step(feed_dataset, tiny, *settings):
    """Table and hidden layer of a model before and after a step; weights are large, so that gradients are."""
    config = tiny("method=bce", "backbone=dnn", "learning_rate=0.01", *settings)
    model = build_model(config, feed_dataset.inputs)
    model.backbone.set_weights([weight + 0.3 for weight in model.backbone.get_weights()])
    [table] = embedding_tables(model.backbone)
    kernel = next(variable for variable in model.backbone.trainable_variables if "hidden_0/kernel" in variable.name)
    before = table.numpy(), kernel.numpy()
    model.train_step(next(iter(batches(feed_dataset, "train", batch_size=1024))))
    return before, (table.numpy(), kernel.numpy())


def test_the_settings_of_a_run_reach_its_optimizer(feed_dataset, tiny):
    def moved(*settings):
        (table, kernel), (new_table, new_kernel) = _after_a_step(feed_dataset, tiny, *settings)
        return np.abs(new_table - table).max(), np.abs(new_kernel - kernel).max()

    plain = moved("optimizer.embeddings.kind=lazy_adam")
    # Adam's first step is the learning rate itself, wherever there is a gradient.
    np.testing.assert_allclose(plain, [0.01, 0.01], rtol=1e-2)
    faster = moved("optimizer.embeddings={kind: lazy_adam, learning_rate: 0.03}")
    np.testing.assert_allclose(faster, [0.03, 0.01], rtol=1e-2)
    # Gradients next to Adam's epsilon: steps are shorter.
    assert max(moved("optimizer.embeddings.kind=lazy_adam", "optimizer.global_clip_norm=1e-7")) < 0.009
    slow = "optimizer.embeddings={kind: adagrad, initial_accumulator: 0.1}"
    assert moved(slow, "optimizer.global_clip_norm=1e-3")[0] <= 0.01 * 1e-3 / np.sqrt(0.1)


@pytest.mark.parametrize("kind", ["adagrad", "rowwise_adagrad"])
def test_rules_that_sum_squares_have_a_learning_rate_of_their_own(feed_dataset, tiny, kind):
    def moved(*settings):
        settings = ("learning_rate=0.001", f"optimizer.embeddings.kind={kind}", *settings)
        (table, _), (new_table, _) = _after_a_step(feed_dataset, tiny, *settings)
        return np.abs(new_table - table).max()

    # By hand: Adagrad's first step is .02 where gradients are far above sqrt(1e-8). The row-wise one's is up to sqrt(d)
    # times that, where one number of d has all the gradient.
    assert 0.018 < moved() < 0.0202 * (1 if kind == "adagrad" else 2)
    assert moved("optimizer.embeddings.learning_rate=0.06") == pytest.approx(3 * moved(), rel=0.01)


@pytest.mark.parametrize("kind", ["lazy_adam", "adam"])
def test_weight_decay_of_a_run_is_of_its_dense_layers_alone(feed_dataset, tiny, kind):
    arguments = ("optimizer.dense.kind=adamw", "optimizer.dense.weight_decay=5", f"optimizer.embeddings.kind={kind}")
    (table, kernel), (new_table, new_kernel) = _after_a_step(feed_dataset, tiny, *arguments)
    assert np.mean(new_kernel) == pytest.approx(0.95 * np.mean(kernel), abs=0.0101)  # 1 - .01 * 5, and Adam's step.
    unmoved = (new_table == table).all(axis=1)
    assert unmoved.any()  # Rows that the batch does not hold, of 1,024 of 3,200 rows.
    assert np.abs(new_table - table).max() < 0.0101


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer.embeddings={kind: adagrad, l1: 0.1}", r"l1 and l2 are for kind ftrl\. Received: kind=adagrad"),
        (
            "optimizer.embeddings={kind: lazy_adam, initial_accumulator: 0.1}",
            r"initial_accumulator is for kinds adagrad, .* Received: kind=lazy_adam",
        ),
        ("optimizer.dense.weight_decay=0.1", r"weight_decay is for kind adamw\. Received: kind=adam"),
        (
            "optimizer.embeddings={kind: adam, learning_rate: 0.1}",
            r"at the learning rate of the run\. Received: learning_rate=0\.1\. Leave it out",
        ),
        ("optimizer.schedule=cosine", r"lr_decay_steps goes with .* Received: schedule=cosine, lr_decay_steps=None"),
        ("optimizer.lr_decay_steps=5", r"lr_decay_steps goes with .* Received: schedule=constant, lr_decay_steps=5"),
        (
            "optimizer={schedule: linear, lr_warmup_steps: 5, lr_decay_steps: 5}",
            r"lr_decay_steps must be greater than lr_warmup_steps\. Received: 5 after 5",
        ),
        (
            "optimizer={embeddings: {kind: ftrl}, schedule: cosine, lr_decay_steps: 5}",
            r"which must stay the same\. Received: schedule=cosine, lr_warmup_steps=0\. Allowed: constant, 0",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(setting, message):
    with pytest.raises(SpecError, match=message):
        load_config(None, [setting])
