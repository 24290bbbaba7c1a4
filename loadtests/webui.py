"""Joules in Locust's web interface: a tab with columns per task and a chart, through Locust's own extension points."""

import json
from pathlib import Path
from typing import Any

from flask import Blueprint, Response, request, send_from_directory
from locust.web import WebUI

from loadtests.figures import Figures, part
from loadtests.recorder import Recorder

KEY = "joules"
COLUMNS = {
    "name": "Task",
    "queries": "# queries",
    "queries_per_s": "Queries/s",
    "active_j": "Active J/query",
    "allocated_j": "Allocated J/query",
    "p50_j": "p50 (J)",
    "p95_j": "p95 (J)",
    "p99_j": "p99 (J)",
    "token_j": "J/output token",
    "gco2e": "gCO2e/1000",
    "idle": "Idle %",
    "ttft_ms": "First token p50 (ms)",
    "quality": "Meter",
    "without_bill": "# without bill",
}
FILES = ("report.html", "report.json", "summary.csv", "requests.csv")
_PAGE = Path(__file__).parent / "pages"


def extend_web_ui(web_ui: WebUI, recorder: Recorder) -> None:
    """Add the tab, its chart and the report's files to the interface."""
    assert web_ui.app is not None
    pages = Blueprint("wattle", __name__)

    @pages.route("/wattle/history")
    def show_history() -> Response:
        return Response(json.dumps(recorder.history), mimetype="application/json")

    @pages.route("/wattle/chart.js")
    def show_chart() -> Response:
        return send_from_directory(_PAGE, "chart.js")

    @pages.route("/wattle/<name>")
    def show_file(name: str) -> Response:
        out = Path(recorder.plan.out).resolve()
        if name not in FILES or not (out / name).exists():
            return Response("The report is written when the run has ended.", 404, mimetype="text/plain")
        return send_from_directory(out, name)

    def extend(response: Response) -> Response:
        if request.path.endswith("/stats/requests") and response.is_json:
            total, tasks = recorder.so_far()
            rows = [_row(name, each) for name, each in tasks.items()]
            table = {"key": KEY, "data": [*rows, _row("Aggregated", total)]}
            response.set_data(json.dumps({**response.get_json(), "extended_stats": [table]}))
        elif request.path == (request.script_root or "") + "/" and response.mimetype == "text/html":
            page = response.get_data(as_text=True)
            response.set_data(page.replace("</body>", '<script src="./wattle/chart.js" defer></script></body>'))
        return response

    web_ui.app.after_request(extend)
    web_ui.app.register_blueprint(pages)
    web_ui.template_args |= {
        "extended_tabs": [{"title": "Joules", "key": KEY}],
        "extended_tables": [{"key": KEY, "structure": [{"key": k, "title": t} for k, t in COLUMNS.items()]}],
        "extended_csv_files": [{"href": f"./wattle/{name}", "title": f"Wattle: {name}"} for name in FILES],
    }


def _row(name: str, figures: Figures) -> dict[str, Any]:
    allocated = figures.allocated_j
    return {
        "name": name,
        "queries": figures.queries,
        "queries_per_s": _short(figures.queries_per_s),
        "active_j": _short(part(figures.active_j, "mean")),
        "allocated_j": _short(part(allocated, "mean")),
        "p50_j": _short(part(allocated, "p50")),
        "p95_j": _short(part(allocated, "p95")),
        "p99_j": _short(part(allocated, "p99")),
        "token_j": _short(figures.allocated_j_per_output_token),
        "gco2e": _short(figures.gco2e_per_1000),
        "idle": _short(None if figures.idle_share is None else 100 * figures.idle_share),
        "ttft_ms": _short(part(figures.ttft_ms, "p50")),
        "quality": figures.quality or "-",
        "without_bill": figures.without_bill,
    }


def _short(value: float | None) -> float | str:
    return "-" if value is None else float(f"{value:.3g}")
