"""What ``import clsd_tf`` offers: names that are imported when they are asked for, and one version."""

import ast
import importlib
import pathlib
import subprocess
import sys

import pytest

import clsd_tf

ROOT = pathlib.Path(__file__).parent.parent


def names_for_type_checkers():
    """Name -> module, as the block that only editors and type checkers read has them."""
    tree = ast.parse(pathlib.Path(clsd_tf.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    return {alias.asname: node.module for node in block.body for alias in node.names}


def test_each_name_is_what_its_module_has_and_type_checkers_see_the_same():
    declared = names_for_type_checkers()
    assert sorted(declared) == clsd_tf.__all__
    for name, module in declared.items():
        assert getattr(clsd_tf, name) is getattr(importlib.import_module(module), name)
    assert set(clsd_tf.__all__) < set(dir(clsd_tf))


def test_an_unknown_name_is_refused_as_any_module_does():
    with pytest.raises(AttributeError, match=r"module 'clsd_tf' has no attribute 'ClsdModels'"):
        clsd_tf.ClsdModels  # noqa: B018
    with pytest.raises(ImportError, match=r"cannot import name 'ClsdModels' from 'clsd_tf'"):
        from clsd_tf import ClsdModels  # noqa: F401


def test_tensorflow_is_imported_for_the_names_that_need_it_only():
    code = """
import sys
import clsd_tf, clsd_tf.backbones
from clsd_tf import DatasetDir, FeatureSpec, WorkDir, load_plugins, register_backbone
print("tensorflow" in sys.modules)
from clsd_tf import build_model
print("tensorflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "True"], done.stderr


def setup(*arguments):
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_installed_has_the_version_of_the_package():
    assert setup("--version").split()[-1] == clsd_tf.__version__


def test_specs_studies_profiles_and_pages_are_installed_with_the_code(tmp_path):
    setup("egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path / "lib")
    packages = ("clsd_tf", "pipelines", "feature_specs", "export")
    needed = {
        path.relative_to(ROOT)
        for package in packages
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".yaml", ".html")
    }
    assert needed <= {path.relative_to(tmp_path / "lib") for path in (tmp_path / "lib").rglob("*")}
    assert not (tmp_path / "lib" / "tests").exists()
