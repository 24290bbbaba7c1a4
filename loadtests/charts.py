"""Plots as inline SVG: axes, points, lines, bars. Knows nothing of load tests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 16, 44
TICKS = 5


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one kind; ``css`` is the class that gives them their colour."""

    name: str
    points: Sequence[tuple[float, float]]
    css: str
    line: bool = False
    labels: Sequence[str] = ()
    """One for each point, shown where the pointer rests on it."""


def plot(series: Sequence[Series], x_title: str, y_title: str) -> str:
    """Points and lines over two linear axes that begin at zero; a sentence where there is nothing to show."""
    points = [point for each in series for point in each.points]
    if not points:
        return '<p class="empty">Nothing to show: no figure is known.</p>'
    x_ticks, y_ticks = ticks(max(x for x, _ in points)), ticks(max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + x / x_ticks[-1] * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - y / y_ticks[-1] * (HEIGHT - TOP - BOTTOM),
        )

    parts = [_frame(x_title, y_title)]
    for tick in x_ticks:
        x, y = place(tick, 0)
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{tick:g}</text>')
    parts += [_y_tick(place(0, tick)[1], tick) for tick in y_ticks]
    for each in series:
        places = [place(*point) for point in each.points]
        if each.line:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline class="{each.css}" points="{path}"/>')
            continue
        for number, (x, y) in enumerate(places):
            label = each.labels[number] if each.labels else each.name
            parts.append(
                f'<circle class="{each.css}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(label)}</title></circle>'
            )
    return _svg(parts) + _legend([(each.name, each.css) for each in series])


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


def ticks(most: float) -> list[float]:
    """About five round numbers from zero to at least ``most``."""
    if most <= 0 or not math.isfinite(most):
        return [0.0, 1.0]
    rough = most / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    # The last digits of a product of floats would show.
    return [float(f"{step * number:.10g}") for number in range(math.ceil(most / step - 1e-9) + 1)]


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
