"""Whether 8-bit products need ONNX Runtime's exact mode is read off the processor."""

from pathlib import Path

import pytest

from models import processor


class Options:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


@pytest.fixture(autouse=True)
def fresh() -> None:
    processor._multiplies_8_bits_exactly.cache_clear()


@pytest.mark.parametrize(
    ("machine", "flags", "needed"),
    [
        ("x86_64", "flags : avx2 fma", True),
        ("x86_64", "flags : avx2 avx512_vnni", False),
        ("AMD64", "flags : avx2 avx_vnni", False),
        ("x86_64", None, True),
        ("aarch64", None, False),
    ],
)
def test_the_exact_mode_is_for_x86_without_vnni(
    machine: str, flags: str | None, needed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, **_: object) -> str:
        if flags is None:
            raise FileNotFoundError(path)
        return flags

    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    monkeypatch.setattr(Path, "read_text", read)
    options = Options()
    processor.keep_products_exact(options)
    processor._multiplies_8_bits_exactly.cache_clear()
    assert options.entries == ({"session.x64quantprecision": "1"} if needed else {})
