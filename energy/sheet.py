"""Tables and plots as one HTML page that needs nothing from anywhere else. Knows nothing of what they show."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from energy.charts import STYLE

_HTML = Path(__file__).with_name("sheet.html")


@dataclass(frozen=True, slots=True)
class Line:
    """A sentence below a table."""

    text: str
    bad: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text; the first column is to the left."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    below: Sequence[Line] = ()
    has_total: bool = False


def render(
    title: str,
    subtitle: str,
    notes: Sequence[str],
    tables: Sequence[Table],
    plots: Sequence[tuple[str, str]],
    limits: str,
) -> str:
    """The page; ``plots`` are names and SVG, ``limits`` is what its figures do not say."""
    template = jinja2.Environment(autoescape=True).from_string(_HTML.read_text(encoding="utf-8"))
    return template.render(
        title=title, subtitle=subtitle, notes=notes, tables=tables, plots=plots, limits=limits, chart_style=STYLE
    )
