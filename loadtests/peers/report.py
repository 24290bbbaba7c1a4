"""Writes the page of the benchmarks from the records. Measures nothing."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loadtests.peers.ceilings import least_s
from loadtests.peers.power import CORE_BUSY_W, CORE_IDLE_W
from loadtests.peers.records import Record
from loadtests.peers.summary import (
    COSINE_TOLERANCE,
    TEXT_TOLERANCE,
    Figure,
    Spread,
    ratios,
    same_share,
    spread,
)
from loadtests.peers.table import PEERS, Setting, Variant
from loadtests.peers.workloads import SHAPES, WORKLOADS, Workload

_HEAD = """# Benchmarks

Written by `make bench`, which makes every peer's environment, gives all of them the same weights and the same token
ids, checks what they answer, and lets them take turns: in each round everybody computes once, another one first, in
processes pinned to cores, and who does not compute is stopped. A figure is the median of the rounds, with the least
and the most. Each peer counts at the fastest of its settings, replicas x threads (for encoders also the tokens of a
batch), which were tried before, for every workload apart.
"""
_READING = f"""## How to read the tables

- **Agreement**: of texts the share of tokens before the first difference from Hugging Face in fp32, mean (least) over
  the texts; of vectors the cosine. The writers have random weights, so that a text that differs says little about
  quality; the encoder is all-MiniLM-L6-v2 on real sentences.
- **Ratio**: our median over that of the best peer, whatever it computes with; then over that of the best peer whose
  agreement is at least ours less {COSINE_TOLERANCE} (cosine) or {TEXT_TOLERANCE} (texts). Above 1 we are faster.
- **Ceiling**: the share of what the machine can do at most: the time that the products and the reads of the weights
  would take at the measured rates, over the time taken. `loadtests/peers/ceilings.py` states the formula. Attention
  and everything else between the products count nothing, so 100% cannot be reached. `-`: the measured rate was not the
  most that it can do.
- **J/query**: joules per text. `measured` is the processor's counter; `estimated` is CPU seconds x
  ({CORE_BUSY_W:g} - {CORE_IDLE_W:g}) W + elapsed seconds x {CORE_IDLE_W:g} W per core, alike for all.
- **Foreign**: cores that other programs used meanwhile, median (most): above 0.2 a figure is doubtful.
- **Calibrated**: scales of activations fixed on half of the sentences, as OpenVINO's int8 has them. **7 bits**: of
  weights, whose products need no exact mode on processors without VNNI.
- Encoders: the mean over the tokens, texts of similar length in one batch, by every side.
- Every written text has its full length: the end-of-text token cannot win.
"""


_LAST = ("ceiling", "J/query", "foreign")
_ENDS = ("same answers", "J/query", "foreign")
_SIDES = {
    "wattle": "Wattle",
    "litserve": "LitServe",
    "litserve torch": "LitServe, PyTorch fp32",
    "engine": "Wattle's engine alone",
}
_HTTP_TITLE = "## Through HTTP"
_VERSIONS_TITLE = "## Versions"


@dataclass(frozen=True)
class _Row:
    """One contender on one workload."""

    workload: Workload
    peer: str
    variant: Variant
    samples: Sequence[Record]
    agreed: dict[str, float]

    @property
    def speed(self) -> Spread:
        """Tokens written, or sentences read, per second."""
        per_batch = self.workload.at_once * (self.workload.new_tokens or 1)
        return spread([per_batch / sample["seconds"] for sample in self.samples])

    @property
    def figure(self) -> Figure:
        """For the ratios."""
        return Figure(self.peer, self.speed, self.agreed["mean"])


def render(records: Sequence[Record], page: str = "") -> str:
    """The page. Servers are measured apart from engines: of which nothing was measured, that stays as ``page`` has it.

    Raises ``SystemExit`` where nothing was measured.
    """
    machine = next((record for record in records if record["record"] == "machine"), None)
    before = _part(page, _HTTP_TITLE)
    http = _http(records) or before
    if machine is None:
        if not _http(records):
            raise SystemExit("nothing was measured yet: run `make bench`")
        rest = page.replace(before, "") if before else page
        engines, versions, last = rest.partition(_VERSIONS_TITLE)
        return f"{engines.rstrip() or _HEAD.rstrip()}\n\n{http}" + (f"\n{versions}{last}" if versions else "")
    parts = [_HEAD, _machine(machine), _READING]
    for workload in WORKLOADS:
        rows = list(_rows(workload, records))
        if rows:
            parts.append(_table(workload, rows, machine))
    parts += [http, _versions(records), _absent(records)]
    return "\n".join(part for part in parts if part)


def _rows(workload: Workload, records: Sequence[Record]) -> Iterator[_Row]:
    mine = [record for record in records if record.get("workload") == workload.name]
    for peer in PEERS.values():
        for variant in peer.variants:
            ours = [each for each in mine if (each["peer"], each["variant"]) == (peer.name, variant.name)]
            samples = [each for each in ours if each["record"] == "sample"]
            tries = [each for each in ours if each["record"] == "try"]
            if samples and tries:
                used = [each for each in tries if Setting(**each["setting"]).text == samples[0]["setting"]]
                yield _Row(workload, peer.name, variant, samples, (used or tries)[0]["agreement"])


def _table(workload: Workload, rows: Sequence[_Row], machine: Record) -> str:
    unit = "tokens/s" if workload.new_tokens else "texts/s"
    lines = [
        f"### {workload.name}",
        "",
        *_header("engine", unit, "least to most", "setting", "ratio to best / to equal", "agreement", *_LAST),
    ]
    tolerance = TEXT_TOLERANCE if workload.new_tokens else COSINE_TOLERANCE
    for row in sorted(rows, key=lambda row: -row.speed.median):
        speed, first = row.speed, row.samples[0]
        ratio = ""
        if row.peer == "wattle":
            found = ratios(row.figure, [other.figure for other in rows], tolerance)
            ratio = f"**{_number(found.to_best)} / {_number(found.to_best_equal)}**"
        joules = spread([sample["joules"] / workload.at_once for sample in row.samples]).median
        foreign = spread([sample["foreign_cores"] for sample in row.samples])
        cells = [
            f"{PEERS[row.peer].title} {row.variant.name}",
            _number(speed.median),
            f"{_number(speed.least)} to {_number(speed.most)}",
            first["setting"],
            ratio,
            f"{row.agreed['mean']:.4f} ({row.agreed['least']:.3f})",
            _ceiling(row, machine),
            f"{_number(joules)} {first['quality']}",
            f"{foreign.median:.2f} ({foreign.most:.2f})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    rounds = min(row.speed.count for row in rows)
    length = f" {workload.new_tokens} tokens are written over {workload.source_tokens}." if workload.new_tokens else ""
    return "\n".join([*lines, "", f"Rounds: {rounds}.{length}", ""])


def _ceiling(row: _Row, machine: Record) -> str:
    # Padding is no work, so the tokens of ragged sentences are those that the samples read.
    tokens = row.samples[0]["input_tokens"]
    rate = machine["rates"][row.variant.arithmetic]
    least = least_s(row.workload, tokens, row.variant.bits, rate, machine["rates"], machine["cache_bytes"])
    share = least / spread([sample["seconds"] for sample in row.samples]).median
    # Where bfloat16 is imitated, small products take another way, faster than the one that was measured.
    return f"{share:.0%}" if share <= 1 else "-"


def _machine(machine: Record) -> str:
    rates = machine["rates"]
    flags, cache_mib = ", ".join(machine["flags"]), machine["cache_bytes"] / 2**20
    return f"""## The machine

{machine["date"]}: {machine["processor"]}, {machine["cores"]} cores ({flags}), last-level cache {cache_mib:.0f} MiB,
Python {machine["python"]}, {machine["system"]}. Measured before the rounds, on all cores: int8 products
{rates["int8"] / 1e9:.0f} GOP/s, bf16 {_number(rates["bf16"] / 1e9)}, fp32 {rates["fp32"] / 1e9:.0f}; reads from memory
{rates["memory"] / 1e9:.0f} GB/s, from the cache {rates["cache"] / 1e9:.0f}.
"""


def _http(records: Sequence[Record]) -> str:
    """The part on servers; empty where none was measured."""
    samples = [record for record in records if record["record"] == "http sample"]
    if not samples:
        return ""
    machine = next(record for record in records if record["record"] == "http machine")
    parts = [
        f"""{_HTTP_TITLE}

{machine["date"]}: {machine["processor"]}, {machine["cores"]} cores, Python {machine["python"]}, {machine["system"]}.

Clients in a closed loop, on the same cores as the server, each with a connection that it keeps. LitServe
{machine["litserve"]} runs the starter's own graphs and tokenizer on ONNX Runtime, at the fastest of the settings tried
for each number of clients: workers x threads, and how many texts it computes together; for sentiment also the same
weights in PyTorch, float32. Wattle runs as `make serve` starts it, bills and all, with
`--max-concurrent-requests 64`. The engine alone gets the same texts as token ids, as many at once as there are
clients, without HTTP. Translation is greedy, and so is generation, which writes at most 32 tokens behind each text and
"He said:".
"""
    ]
    for endpoint in dict.fromkeys(sample["endpoint"] for sample in samples):
        titles = ("clients", "server", "requests/s", "least to most", "p50 ms", "p95 ms", "setting")
        lines = [
            f"### {endpoint} through HTTP",
            "",
            *_header(*titles, "Wattle's ratio to it", "CPU ms/request", *_ENDS),
        ]
        for clients in dict.fromkeys(sample["clients"] for sample in samples):
            found = [each for each in samples if (each["endpoint"], each["clients"]) == (endpoint, clients)]
            lines += _http_rows(found)
        rounds = min(Counter((each["endpoint"], each["clients"], each["side"]) for each in samples).values())
        parts.append("\n".join([*lines, "", f"Rounds: {rounds}.", ""]))
    return "\n".join(parts)


def _http_rows(samples: Sequence[Record]) -> Iterator[str]:
    sides = {side: [each for each in samples if each["side"] == side] for side in _SIDES}
    sides = {side: found for side, found in sides.items() if found}
    if not {"wattle", "litserve", "engine"} <= sides.keys():
        return
    speeds = {side: spread([each["per_s"] for each in found]) for side, found in sides.items()}
    ours = _answers(sides["wattle"])
    for side, found in sides.items():
        speed, same = speeds[side], same_share(ours, _answers(found))
        foreign = spread([each["foreign_cores"] for each in found])
        cells = [
            str(found[0]["clients"]),
            _SIDES[side],
            _number(speed.median),
            f"{_number(speed.least)} to {_number(speed.most)}",
            _number(spread([each["p50_s"] for each in found]).median * 1e3),
            _number(spread([each["p95_s"] for each in found]).median * 1e3),
            found[0]["setting"],
            "" if side == "wattle" else f"**{_number(speeds['wattle'].median / speed.median)}**",
            _number(spread([each["server_cpu_s"] for each in found]).median * 1e3),
            "" if side == "wattle" or same is None else f"{same:.0%}",
            f"{_number(spread([each['joules'] for each in found]).median)} {found[0]['quality']}",
            f"{foreign.median:.2f} ({foreign.most:.2f})",
        ]
        yield f"| {' | '.join(cells)} |"


def _answers(samples: Sequence[Record]) -> dict[str, str]:
    """What a server answered to each body; the engine answers nobody."""
    return {body: answer for each in samples for body, answer in each.get("answers", {}).items()}


def _part(page: str, title: str) -> str:
    """The part of a page that begins with ``title``, a heading of the second level; empty where there is none."""
    _, found, rest = page.partition(f"{title}\n")
    return (found + rest.partition("\n## ")[0]).rstrip() + "\n" if found else ""


def _versions(records: Sequence[Record]) -> str:
    found: dict[str, dict[str, str]] = {}
    for record in records:
        if record["record"] == "try":
            found[PEERS[record["peer"]].title] = record["versions"]
    lines = [
        f"- {title}: {', '.join(f'{name} {number}' for name, number in versions.items())}"
        for title, versions in found.items()
    ]
    return "\n".join([_VERSIONS_TITLE, "", *lines, ""]) if lines else ""


def _absent(records: Sequence[Record]) -> str:
    # What failed in one run may have gone well in a later one.
    measured = {
        (record["peer"], record["variant"], record["workload"].split()[0])
        for record in records
        if record["record"] == "sample"
    }
    lines = dict.fromkeys(
        f"- {' '.join(filter(None, (record['peer'], record['variant'], record['shape'])))}: {record['reason']}"
        for record in records
        if record["record"] == "absent" and (record["peer"], record["variant"], record["shape"]) not in measured
    )
    told = {(record["peer"], record["variant"], record["shape"]) for record in records if record["record"] == "absent"}
    lines |= dict.fromkeys(f"- {name}: not run" for name in _not_run(measured, told))
    run = {record["workload"] for record in records if record["record"] == "sample"}
    shapes = {shape for _, _, shape in measured}
    missing = [each.name for each in WORKLOADS if each.shape.name in shapes and each.name not in run]
    lines |= dict.fromkeys(f"- {name}: not run" for name in missing)
    return "\n".join(["## Not measured", "", *lines, ""]) if lines else ""


def _not_run(measured: set[tuple[str, str, str]], told: set[tuple[str, str, str]]) -> Iterator[str]:
    """What nobody asked for: models, and of those that were measured who had no part."""
    shapes = {shape for _, _, shape in measured}
    away = {peer for peer, variant, _ in told if not variant}
    for shape in SHAPES.values():
        if shape.name not in shapes:
            yield shape.name
            continue
        for peer in PEERS.values():
            for variant in peer.variants:
                who = (peer.name, variant.name, shape.name)
                if shape.kind in variant.kinds and peer.name not in away and who not in measured | told:
                    yield " ".join(who)


def _header(*titles: str) -> tuple[str, str]:
    return f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"


def _number(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
