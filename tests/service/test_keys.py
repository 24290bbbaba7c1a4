"""The file of keys: what it may hold, how it is followed, and whose a secret is."""

import hashlib
import tomllib
from pathlib import Path

import pytest

import wattle
from service.keys import Keyring, KeysFileError, add_key, read_keys


class Hand:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def test_a_key_is_found_by_its_secret_alone(path: Path) -> None:
    secrets = {name: add_key(path, name, {}) for name in ("alice", "bob")}
    ring = Keyring(path)
    for name, secret in secrets.items():
        key = ring.find(secret)
        assert key is not None and key.name == name
    digest = hashlib.sha256(secrets["bob"].encode()).hexdigest()
    for wrong in ("", "alice", digest, secrets["bob"][:-1], secrets["bob"] + "a", "\ud800", "0" * 64):
        assert ring.find(wrong) is None


def test_the_file_holds_hashes_and_limits_for_its_owner_alone(path: Path) -> None:
    secret = add_key(path, "alice", {"admin": True, "requests_per_minute": 60, "daily_budget_j": 2.5})
    text = path.read_text()
    assert secret not in text and len(secret) > 43
    assert tomllib.loads(text)["alice"] == {
        "sha256": hashlib.sha256(secret.encode()).hexdigest(),
        "admin": True,
        "requests_per_minute": 60,
        "daily_budget_j": 2.5,
    }
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["keys.toml"]


def test_adding_keeps_what_is_there(path: Path) -> None:
    add_key(path, "alice", {})
    path.write_text("# mine\n" + path.read_text())
    path.chmod(0o640)
    add_key(path, "bob", {"concurrency": 2})
    assert path.read_text().startswith("# mine\n")
    assert path.stat().st_mode & 0o777 == 0o640
    assert {name: key.concurrency for name, key in read_keys(path).items()} == {"alice": None, "bob": 2}
    before = path.read_text()
    with pytest.raises(KeysFileError, match="has a key of the name bob"):
        add_key(path, "bob", {})
    with pytest.raises(KeysFileError, match="name: "):
        add_key(path, "b.b", {})
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[alice", "is not TOML"),
        ("alice = 1", "stands outside of a table"),
        ("[alice]", "sha256: field required"),
        ("[alice]\nsha256 = 'x'", "sha256: string should match"),
        (f"[alice]\nsha256 = '{'a' * 64}'\nrate = 1", "rate: extra"),
        (f"[alice]\nsha256 = '{'a' * 64}'\nconcurrency = 0", "concurrency: input should be greater"),
        (f"[alice]\nsha256 = '{'a' * 64}'\nadmin = 'yes'", "admin: input should be a valid boolean"),
        (f"[alice]\nsha256 = '{'a' * 64}'\n[bob]\nsha256 = '{'a' * 64}'", "holds a key under two names"),
        ("\udcff", "is not TOML"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(path: Path, text: str, complaint: str) -> None:
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(KeysFileError, match=complaint):
        Keyring(path)


def test_a_missing_file_says_so(path: Path) -> None:
    with pytest.raises(KeysFileError, match="cannot be read: No such file"):
        Keyring(path)


def test_a_changed_file_is_followed_and_a_broken_one_is_not(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Hand()
    alice = add_key(path, "alice", {})
    ring = Keyring(path, clock)
    bob = add_key(path, "bob", {})
    assert ring.find(bob) is None, "looked at more than once a second"
    clock.now_s += 1
    assert ring.find(bob) is not None and ring.find(alice) is not None
    good = path.read_text()
    for broken in ("[alice", None):
        path.unlink() if broken is None else path.write_text(broken)
        caplog.clear()
        for _ in range(2):
            clock.now_s += 1
            assert ring.find(bob) is not None and ring.find(alice) is not None
        assert caplog.text.count("the keys stay as they were") == 1, "said once"
    path.write_text(good[good.index("[bob]") :])
    clock.now_s += 1
    assert ring.find(alice) is None and ring.find(bob) is not None


def test_the_command_prints_a_key_once(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--api-keys-file", str(path), "--requests-per-minute", "6", "--admin"]
    assert wattle.main(["add-key", "alice", *flags]) == 0
    secret = capsys.readouterr().out.strip()
    key = Keyring(path).find(secret)
    assert key is not None and (key.name, key.requests_per_minute, key.admin) == ("alice", 6, True)
    assert wattle.main(["add-key", "alice", *flags]) == 1
    shown = capsys.readouterr()
    assert "choose another" in shown.err and shown.out == ""


def test_the_command_needs_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert wattle.main(["add-key", "alice"]) == 2
    assert "WATTLE_API_KEYS_FILE" in capsys.readouterr().err
    assert wattle.main(["add-key", "alice", "--api-keys-file", "/proc/keys/none.toml"]) == 1
    assert "cannot be written" in capsys.readouterr().err
