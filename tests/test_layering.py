"""Imports go down only, and heavy or command-only libraries stay in their rooms."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("clsd_tf", "export", "feature_specs", "pipelines")

# Rooms of clsd_tf, lowest first: a room may import only rooms of lower levels.
LEVELS = [
    {"model_inputs", "validation", "interruption"},
    {"expectations", "optimizer_config"},
    {"tables"},
    {"feature_types"},
    {"features"},
    {"artifacts", "columns", "hashing", "console", "quiet_start", "plots"},
    {"transform", "examples", "sketches", "request_files"},
    {"column_summaries", "lineage", "servable", "small_groups"},
    {"data_statistics"},
    {"data_checks"},
    {"data_report"},
    {"replicas", "table_rules"},
    {"input_pipeline", "throughput", "embeddings", "losses", "metrics", "significance", "calibration"},
    {"backbones", "optimizers", "distribution"},
    {"clsd"},
    {"train_config", "callbacks"},
    {"checkpoints"},
    {"assembly"},
    {"warm_start"},
    {"fit"},
    {"teachers"},
    {"training"},
    {"evaluation", "confidence_report", "profile_features"},
    {"prequential", "report", "study_metrics", "user_errors"},
    {"daily", "study", "user_intervals"},
    {"daily_report", "study_tables"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
COMMANDS = {
    "pipelines.build_dataset", "pipelines.check_spec", "pipelines.confidence_report", "pipelines.convert_kuairand",
    "pipelines.demo", "pipelines.evaluate", "pipelines.fetch_movielens", "pipelines.infer_spec",
    "pipelines.rank_profile_features", "pipelines.simulate_feed", "pipelines.study", "pipelines.train",
    "pipelines.train_daily",
    "export.client", "export.contract", "export.main", "export.manage", "export.predict", "export.serve",
    "export.verify", "pipelines.predict", "pipelines.validate_data",
}  # fmt: skip


def modules():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield name, ast.parse(path.read_text(encoding="utf-8"))


MODULES = dict(modules())


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name):
    """clsd_tf.backbones.dnn.Dnn -> backbones."""
    parts = name.split(".")
    return parts[1] if parts[0] == "clsd_tf" and len(parts) > 1 and parts[1] in LEVEL else None


@pytest.mark.parametrize("name", MODULES)
def test_rooms_import_only_rooms_below_them(name):
    own = room(name)
    if own is None:
        assert not name.startswith("clsd_tf.") or name == "clsd_tf", f"{name} has no level: add it to LEVELS"
        return
    wrong = [
        other
        for other in imported(MODULES[name])
        if room(other) not in (None, own) and LEVEL[room(other)] >= LEVEL[own]
    ]
    assert not wrong
    assert not [
        other for other in imported(MODULES[name]) if other.split(".")[0] in ("pipelines", "export", "feature_specs")
    ]


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("apache_beam", ("pipelines.",)),
        ("absl.flags", tuple(COMMANDS)),
        ("tensorflow_serving", ("export.",)),
        ("tensorflow_datasets", ("pipelines.",)),
        (
            "matplotlib",
            (
                "clsd_tf.plots",
                "clsd_tf.report",
                "clsd_tf.confidence_report",
                "clsd_tf.daily_report",
                "clsd_tf.data_report",
                "clsd_tf.study_tables",
            ),
        ),
        ("jinja2", ("clsd_tf.plots",)),
        ("pickle", ()),
        ("keras", ()),
    ],
)
def test_libraries_stay_in_their_rooms(library, allowed):
    users = [
        name for name, tree in MODULES.items() if any(f"{other}.".startswith(f"{library}.") for other in imported(tree))
    ]
    assert [name for name in users if not name.startswith(allowed)] == []


def test_pipelines_and_export_do_not_know_each_other():
    for name, tree in MODULES.items():
        for other in imported(tree):
            assert not (name.startswith("pipelines") and other.startswith("export"))
            assert not (name.startswith("export") and other.startswith(("pipelines", "feature_specs")))


def test_every_module_with_a_main_is_listed_as_a_command():
    with_main = {
        name
        for name, tree in MODULES.items()
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
    }
    assert with_main == COMMANDS


def test_no_command_is_imported_by_anything():
    for name, tree in MODULES.items():
        assert not [
            other for other in imported(tree) if any(other.startswith(f"{command}.") for command in COMMANDS)
        ], name


def test_the_verifier_of_servables_does_not_import_clsd_tf():
    assert not [
        other
        for name in ("export", "export.verify")
        for other in imported(MODULES[name])
        if other.startswith("clsd_tf")
    ]


def test_the_spec_types_need_no_tensorflow():
    rooms = ("validation", "model_inputs", "expectations", "tables", "feature_types", "features", "artifacts")
    for name in ("clsd_tf", "feature_specs", *(f"clsd_tf.{room}" for room in rooms)):
        assert not [other for other in imported(MODULES[name]) if other.split(".")[0] in ("tensorflow", "apache_beam")]
