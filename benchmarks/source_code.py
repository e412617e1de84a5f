"""Source code read with ``ast``: modules, the graph of their imports, and their functions with what docstrings say."""

from __future__ import annotations

import ast
import dataclasses
import graphlib
import io
import math
import pathlib
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping

Graph = Mapping[str, set[str]]  # Name -> names that it imports.

_ARGS = re.compile(r"^ *Args:$", re.MULTILINE)
# A summary that begins with the verb needs no section of its own (Google's style guide).
_RETURNS = re.compile(r"^ *(Returns|Yields):$|\A(Returns|Yields)\b", re.MULTILINE)
_DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef
# Called and documented by Keras, Beam, TensorFlow and gRPC, whose methods begin with a capital.
_OVERRIDES = re.compile(
    "build|call|compile|fit|from_config|get_config|reset_state|result|on_.*|make_train_function|(test|train|update)_step|"
    "update_state|deserialize|serialize|expand|process|setup|start_bundle|finish_bundle|get_metrics_namespace|"
    "get_num_bytes|load_model|run_inference|should_skip_batching|intercept_service|[A-Z].*"
)
_RULE_DECORATORS = {"base_rule", "version_rule"}


@dataclasses.dataclass(frozen=True)
class Module:
    """A file of Python.

    Attributes:
      name: dotted; a package's own file ends in ``.__init__``.
      path: relative to the repository.
      text: the file's.
      tree: the text, parsed.
    """

    name: str
    path: str
    text: str
    tree: ast.Module

    def imported_names(self) -> Iterator[str]:
        """Yields dotted names, also of imports within functions; not those that only type checkers see."""
        unseen = {id(inner) for node in ast.walk(self.tree) if _is_for_checkers(node) for inner in ast.walk(node)}
        for node in ast.walk(self.tree):
            if id(node) in unseen:
                continue
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)

    def num_comments(self) -> int:
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return sum(token.type == tokenize.COMMENT for token in tokens)


@dataclasses.dataclass(frozen=True)
class Function:
    """A function or method that others may call.

    Attributes:
      place: path:line name.
      arguments: without ``self`` and ``cls``.
      docstring: empty where there is none.
      returns: whether the annotation names something other than None.
    """

    place: str
    arguments: tuple[str, ...]
    docstring: str
    returns: bool

    @property
    def documents_arguments(self) -> bool:
        """An Args section, or a single argument that the text names in backticks."""
        (only,) = self.arguments if len(self.arguments) == 1 else (None,)
        return bool(_ARGS.search(self.docstring)) or f"`{only}`" in self.docstring

    @property
    def documents_result(self) -> bool:
        return bool(_RETURNS.search(self.docstring))


def _is_for_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def read_modules(root: pathlib.Path, packages: Iterable[str]) -> dict[str, Module]:
    """Reads the files below ``packages``.

    Args:
      root: the repository.
      packages: names of directories in it.

    Returns:
      Name -> module, sorted by name.
    """
    found = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            relative, text = path.relative_to(root), path.read_text(encoding="utf-8")
            name = ".".join(relative.with_suffix("").parts)
            found[name] = Module(name, str(relative), text, ast.parse(text))
    return dict(sorted(found.items()))


def import_graph(modules: Mapping[str, Module]) -> Graph:
    """Module -> modules of ``modules`` that it imports."""

    def target(name: str) -> str | None:
        parent = name.rpartition(".")[0]
        places = (name, f"{name}.__init__", parent, f"{parent}.__init__")
        return next((place for place in places if place in modules), None)

    return {
        name: {found for other in module.imported_names() if (found := target(other))} - {name}
        for name, module in modules.items()
    }


def rooms_graph(graph: Graph, folder: str) -> Graph:
    """Makes a graph of what lies at the top of a folder, packages and modules alike.

    Args:
      graph: of modules.
      folder: dotted; empty for the repository.

    Returns:
      Room -> rooms of the folder that it imports; the folder's ``__init__`` is a room, too.
    """
    depth = len(folder.split(".")) if folder else 0
    inside = {
        name: ".".join(name.split(".")[: depth + 1]) for name in graph if not folder or name.startswith(f"{folder}.")
    }
    rooms: dict[str, set[str]] = {room: set() for room in inside.values()}
    for name, room in inside.items():
        rooms[room] |= {inside[other] for other in graph[name] if other in inside} - {room}
    return rooms


def folders(modules: Iterable[str]) -> list[str]:
    """Dotted names of all folders with ``modules`` below them, the repository's empty one among them."""
    parts = [name.split(".") for name in modules]
    return sorted({".".join(found[:depth]) for found in parts for depth in range(len(found))})


def circles(graph: Graph) -> list[list[str]]:
    """Finds the largest groups of names of ``graph`` that all import one another, over however many steps."""
    reached = {name: _reachable(graph, name) for name in graph}
    groups = {
        tuple(sorted(other for other in reached[name] if name in reached[other]))
        for name in graph
        if name in reached[name]
    }
    return sorted(list(group) for group in groups)


def _reachable(graph: Graph, start: str) -> set[str]:
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph[name]
    return found


def num_floors(graph: Graph) -> float:
    """Counts the names on the longest chain of imports in ``graph``; infinite where there is a circle."""
    floors: dict[str, int] = {}
    try:
        for name in graphlib.TopologicalSorter(graph).static_order():
            floors[name] = 1 + max((floors[below] for below in graph[name]), default=0)
    except graphlib.CycleError:
        return math.inf
    return max(floors.values(), default=0)


def public_functions(module: Module) -> Iterator[Function]:
    """Yields functions and methods of public classes of ``module``; no ``main``, overrides, dunders and setters.

    Nor functions that ``export.contract_rules.rules`` turns into a rule: its title and reason document it.
    """
    for node in module.tree.body:
        if isinstance(node, _DEFINITIONS) and _is_public(node.name) and node.name != "main" and not _is_rule(node):
            yield _function(module, node, node.name, _argument_names(node))
        elif isinstance(node, ast.ClassDef) and _is_public(node.name):
            yield from _public_methods(module, node)


def _is_rule(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    calls = [decorator.func for decorator in node.decorator_list if isinstance(decorator, ast.Call)]
    return any(isinstance(function, ast.Name) and function.id in _RULE_DECORATORS for function in calls)


def _public_methods(module: Module, cls: ast.ClassDef) -> Iterator[Function]:
    for node in cls.body:
        if not isinstance(node, _DEFINITIONS) or not _is_public(node.name):
            continue
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        if (cls.bases and _OVERRIDES.fullmatch(node.name)) or any(name.endswith(".setter") for name in decorators):
            continue
        names = _argument_names(node)
        yield _function(module, node, f"{cls.name}.{node.name}", names if "staticmethod" in decorators else names[1:])


def _function(
    module: Module, node: ast.FunctionDef | ast.AsyncFunctionDef, name: str, arguments: tuple[str, ...]
) -> Function:
    annotation = ast.unparse(node.returns) if node.returns else "None"
    docstring = ast.get_docstring(node) or ""
    return Function(f"{module.path}:{node.lineno} {name}", arguments, docstring, annotation != "None")


def _argument_names(node: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, ...]:
    every = [*node.args.posonlyargs, *node.args.args, node.args.vararg, *node.args.kwonlyargs, node.args.kwarg]
    return tuple(argument.arg for argument in every if argument)


def _is_public(name: str) -> bool:
    return not name.startswith("_")


def docstrings(module: Module) -> Iterator[tuple[str, str]]:
    """Yields (path:line, text) of the docstrings of ``module``, its classes and functions, private ones too."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Module | ast.ClassDef | _DEFINITIONS) and (text := ast.get_docstring(node)):
            yield f"{module.path}:{getattr(node, 'lineno', 1)}", text


def function_lengths(module: Module) -> Iterator[tuple[str, int]]:
    """Yields (path:line name, lines) of all functions of ``module``; a docstring's lines do not count."""
    for node in ast.walk(module.tree):
        if isinstance(node, _DEFINITIONS):
            without = _num_lines(node.body[0]) if ast.get_docstring(node) is not None else 0
            yield f"{module.path}:{node.lineno} {node.name}", _num_lines(node) - without


def _num_lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def public_classes(module: Module) -> set[str]:
    """Returns the names of public classes at the top of ``module``."""
    return {node.name for node in module.tree.body if isinstance(node, ast.ClassDef) and _is_public(node.name)}
