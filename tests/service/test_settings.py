"""Settings come from flags, then the environment, then defaults; a wrong one is named."""

import os
from pathlib import Path

import pytest

from service.settings import Settings, read_settings


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith("WATTLE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WATTLE_MODELS", str(tmp_path))


def test_flags_overrule_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATTLE_PORT", "8001")
    monkeypatch.setenv("WATTLE_PUE", "1.5")
    settings = read_settings(port="8002")
    assert (settings.port, settings.pue, settings.host) == (8002, 1.5, "127.0.0.1")


def test_several_folders_of_models(tmp_path: Path) -> None:
    folders = (tmp_path / "a", tmp_path / "b")
    for folder in folders:
        folder.mkdir()
    assert read_settings(models=os.pathsep.join(map(str, folders))).models == folders


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "high"),
        ("port", "65536"),
        ("models", "/no/such/folder"),
        ("pue", "0.9"),
        ("meter", "guess"),
        ("grid_zone", "Narnia"),
        ("model_aliases", "gpt-4o-mini"),
        ("model_aliases", "=generate-en"),
        ("model_aliases", "a=b,"),
        ("life_years", "0"),
        ("machine_share", "1.1"),
        ("ledger_max_days", "0"),
        ("ledger_max_mb", "0"),
        ("max_body_bytes", "0"),
        ("max_client_batch_size", "100000"),
        ("threads", "0"),
    ],
)
def test_a_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    with pytest.raises(ValueError, match=name):
        read_settings(**{name: value})
    monkeypatch.setenv(f"WATTLE_{name.upper()}", value)
    with pytest.raises(ValueError, match=name):
        read_settings()


def test_only_what_is_wrong_is_told_and_what_was_given(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(ValueError) as told:
        read_settings(models=os.pathsep.join([missing, str(tmp_path)]), port="eight")
    first, second = sorted(str(told.value).split("; "))
    assert first.startswith("models.0: ") and first.endswith(f"({missing!r})")
    assert second.startswith("port: ") and second.endswith("('eight')")


def test_aliases_are_pairs() -> None:
    assert read_settings(model_aliases="gpt-4o-mini=generate-en, a = b").model_aliases == {
        "gpt-4o-mini": "generate-en",
        "a": "b",
    }


def test_an_unknown_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATTLE_PROT", "8001")
    with pytest.raises(ValueError, match="WATTLE_PROT"):
        read_settings()
    monkeypatch.delenv("WATTLE_PROT")
    with pytest.raises(ValueError, match="prot"):
        read_settings(prot="8001")


def test_state_lies_where_the_user_keeps_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert read_settings().ledger == tmp_path / "wattle" / "ledger.sqlite"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert read_settings().ledger == Path.home() / ".local" / "state" / "wattle" / "ledger.sqlite"


def test_every_setting_says_what_it_does() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []
