"""What every registered method keeps of the contract, and how an objective decides between epochs."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from clsd_tf.data import input_pipeline
from clsd_tf.data.input_pipeline import read_columns
from clsd_tf.methods import METHODS, method_of
from clsd_tf.methods.method import MethodConfig, Objective
from clsd_tf.methods.pointwise.config import BceConfig
from clsd_tf.methods.pointwise.method import PointwiseMethod
from clsd_tf.storage.work_dir import WorkDir
from clsd_tf.training.assembly import build_model
from clsd_tf.training.best_epoch import BestEpoch, kept_epoch, read_best_weights
from clsd_tf.training.checkpoints import RunState
from clsd_tf.training.config import TrainConfig, parse_config, parse_method

# Methods of other tests' plug-ins are theirs to test.
BUILT_IN = ("bce", "clsd")
every_method = pytest.mark.parametrize("name", BUILT_IN)
# With them, a method's model has all the state that it can have.
ALL_PARTS = {
    "clsd": {
        "teacher": "ema",
        "ema_momentum": 0.5,
        "normalizer_momentum": 0.9,
        "lambda": 0.5,
        "mu": 0.5,
        "global_weighting": "standardized",
        "local_weighting": "standardized",
        "loss_warmup_steps": 0,
    }
}


def config_of(name, **settings):
    method = {"name": name, **settings}
    return parse_config({"method": method, "backbone": "dnn", "hidden_units": [4], "embeddings": {"dim": 2}}, name)


@every_method
def test_a_method_stands_under_the_name_of_its_settings(name):
    assert METHODS[name].Config().name == name
    assert method_of(METHODS[name].Config()) is METHODS[name]


@every_method
@pytest.mark.parametrize("is_default", [True, False])
def test_settings_come_back_from_what_is_written_of_them(name, is_default):
    config = config_of(name, **({} if is_default else ALL_PARTS.get(name, {"loss": "focal", "clicks": "intense"})))
    assert isinstance(config.method, METHODS[name].Config)
    assert parse_config(config.to_dict(), "config.json") == config
    assert parse_method(config.to_dict()["method"]) == config.method


def first_batch(dataset, config):
    batches = input_pipeline.training_epochs(dataset, batch_size=256, seed=1, first_epoch=0, num_epochs=1)
    features, labels, weights = next(iter(batches))
    scores = {run.feature: tf.linspace(0.1, 0.9, 256) for run in config.teacher_runs}
    return {**features, **scores}, labels, weights


@every_method
@pytest.mark.parametrize("is_default", [True, False])
def test_training_goes_on_from_all_that_a_step_changes(feed_dataset, name, is_default):
    config = config_of(name, **({} if is_default else ALL_PARTS.get(name, {})))
    model = build_model(config, feed_dataset.inputs)
    assert "backbone" in model.parts
    batch = first_batch(feed_dataset, config)
    model.train_step(batch)  # The second one changes what the first one leaves at its start.
    before = {variable.ref(): variable.numpy() for variable in model.variables + all_variables(model)}
    model.train_step(batch)
    changed = {variable for variable, value in before.items() if (variable.deref().numpy() != value).any()}
    state = [variable for part in model.training_state.values() for variable in part]
    kept = {variable.ref() for variable in (*state, *model.epoch_variables)}
    assert changed
    assert not {variable.deref().name for variable in changed - kept}
    # The parts that are served are among what training goes on from.
    served = {variable.ref() for part in model.parts.values() for variable in part.variables}
    assert served <= {variable.ref() for variable in state}


def all_variables(model):
    """What hangs on the model, its optimizers and metrics included: all that a checkpoint of it holds."""
    view = tf.train.Checkpoint(model=model)
    nodes = tf.__internal__.tracking.ObjectGraphView(view).breadth_first_traversal()[0]
    return [node for node in nodes if isinstance(node, tf.Variable)]


@every_method
def test_debug_outputs_are_numbers_of_each_row(feed_dataset, name):
    config = config_of(name)
    model = build_model(config, feed_dataset.inputs)
    features, _, _ = first_batch(feed_dataset, config)
    outputs = model.debug_outputs(features)
    assert "logit" in outputs
    assert {key: (value.shape.as_list(), value.dtype) for key, value in outputs.items()} == {
        key: ([256], tf.float32) for key in outputs
    }
    np.testing.assert_allclose(tf.sigmoid(outputs["logit"]), model(features), rtol=1e-6)


def test_debug_outputs_of_clsd_explain_a_weight(feed_dataset):
    model = build_model(config_of("clsd"), feed_dataset.inputs)
    assert model.debug_outputs(first_batch(feed_dataset, config_of("clsd"))[0]).keys() == {
        "logit", "teacher_score", "ad_gate_correction",
    }  # fmt: skip
    bce = build_model(config_of("bce"), feed_dataset.inputs)
    assert bce.debug_outputs(first_batch(feed_dataset, config_of("bce"))[0]).keys() == {"logit"}


@every_method
def test_the_objective_is_among_what_is_measured_and_may_be_missing(feed_dataset, name):
    method = METHODS[name]
    fields = read_columns(feed_dataset, "validation", list(method.validation_fields))
    scores = np.random.default_rng(0).random(feed_dataset.num_rows("validation")).astype(np.float32)
    assert 0 < method.validate(fields, scores)[method.objective.metric] < 1
    no_clicks = {**fields, "label": np.zeros_like(fields["label"])}
    assert method.validate(no_clicks, scores)[method.objective.metric] is None
    assert method.objective.missing


@pytest.mark.parametrize(
    "statement",
    [
        "import clsd_tf.methods",
        *(f"from clsd_tf.methods import METHODS; METHODS[{name!r}]" for name in BUILT_IN),
        "from clsd_tf.methods import METHODS; METHODS['clsd'].teacher_runs(METHODS['clsd'].Config())",
        "from clsd_tf.training.config import load_config; load_config(None, ['method.mu=0.5'])",
    ],
)
def test_methods_are_known_without_tensorflow(statement):
    program = f"import sys; {statement}; print('tensorflow' in sys.modules, 'tf_keras' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# Objectives.


class _OneWeight(tf.keras.Model):
    def __init__(self):
        super().__init__()
        self.weight = tf.Variable(0.0)
        self.parts = {"backbone": tf.Module()}
        self.parts["backbone"].weight = self.weight


LOSS = Objective("log_loss", "log loss", greater_is_better=False)
AUC = Objective("auc", "AUC")


@pytest.mark.parametrize(
    ("objective", "values", "best", "without_gain"),
    [
        (LOSS, [0.7, 0.5, 0.6], 1, 1),
        (AUC, [0.7, 0.5, 0.6], 0, 2),
        (LOSS, [0.5, 0.5], 0, 1),  # An equal value is no gain.
        (AUC, [0.5, 0.5], 0, 1),
        (LOSS, [1e9], 0, 0),
        (AUC, [-1e9], 0, 0),
    ],
)
def test_the_weights_of_the_best_epoch_are_kept(tmp_path, objective, values, best, without_gain):
    model, state, work_dir = _OneWeight(), RunState(), WorkDir(tmp_path)
    competition = BestEpoch(work_dir, objective, patience_epochs=2, to_keep=2, is_chief=True)
    for epoch, value in enumerate(values):
        assert not competition.is_exhausted(state)
        model.weight.assign(float(epoch))
        competition.compete(model, state, epoch, value)
    assert (state.best_epoch, state.best_value, state.epochs_without_gain) == (best, values[best], without_gain)
    assert competition.is_exhausted(state) == (without_gain >= 2)
    competition.remove_others(state)
    read_best_weights(model, work_dir)
    assert model.weight.numpy() == best


class _LossConfig(BceConfig):
    name: str = "by_loss"


class _ByLoss(PointwiseMethod[_LossConfig]):
    Config = _LossConfig
    objective = LOSS


@pytest.fixture
def by_loss():
    METHODS.register("by_loss")(_ByLoss())
    yield
    del METHODS["by_loss"]


def test_an_objective_that_should_be_small_decides_a_run(by_loss, feed_dataset, run_of, deterministic):
    content = {"backbone": "dnn", "learning_rate": 0.05, "batch_size": 256, "max_epochs": 12, "patience_epochs": 2}
    config = parse_config({**content, "method": "by_loss"}, "test")
    run = run_of(config, "by_loss")
    losses = [entry["val_log_loss"] for entry in run.history]
    best = int(np.argmin(losses))
    assert len(losses) == best + 1 + 2 < 12
    assert kept_epoch(run.history, config)["epoch"] == best
    assert run.work_dir.best_weights == run.work_dir.weights_of(best)
    greatest = kept_epoch(run.history, config.model_copy(update={"method": BceConfig()}))
    assert greatest["val_auc"] == max(entry["val_auc"] for entry in run.history)


def test_without_patience_the_last_epoch_is_kept_whatever_the_objective(by_loss):
    history = [{"competes": True, "val_log_loss": value} for value in (0.1, 0.2)]
    config = TrainConfig(method=_LossConfig(), patience_epochs=None)
    assert kept_epoch(history, config) is history[-1]
    assert kept_epoch(history, config.model_copy(update={"patience_epochs": 2})) is history[0]


def test_epochs_of_loss_warmup_are_never_kept(by_loss):
    history = [{"competes": epoch > 0, "val_log_loss": value} for epoch, value in enumerate((0.1, 0.3, 0.2))]
    assert kept_epoch(history, TrainConfig(method=_LossConfig())) is history[2]
    assert isinstance(_LossConfig(), MethodConfig)
