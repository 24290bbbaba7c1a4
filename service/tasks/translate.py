"""Translation: a text in one language, written anew in another."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, Field

from models.manifest import ArtefactError, Manifest
from service.engine.types import Output, WriteItem
from service.errors import UnsupportedLanguages
from service.models import Model, Models
from service.streaming import PlainTranscript, Transcript
from service.tasks.base import Encoded, Task, WritingRequest, WrittenText, check_writer, encode_text, sampling, written


class TranslateRequest(WritingRequest):
    """Texts to translate."""

    source: str | None = Field(None, description="Language code of the input; by default the model's.")
    target: str | None = Field(None, description="Language code of the output; by default the model's.")
    beams: int | None = Field(None, ge=1, le=8, description="Width of the beam search; 1 is greedy.")


class Translate(Task[TranslateRequest, None]):
    """An encoder-decoder from one language to another."""

    name = "translate"
    summary = "Translate a text"
    request = TranslateRequest
    result = WrittenText
    example: ClassVar[Mapping[str, Any]] = {"input": "A dog runs along the beach.", "beams": 1}

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

    def encode(self, request: TranslateRequest, model: Model, request_id: str) -> Encoded[None]:
        texts = [encode_text(model, text, param="input", truncate=request.truncate) for text in request.input]
        return Encoded(
            tuple(WriteItem(request_id, ids, sampling(model, len(ids), beams=request.beams)) for ids in texts), None
        )

    def transcript(self, plan: None, model: Model, number: int) -> Transcript:
        return PlainTranscript(model.tokenizer)

    def decode(self, plan: None, model: Model, outputs: Sequence[Output]) -> list[BaseModel]:
        return [
            WrittenText(text=model.tokenizer.decode(output.output_ids), finish_reason=output.finish_reason)
            for output in map(written, outputs)
        ]
