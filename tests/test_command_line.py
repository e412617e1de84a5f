"""``clsd``: the commands under one roof, named, listed and completed without importing them."""

import ast
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from test_layering import COMMANDS as MAINS

import clsd_tf
from clsd_tf.commands.command_line import COMMANDS

ROOT = pathlib.Path(__file__).parent.parent
_START = "from clsd_tf.commands.command_line import clsd; clsd()"


def clsd(*arguments, start=_START, cwd=None, **environment):
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-c", start, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_main_has_a_name():
    assert set(COMMANDS.values()) == MAINS - {"export.verify"}  # A step of export.


def test_help_lists_the_commands_in_the_order_of_the_job_with_their_first_lines():
    listed = clsd("--help", COLUMNS="200").stdout.partition("Commands:\n")[2].splitlines()
    first_lines = [
        ast.get_docstring(ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")))
        .splitlines()[0]
        for module in COMMANDS.values()
    ]  # fmt: skip
    expected = [[name, text] for name, text in zip(COMMANDS, first_lines, strict=True)]
    assert [line.strip().split(maxsplit=1) for line in listed[: len(COMMANDS)]] == expected


def test_help_imports_no_heavy_library():
    start = f"""
import sys
try:
    {_START}
finally:
    print(sorted({{"tensorflow", "apache_beam", "pyarrow", "numpy", "rich"}} & set(sys.modules)))
"""
    done = clsd("--help", start=start)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_the_version_is_that_of_the_package():
    assert clsd("--version").stdout == f"clsd, version {clsd_tf.__version__}\n"


def test_an_unknown_command_is_refused_with_the_nearest_one():
    done = clsd("trian")
    assert done.returncode == 2
    assert "No such command 'trian'. Did you mean" in done.stderr


_OWN = """
import sys
print(__name__, __spec__.name, sys.argv, sys.modules["__main__"].__spec__ is __spec__)
if "--stop" in sys.argv:
    raise KeyboardInterrupt
"""
_COUNTING = """'Counts sheep.'
from absl import flags
from clsd_tf.commands import console

SHEEP = flags.DEFINE_integer("num_sheep", 3, "How many.")
if __name__ == "__main__":
    console.run(lambda argv: print(SHEEP.value, argv))
"""
_WITH_OWN = """
from clsd_tf.commands import command_line
command_line._clsd.add_command(command_line._Command("own", "own_main"))
command_line.clsd()
"""


@pytest.fixture
def own(tmp_path):
    """(arguments, source) -> what ``clsd own`` gives; by default it prints what it is started with."""

    def run(*arguments, source=_OWN):
        (tmp_path / "own_main.py").write_text(source, encoding="utf-8")
        return clsd("own", *arguments, start=_WITH_OWN, cwd=tmp_path)

    return run


def test_a_command_gets_its_arguments_as_they_are_and_runs_as_the_main_module(own):
    arguments = ["list", "--name=x y", "--set", "a=b", "-v", "--", "--help", "--version"]
    done = own(*arguments)
    assert done.stdout == f"__main__ own_main {['clsd own', *arguments]} True\n", done.stderr


def test_help_and_arguments_of_a_command_name_it_as_it_was_called(own):
    assert own("--num_sheep=7", "black", source=_COUNTING).stdout == "7 ['clsd own', 'black']\n"
    text = own("--help", source=_COUNTING).stdout
    assert text.startswith("Counts sheep.\nflags:\n\nclsd own:\n  --num_sheep: How many.")
    assert "  --plugin: Module of yours" in text
    done = own("--num_ship=7", source=_COUNTING)
    assert (done.returncode, "Did you mean: num_sheep" in done.stderr) == (1, True)


def test_ctrl_c_ends_a_command_by_the_signal(own):
    done = own("--stop")
    assert done.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in done.stderr


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("clsd confid", ["plain,confidence-report"]),
        ("clsd train --wo", ["plain,--work_dir"]),
        ("clsd train --pl", ["plain,--plugin"]),
        ("clsd train --work_dir=ru", ["file,ru"]),  # The shell completes files.
    ],
)
def test_names_flags_and_files_are_completed(words, completed):
    words = words.replace("=", " = ")  # As bash splits them.
    done = clsd(_CLSD_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(len(words.split()) - 1))
    assert done.stdout.split() == completed, done.stderr
