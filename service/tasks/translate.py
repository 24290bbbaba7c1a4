"""Translation: a text in one language, written anew in another, sentence by sentence.

Models of translation learn from sentences, and leave out most of a paragraph that they are given whole (docs/LOG.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, Field

from models.manifest import ArtefactError, Manifest
from models.sentences import split_sentences
from service.engine.types import FinishReason, Output, WriteItem
from service.errors import UnsupportedLanguages
from service.models import Model, Models
from service.streaming import PlainTranscript, Transcript
from service.tasks.base import (
    MAX_BEAMS,
    Encoded,
    Task,
    WritingRequest,
    WrittenText,
    check_writer,
    encode_readable,
    refuse_longer,
    sampling,
    unreadable,
    written,
)

MAX_TEXT_TOKENS = 4096
"""Longest text that is translated, however short its sentences; what one request can ask for must have an end."""
_UNSPACED = ("zh", "ja", "th", "lo", "km", "my")
"""Languages that put no space between sentences."""


class TranslateRequest(WritingRequest):
    """Texts to translate."""

    source: str | None = Field(None, description="Language code of the input; by default the model's.")
    target: str | None = Field(None, description="Language code of the output; by default the model's.")
    beams: int | None = Field(None, ge=1, le=MAX_BEAMS, description="Width of the beam search; 1 is greedy.")


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around the sentences of a text."""

    before: tuple[str, ...]
    """What comes before each sentence."""
    after: str


@dataclass(frozen=True, slots=True)
class TranslatePlan:
    """How translated sentences make texts."""

    frames: tuple[Frame, ...]
    """One per text."""
    places: tuple[tuple[int, int], ...]
    """Of each item: the number of its text, and of its sentence in it."""


class Translate(Task[TranslateRequest, TranslatePlan]):
    """An encoder-decoder from one language to another."""

    name = "translate"
    summary = "Translate a text"
    request = TranslateRequest
    result = WrittenText
    example: ClassVar[Mapping[str, Any]] = {"input": "A dog runs along the beach.", "beams": 1}
    in_groups = True

    def check(self, manifest: Manifest) -> None:
        check_writer(manifest)
        if len(manifest.languages) != 2:
            raise ArtefactError("manifest.json: translate needs two languages, the source and the target")

    def choose(self, request: TranslateRequest, models: Models) -> Model:
        """The first model, or the one named, that translates between the languages asked for."""
        candidates = models.for_task(self.name) if request.model is None else [super().choose(request, models)]
        for model in candidates:
            source, target = model.manifest.languages
            if request.source in (None, source) and request.target in (None, target):
                return model
        if not candidates:
            return super().choose(request, models)
        pairs = ", ".join(f"{source} to {target}" for source, target in (m.manifest.languages for m in candidates))
        known_source = request.source in (None, *(model.manifest.languages[0] for model in candidates))
        raise UnsupportedLanguages(
            "target" if known_source else "source", f"this language pair is not available; available are: {pairs}"
        )

    def encode(self, request: TranslateRequest, model: Model, request_id: str) -> Encoded[TranslatePlan]:
        frames: list[Frame] = []
        places: list[tuple[int, int]] = []
        items: list[WriteItem] = []
        for number, text in enumerate(request.input):
            frame, sentences = _cut(model, text, request.truncate)
            frames.append(frame)
            places += [(number, place) for place in range(len(sentences))]
            items += [WriteItem(request_id, ids, sampling(model, len(ids), beams=request.beams)) for ids in sentences]
        return Encoded(tuple(items), TranslatePlan(tuple(frames), tuple(places)))

    def transcript(self, plan: TranslatePlan, model: Model, number: int) -> Transcript | None:
        # Of several sentences none is told before those in front of it are whole.
        return PlainTranscript(model.tokenizer) if _is_alone(plan, number) else None

    def result_of(self, plan: TranslatePlan, number: int) -> int:
        return plan.places[number][0]

    def part(self, plan: TranslatePlan, model: Model, outputs: Sequence[Output]) -> str:
        number = len(outputs) - 1
        return "" if _is_alone(plan, number) else _sentence(plan, model, outputs, number)

    def decode(self, plan: TranslatePlan, model: Model, outputs: Sequence[Output]) -> list[BaseModel]:
        texts = [""] * len(plan.frames)
        reasons: list[set[FinishReason]] = [set() for _ in plan.frames]
        for number, output in enumerate(outputs):
            text = self.result_of(plan, number)
            texts[text] += _sentence(plan, model, outputs, number)
            reasons[text].add(written(output).finish_reason)
        return [
            WrittenText(
                text=text if "energy_budget" in ends else text + frame.after,
                finish_reason=next((reason for reason in ("energy_budget", "length") if reason in ends), "stop"),
            )
            for text, frame, ends in zip(texts, plan.frames, reasons, strict=True)
        ]


def _cut(model: Model, text: str, truncate: bool) -> tuple[Frame, list[tuple[int, ...]]]:
    """The sentences of a text as the model reads them, and what stands around them.

    Raises ``TooManyTokens`` unless ``truncate``, and ``InvalidValue`` for a text without a single token.
    """
    before: list[str] = []
    sentences: list[tuple[int, ...]] = []
    reach = total = 0
    spans = split_sentences(text)
    # What holds no word beside words stays as it is: a line of dashes, an emoji, what the model cannot read.
    for start, end in [span for span in spans if _holds_words(text[slice(*span)])] or spans:
        # A sentence may be wrapped over lines.
        sentence = " ".join(text[start:end].split())
        ids = encode_readable(model, sentence, param="input", truncate=truncate)
        if ids is None:
            continue
        before.append(_gap(text[reach:start], model.manifest.languages[1]) if sentences else text[:start])
        sentences.append(ids)
        reach, total = end, total + len(ids)
        if truncate and total >= MAX_TEXT_TOKENS:
            return Frame(tuple(before), ""), sentences
    if not sentences:
        raise unreadable("input")
    refuse_longer(total, MAX_TEXT_TOKENS, param="input", truncate=False)
    return Frame(tuple(before), text[reach:]), sentences


def _holds_words(text: str) -> bool:
    return any(map(str.isalnum, text))


def _gap(gap: str, language: str) -> str:
    """What stands between two sentences, in ``language``."""
    if "\n" in gap or gap.strip():
        return gap
    return "" if language in _UNSPACED else gap or " "


def _is_alone(plan: TranslatePlan, number: int) -> bool:
    """Whether an item is all of its text."""
    return plan.frames[plan.places[number][0]].before == ("",)


def _sentence(plan: TranslatePlan, model: Model, outputs: Sequence[Output], number: int) -> str:
    """What the item of a number adds to its text: nothing where the request's joules were spent before it."""
    text, place = plan.places[number]
    if any(written(output).finish_reason == "energy_budget" for output in outputs[number - place : number]):
        return ""
    return plan.frames[text].before[place] + model.tokenizer.decode(written(outputs[number]).output_ids)
