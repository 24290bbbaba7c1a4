from typing import Any

import pytest

from loadtests.peers.report import render

RATES = {"fp32": 2e11, "bf16": 4e11, "int8": 8e11, "memory": 3e10, "cache": 1e11}
MACHINE = {
    "record": "machine",
    "date": "2026-11-24",
    "processor": "A processor",
    "cores": 2,
    "flags": ["avx2"],
    "python": "3.11.7",
    "system": "Linux",
    "cache_bytes": 32 << 20,
    "rates": RATES,
}
NAME = "translate-6x2-256 greedy 8"
SETTING = {"replicas": 2, "threads": 1, "batch_tokens": 1 << 30}


def contender(peer: str, variant: str, seconds: list[float], agreement: float) -> list[dict[str, Any]]:
    who = {"workload": NAME, "peer": peer, "variant": variant}
    agreed = {"mean": agreement, "least": agreement}
    tried = {"record": "try", **who, "setting": SETTING, "seconds": 1, "agreement": agreed, "versions": {peer: "1.0"}}
    samples = [
        {
            "record": "sample",
            **who,
            "round": number,
            "setting": "2 x 1",
            "input_tokens": 160,
            "seconds": each,
            "joules": 8.0,
            "quality": "estimated",
            "foreign_cores": 0.1 * number,
        }
        for number, each in enumerate(seconds)
    ]
    return [tried, *samples]


RECORDS = [
    MACHINE,
    *contender("wattle", "rowwise", [0.1, 0.2, 0.4], 0.95),
    *contender("ctranslate2", "int8", [0.1, 0.1, 0.1], 0.5),
    *contender("huggingface", "fp32", [0.8, 0.8, 0.8], 1.0),
    {"record": "absent", "peer": "openvino", "variant": "int8", "shape": "minilm", "reason": "no wheel"},
    {"record": "absent", "peer": "wattle", "variant": "rowwise", "shape": "translate-6x2-256", "reason": "too early"},
]


def row(page: str, start: str) -> list[str]:
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_holds_what_was_measured() -> None:
    page = render(RECORDS)
    # 160 tokens in 0.2 s; 1,600 of CTranslate2, 200 of Hugging Face; 1 J for each of the eight texts.
    assert row(page, "Wattle rowwise")[1:6] == ["800", "400 to 1,600", "2 x 1", "**0.5 / 4**", "0.9500 (0.950)"]
    assert row(page, "Wattle rowwise")[7:] == ["1 estimated", "0.10 (0.20)"]
    assert row(page, "CTranslate2")[4] == ""
    assert "Rounds: 3." in page


def test_no_share_is_told_of_a_rate_that_was_not_the_machines_most() -> None:
    slow = MACHINE | {"rates": RATES | {"bf16": 1e6}}
    page = render([slow, *contender("huggingface", "bf16", [0.8], 1.0), *contender("huggingface", "fp32", [0.8], 1.0)])
    assert row(page, "Hugging Face bf16")[6] == "-"
    assert row(page, "Hugging Face fp32")[6].endswith("%")


def test_the_fastest_comes_first_and_other_workloads_are_left_out() -> None:
    page = render(RECORDS)
    assert page.index("| CTranslate2") < page.index("| Wattle") < page.index("| Hugging Face")
    assert page.count("\n### ") == 1


def test_the_machine_the_versions_and_who_is_missing_are_told() -> None:
    page = render(RECORDS)
    assert "800 GOP/s, bf16 400" in page
    assert "- CTranslate2: ctranslate2 1.0" in page
    assert "- openvino int8 minilm: no wheel" in page
    assert "too early" not in page
    assert "- optimum fp32 translate-6x2-256: not run" in page and "- generate-135m: not run" in page
    assert "ctranslate2 int8 translate-6x2-256: not run" not in page


def http_sample(side: str, per_s: float, answers: dict[str, str] | None) -> dict[str, Any]:
    return {
        "record": "http sample",
        "endpoint": "sentiment",
        "clients": 8,
        "side": side,
        "round": 0,
        "setting": "2 x 1",
        "per_s": per_s,
        "p50_s": 0.01,
        "p95_s": 0.02,
        "server_cpu_s": 0.004,
        "joules": 0.5,
        "quality": "estimated",
        "foreign_cores": 0.0,
        **({} if answers is None else {"answers": answers}),
    }


HTTP_MACHINE = {
    "record": "http machine",
    "litserve": "0.2",
    "date": "2026-11-25",
    "processor": "another",
    "cores": 2,
    "python": "3.11",
    "system": "Linux",
}
SERVERS = [
    HTTP_MACHINE,
    http_sample("wattle", 300, {"0": "positive", "1": "neutral"}),
    http_sample("litserve", 200, {"0": "positive", "1": "negative"}),
    http_sample("litserve torch", 100, {"0": "positive", "1": "neutral"}),
    http_sample("engine", 400, None),
]


def test_servers_stand_side_by_side_and_beside_the_engine() -> None:
    page = render(SERVERS)
    assert row(page, "8 | Wattle |")[2:10] == ["300", "300 to 300", "10", "20", "2 x 1", "", "4", ""]
    assert row(page, "8 | LitServe |")[7:10] == ["**1.5**", "4", "50%"]
    assert row(page, "8 | LitServe, PyTorch fp32")[7:10] == ["**3**", "4", "100%"]
    assert row(page, "8 | Wattle's engine alone")[2:10:5] == ["400", "**0.75**"]
    assert "LitServe\n0.2 runs" in page and "another, 2 cores" in page


def test_what_was_not_measured_stays_as_the_page_has_it() -> None:
    engines = render(RECORDS)
    both = render(SERVERS, engines)
    for part in (*engines.split("\n## "), "another, 2 cores"):
        assert part.strip() in both
    # Measured again, each part replaces itself alone.
    assert render(SERVERS, both) == both
    assert render(RECORDS, both) == render([*RECORDS, *SERVERS])


def test_without_a_measurement_there_is_no_page() -> None:
    with pytest.raises(SystemExit, match="make bench"):
        render([])
