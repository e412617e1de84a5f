"""The HTML reports' common page, and the look of their plots."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
import markupsafe
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")  # Okabe-Ito.
LINE_STYLE: dict[str, Any] = {"linewidth": 1.6, "marker": "o", "markersize": 3.5}
_MAX_PANELS_A_LINE = 4


def render_page(template: pathlib.Path, **values: Any) -> str:
    """Renders a template that may extend ``page.html``.

    Args:
      template: a jinja2 file; templates beside it and in this package are found by name.
      **values: of the names in the template; text is escaped when it is inserted.

    Returns:
      The HTML page.

    Raises:
      jinja2.UndefinedError: the template uses a name that ``values`` lacks.
    """
    directories = [template.parent, pathlib.Path(__file__).parent]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(directories), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template.name).render(**values)


def svg(figure: Figure) -> markupsafe.Markup:
    """Draws a figure as an ``<svg>`` element.

    Args:
      figure: its texts, which may hold values of the data, are drawn as they are, without math.

    Returns:
      Markup that templates do not escape again.
    """
    buffer = io.StringIO()
    for text in figure.findobj(Text):  # Those there are; drawing makes more.
        text.set_parse_math(False)
    with matplotlib.rc_context({"text.parse_math": False}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    page = buffer.getvalue()
    return markupsafe.Markup(page[page.index("<svg") :])


def tidy(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Labels a plot and takes away what is not data.

    Args:
      axes: the plot.
      title: above it, to the left.
      x_label: empty for none.
      y_label: empty for none.
    """
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def panel_grid(num_panels: int, panel_size: tuple[float, float]) -> tuple[Figure, Sequence[Axes]]:
    """Creates a figure of small panels with common axes, four a line.

    Args:
      num_panels: >= 1.
      panel_size: (width, height) of each in inches.

    Returns:
      The figure, and its ``num_panels`` panels line by line.
    """
    columns = min(_MAX_PANELS_A_LINE, num_panels)
    lines = -(-num_panels // columns)
    figure = Figure(figsize=(panel_size[0] * columns, panel_size[1] * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes in panels[num_panels:]:
        axes.set_visible(False)
    return figure, panels[:num_panels]
