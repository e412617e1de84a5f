"""Prints the numbers of the house: how the code is cut into packages, and how much of it is documented.

Example:
  python -m benchmarks.house
  python -m benchmarks.house --list=args

All of them are read from the source, but for the time of an import, which is measured in a fresh process. With --list
come the places that stand against one of them.
"""

import dataclasses
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from absl import flags

from benchmarks import source_code
from clsd_tf.commands import console

ROOT = pathlib.Path(__file__).parent.parent
LIBRARY = ("clsd_tf", "export", "feature_specs", "pipelines")
CLSD = "clsd_tf.methods.clsd."
LONGEST_FUNCTION = 44
_OPENINGS = re.compile(r"(What|Which|Whether|How)\b")
_IMPORT = (
    "import sys, time; start = time.perf_counter(); import clsd_tf.training.config; "
    "print(time.perf_counter() - start, 'tensorflow' in sys.modules)"
)

Modules = Mapping[str, source_code.Module]


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number of the house.

    Attributes:
      name: how --list asks for it.
      title: with the unit.
      found: the number.
      lowest, highest: the target; None for no limit.
      against: places that keep the number from being better, a line each.
    """

    name: str
    title: str
    found: float
    lowest: float | None = None
    highest: float | None = None
    against: Sequence[str] = ()

    @property
    def holds(self) -> bool:
        return (self.lowest is None or self.found >= self.lowest) and (
            self.highest is None or self.found <= self.highest
        )

    @property
    def row(self) -> list[str]:
        """The cells of the table: title, number, target, and whether it holds."""
        if self.lowest is None and self.highest is None:
            return [self.title, f"{self.found:.4g}", "", ""]
        target = f">= {self.lowest:g}" if self.highest is None else f"<= {self.highest:g}"
        return [self.title, f"{self.found:.4g}", target, "yes" if self.holds else "NO"]


def shape(modules: Modules) -> list[Measure]:
    """Rooms and floors of clsd_tf, and circles anywhere in ``modules``."""
    graph = source_code.import_graph(modules)
    rooms = source_code.rooms_graph(graph, "clsd_tf")
    rooms = {room: below - {"clsd_tf.__init__"} for room, below in rooms.items() if room != "clsd_tf.__init__"}
    circles = [" -> ".join(circle) for circle in source_code.circles(graph)]
    of_packages = [
        " -> ".join(circle)
        for folder in source_code.folders(modules)
        for circle in source_code.circles(source_code.rooms_graph(graph, folder))
    ]
    return [
        Measure("rooms", "rooms at the top of clsd_tf", len(rooms), highest=20, against=sorted(rooms)),
        Measure("floors", "floors: packages on the longest chain of imports", source_code.num_floors(rooms), highest=9),
        Measure("circles", "circles of modules", len(circles), highest=0, against=circles),
        Measure("package_circles", "circles within a folder", len(of_packages), highest=0, against=of_packages),
    ]


def knowledge_of_clsd(modules: Modules) -> Measure:
    """Files outside of clsd_tf/methods/clsd that name one of its classes, in code or text."""
    inside = [module for name, module in modules.items() if name.startswith(CLSD)]
    classes = sorted(set().union(*(source_code.public_classes(module) for module in inside)))
    word = re.compile(rf"\b({'|'.join(classes)})\b")
    against = [
        f"{module.path}: {', '.join(sorted(set(found)))}"
        for module in modules.values()
        if module not in inside and (found := word.findall(module.text))
    ]
    return Measure(
        "clsd", "files that name CLSD's classes, outside of its folder", len(against), highest=3, against=against
    )


def longest_function(modules: Modules) -> Measure:
    """Lines of the longest function, without its docstring."""
    found = [function for module in modules.values() for function in source_code.function_lengths(module)]
    against = [f"{place}: {lines} lines" for place, lines in sorted(found, key=lambda each: -each[1])[:20]]
    longest = max(lines for _, lines in found)
    return Measure("length", "longest function, lines", longest, highest=LONGEST_FUNCTION, against=against)


def documentation(modules: Modules) -> list[Measure]:
    """Shares of public functions with arguments that document them and their results, in per cent."""
    every = [function for module in modules.values() for function in source_code.public_functions(module)]
    with_arguments = [function for function in every if function.arguments]
    returning = [function for function in with_arguments if function.returns]
    return [
        _share("args", "Args", with_arguments, lambda function: function.documents_arguments),
        _share(
            "returns",
            "Returns or Yields, of those that return something",
            returning,
            lambda function: function.documents_result,
        ),
    ]


def _share(name: str, title: str, functions: list, documented: Callable[[source_code.Function], bool]) -> Measure:
    against = [function.place for function in functions if not documented(function)]
    share = 100 * (1 - len(against) / len(functions))
    return Measure(name, f"public functions with arguments that have {title}, %", share, lowest=80, against=against)


def openings(modules: Modules) -> Measure:
    """Docstrings that begin with a question word, in per cent."""
    every = [found for module in modules.values() for found in source_code.docstrings(module)]
    against = [f"{place} {text.splitlines()[0]}" for place, text in every if _OPENINGS.match(text)]
    title = "docstrings that open with What, Which, Whether or How, %"
    return Measure("openings", title, 100 * len(against) / len(every), highest=0, against=against)


def comments(modules: Modules) -> Measure:
    """Comments per 1000 lines."""
    lines = sum(len(module.text.splitlines()) for module in modules.values())
    return Measure(
        "comments",
        "comments per 1000 lines",
        1000 * sum(map(source_code.Module.num_comments, modules.values())) / lines,
    )


def config_import() -> list[Measure]:
    """Seconds to import the training config in a fresh process, and whether that imports TensorFlow."""
    done = subprocess.run([sys.executable, "-c", _IMPORT], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, tensorflow = done.stdout.split()
    return [
        Measure("import", "import clsd_tf.training.config, seconds", float(seconds), highest=2),
        Measure("tensorflow", "TensorFlow imported by it", int(tensorflow == "True"), highest=0),
    ]


def measures(root: pathlib.Path) -> list[Measure]:
    """All numbers that the source under ``root`` gives."""
    library = source_code.read_modules(root, LIBRARY)
    with_benchmarks = source_code.read_modules(root, (*LIBRARY, "benchmarks"))
    return [
        *shape(library),
        knowledge_of_clsd(with_benchmarks),
        longest_function(with_benchmarks),
        *documentation(library),
        openings(with_benchmarks),
        comments(library),
    ]


_LIST = flags.DEFINE_string("list", None, "Prints the places against one number, by its name in the table.")


def main(argv) -> None:
    found = measures(ROOT)
    if _LIST.value:
        names = {measure.name: measure for measure in found}
        if _LIST.value not in names:
            raise ValueError(f"--list names a number. Received: {_LIST.value}. Allowed: {', '.join(names)}")
        print(*names[_LIST.value].against, sep="\n")
        return
    rows = [[measure.name, *measure.row] for measure in [*found, *config_import()]]
    console.print_table("The house", ["--list", "number", "found", "target", "holds"], rows)


if __name__ == "__main__":
    console.run(main)
