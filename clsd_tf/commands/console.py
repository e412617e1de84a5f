"""Console of the commands: quiet start, progress, tables, and errors without a traceback."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import rich.box
import rich.console
import rich.markup
import rich.measure
import rich.progress
import rich.table
from absl import app, flags, logging

from clsd_tf.commands.interruption import EXIT_CODE, TrainingInterruptedError
from clsd_tf.plugins.loading import load_plugins

console = rich.console.Console(stderr=False, highlight=False)
USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, RuntimeError)
flags.disclaim_key_flags()  # --help lists what ``run`` defines among the flags of the command that calls it.


def run(main: Callable[[Sequence[str]], None], flags_parser: Callable[[list[str]], list[str]] | None = None) -> None:
    """Runs a command, after its plug-ins are loaded: those of --plugin, a flag of every command, and of entry points.

    A user's mistake ends with its message and status 1, anything else with a traceback. Where SIGTERM interrupted
    training, a line says how to go on, and the status is ``interruption.EXIT_CODE``.

    Args:
      main: takes what is left of the command line, the program's name first.
      flags_parser: from the command line to what ``main`` takes; by default a flag that is not known is an error.
    """
    flags.DEFINE_multi_string("plugin", [], "Module of yours that registers backbones and the like; may be repeated.")

    def guarded(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        try:
            load_plugins(plugins())
            main(argv)
        except TrainingInterruptedError as interruption:
            console.print(rich.markup.escape(str(interruption)), soft_wrap=True)
            sys.exit(EXIT_CODE)
        except USER_ERRORS as error:
            rich.console.Console(stderr=True, highlight=False, soft_wrap=True).print(
                f"[bold red]error:[/] {rich.markup.escape(str(error))}"
            )
            sys.exit(1)

    app.run(guarded, flags_parser=flags_parser) if flags_parser else app.run(guarded)


def plugins() -> list[str]:
    """The modules that --plugin names, for processes that a command starts."""
    return flags.FLAGS.plugin


def warn(message: str | None) -> None:
    """Prints a warning.

    Args:
      message: None prints nothing.
    """
    if message is not None:
        console.print(f"[yellow]warning:[/] {rich.markup.escape(message)}", soft_wrap=True)


class _LiveText(rich.progress.ProgressColumn):
    """The text that a function gives at each refresh."""

    def __init__(self, text: Callable[[], str]):
        super().__init__()
        self._text = text

    def render(self, task: rich.progress.Task) -> str:
        return self._text()


@contextlib.contextmanager
def step(title: str, progress_text: Callable[[], str] = str) -> Iterator[Callable[[str], None]]:
    """Shows a spinner with the elapsed time while a step runs, then one line with what it did.

    Args:
      title: of the step.
      progress_text: how far it is, asked several times a second.

    Yields:
      A function that sets the text shown behind the title in the final line.
    """
    details: list[str] = []
    start = time.monotonic()
    progress = rich.progress.Progress(
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("{task.description}"),
        rich.progress.TimeElapsedColumn(),
        _LiveText(progress_text),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress:
        progress.add_task(title)
        yield details.append
    seconds = time.monotonic() - start
    console.print(f"[green]done[/] {title} [dim]{seconds:.1f} s[/] {' '.join(details)}", soft_wrap=True)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table at its full width: text left-aligned, numbers right-aligned, nothing cut off.

    Args:
      title: a line above it.
      columns: names.
      rows: of one value per column: text as it is, numbers as ``format_number`` has them.
    """
    rows = [list(row) for row in rows]
    result = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for index, name in enumerate(columns):
        is_text = all(isinstance(row[index], str) for row in rows)
        result.add_column(name, justify="left" if is_text else "right", no_wrap=True)
    for row in rows:
        result.add_row(*(value if isinstance(value, str) else format_number(value) for value in row))
    wide = console.options.update(max_width=10_000)
    width = rich.measure.Measurement.get(console, wide, result).maximum
    console.print(f"[bold]{rich.markup.escape(title)}[/]", soft_wrap=True)
    rich.console.Console(file=console.file, width=width, highlight=False).print(result)


def format_number(value: object) -> str:
    """Formats a ``value`` for a table.

    Returns:
      Integers with thousands separators, fractions with 4 decimals, None as "-".
    """
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
