"""Plots as SVG: axes, points, lines, bars. Needs only the standard library, and knows nothing of what is drawn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 16, 44
TICKS = 5
NAME_WIDTH, NAME_HEIGHT = 6.5, 13
"""Of a letter beside a point, about; names that would overlap are moved apart."""
COLOURS = ("a", "b", "c", "d", "e")
"""The classes that ``STYLE`` gives colours."""
STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #66707a; --line: #d8dde2; --paper: #fff;
  --a: #0b7a53; --b: #c26c00; --c: #3b6fd4; --d: #8a4fb5; --e: #6c6c6c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #98a2ab; --line: #39424a; --paper: #14191d;
    --a: #35b98a; --b: #f2a33c; --c: #7ea6f5; --d: #c795e8; --e: #a0a0a0; }
}
svg { width: 100%; font: 11px system-ui, sans-serif; fill: var(--soft); }
svg .title, svg .name { fill: var(--ink); } svg .paper { fill: var(--paper); }
.axis, .lead { stroke: var(--soft); fill: none; } .lead { stroke-width: .6; } .grid { stroke: var(--line); }
.a { --own: var(--a); } .b { --own: var(--b); } .c { --own: var(--c); } .d { --own: var(--d); } .e { --own: var(--e); }
circle, rect.a, rect.b, rect.c, rect.d, rect.e { fill: var(--own); }
polyline { fill: none; stroke: var(--own); stroke-width: 1.8; }
.legend { font-size: .85rem; } .legend span { margin-right: 1rem; }
.legend i { display: inline-block; width: .7rem; height: .7rem; margin-right: .35rem; background: var(--own); }
"""


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one kind; ``css`` is the class that gives them their colour."""

    name: str
    points: Sequence[tuple[float, float]]
    css: str
    line: bool = False
    labels: Sequence[str] = ()
    """One for each point, shown where the pointer rests on it."""
    named: bool = False
    """Whether the labels also stand beside the points."""


def plot(series: Sequence[Series], x_title: str, y_title: str, y_from_zero: bool = True) -> str:
    """``picture`` with a legend below it; a sentence where there is nothing to show."""
    if not any(each.points for each in series):
        return '<p class="empty">Nothing to show: no figure is known.</p>'
    return picture(series, x_title, y_title, y_from_zero) + _legend([(each.name, each.css) for each in series])


def picture(series: Sequence[Series], x_title: str, y_title: str, y_from_zero: bool = True) -> str:
    """Points and lines over two linear axes: that of x begins at zero, that of y where it is told to.

    At least one series must have a point.
    """
    points = [point for each in series for point in each.points]
    lowest = 0.0 if y_from_zero else min(y for _, y in points)
    x_ticks, y_ticks = ticks(max(x for x, _ in points)), ticks(max(y for _, y in points), lowest)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + x / x_ticks[-1] * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM),
        )

    parts = [_frame(x_title, y_title)]
    for tick in x_ticks:
        x, y = place(tick, y_ticks[0])
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{tick:g}</text>')
    parts += [_y_tick(place(0, tick)[1], tick) for tick in y_ticks]
    for each in series:
        places = [place(*point) for point in each.points]
        if each.line and len(places) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline class="{each.css}" points="{path}"/>')
            continue
        for number, (x, y) in enumerate(places):
            label = each.labels[number] if each.labels else each.name
            parts.append(
                f'<circle class="{each.css}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(label)}</title></circle>'
            )
    named = [
        (label, place(*point)) for s in series if s.named for label, point in zip(s.labels, s.points, strict=True)
    ]
    return _svg([*parts, *_names(named)])


def standalone(svg: str) -> str:
    """A picture as a file of its own, which brings its colours and follows those of the reader's system."""
    head, tag, body = svg.partition(">")
    size = f'xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}"'
    paper = '<rect class="paper" width="100%" height="100%"/>'
    return f"{head} {size}{tag}<style>{STYLE}</style>{paper}{body}\n"


def bars(groups: Sequence[tuple[str, Sequence[tuple[str, float, str]]]], y_title: str) -> str:
    """Bars side by side: ``(group, [(name, value, css), ...])``; a sentence where there is nothing to show."""
    values = [bar for _, group in groups for bar in group]
    if not values:
        return '<p class="empty">Nothing to show: no figure is known.</p>'
    y_ticks = ticks(max(value for _, value, _ in values))
    parts = [_frame("", y_title)]

    def height(value: float) -> float:
        return value / y_ticks[-1] * (HEIGHT - TOP - BOTTOM)

    parts += [_y_tick(HEIGHT - BOTTOM - height(tick), tick) for tick in y_ticks]
    slot = (WIDTH - LEFT - RIGHT) / len(groups)
    for place, (title, group) in enumerate(groups):
        width = 0.7 * slot / max(1, len(group))
        start = LEFT + slot * (place + 0.15)
        for number, (name, value, css) in enumerate(group):
            tall = height(value)
            parts.append(
                f'<rect class="{css}" x="{start + number * width:.1f}" y="{HEIGHT - BOTTOM - tall:.1f}" '
                f'width="{0.9 * width:.1f}" height="{tall:.1f}"><title>{escape(name)}: {value:.4g}</title></rect>'
            )
        for row, line in enumerate(title.split("\n")):
            parts.append(
                f'<text x="{LEFT + slot * (place + 0.5):.1f}" y="{HEIGHT - BOTTOM + 16 + 13 * row}" '
                f'text-anchor="middle">{escape(line)}</text>'
            )
    return _svg(parts) + _legend(list(dict.fromkeys((name, css) for name, _, css in values)))


def ticks(most: float, least: float = 0.0) -> list[float]:
    """About five round numbers from at most ``least`` to at least ``most``."""
    if most <= least or not math.isfinite(most):
        return [least, least + 1.0]
    rough = (most - least) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    # The last digits of a product of floats would show.
    return [float(f"{step * number:.10g}") for number in range(first, last + 1)]


def _names(points: Sequence[tuple[str, tuple[float, float]]]) -> list[str]:
    """Names to the right of their points, or to the left where the frame ends; one that would meet another, a point or
    the axis below, stands where the nearest room is, and a line leads to it."""
    parts: list[str] = []
    taken = [(x - 5, x + 5, y + 4) for _, (x, y) in points]
    for name, (x, y) in sorted(points, key=lambda each: each[1][::-1]):
        width = NAME_WIDTH * len(name)
        fits = x + 8 + width <= WIDTH
        left = x + 8 if fits else x - 8 - width
        beside = [each for first, last, each in taken if left < last and first < left + width]
        lines = [y + 4 + line for line in range(-HEIGHT, HEIGHT) if TOP <= y + 4 + line <= HEIGHT - BOTTOM - 3]
        free = [line for line in lines if all(abs(line - other) >= NAME_HEIGHT for other in beside)]
        line = min(free or lines, key=lambda line: abs(line - y - 4))
        taken.append((left, left + width, line))
        start, anchor = (x + 8, "start") if fits else (x - 8, "end")
        if abs(line - y - 4) > NAME_HEIGHT / 2:
            parts.append(f'<path class="lead" d="M{x:.1f} {y:.1f}L{start:.1f} {line - 4:.1f}"/>')
        parts.append(f'<text class="name" x="{start:.1f}" y="{line:.1f}" text-anchor="{anchor}">{escape(name)}</text>')
    return parts


def _frame(x_title: str, y_title: str) -> str:
    bottom = HEIGHT - BOTTOM
    middle = (TOP + bottom) / 2
    return (
        f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}"/>'
        f'<text class="title" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(x_title)}</text>"
        f'<text class="title" transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_title)}</text>"
    )


def _y_tick(y: float, value: float) -> str:
    return (
        f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
    )


def _legend(names: Sequence[tuple[str, str]]) -> str:
    if len(names) < 2:
        return ""
    return (
        '<p class="legend">'
        + "".join(f'<span><i class="{css}"></i>{escape(name)}</span>' for name, css in names)
        + "</p>"
    )


def _svg(parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
