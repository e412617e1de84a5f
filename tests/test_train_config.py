"""The configuration of a training run: how it is read, what it refuses, and what follows from it."""

import json
import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from clsd_tf.layers.calibration_config import CalibrationConfig
from clsd_tf.layers.embedding_config import EmbeddingConfig
from clsd_tf.methods.clsd.config import ClsdConfig, GuardConfig
from clsd_tf.methods.pointwise.config import BceConfig
from clsd_tf.spec.validation import SpecError
from clsd_tf.training.config import TrainConfig, differences, load_config, parse_config

# Reading.


def test_without_a_file_the_config_has_its_defaults():
    assert load_config(None, []) == TrainConfig()


def test_a_file_is_read_and_assignments_go_over_it(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("backbone: dnn\nhidden_units: [32, 16]\nmethod: {mu: 0.25, lambda: 0.5}\n", encoding="utf-8")
    config = load_config(str(path), ["method.mu=0.125", "seed=7", "hidden_units=[8]", "calibration.method=none"])
    assert config == TrainConfig(
        backbone="dnn",
        hidden_units=(8,),
        seed=7,
        method=ClsdConfig(mu=0.125, lambda_=0.5),
        calibration=CalibrationConfig(method="none"),
    )


def test_an_empty_file_gives_the_defaults(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("# Nothing yet.\n", encoding="utf-8")
    assert load_config(str(path), []) == TrainConfig()


def test_lambda_is_assigned_under_its_own_name():
    assert load_config(None, ["method.lambda=0.3", "method.mu=0.0"]).method.lambda_ == 0.3


def test_assignments_reach_every_depth():
    config = load_config(None, ["method.ad_gate.features=[age_group]", "method.guards.min_ctr_ratio=0.25"])
    assert config.method.ad_gate.features == ("age_group",)
    assert config.method.guards.min_ctr_ratio == 0.25


def test_backbone_arguments_are_any_mapping():
    assert load_config(None, ["backbone_arguments.num_layers=2"]).backbone_arguments == {"num_layers": 2}
    assert load_config(None, ["backbone_arguments={a: [1, x]}"]).backbone_arguments == {"a": [1, "x"]}


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001"])
def test_a_number_may_have_an_exponent_with_or_without_a_point(text):
    assert load_config(None, [f"learning_rate={text}"]).learning_rate == 0.001


_OF_ROWS = {
    "loss": st.sampled_from(["bce", "label_smoothing", "focal"]),
    "clicks": st.sampled_from(["all", "intense"]),
    "label_smoothing": st.floats(0, 0.99),
}
_CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "hidden_units": st.lists(st.integers(1, 512), max_size=3),
        "backbone_arguments": st.dictionaries(st.text(max_size=5), st.integers() | st.text() | st.none(), max_size=2),
        "seed": st.integers(0, 2**31),
        "method": st.sampled_from(["bce", "clsd"])
        | st.fixed_dictionaries({"name": st.just("bce")}, optional=_OF_ROWS)
        | st.fixed_dictionaries(
            {"lambda": st.floats(0, 0.5), "mu": st.floats(0, 0.5)},
            optional={
                **_OF_ROWS,
                "teacher": st.sampled_from(["self", "ema", "prequential", "cross_fit"]),
                "kappa": st.floats(0.01, 100),
                "ad_gate": st.fixed_dictionaries({"features": st.none() | st.lists(st.text(), min_size=1)}),
            },
        ),
        "calibration": st.fixed_dictionaries({"user_group": st.none() | st.text()}),
    },
)


@given(_CONFIGS)
@settings(max_examples=50, deadline=None)
def test_a_config_survives_its_way_through_json_and_yaml(content):
    config = parse_config(content, "test")
    assert parse_config(json.loads(json.dumps(config.to_dict())), "json") == config
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.to_dict())), "yaml") == config


def test_the_dict_form_is_complete_and_uses_the_names_of_the_command_line():
    content = load_config(None, ["method.lambda=0.25", "method.mu=0.0", "method.ad_gate.hidden_units=[3]"]).to_dict()
    assert content.keys() == TrainConfig.model_fields.keys()
    assert content["method"]["lambda"] == 0.25
    assert "lambda_" not in content["method"]
    assert content["method"]["ad_gate"]["hidden_units"] == [3]
    assert content["calibration"].keys() == {"method", "user_group", "shrinkage_rows"}


# What is refused.


@pytest.mark.parametrize(
    ("assignment", "fragments"),
    [
        ("learning_rat=0.1", ["learning_rat: unknown key", "Received: 'learning_rat'", "learning_rate", "batch_size"]),
        ("method.lamda=0.1", ["method.lamda: unknown key", "Received: 'lamda'", "lambda, ", "loss_warmup_steps"]),
        ("method.guards.min_ptcr=0", ["method.guards.min_ptcr: unknown key", "Allowed: ", "min_ctr_ratio"]),
        ("calibration.group=age", ["calibration.group: unknown key", "Allowed: method, shrinkage_rows, user_group"]),
        ("batch_size=0", ["batch_size: ", "greater than or equal to 1", "Received: 0"]),
        ("dropout=1.0", ["dropout: ", "less than 1", "Received: 1.0"]),
        ("method.label_smoothing=1.0", ["label_smoothing: ", "less than 1", "Received: 1.0"]),
        ("method.focal_gamma=-0.5", ["focal_gamma: ", "greater than or equal to 0", "Received: -0.5"]),
        ("learning_rate=fast", ["learning_rate: ", "valid number", "Received: 'fast'"]),
        ("method=sgd", ["method.name: unknown method", "Received: 'sgd'", "Allowed: bce, clsd", "--plugin"]),
        ("method.name=sgd", ["method.name: unknown method", "Received: 'sgd'"]),
        ("embeddings.dim=0", ["embeddings.dim: ", "greater than or equal to 1", "Received: 0"]),
        ("method.loss=hinge", ["loss: ", "'bce', 'label_smoothing' or 'focal'", "Received: 'hinge'"]),
        ("method.clicks=strong", ["clicks: ", "'all' or 'intense'", "Received: 'strong'"]),
        ("calibration.method=beta", ["calibration.method: ", "'none', 'platt' or 'isotonic'", "Received: 'beta'"]),
        (
            "method.teacher=oracle",
            ["method.teacher: ", "ema, cross_fit, prequential, {scores: ", "Received: 'oracle'"],
        ),
        ("method.num_folds=1", ["method.num_folds: ", "greater than or equal to 2", "Received: 1"]),
        ("method.num_repeats=0", ["method.num_repeats: ", "greater than or equal to 1", "Received: 0"]),
        ("method.fold_by=item", ["method.fold_by: ", "'row' or 'user'", "Received: 'item'"]),
        ("method={lambda: 0.5, mu: 0.75}", ["method: lambda + mu must be at most 1", "Received: 0.5 + 0.75"]),
        ("method.global_weighting=raw", ["drives every prediction to 0", "Received: raw", "allow_raw=true"]),
        ("hidden_units=8", ["hidden_units: ", "Received: 8"]),
        ("hidden_units=[8, 0]", ["hidden_units.1: ", "Received: 0"]),
        ("backbone_arguments=3", ["backbone_arguments: ", "Received: 3"]),
        ("seed", ["key=value", "Received: 'seed'", "method.mu=0.3"]),
    ],
)
def test_a_bad_assignment_names_key_received_and_allowed(assignment, fragments):
    with pytest.raises(SpecError) as error:
        load_config(None, [assignment])
    for fragment in fragments:
        assert fragment in str(error.value)


def test_errors_in_a_file_name_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("bachbone: dnn\n", encoding="utf-8")
    with pytest.raises(SpecError, match=r"mine\.yaml is not valid:\n  bachbone: unknown key"):
        load_config(str(path), [])


@pytest.mark.parametrize("content", ["- dnn\n", "backbone: [dnn\n", "just text\n"])
def test_a_file_that_is_no_mapping_is_refused_as_a_bad_config(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SpecError, match=r"mine\.yaml"):
        load_config(str(path), ["seed=2"])


def test_an_assignment_below_a_plain_value_is_refused_as_a_bad_config(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 1\n", encoding="utf-8")
    with pytest.raises(SpecError, match=r"--set seed\.first=2: seed is a single value"):
        load_config(str(path), ["seed.first=2"])


def test_an_assignment_that_is_no_yaml_is_refused_as_a_bad_config():
    with pytest.raises(SpecError, match="hidden_units"):
        load_config(None, ["hidden_units=[8"])


# What follows from a config.


def test_a_method_has_its_own_settings_alone():
    assert load_config(None, ["method=bce"]).method == BceConfig()
    assert load_config(None, ["method=clsd", "method.kappa=2.0"]).method == ClsdConfig(kappa=2.0)
    with pytest.raises(SpecError, match=r"method\.kappa: unknown key. Received: 'kappa'. Allowed: clicks, "):
        load_config(None, ["method.kappa=2.0", "method=bce"])


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        ([], ["cross_fit"]),
        (["method.teacher=prequential"], ["prequential"]),
        (["method.teacher={scores: scores.parquet}"], ["scores"]),
        (["method.teacher=self"], []),
        (["method.teacher=ema"], []),
        (["method=bce"], []),
    ],
)
def test_teachers_that_score_before_training_are_runs(assignments, expected):
    assert [run.teacher for run in load_config(None, assignments).teacher_runs] == expected


@pytest.mark.parametrize("teacher", ["self", "ema"])
def test_an_online_teacher_over_several_epochs_is_warned_of(teacher):
    warning = load_config(None, [f"method.teacher={teacher}", "max_epochs=3"]).warning
    assert f"teacher={teacher}" in warning
    assert "overconfident. Received: 3 epochs. Use a cross_fit teacher, or train for one epoch" in warning


@pytest.mark.parametrize(
    "assignments",
    [
        ["method.teacher=self", "max_epochs=1"],
        ["method.teacher=ema", "max_epochs=1"],
        ["method.teacher=cross_fit", "max_epochs=3"],
        ["method.teacher=prequential", "max_epochs=3"],
        ["method=bce", "max_epochs=3"],
    ],
)
def test_no_warning_without_an_overconfident_teacher(assignments):
    assert load_config(None, assignments).warning is None


def test_a_config_is_read_without_tensorflow():
    code = (
        "import sys, clsd_tf.training.config as c; c.load_config(None, ['method.mu=0.5']); "
        "print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_differences_name_each_setting_by_itself():
    one = load_config(None, ["method.mu=0.5", "method.ad_gate.bound=0.2", "seed=2"]).to_dict()
    other = load_config(None, ["method.mu=0.25"]).to_dict()
    assert differences(one, other) == (
        {"method.mu": 0.5, "method.ad_gate.bound": 0.2, "seed": 2},
        {"method.mu": 0.25, "method.ad_gate.bound": 0.3, "seed": 1},
    )
    assert differences(one, one) == ({}, {})
    bce = load_config(None, ["method=bce"]).to_dict()
    received, allowed = differences(bce, other)
    assert (received["method.name"], received["method.mu"], allowed["method.mu"]) == ("bce", None, 0.25)


# Configs of version 0.1.


def test_a_config_of_version_0_1_means_what_it_meant():
    old = {
        "method": "clsd",
        "loss": "focal",
        "focal_gamma": 2.0,
        "clicks": "intense",
        "embedding_dim": 4,
        "embedding_l2": 0.5,
        "embedding_l2_rows": "touched",
        "embedding_initializer": "uniform",
        "embedding_init_scale": 0.3,
        "unified_buckets": 9,
        "clsd": {
            "mu": 0.5,
            "global_form": "standardised",
            "local_form": "ratio",
            "normaliser_momentum": 0.9,
            "guards": {"min_pctr_ratio": 0.25},
        },
        "calibration": {"method": "none"},
    }
    assert parse_config(old, "old") == TrainConfig(
        method=ClsdConfig(
            mu=0.5,
            global_weighting="standardized",
            local_weighting="ratio",
            normalizer_momentum=0.9,
            guards=GuardConfig(min_ctr_ratio=0.25),
            loss="focal",
            focal_gamma=2.0,
            clicks="intense",
        ),
        embeddings=EmbeddingConfig(
            dim=4, l2=0.5, l2_rows="touched", initializer="uniform", init_scale=0.3, unified_buckets=9
        ),
        calibration=CalibrationConfig(method="none"),
    )


def test_what_stood_beside_bce_in_version_0_1_had_no_effect_and_is_left_out():
    assert parse_config({"method": "bce", "clsd": {"mu": 0.5}, "loss": "focal"}, "old").method == BceConfig(
        loss="focal"
    )


@pytest.mark.parametrize("content", [{"clsd": 3}, {"clsd": {"lamda": 0.5}}, {"embeddings": 3, "embedding_dim": 4}])
def test_what_neither_version_knows_is_refused(content):
    with pytest.raises(SpecError, match=r"unknown key|embeddings"):
        parse_config(content, "old")


def test_todays_keys_win_over_those_of_version_0_1():
    config = parse_config({"clsd": {"mu": 0.5, "kappa": 2.0}, "method": {"mu": 0.25}, "embedding_dim": 4}, "mixed")
    assert config.method == ClsdConfig(mu=0.25, kappa=2.0)
