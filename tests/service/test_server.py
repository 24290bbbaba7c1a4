"""The command line and a real server on a real socket."""

import gc
import json
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import pytest
import uvicorn
from starlette.responses import Response

import wattle
from service.app import create_app
from service.keys import add_key
from service.server import CannotListen, _Server, server_config
from service.settings import Settings
from tests.service.fakes import wait_until, write_models
from tests.tiny import write_tiny

ROOT = Path(__file__).parents[2]
START_S = 60.0


@contextmanager
def serve(lines: int, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A running server, its address and the ``lines`` that it printed once ready."""
    command = [sys.executable, "-m", "wattle", "serve", "--port", "0", "--executors", "1", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        ready, _, _ = select.select([process.stdout], [], [], START_S)
        assert ready, "the server printed nothing"
        printed = [process.stdout.readline() for _ in range(lines)]
        address = re.search(r"http://\S+", printed[0])
        assert address, (printed, process.communicate(timeout=5))
        yield process, address[0], printed
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    for kind in ("classify", "decoder", "bert-span", "encoder-decoder", "bert-prefix-lm"):
        write_tiny(root / kind, kind, max_positions=512 if kind == "decoder" else 64)
    return root


def test_idle_connections_are_kept_longer_than_clients_and_proxies_keep_theirs(tiny: Path) -> None:
    settings = Settings(models=(tiny,))
    assert server_config(create_app(settings), settings).timeout_keep_alive > 60


def test_a_server_answers_and_finishes_what_runs_when_it_is_told_to_stop(tiny: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.sqlite"
    with serve(4 + 5, "--models", str(tiny), "--state", str(tmp_path), "--meter", "estimate") as running:
        process, address, printed = running
        assert f"docs: {address}/docs\n" in printed
        assert f"dashboard: {address}/dashboard\n" in printed
        assert sum(" MB" in line for line in printed) == 5
        with httpx.Client(base_url=address, timeout=30) as client:
            answers = {
                "sentiment": {"input": "I love this film"},
                "generate": {"input": "The quick brown fox"},
                "translate": {"input": "bees visit it all day long", "beams": 2},
                "answer": {"question": "How many joules?", "context": "A wattle tree blooms yellow in August."},
                "summarize": {"input": "Energy is what a meter counts.", "mode": "extractive"},
            }
            for task, body in answers.items():
                answer = client.post(f"/v1/{task}", json=body)
                assert answer.status_code == 200, answer.text
                assert answer.json()["energy"]["quality"] == "estimated"
                assert client.get(f"/v1/energy/requests/{answer.json()['id']}").json()["status"] == "ok"
            with ThreadPoolExecutor() as threads:
                long = {"question": "How many joules?", "context": "bees visit it all day long. " * 2000}
                running_request = threads.submit(client.post, "/v1/answer", json=long)
                wait_until(lambda: "wattle_queue_size 0.0" not in client.get("/metrics").text)
                process.send_signal(signal.SIGTERM)
                assert running_request.result().status_code == 200
            assert process.wait(timeout=20) in (0, -signal.SIGTERM)
            with pytest.raises(httpx.ConnectError):
                client.get("/livez")
        assert ledger.exists()
        assert process.stderr
        log = process.stderr.read()
        assert "Traceback" not in log
        lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        assert len(lines) == len(answers) + 1


def test_a_port_in_use_is_told_at_once(models_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert wattle.main(["serve", "--port", str(port), "--models", str(models_folder)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("wattle: cannot listen on 127.0.0.1 port")
    assert str(port) in message and "in use" in message


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_others_are_not_served_without_keys(
    models_folder: Path, host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wattle.main(["serve", "--host", host, "--port", "0", "--models", str(models_folder)]) == 1
    message = capsys.readouterr().err
    assert all(way in message for way in ("wattle add-key", "--api-keys-file", "--insecure", "WATTLE_INSECURE=true"))


def test_others_are_served_with_keys_or_where_that_is_wished(tiny: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    secret = add_key(keys, "alice", {})
    one = ("--models", str(tiny / "classify"), "--state", str(tmp_path), "--host", "0.0.0.0", "--meter", "none")
    for flags, status in ((("--api-keys-file", str(keys)), 401), (("--insecure",), 200)):
        with serve(1, *one, *flags) as (_, address, _), httpx.Client(base_url=address, timeout=30) as client:
            assert client.get("/v1/models").status_code == status
            assert client.get("/v1/models", headers={"authorization": f"Bearer {secret}"}).status_code == 200
            assert client.get("/readyz").status_code == 200


def test_keys_that_cannot_be_read_are_told_at_once(
    models_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["serve", "--models", str(models_folder), "--port", "0", "--api-keys-file", str(tmp_path / "none")]
    assert wattle.main(arguments) == 1
    assert "cannot be read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("error", [None, CannotListen("taken")])
def test_no_garbage_is_looked_for_while_it_starts(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    collected = []

    def run(settings: Settings) -> int:
        collected.append(gc.isenabled())
        if error is not None:
            raise error
        return 0

    monkeypatch.setattr("service.server.serve", run)
    assert wattle.main(["serve"]) == (0 if error is None else 1)
    assert [*collected, gc.isenabled()] == [False, True]


def test_garbage_is_collected_once_it_serves_but_rarely() -> None:
    seen, before = [], gc.get_threshold()

    def stop_at_once() -> None:
        seen.append((gc.isenabled(), gc.get_freeze_count() > 0, gc.get_threshold()[0] > 700))
        server.should_exit = True

    server = _Server(uvicorn.Config(Response("unused"), lifespan="off", log_config=None), stop_at_once)
    gc.disable()
    gc.set_threshold(700)
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            server.run(sockets=[listener])
    finally:
        gc.unfreeze()
        gc.enable()
        gc.set_threshold(*before)
    assert seen == [(True, True, True)]


def test_a_wrong_setting_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert wattle.main(["serve", "--models", "/no/such/folder"]) == 2
    assert "models" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["serve", "--prot", "1"], ["serve", "--por", "1"], ["sing"], []])
def test_an_unknown_option_is_an_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        wattle.main(arguments)
    assert ended.value.code == 2
    assert "usage: wattle" in capsys.readouterr().err


def test_help_shows_every_setting_with_its_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        wattle.main(["serve", "--help"])
    shown = capsys.readouterr().out
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in shown
        assert f"WATTLE_{name.upper()}" in "".join(shown.split())


def test_the_models_are_listed_with_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_models(tmp_path)
    assert wattle.main(["models", "--models", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()][:2] == ["name", "tiny-answer"]
    assert shown.err == ""
    (tmp_path / "tiny-answer" / "model.onnx").write_bytes(b"altered")
    assert wattle.main(["models", "--models", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert "tiny-answer" not in shown.out
    assert shown.err.startswith("refused tiny-answer: model.onnx: ")
