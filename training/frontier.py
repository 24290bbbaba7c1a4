"""Quality against joules per query, from the variants that manifests hold. Knows nothing of how they were measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from energy.charts import Series, picture, standalone
from models.manifest import Load, Manifest, Score, Variant
from training.card import by_set, described, table
from training.errors import TrainingError, writing

HEADLINE = {
    "sentiment": "macro recall",
    "answer": "F1",
    "translate": "sacreBLEU",
    "summarize": "ROUGE-1",
    "generate": "bits per byte",
}
"""The metric of each task that is drawn, on the first set that it was measured on; where it was on none, of sentiment
without neutral texts for instance, the first metric there is."""
LOWER_IS_BETTER = ("bits per byte",)
COMMAND = "wattle quantise MODEL ... --data DATA --limit ROWS --write && wattle frontier MODEL ..."


@dataclass(frozen=True)
class Point:
    """One model stored in one way."""

    model: str
    parent: str
    """Of which it is the student; empty where it is nobody's."""
    way: str
    size_mb: float
    scores: tuple[Score, ...]
    quality: float
    """By the headline metric."""
    active_j: float
    """Per query."""
    exported: bool
    """Whether the model's folder holds it stored like this."""


@dataclass(frozen=True)
class Frontier:
    """The points of one task that answered the same queries."""

    name: str
    """Task and languages."""
    headline: Score
    """What is drawn; its value means nothing here."""
    points: tuple[Point, ...]
    meter: str
    """Quality of all their joules."""
    load: Load

    @property
    def best(self) -> list[Point]:
        """The points that no other beats: nowhere worse and somewhere better; by joules."""
        sign = -1 if self.headline.metric in LOWER_IS_BETTER else 1
        keys = {point: (point.active_j, -sign * point.quality) for point in self.points}

        def beaten(point: Point) -> bool:
            mine = keys[point]
            return any(key != mine and key[0] <= mine[0] and key[1] <= mine[1] for key in keys.values())

        return sorted((point for point in self.points if not beaten(point)), key=keys.__getitem__)


def frontiers(manifests: Sequence[Manifest]) -> list[Frontier]:
    """A frontier for each task and its languages.

    Raises ``TrainingError`` for a model that was not measured, or not as the others of its task were.
    """
    groups: dict[str, list[Manifest]] = {}
    for manifest in manifests:
        if not manifest.tasks:
            raise TrainingError(f"{manifest.name}: a model of vectors has no task to be good at")
        groups.setdefault("-".join((manifest.tasks[0], *manifest.languages)), []).append(manifest)
    return [_frontier(name, group) for name, group in sorted(groups.items())]


def _frontier(name: str, manifests: Sequence[Manifest]) -> Frontier:
    for manifest in manifests:
        if not manifest.variants or any(None in (each.active_j_per_query, each.load) for each in manifest.variants):
            raise TrainingError(f"{manifest.name}: its joules per query are not known; {COMMAND} measures and draws")
    variants = [variant for manifest in manifests for variant in manifest.variants]
    for what, values in (
        ("with different meters", {variant.quality for variant in variants}),
        ("on different rows", {tuple((s.data, s.metric, s.rows) for s in variant.scores) for variant in variants}),
        ("at different times", {variant.load for variant in variants}),
    ):
        if len(values) > 1:
            names = " and ".join(manifest.name for manifest in manifests)
            raise TrainingError(
                f"{names} were measured {what}, so their figures do not compare: name them in one `wattle quantise`"
            )
    metric = HEADLINE[manifests[0].tasks[0]]
    scores, load = variants[0].scores, variants[0].load
    if not scores or load is None:
        raise TrainingError(f"{manifests[0].name}: its variants have no scores; {COMMAND} measures and draws")
    headline = next((score for score in scores if score.metric == metric), scores[0])
    tell = len({variant.setting for variant in variants}) > 1
    return Frontier(
        name,
        headline,
        tuple(_point(manifest, variant, headline, tell) for manifest in manifests for variant in manifest.variants),
        variants[0].quality,
        load,
    )


def _point(manifest: Manifest, variant: Variant, headline: Score, tell: bool) -> Point:
    parent = manifest.parent
    return Point(
        model=manifest.name,
        parent=parent.name if parent is not None and parent.relation == "distilled" else "",
        way=_way(variant) + (f", {variant.setting}" if tell and variant.setting else ""),
        size_mb=variant.size_mb,
        scores=variant.scores,
        quality=next(s.value for s in variant.scores if (s.data, s.metric) == (headline.data, headline.metric)),
        active_j=variant.active_j_per_query or 0.0,
        exported=(variant.scheme, variant.bits) == (manifest.quantisation.scheme, manifest.quantisation.bits),
    )


def _way(variant: Variant) -> str:
    return "float32" if variant.scheme == "none" else f"int{variant.bits} {variant.scheme}"


def draw(frontier: Frontier) -> str:
    """The picture as an SVG file: every point with its name, a line through those that no other beats."""
    best = frontier.best
    several = len({point.model for point in frontier.points}) > 1
    series = [Series("frontier", [(point.active_j, point.quality) for point in best], "a", line=True)]
    for css, points in (("a", best), ("b", [point for point in frontier.points if point not in best])):
        places = [(point.active_j, point.quality) for point in points]
        labels = [f"{point.model} {point.way}" if several else point.way for point in points]
        series.append(Series("points", places, css, labels=labels, named=True))
    headline = frontier.headline
    title = f"{headline.metric} on {headline.data}" + (" (lower is better)" if _falls(frontier) else "")
    return standalone(picture(series, "active J per query", title, y_from_zero=False))


def _falls(frontier: Frontier) -> bool:
    return frontier.headline.metric in LOWER_IS_BETTER


def write_frontiers(found: Sequence[Frontier], page: Path) -> list[Path]:
    """Write the page and, in ``images`` beside it, a picture for each frontier; the paths of all.

    Raises ``TrainingError`` where they cannot be written.
    """
    pictures = {f"images/frontier-{each.name}.svg": draw(each) for each in found}
    with writing(page):
        (page.parent / "images").mkdir(parents=True, exist_ok=True)
        for name, svg in pictures.items():
            (page.parent / name).write_text(svg, encoding="utf-8")
        page.write_text(as_markdown(found, list(pictures)), encoding="utf-8")
    return [page, *(page.parent / name for name in pictures)]


def as_markdown(found: Sequence[Frontier], pictures: Sequence[str]) -> str:
    """The page; ``pictures`` are their paths, as seen from it."""
    lines = [
        "# What quality costs",
        "",
        "Quality against active joules per query (above idle) of each model stored in every way, through the service.",
        "Points that no other beats in both are marked; in the pictures a line joins them. Within a table every model",
        "answered the same texts, in turns; between tables nothing compares. Scores on so few rows are rough, and the",
        "model cards have those on all rows. What is not in `models/starters` was measured beside it, and does not",
        "ship. Written by",
        "",
        "```sh",
        "wattle quantise models/starters/* MODEL ... --data DATA --limit ROWS --write",
        "wattle frontier models/starters/* MODEL ...",
        "```",
    ]
    for each, path in zip(found, pictures, strict=True):
        lines += ["", f"## {each.name}", "", *_section(each, path)]
    return "\n".join(lines) + "\n"


def _section(frontier: Frontier, picture_path: str) -> list[str]:
    best, first = frontier.best, frontier.points[0]
    head = ["model", "stored as", "MB", *by_set(first.scores), f"active J a query ({frontier.meter})", "frontier"]
    rows = [
        [
            point.model + (f" (student of {point.parent})" if point.parent else ""),
            point.way + (", as exported" if point.exported else ""),
            f"{point.size_mb:g}",
            *by_set(point.scores).values(),
            f"{point.active_j:.3g}",
            "yes" if point in best else "",
        ]
        for point in frontier.points
    ]
    return [
        f"![{frontier.headline.metric} against joules per query]({picture_path})",
        "",
        *table(head, rows),
        "",
        described(frontier.load),
    ]


def verdict(frontier: Frontier) -> str:
    """The frontier in one line."""
    points = [f"{each.model} {each.way} ({each.quality:.2f} at {each.active_j:.3g} J)" for each in frontier.best]
    return f"{frontier.name}, {frontier.headline.metric} on {frontier.headline.data}: {', '.join(points)}"
