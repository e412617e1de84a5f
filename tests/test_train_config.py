"""The configuration of a training run: how it is read, what it refuses, and what follows from it."""

import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from clsd_tf.layers.calibration import CalibrationConfig
from clsd_tf.methods.clsd import ClsdConfig
from clsd_tf.spec.validation import SpecError
from clsd_tf.training.config import TrainConfig, load_config, parse_config, teacher_warning

# Reading.


def test_without_a_file_the_config_has_its_defaults():
    assert load_config(None, []) == TrainConfig()


def test_a_file_is_read_and_assignments_go_over_it(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("backbone: dnn\nhidden_units: [32, 16]\nclsd: {mu: 0.25, lambda: 0.5}\n", encoding="utf-8")
    config = load_config(str(path), ["clsd.mu=0.125", "seed=7", "hidden_units=[8]", "calibration.method=none"])
    assert config == TrainConfig(
        backbone="dnn",
        hidden_units=(8,),
        seed=7,
        clsd=ClsdConfig(mu=0.125, lambda_=0.5),
        calibration=CalibrationConfig(method="none"),
    )


def test_an_empty_file_gives_the_defaults(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("# Nothing yet.\n", encoding="utf-8")
    assert load_config(str(path), []) == TrainConfig()


def test_lambda_is_assigned_under_its_own_name():
    assert load_config(None, ["clsd.lambda=0.3", "clsd.mu=0.0"]).clsd.lambda_ == 0.3


def test_assignments_reach_every_depth():
    config = load_config(None, ["clsd.ad_gate.features=[age_group]", "clsd.guards.min_pctr_ratio=0.25"])
    assert config.clsd.ad_gate.features == ("age_group",)
    assert config.clsd.guards.min_pctr_ratio == 0.25


def test_backbone_arguments_are_any_mapping():
    assert load_config(None, ["backbone_arguments.num_layers=2"]).backbone_arguments == {"num_layers": 2}
    assert load_config(None, ["backbone_arguments={a: [1, x]}"]).backbone_arguments == {"a": [1, "x"]}


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001"])
def test_a_number_may_have_an_exponent_with_or_without_a_point(text):
    assert load_config(None, [f"learning_rate={text}"]).learning_rate == 0.001


_CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "method": st.sampled_from(["bce", "clsd"]),
        "loss": st.sampled_from(["bce", "label_smoothing", "focal"]),
        "clicks": st.sampled_from(["all", "intense"]),
        "label_smoothing": st.floats(0, 0.99),
        "hidden_units": st.lists(st.integers(1, 512), max_size=3),
        "backbone_arguments": st.dictionaries(st.text(max_size=5), st.integers() | st.text() | st.none(), max_size=2),
        "seed": st.integers(0, 2**31),
        "clsd": st.fixed_dictionaries(
            {"lambda": st.floats(0, 0.5), "mu": st.floats(0, 0.5)},
            optional={
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
    content = load_config(None, ["clsd.lambda=0.25", "clsd.mu=0.0", "clsd.ad_gate.hidden_units=[3]"]).to_dict()
    assert content.keys() == TrainConfig.model_fields.keys()
    assert content["clsd"]["lambda"] == 0.25
    assert "lambda_" not in content["clsd"]
    assert content["clsd"]["ad_gate"]["hidden_units"] == [3]
    assert content["calibration"].keys() == {"method", "user_group", "shrinkage_rows"}


# What is refused.


@pytest.mark.parametrize(
    ("assignment", "fragments"),
    [
        ("learning_rat=0.1", ["learning_rat: unknown key", "Received: 'learning_rat'", "learning_rate", "batch_size"]),
        ("clsd.lamda=0.1", ["clsd.lamda: unknown key", "Received: 'lamda'", "lambda, ", "loss_warmup_steps"]),
        ("clsd.guards.min_ptcr=0", ["clsd.guards.min_ptcr: unknown key", "Allowed: ", "min_pctr_ratio"]),
        ("calibration.group=age", ["calibration.group: unknown key", "Allowed: method, shrinkage_rows, user_group"]),
        ("batch_size=0", ["batch_size: ", "greater than or equal to 1", "Received: 0"]),
        ("dropout=1.0", ["dropout: ", "less than 1", "Received: 1.0"]),
        ("label_smoothing=1.0", ["label_smoothing: ", "less than 1", "Received: 1.0"]),
        ("focal_gamma=-0.5", ["focal_gamma: ", "greater than or equal to 0", "Received: -0.5"]),
        ("learning_rate=fast", ["learning_rate: ", "valid number", "Received: 'fast'"]),
        ("method=sgd", ["method: ", "'bce' or 'clsd'", "Received: 'sgd'"]),
        ("loss=hinge", ["loss: ", "'bce', 'label_smoothing' or 'focal'", "Received: 'hinge'"]),
        ("clicks=strong", ["clicks: ", "'all' or 'intense'", "Received: 'strong'"]),
        ("calibration.method=beta", ["calibration.method: ", "'none', 'platt' or 'isotonic'", "Received: 'beta'"]),
        ("clsd.teacher=oracle", ["'self', 'ema', 'prequential' or 'cross_fit'", "Received: 'oracle'"]),
        ("clsd.num_folds=1", ["clsd.num_folds: ", "greater than or equal to 2", "Received: 1"]),
        ("clsd.num_repeats=0", ["clsd.num_repeats: ", "greater than or equal to 1", "Received: 0"]),
        ("clsd.fold_by=item", ["clsd.fold_by: ", "'row' or 'user'", "Received: 'item'"]),
        ("clsd={lambda: 0.5, mu: 0.75}", ["clsd: lambda + mu must be at most 1", "Received: 0.5 + 0.75"]),
        ("clsd.global_form=raw", ["drives every prediction to 0", "Received: raw", "allow_raw=true"]),
        ("hidden_units=8", ["hidden_units: ", "Received: 8"]),
        ("hidden_units=[8, 0]", ["hidden_units.1: ", "Received: 0"]),
        ("backbone_arguments=3", ["backbone_arguments: ", "Received: 3"]),
        ("seed", ["key=value", "Received: 'seed'", "clsd.mu=0.3"]),
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


def test_bce_has_nothing_of_clsd():
    config = load_config(None, ["method=bce", "clsd.teacher=prequential"])
    assert (config.effective_clsd.lambda_, config.effective_clsd.mu) == (0.0, 0.0)
    assert load_config(None, ["clsd.kappa=2.0"]).effective_clsd == ClsdConfig(kappa=2.0)


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        ([], True),  # The default teacher is cross_fit.
        (["clsd.teacher=prequential"], True),
        (["clsd.teacher=self"], False),
        (["clsd.teacher=ema"], False),
        (["method=bce", "clsd.teacher=cross_fit"], False),
    ],
)
def test_teachers_that_score_before_training_store_their_scores(assignments, expected):
    assert load_config(None, assignments).uses_stored_scores == expected


@pytest.mark.parametrize("teacher", ["self", "ema"])
def test_an_online_teacher_over_several_epochs_is_warned_of(teacher):
    warning = teacher_warning(load_config(None, [f"clsd.teacher={teacher}", "max_epochs=3"]))
    assert f"teacher={teacher}" in warning
    assert "overconfident. Received: 3 epochs. Use a cross_fit teacher, or train for one epoch" in warning


@pytest.mark.parametrize(
    "assignments",
    [
        ["clsd.teacher=self", "max_epochs=1"],
        ["clsd.teacher=ema", "max_epochs=1"],
        ["clsd.teacher=cross_fit", "max_epochs=3"],
        ["clsd.teacher=prequential", "max_epochs=3"],
        ["method=bce", "clsd.teacher=self", "max_epochs=3"],
    ],
)
def test_no_warning_without_an_overconfident_teacher(assignments):
    assert teacher_warning(load_config(None, assignments)) is None
