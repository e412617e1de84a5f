"""``clsd <name>``: every command under one roof, each as ``python -m <module>`` runs it.

Nothing of a command is imported before it is chosen: help and completion come from its source.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.resources
import importlib.util
import sys
from collections.abc import Iterator

import click
from click.shell_completion import CompletionItem

import clsd_tf

# In the order of the job.
COMMANDS = {
    "demo": "pipelines.demo",
    "fetch-movielens": "pipelines.fetch_movielens",
    "convert-kuairand": "pipelines.convert_kuairand",
    "simulate-feed": "pipelines.simulate_feed",
    "infer-spec": "pipelines.infer_spec",
    "check-spec": "pipelines.check_spec",
    "build": "pipelines.build_dataset",
    "validate-data": "pipelines.validate_data",
    "train": "pipelines.train",
    "train-daily": "pipelines.train_daily",
    "evaluate": "pipelines.evaluate",
    "confidence-report": "pipelines.confidence_report",
    "rank-profile-features": "pipelines.rank_profile_features",
    "study": "pipelines.study",
    "export": "export.main",
    "contract": "export.contract",
    "manage": "export.manage",
    "serve": "export.serve",
    "client": "export.client",
    "predict": "export.predict",
    "predict-bulk": "pipelines.predict",
}


class _Command(click.Command):
    """A module with a main. Its arguments are left as they are: absl reads them."""

    def __init__(self, name: str, module: str):
        super().__init__(name)
        self._module = module

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.args = args
        return args

    def invoke(self, ctx: click.Context) -> tuple[str, str, list[str]]:
        return self._module, ctx.command_path, ctx.args

    def get_short_help_str(self, limit: int = 45) -> str:
        return (ast.get_docstring(self._source()) or "").splitlines()[0]

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        if not incomplete.startswith("-"):
            return [CompletionItem(incomplete, type="file")]
        flags = [f"--{name}" for name in (*_flag_names(self._source()), "plugin", "help")]
        return [CompletionItem(flag) for flag in flags if flag.startswith(incomplete)]

    def _source(self) -> ast.Module:
        package, _, name = self._module.rpartition(".")
        return ast.parse((importlib.resources.files(package) / f"{name}.py").read_text(encoding="utf-8"))


def _flag_names(source: ast.Module) -> Iterator[str]:
    """Names in ``flags.DEFINE_<type>("name", ...)``, in their order."""
    for node in ast.walk(source):
        match node:
            case ast.Call(func=ast.Attribute(attr=define), args=[ast.Constant(value=str(name)), *_]):
                if define.startswith("DEFINE_"):
                    yield name


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)


@click.group(
    cls=_Commands,
    commands={name: _Command(name, module) for name, module in COMMANDS.items()},
    context_settings={"max_content_width": 120},
    epilog="`clsd COMMAND --help` explains each.",
)
@click.version_option(clsd_tf.__version__, prog_name="clsd")
def _clsd() -> None:
    """Click-through rates with click confidence, from raw logs to a served model."""


def clsd() -> None:
    """The console script ``clsd``."""
    try:
        chosen = _clsd.main(prog_name="clsd", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    if isinstance(chosen, tuple):  # Help and version give a status.
        _run_as_main(*chosen)


def _run_as_main(module: str, program: str, arguments: list[str]) -> None:
    """As ``python -m`` runs a module, under the name of the program that was called.

    Not by ``runpy``, which names it after its file, and not within click, which takes Ctrl-C for itself.
    """
    spec = importlib.util.find_spec(module)
    code = spec.loader.get_code(module) if spec and isinstance(spec.loader, importlib.abc.InspectLoader) else None
    if spec is None or code is None:
        raise ModuleNotFoundError(f"this installation of clsd_tf has lost a module. Missing: {module}")
    main = importlib.util.module_from_spec(spec)
    main.__name__ = "__main__"
    sys.modules["__main__"] = main
    sys.argv = [program, *arguments]
    exec(code, vars(main))
