"""Packages import only packages below them, and heavy or command-only libraries stay in their rooms."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# In reading order, lowest first: a package imports only itself and packages above it in its list.
CLSD_TF = (
    "plugins", "commands", "metrics", "pages", "spec", "storage", "layers", "optimizers", "backbones", "data",
    "distributed", "statistics", "serving", "methods", "training", "evaluation", "continual", "study",
)  # fmt: skip
PIPELINES = ("sources", "rows", "spec_inference", "beam", "public_data", "studies")
EXPORT = ("clients", "publishing", "servable", "server", "contract_rules")
PACKAGES = [
    *(f"clsd_tf.{name}" for name in CLSD_TF),
    "feature_specs",
    *(f"pipelines.{name}" for name in PIPELINES),
    *(f"export.{name}" for name in EXPORT),
]
WITHOUT_TENSORFLOW = ("plugins", "metrics", "pages", "spec", "storage")
COMMANDS = {
    "pipelines.build_dataset", "pipelines.check_spec", "pipelines.confidence_report", "pipelines.convert_kuairand",
    "pipelines.demo", "pipelines.evaluate", "pipelines.fetch_movielens", "pipelines.infer_spec",
    "pipelines.rank_profile_features", "pipelines.simulate_feed", "pipelines.study", "pipelines.train",
    "pipelines.train_daily",
    "export.client", "export.contract", "export.main", "export.manage", "export.predict", "export.serve",
    "export.verify", "pipelines.predict", "pipelines.validate_data",
}  # fmt: skip


def modules():
    for package in ("clsd_tf", "export", "feature_specs", "pipelines"):
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


def package(name):
    """clsd_tf.backbones.dnn.Dnn -> clsd_tf.backbones; None outside of the packages."""
    return next((found for found in PACKAGES if f"{name}.".startswith(f"{found}.")), None)


def internal(tree):
    """What is imported of these packages: (package, name)."""
    return [(package(name), name) for name in imported(tree) if package(name)]


@pytest.mark.parametrize("name", MODULES)
def test_packages_import_only_packages_below_them(name):
    own = package(name)
    if own is None:
        assert name in {"clsd_tf", "pipelines", "export", *COMMANDS}, f"{name} is in no package"
        return
    below = PACKAGES[: PACKAGES.index(own) + 1]
    assert [other for found, other in internal(MODULES[name]) if found not in below] == []


def at_module_level(tree):
    """Imports that run when the module is imported: neither those of functions nor those for type checks."""
    nodes = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return imported(ast.Module(nodes, []))


def test_there_is_no_circle_of_modules():
    graph = {
        name: {
            found
            for other in at_module_level(tree)
            for found in (other, other.rpartition(".")[0])
            # A package's face is imported with each of its modules.
            if found in MODULES and found != name and not name.startswith(f"{found}.")
        }
        for name, tree in MODULES.items()
    }
    left = dict(graph)
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert sorted(left) == []


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("apache_beam", ("pipelines.beam.",)),
        ("absl.flags", ("clsd_tf.commands.", *COMMANDS)),
        ("tensorflow_serving", ("export.",)),
        ("tensorflow_datasets", ("pipelines.",)),
        (
            "matplotlib",
            (
                "clsd_tf.pages.plots",
                "clsd_tf.evaluation.report",
                "clsd_tf.methods.clsd.confidence_report",
                "clsd_tf.continual.report",
                "clsd_tf.statistics.report",
                "clsd_tf.study.tables",
            ),
        ),
        ("jinja2", ("clsd_tf.pages.plots",)),
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
        for name in ("export", "export.verify", "export.servable", "export.servable.warmup")
        for other in imported(MODULES[name])
        if other.startswith("clsd_tf")
    ]


def test_the_packages_that_need_no_tensorflow_import_none():
    for name, tree in MODULES.items():
        if package(name) in {"feature_specs", *(f"clsd_tf.{lowest}" for lowest in WITHOUT_TENSORFLOW)}:
            heavy = [other for other in imported(tree) if other.split(".")[0] in ("tensorflow", "apache_beam")]
            assert heavy == [], name
