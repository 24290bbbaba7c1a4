"""A run's document as people read it: in a terminal, as CSV, as one HTML page. Knows nothing of how it was made."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from energy.charts import Series, bars, plot
from energy.sheet import Line, Table, render

RED, BOLD, PLAIN = "\x1b[31m", "\x1b[1m", "\x1b[0m"
TIME = {
    "task": "task",
    "requests": "requests",
    "failed": "failed",
    "requests_per_s": "answers/s",
    "queries_per_s": "queries/s",
    "latency_ms.p50": "p50 ms",
    "latency_ms.p95": "p95 ms",
    "latency_ms.p99": "p99 ms",
    "ttft_ms.p50": "first token p50 ms",
    "ttft_ms.p95": "first token p95 ms",
    "queue_ms.p95": "queue p95 ms",
}
ENERGY = {
    "task": "task",
    "queries": "queries",
    "active_j.mean": "active J/query",
    "active_j.p50": "p50",
    "active_j.p95": "p95",
    "active_j.p99": "p99",
    "allocated_j.mean": "allocated J/query",
    "allocated_j.p50": "p50",
    "allocated_j.p95": "p95",
    "allocated_j.p99": "p99",
    "active_j_per_output_token": "active J/token",
    "allocated_j_per_output_token": "allocated J/token",
    "gco2e_per_1000": "gCO2e/1000",
    "idle_share": "idle share",
    "quality": "meter",
    "without_bill": "no bill",
    "unsettled": "not final",
}
SHARES = ("idle_share",)
LIMITS = (
    "J/query changes several-fold with load and batch size: compare runs of the same scenario and the same load only. "
    "The load generator ran on the machine that it measured, unless the target is remote, and took its share of the "
    "processor. Estimated joules rank one machine's settings; they are no reading of a meter."
)


def write_report(found: Mapping[str, Any], out: Path) -> None:
    """``report.json``, ``report.html``, ``summary.csv`` and ``requests.csv`` in a folder, which is made."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.html").write_text(as_html(found), encoding="utf-8")
    rows = [{"task": name, **figures} for name, figures in _rows(found)]
    _write_csv(out / "summary.csv", [{**row, "models": " ".join(row["models"])} for row in rows])
    _write_csv(out / "requests.csv", found["requests"])
    # Last: whoever waits for the report finds it whole, with its neighbours.
    partial = out / "report.json.partial"
    partial.write_text(json.dumps(found), encoding="utf-8")
    partial.replace(out / "report.json")


def as_text(found: Mapping[str, Any], colour: bool = False) -> str:
    """For a terminal."""
    red, bold, plain = (RED, BOLD, PLAIN) if colour else ("", "", "")
    lines = [f"{bold}{_title(found)}{plain}", _subtitle(found)]
    lines += [f"{red}{note}{plain}" for note in found["notes"]]
    for table in _tables(found):
        lines += ["", f"{bold}{table.title}{plain}", *aligned([table.head, *table.rows])]
        lines += [f"{red}{line.text}{plain}" if line.bad else line.text for line in table.below]
    return "\n".join(lines)


def as_html(found: Mapping[str, Any]) -> str:
    """One page that needs nothing else."""
    return render(_title(found), _subtitle(found), found["notes"], _tables(found), _plots(found), LIMITS)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table of text, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def shown(value: Any, name: str = "") -> str:
    """A figure with three digits; what is unknown is a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        if name in SHARES:
            return f"{100 * value:.0f}%"
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def pick(figures: Mapping[str, Any], name: str) -> Any:
    """``latency_ms.p95`` of figures; None where there is no such figure."""
    value: Any = figures
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _rows(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [*found["tasks"].items(), ("total", found["total"])]


def _title(found: Mapping[str, Any]) -> str:
    return f"{found['name']}: {found['target']}" + (f" ({found['model']})" if found["model"] else "")


def _subtitle(found: Mapping[str, Any]) -> str:
    scenario = found["scenario"]
    load = f"{scenario['users']} users" if scenario["rate"] is None else f"{scenario['rate']:g} requests/s (Poisson)"
    shape = "" if scenario["shape"] == "constant" else f", {scenario['shape']}"
    return (
        f"{found['started_at']}  {load}{shape}, {found['load_s']:.0f} s, the first {scenario['warm_up_s']:g} s not "
        f"counted. Dialect {found['dialect']}. {found['machine']['cores']} cores, {found['machine']['processor']}."
    )


def _tables(found: Mapping[str, Any]) -> list[Table]:
    rows = _rows(found)
    tables = [
        Table(
            title,
            list(columns.values()),
            [[name if key == "task" else shown(pick(each, key), key) for key in columns] for name, each in rows],
            below,
            has_total=True,
        )
        for title, columns, below in (("Time", TIME, _drift(found)), ("Energy", ENERGY, ()))
    ]
    if found["metered"]:
        tables.append(_metered(found["metered"]))
    if found["balance"]:
        tables.append(_balance(found["balance"]))
    if found["failures"]:
        failures = [[reason, str(count)] for reason, count in found["failures"].items()]
        tables.append(Table("Failures", ["reason", "requests"], failures))
    return tables


def _drift(found: Mapping[str, Any]) -> list[Line]:
    if found["scenario"]["shape"] != "constant":
        return []  # the load itself has changed
    names = {"latency": "latency", "allocated_j": "allocated J/query"}
    said = [f"{names[key]} x {value:.2f}" for key, value in found["drift"].items() if value is not None]
    return [Line(f"Last fifth of the run against the first: {', '.join(said)}.")] if said else []


def _metered(found: Mapping[str, Any]) -> Table:
    """The whole run by this machine's meter, where requests have no bills."""
    per = ("active_j_per_query", "allocated_j_per_query", "active_j_per_output_token", "allocated_j_per_output_token")
    cells = [shown(found[key]) for key in ("energy_j", "idle_j", "active_j", *per)]
    head = ["meter", "machine J", "idle J", "server active J", "active J/query", "allocated J/query"]
    below = [
        Line(
            "The server sends no bills, so this machine's meter was read over the whole run, warm-up included: "
            "means only. The server's share of the active energy is its share of the CPU time."
        )
    ]
    return Table(
        "Energy by this machine's meter",
        [*head, "active J/token", "allocated J/token"],
        [[f"{found['source']} ({found['quality']})", *cells]],
        below,
    )


def _balance(found: Mapping[str, Any]) -> Table:
    parts = {"bills of this run": found["bills_j"], **found["rest_j"], "residual": found["residual_j"]}
    meter_j = found["meter_j"]
    rows = [
        [name.replace("_", " "), f"{value:z.2f}", f"{100 * value / meter_j:z.2f}%" if meter_j else "-"]
        for name, value in {**parts, f"meter ({', '.join(found['sources'])})": meter_j}.items()
    ]
    verdict = (
        Line("Bills, idle and named rest add up to the meter.")
        if found["holds"]
        else Line("Residual above 1% of the meter: these bills do not account for the energy.", bad=True)
    )
    below = [verdict]
    if found["open_j"] > 0:
        below.append(Line(f"{found['open_j']:.2f} J more were metered, and not assigned yet when the run was closed."))
    return Table("Conservation, from outside", ["part", "J", "of the meter"], rows, below, has_total=True)


def _plots(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    windows = found["windows"]
    latency = [(each["queries_per_s"], each["p95_ms"]) for each in windows if each["p95_ms"] is not None]
    median = [(each["queries_per_s"], each["p50_ms"]) for each in windows if each["p50_ms"] is not None]
    load = [
        Series(name, _points(windows, "in_flight", key), css)
        for name, key, css in (("active", "active_j", "a"), ("allocated", "allocated_j", "b"))
    ]
    over_time = [
        Series(name, _points(windows, "at_s", key), css, line=True)
        for name, key, css in (("active", "active_j", "a"), ("allocated", "allocated_j", "b"))
    ]
    precision = {model["name"]: f"{model['bits']} bits" for model in found["models"] if model.get("bits")}
    groups = []
    for name, each in found["tasks"].items():
        shares = [("active", pick(each, "active_j.mean"), "a"), ("allocated", pick(each, "allocated_j.mean"), "b")]
        known = [(title, value, css) for title, value, css in shares if value is not None]
        if known:
            precisions = ", ".join(sorted({precision[model] for model in each["models"] if model in precision}))
            groups.append((f"{name}\n{precisions or ', '.join(each['models'])}", known))
    power = [Series("power", [(at_s, watts) for at_s, watts in found["power"] if at_s >= 0], "c", line=True)]
    return [
        ("J/query against load", plot(load, "requests in flight (mean of a window)", "J/query")),
        (
            "Latency against throughput",
            plot([Series("p50", median, "a"), Series("p95", latency, "b")], "queries/s", "ms"),
        ),
        ("J/query by task and precision", bars(groups, "J/query")),
        ("The meter over time", plot(power, "s", "W")),
        ("J/query over time", plot(over_time, "s", "J/query")),
    ]


def _points(windows: Sequence[Mapping[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
    return [(each[x], each[y]) for each in windows if each[y] is not None]


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    flat = [_flat(row) for row in rows]
    # The row with the most columns names them: what nothing is known of is an empty cell.
    names = list(dict.fromkeys(name for row in flat for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(flat)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": each for key, each in value.items()}
        else:
            flat[name] = value
    return flat
