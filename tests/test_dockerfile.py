"""The image holds the service and the starters, and nothing that serving does not need."""

import json
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions as (name, arguments), continued lines joined, comments left out."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    pairs = (line.strip().partition(" ") for line in lines if line.strip())
    return [(name, arguments.strip()) for name, _, arguments in pairs]


def arguments_of(name: str) -> list[str]:
    return [arguments for found, arguments in instructions() if found == name]


def copied() -> list[str]:
    return [source for arguments in arguments_of("COPY") for source in arguments.split()[:-1]]


def test_every_copied_path_exists_and_is_sent_to_the_build() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert "*" in ignore, "what is not named stays out"
    assert sent == set(copied())
    assert [source for source in copied() if not (ROOT / source).exists()] == []


def test_the_service_and_what_it_serves_are_copied() -> None:
    assert {"pyproject.toml", "wattle.py", "energy", "models", "service"} <= set(copied())


def test_only_serving_dependencies_are_installed() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    installs = " ".join(arguments_of("RUN"))
    assert arguments_of("ARG") == ["RUNTIME=cpu"]
    assert "'${RUNTIME}'" in installs
    assert [extra for extra in extras if f"'{extra}'" in installs] == []
    assert re.search(r"\b(torch|transformers)\b", installs) is None


def test_all_that_is_imported_is_compiled() -> None:
    (compiled,) = re.findall(r"compileall -q ([\w. ]+)", " ".join(arguments_of("RUN")))
    sources = {path for path in copied() if path.endswith(".py") or (ROOT / path / "__init__.py").exists()}
    assert set(compiled.split()) == sources


def test_it_runs_as_an_ordinary_user_on_a_port_that_it_exposes() -> None:
    assert arguments_of("USER")[-1] not in ("root", "0")
    assert arguments_of("EXPOSE") == ["8000"]
    # A list has no shell between the container and the service, so SIGTERM reaches the service.
    command = json.loads(arguments_of("CMD")[-1])
    assert command[:2] == ["wattle", "serve"]
    assert command[command.index("--port") + 1] == "8000"


def test_it_serves_nobody_without_keys_unless_it_is_told_to() -> None:
    command = json.loads(arguments_of("CMD")[-1])
    # The service refuses this address without keys.
    assert command[command.index("--host") + 1] == "0.0.0.0"
    assert "--insecure" not in command
    assert not [arguments for arguments in arguments_of("ENV") if "WATTLE_INSECURE" in arguments]


def test_its_health_check_asks_whether_the_service_is_ready() -> None:
    (check,) = arguments_of("HEALTHCHECK")
    command = json.loads(check.partition("CMD")[2])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "HEALTHCHECK", "exec")
    assert "http://127.0.0.1:8000/readyz" in command[2]
