"""Small real parts for the tests of the service: tiny tokenizers, model folders, an engine and an account.

They compute exactly: the engine writes what it reads, and every request costs 1.5 J above idle, 2 J in all.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

from energy.account import Attributed, MeterTotal, Totals, Unattributed
from energy.ledger import Ledger
from energy.settlement import Reason
from energy.types import (
    Beside,
    Bill,
    Bills,
    CarbonAssumptions,
    Ended,
    Load,
    Part,
    Phase,
    Quality,
    RequestRecord,
    SettledRecord,
    Step,
)
from models.config import TransformerConfig
from models.manifest import GenerationDefaults, Manifest, Quantisation, SpecialIds, write_manifest
from service.app import check_manifest, open_models
from service.books import Books
from service.classifiers.store import Classifiers
from service.core import Service
from service.door import Door
from service.engine.types import (
    EncodeItem,
    EncodeOutput,
    EngineFailed,
    ExtractItem,
    Item,
    Output,
    Ticket,
    Timing,
    TokenLogprobs,
    WriteItem,
    WriteOutput,
)
from service.knowledge.bases import Knowledge, find_embedder
from service.metrics import Metrics
from service.models import Model
from service.repository import Repository
from service.settings import Settings

PAD, UNK, CLS, SEP, EOS = range(5)
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]")
_WORDS = """
    good bad fine paris is the capital of france where it rains what when question city lies on river and big small
    dog runs along beach #person1# alice bob said hello cafe
"""
MODEL_BYTES = 2_000_000
TIMING = Timing(queue_ns=2_000_000, compute_ns=5_000_000)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHAT_TOKENS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
LABELS = ("negative", "neutral", "positive")


def word_tokenizer(single: str) -> Tokenizer:
    """Uncased WordPiece over a few words and every ASCII letter, digit and mark; ``single`` frames a text."""
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces = dict.fromkeys([*SPECIALS, *letters, *(f"##{letter}" for letter in letters), *_WORDS.split()])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(tokenizer_models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(token, vocabulary[token]) for token in SPECIALS]
    )
    # A tokenizer saved in training may bring limits; the service must lift them.
    tokenizer.enable_truncation(8)
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """One token per byte, after four control tokens."""
    alphabet = [*CHAT_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {piece: number for number, piece in enumerate(alphabet)}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(CHAT_TOKENS))
    return tokenizer


def manifest(name: str, task: str, **fields: Any) -> Manifest:
    """A manifest that its task accepts; ``fields`` overrule."""
    shape: dict[str, Any] = {"style": "modern", "vocab_size": 300, "d_model": 32, "n_heads": 2, "d_ff": 64}
    shape["max_positions"] = 256
    writer: dict[str, Any] = {
        "max_output_tokens": 64,
        "generation": GenerationDefaults(max_tokens=64, beams=1),
    }
    by_task: dict[str, dict[str, Any]] = {
        "translate": {
            "config": {"architecture": "encoder-decoder", "head": "lm", "n_encoder_layers": 1, "n_decoder_layers": 1},
            "languages": ("en", "de"),
            **writer,
        },
        "generate": {
            "config": {"architecture": "decoder", "head": "lm", "n_decoder_layers": 1},
            "special_ids": SpecialIds(pad=0, eos=1),
            "chat_template": CHAT_TEMPLATE,
            **writer,
        },
        "answer": {"config": {"architecture": "encoder", "head": "span", "n_encoder_layers": 1, "n_token_types": 2}},
        "sentiment": {
            "config": {"architecture": "encoder", "head": "classify", "n_encoder_layers": 1, "n_labels": 3}
            | {"vector_layers": (1,)},
            "labels": LABELS,
        },
        "summarize": {
            "config": {"architecture": "prefix-lm", "head": "lm", "n_decoder_layers": 1, "extract_head": True},
            **writer,
        },
    }
    chosen: dict[str, Any] = {
        "name": name,
        "revision": "1",
        "description": "For the tests.",
        "tasks": (task,),
        "languages": ("en",),
        "max_input_tokens": 128,
        "special_ids": SpecialIds(pad=PAD, unk=UNK, cls=CLS, sep=SEP, bos=EOS, eos=EOS),
        "quantisation": Quantisation(scheme="none"),
        **by_task[task],
        **fields,
    }
    chosen["config"] = TransformerConfig(**{**shape, **chosen["config"]})
    return Manifest(**chosen)


def write_model(root: Path, name: str, task: str, tokenizer: Tokenizer | None = None, **fields: Any) -> Path:
    """A model folder without weights: the fake engine needs none."""
    folder = root / name
    folder.mkdir(parents=True)
    frames = {"translate": "$A [EOS]", "summarize": "[CLS] $A [SEP]", "sentiment": "[CLS] $A [SEP]", "answer": "$A"}
    chosen = tokenizer or (byte_tokenizer() if task == "generate" else word_tokenizer(frames[task]))
    chosen.save(str(folder / "tokenizer.json"))
    (folder / "model.onnx").write_bytes(b"no weights")
    write_manifest(folder, manifest(name, task, **fields))
    return folder


def write_models(root: Path) -> Path:
    """One model per task."""
    for task in ("translate", "generate", "answer", "sentiment", "summarize"):
        write_model(root, f"tiny-{task}", task)
    return root


class FakeEngine:
    """Answers at once and exactly, or misbehaves as told."""

    def __init__(self, vocabularies: Mapping[str, Mapping[str, int]] | None = None) -> None:
        self.vocabularies = dict(vocabularies or {})
        """Of the models that are loaded, by their keys."""
        self.load_failure: Exception | None = None
        self.lost: EngineFailed | None = None
        self.items: list[Item] = []
        self.tickets: list[Ticket] = []
        self.refusal: Exception | None = None
        """Raised by ``submit``."""
        self.failure: Exception | None = None
        """What every item ends in."""
        self.holds = False
        """Whether items wait for ever."""
        self.writes: tuple[int, ...] | None = None
        """What is written instead of the input."""
        self.breaks = False
        """Whether an item to write fails after its first token."""
        self.logit = 0.0
        """Added to every logit."""

    def submit(self, model: str, items: Sequence[Item], key: str = "") -> list[Ticket]:
        if self.refusal:
            raise self.refusal
        tickets = [Ticket() for _ in items]
        self.items += items
        self.tickets += tickets
        for item, ticket in zip(items, tickets, strict=True):
            if self.breaks and isinstance(item, WriteItem) and item.on_tokens:
                item.on_tokens(item.input_ids[:1])
                ticket.future.set_exception(RuntimeError("broken"))
            elif self.failure:
                ticket.future.set_exception(self.failure)
            elif not self.holds:
                ticket.future.set_result(self._compute(model, item))
        return tickets

    def memory_of(self, model: Model) -> int:
        return MODEL_BYTES

    def load(self, models: Mapping[str, Model]) -> None:
        if self.load_failure:
            raise self.load_failure
        self.vocabularies |= {key: model.tokenizer.get_vocab() for key, model in models.items()}

    def unload(self, key: str) -> None:
        del self.vocabularies[key]

    def queue_depth(self) -> int:
        return sum(not ticket.future.done() for ticket in self.tickets)

    def running(self) -> int:
        return 0

    def _compute(self, model: str, item: Item) -> Output:
        words = self.vocabularies[model]
        match item:
            case WriteItem():
                return self._write(item)
            case ExtractItem():
                # A sentence is worth the number of its first token.
                return EncodeOutput(np.array(item.input_ids, np.float32) + self.logit, TIMING)
            case EncodeItem(input_ids=ids, token_types=types) if types:
                # The answer is the word "paris" in the context; there is none where it is missing.
                hits = np.array(
                    [token == words["paris"] and kind == 1 for token, kind in zip(ids, types, strict=True)]
                )
                logits = np.where(hits, 5, -5).astype(np.float32)
                logits[0] = 0
                return EncodeOutput(np.stack([logits, logits], axis=1) + self.logit, TIMING)
            case EncodeItem(input_ids=ids, wants_vector=True):
                # A bag of words, in as many bags as the model is wide.
                return EncodeOutput(np.bincount(np.array(ids) % 32, minlength=32).astype(np.float32), TIMING)
            case EncodeItem(input_ids=ids):
                counts = [ids.count(words[word]) for word in ("bad", "fine", "good")]
                return EncodeOutput(np.array(counts, np.float32) + self.logit, TIMING)

    def _write(self, item: WriteItem) -> WriteOutput:
        """Copy the input, one token after the other."""
        written: list[int] = []
        told: list[TokenLogprobs] = []
        for token in item.input_ids if self.writes is None else self.writes:
            if len(written) == item.sampling.max_tokens:
                return WriteOutput(tuple(written), "length", TIMING, tuple(told))
            written.append(token)
            if item.sampling.logprobs is not None:
                # The likeliest are the token itself and those before it in the vocabulary.
                likeliest = tuple((max(0, token - n), -0.5 - n) for n in range(item.sampling.logprobs))
                told.append(TokenLogprobs(-0.5, likeliest))
            if item.on_tokens:
                item.on_tokens(written)
            if item.should_stop and (reason := item.should_stop(written)):
                return WriteOutput(tuple(written), "stop" if reason is True else reason, TIMING, tuple(told))
        return WriteOutput(tuple(written), "stop", TIMING, tuple(told))


class FakeAccount:
    """Bills 1.5 J above idle and 2 J in all, settled at once."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.records: dict[str, SettledRecord] = {}
        self.quality = Quality.MEASURED
        self.wakes = 0
        self.steps: list[Step] = []
        self.loads: Sequence[Load] | None = None
        self.time_s = 1_700_000_000.0
        self.on_settled: Callable[[Sequence[Bills]], None] = lambda bills: None
        self.seen_uj = 0
        """Of a request that runs, more at every look."""

    @property
    def is_metered(self) -> bool:
        return self.quality is not Quality.UNAVAILABLE

    def spent_uj(self, request_id: str) -> int:
        self.seen_uj += 100_000
        return self.seen_uj

    def wake(self) -> None:
        self.wakes += 1

    def record(self, step: Step) -> None:
        self.steps.append(step)

    def close(self, ended: Ended, beside: Beside, loads: Sequence[Load] | None = None) -> Bill:
        record = RequestRecord(*ended)
        self.loads = loads
        known = self.quality is not Quality.UNAVAILABLE
        bill = Bill(
            request_id=record.request_id,
            active_uj=1_500_000 if known else None,
            allocated_uj=2_000_000 if known else None,
            gco2e=0.25 if known else None,
            quality=self.quality,
            settled=True,
            parts=(Part("cpu", Phase.ENCODE, 2_000_000),) if known else (),
        )
        carbon = CarbonAssumptions("DEU", 350.0, "a table", 1.0, None, 4.0)
        settled = SettledRecord(record, bill, self.time_s + len(self.records), carbon)
        self.records[record.request_id] = settled
        self.ledger.put(Bills.of(settled))
        self.on_settled([Bills.of(settled)])
        return bill

    def find(self, request_id: str) -> SettledRecord | None:
        return self.records.get(request_id)

    def totals(self) -> Totals:
        spent = 2_000_000 * len(self.records)
        return Totals(
            meters=(MeterTotal("cpu", "fake", spent + 500_000, 0, 250_000),),
            attributed=(Attributed("cpu", "tiny", "sentiment", Phase.ENCODE, Quality.MEASURED, spent),),
            unattributed=(Unattributed("cpu", Reason.IDLE, 500_000),),
        )


@contextmanager
def build(settings: Settings) -> Iterator[Service]:
    """The service as ``create_app`` builds it, with the fake engine and account."""
    models = open_models(settings)
    engine = FakeEngine()
    metrics = Metrics()
    max_bytes = None if settings.max_models_mb is None else settings.max_models_mb * 1_000_000
    repository = Repository(models, engine, metrics, roots=settings.models, check=check_manifest, max_bytes=max_bytes)
    repository.fill()
    with TemporaryDirectory() as folder:
        # Of another time than now: the records' times stand still.
        ledger = Ledger(Path(folder) / "ledger.sqlite", max_days=100_000)
        account = FakeAccount(ledger)
        metrics.watch(engine.queue_depth, engine.running, account.totals, ledger)
        books = Books(metrics, settings.daily_budget_j)
        account.on_settled = books.settled
        embedder = find_embedder(models)
        knowledge = Knowledge(settings.knowledge, settings.max_documents, engine, embedder, account.record)
        yield Service(
            repository=repository,
            engine=engine,
            account=account,
            ledger=ledger,
            metrics=metrics,
            books=books,
            door=Door(settings.max_concurrent_requests, settings.max_queue_tokens, settings.max_key_share),
            max_client_batch_size=settings.max_client_batch_size,
            request_timeout_s=settings.request_timeout_s,
            knowledge=knowledge,
            classifiers=Classifiers(settings.classifiers),
            log_texts=settings.log_texts,
        )
        knowledge.close()
        ledger.close()


def wait_until(condition: Any, within_s: float = 5.0) -> None:
    """Return as soon as ``condition()`` holds."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition never came true")
        time.sleep(0.002)
