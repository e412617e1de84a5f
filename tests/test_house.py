"""The numbers of the house: what counts as a circle, a floor, a documented function."""

import math

import pytest

from benchmarks import house, source_code

FLOORS = {"roof": {"hall", "cellar"}, "hall": {"cellar"}, "cellar": set()}


def module(text, path="clsd_tf/room/file.py"):
    name = path.removesuffix(".py").replace("/", ".")
    return source_code.Module(name, path, text, source_code.ast.parse(text))


def functions(text):
    return {found.place.split(" ")[1]: found for found in source_code.public_functions(module(text))}


def test_floors_are_the_names_on_the_longest_chain():
    assert source_code.num_floors(FLOORS) == 3
    assert source_code.num_floors({**FLOORS, "cellar": {"roof"}}) == math.inf


def test_circles_hold_those_that_import_one_another_and_not_those_that_lead_there():
    assert source_code.circles(FLOORS) == []
    assert source_code.circles({"roof": {"hall"}, "hall": {"cellar"}, "cellar": {"hall"}}) == [["cellar", "hall"]]


def test_imports_for_type_checkers_are_none():
    text = "import a\nif TYPE_CHECKING:\n    import b\ndef late():\n    from c import d"
    assert list(module(text).imported_names()) == ["a", "c.d"]


def test_two_packages_whose_modules_form_no_circle_can_form_one():
    modules = {
        "clsd_tf.a.low": module("", "clsd_tf/a/low.py"),
        "clsd_tf.b.middle": module("from clsd_tf.a import low", "clsd_tf/b/middle.py"),
        "clsd_tf.a.high": module("def late():\n    from clsd_tf.b.middle import name", "clsd_tf/a/high.py"),
    }
    found = {measure.name: measure for measure in house.shape(modules)}
    assert found["circles"].holds
    assert found["package_circles"].against == ["clsd_tf.a -> clsd_tf.b"]
    assert (found["rooms"].found, found["floors"].found) == (2, math.inf)


def test_public_functions_are_those_that_the_project_documents_itself():
    text = """
def join(left, right): ...
def _private(x): ...
def main(argv): ...
@functools.cache
def cached(key): ...
@version_rule(title="Variables are files", why="Others are not loaded.")
def variables(version): ...
class Layer(Base):
    def __init__(self, units): ...
    def call(self, inputs): ...
    def rows(self): ...
    @staticmethod
    def made(size): ...
class _Hidden:
    def rows(self, x): ...
"""
    assert {name: found.arguments for name, found in functions(text).items()} == {
        "join": ("left", "right"),
        "cached": ("key",),
        "Layer.rows": (),
        "Layer.made": ("size",),
    }


@pytest.mark.parametrize(
    ("docstring", "arguments", "result"),
    [
        ("Adds.", False, False),
        ("Adds.\n\n    Args:\n      x: one.\n\n    Returns:\n      More.\n    ", True, True),
        ("Returns ``x`` and one.", True, True),
        ("Yields what was Args: and Returns: in prose.", False, True),
    ],
)
def test_a_function_is_documented_by_sections_or_by_its_one_sentence(docstring, arguments, result):
    (found,) = functions(f'def add(x: int) -> int:\n    """{docstring}"""').values()
    assert (found.documents_arguments, found.documents_result) == (arguments, result)


def test_several_arguments_need_a_section():
    (found,) = functions('def add(x, y):\n    """Adds ``x`` and ``y``."""').values()
    assert not found.documents_arguments


def test_a_docstring_does_not_make_a_function_longer():
    text = 'def add(x):\n    """Adds.\n\n    Much.\n    """\n    x += 1\n    return x'
    assert list(source_code.function_lengths(module(text))) == [("clsd_tf/room/file.py:1 add", 3)]
