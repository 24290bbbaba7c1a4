import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer

from loadtests.peers.engine_loop import items_of
from loadtests.peers.http_rounds import ENDPOINTS
from service.engine.engine import Engine
from service.engine.settings import EngineSettings
from service.engine.types import WriteOutput
from tests.tiny import SENTENCES, Kind, write_tiny

TORCH = "loadtests.peers.litserve_torch"
TEXTS = [SENTENCES[0], "A dog.", *SENTENCES[2:4]]


class LitAPI:
    """Of LitServe, which has an environment of its own, what a starter is made of."""

    def __init__(self, **settings: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setitem(sys.modules, "litserve", SimpleNamespace(LitAPI=LitAPI))
    name = "loadtests.peers.litserve_server"
    yield importlib.import_module(name)
    for made_of_it in (name, TORCH):
        sys.modules.pop(made_of_it, None)


def test_it_says_the_same_labels_on_either_side(server: ModuleType, tmp_path: Path) -> None:
    manifest = write_tiny(tmp_path, "classify")
    starters = [importlib.import_module(TORCH).TorchStarter, server.Starter]
    answers = []
    for starter in (make(tmp_path, 1, len(TEXTS), 0) for make in starters):
        starter.setup("cpu")
        answers.append([starter.predict(starter.batch(TEXTS)), starter.predict(TEXTS[0])])
    assert answers[0] == answers[1]
    assert set(answers[0][0]) <= set(manifest.labels) and answers[0][1] == answers[0][0][0]


@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder"])
@pytest.mark.parametrize("max_tokens", [0, 5])
def test_it_writes_what_the_engine_writes(server: ModuleType, tmp_path: Path, kind: Kind, max_tokens: int) -> None:
    manifest = write_tiny(tmp_path, kind)
    starter = server.Starter(tmp_path, 1, len(TEXTS), max_tokens)
    starter.setup("cpu")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    model = SimpleNamespace(folder=tmp_path, manifest=manifest)
    engine = Engine({"it": model}, lambda step: None, EngineSettings())
    tickets = engine.submit("it", items_of(manifest, tokenizer, TEXTS, max_tokens))
    outputs = [ticket.future.result(10) for ticket in tickets]
    engine.close()
    written = [output.output_ids for output in outputs if isinstance(output, WriteOutput)]
    assert max(map(len, written)) == (max_tokens or 16)
    assert starter.predict(starter.batch(TEXTS)) == tokenizer.decode_batch(written)
    assert starter.predict(TEXTS[0]) == tokenizer.decode(written[0])


def test_generation_is_the_longer_kind() -> None:
    sentiment, translation, generation = ENDPOINTS
    assert (sentiment.max_tokens, translation.max_tokens, generation.max_tokens) == (0, 0, 32)
    assert generation.texts == [f"{text} He said:" for text in translation.texts]
