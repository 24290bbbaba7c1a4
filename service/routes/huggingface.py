"""Hugging Face's inference tasks: a model's URL is ``/hf/{model}``, and what it answers depends on its task."""

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field, field_validator
from starlette.responses import Response

from service.conversation import Asked, ask, request_of
from service.core import Receipt
from service.errors import InvalidValue, renaming
from service.models import Model
from service.routes.common import energy_fields, service_of
from service.routes.openai.chat import ChatRequest, ChatResponse, answer_chat
from service.routes.openai.common import ERRORS, Lenient, example, finish_reason
from service.routes.openai.embeddings import EMBED
from service.routes.sse import event, respond, respond_whole, streamed
from service.tasks import task_of
from service.tasks.answer import AnswerResult
from service.tasks.base import WrittenText, written
from service.tasks.embed import Embedding, embeds
from service.tasks.generate import GeneratedText
from service.tasks.sentiment import SentimentResult

_TEXTS = {"translate": "translation_text", "summarize": "summary_text"}
_WISHES = {
    "max_new_tokens": "max_tokens",
    "num_beams": "beams",
    "src_lang": "source",
    "tgt_lang": "target",
    "handle_impossible_answer": "abstain",
}
"""What Hugging Face calls parameters of the tasks, where it differs."""
_NAMES = {
    **dict.fromkeys(("input", "question", "context"), "inputs"),
    **{ours: theirs for theirs, ours in _WISHES.items()},
}


class Parameters(Lenient):
    """Parameters of the tasks that the client knows; each task leaves alone what it doesn't know."""

    max_new_tokens: int | None = Field(
        None, ge=1, description="Most tokens to write; the model's own limit holds too."
    )
    num_beams: int | None = Field(None, ge=1, description="Width of the beam search of a translation or summary.")
    do_sample: bool | None = Field(None, description="False always takes the likeliest token.")
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0, description="Choose among this many tokens, or tell this many labels.")
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = None
    stop: list[str] | None = Field(None, description="Up to four texts that end the writing.")
    details: bool | None = Field(None, description="Tell tokens, how likely they were, and why the text ended.")
    return_full_text: bool | None = Field(None, description="Repeat the prompt before what continues it.")
    truncate: int | None = Field(None, description="Cut an input that is longer than the model reads.")
    truncation: str | None = Field(None, description="The same, unless it is `do_not_truncate`.")
    src_lang: str | None = None
    tgt_lang: str | None = None
    handle_impossible_answer: bool = Field(False, description="Answer with nothing where that is likelier.")
    grammar: Any = Field(None, description="Not supported.")
    generate_parameters: dict[str, Any] | None = Field(None, description="Parameters as these, for what is written.")
    energy_budget_j: float | None = Field(None, description="Most joules that the request may cost.")


class HuggingFaceRequest(Lenient):
    """Inputs for a model's task, and parameters; those that the task doesn't know are left alone."""

    inputs: Any = Field(
        description="A text or a list of them; for answers `question` and `context`, or a list of such."
    )
    parameters: Parameters = Field(default_factory=lambda: Parameters.model_validate({}))
    stream: bool | None = Field(None, description="Tell a text in pieces.")
    truncate: bool = Field(False, description="Cut a text that is too long to be embedded.")
    dimensions: int | None = Field(None, description="Keep this many numbers of an embedding, the first.")

    @field_validator("parameters", mode="before")
    @classmethod
    def _none_is_none_of_them(cls, value: Any) -> Any:
        return {} if value is None else value


def huggingface_routes() -> APIRouter:
    """What ``huggingface_hub.InferenceClient(model=URL)`` calls."""
    router = APIRouter(prefix="/hf", tags=["huggingface"])

    @router.post(
        "/{model:path}/v1/chat/completions",
        operation_id="huggingface_chat",
        summary="Hugging Face: go on with a conversation, as OpenAI's chat completions do",
        response_model=ChatResponse,
        responses=ERRORS | streamed("With `stream`: OpenAI's `chat.completion.chunk`, and last `[DONE]`."),
        openapi_extra=example({"messages": [{"role": "user", "content": "Would you like a cup of coffee?"}]}),
    )
    async def chat(model: str, body: ChatRequest, http: Request) -> Response:
        return await answer_chat(http, body, service_of(http).models.named(model))

    @router.post(
        "/{model:path}",
        operation_id="huggingface",
        summary="Hugging Face: do a model's task",
        responses=ERRORS | streamed("With `stream`: one event for every piece, and a last one with the whole text."),
        openapi_extra=example({"inputs": "The food was wonderful."}),
    )
    async def infer(model: str, body: HuggingFaceRequest, http: Request) -> Response:
        chosen = service_of(http).models.named(model)
        if embeds(chosen):
            with renaming(_NAMES):
                wishes: dict[str, Any] = {"truncate": body.truncate, "dimensions": body.dimensions}
                wishes["energy_budget_j"] = body.parameters.energy_budget_j
                request = request_of(EMBED, {"input": body.inputs, "model": model, **wishes})
            return await respond_whole(http, EMBED, request, _vectors, _NAMES)
        asked = _ask(chosen, body)
        return await respond(http, asked.task, asked.request, _Inference(asked, body), stream=bool(body.stream))

    return router


def _ask(model: Model, body: HuggingFaceRequest) -> Asked:
    told = body.parameters
    if told.grammar is not None:
        raise InvalidValue("grammar", "is not supported: the models write plain text")
    parameters = told.model_dump(exclude_none=True) | (told.generate_parameters or {})
    wishes = {_WISHES.get(name, name): value for name, value in parameters.items()}
    wishes["truncate"] = told.truncate is not None or told.truncation not in (None, "do_not_truncate")
    wishes["logprobs"] = 0 if told.details else None
    # The prompt is continued as it stands: a conversation has a path of its own.
    wishes["chat"] = False
    if told.do_sample is False:
        wishes["temperature"] = 0.0
    texts = body.inputs
    if "context" in task_of(model).request.model_fields:
        pairs = texts if isinstance(texts, list) else [texts]
        if not all(isinstance(pair, dict) and {"question", "context"} <= pair.keys() for pair in pairs):
            raise InvalidValue("inputs", "must be a question and a context")
        texts = [pair["question"] for pair in pairs]
        wishes["context"] = [pair["context"] for pair in pairs]
    with renaming(_NAMES):
        return ask(model, texts, wishes)


class _Inference:
    """Tells a request; see ``Script``."""

    names: Mapping[str, str] = _NAMES

    def __init__(self, asked: Asked, body: HuggingFaceRequest) -> None:
        self._asked, self._body = asked, body
        self._events = count(1)

    def whole(self, receipt: Receipt) -> Any:
        """See ``Script``."""
        shown = [self._show(receipt, number) for number in range(len(receipt.results))]
        # An answer stands alone, every other result in a list.
        return shown[0] if isinstance(self._body.inputs, dict) else shown

    def opening(self, receipt: Receipt) -> Iterator[bytes]:
        """See ``Script``."""
        return iter(())

    def piece(self, number: int, text: str) -> Iterator[bytes]:
        """See ``Script``."""
        yield self._event(text)

    def closing(self, receipt: Receipt) -> Iterator[bytes]:
        """See ``Script``."""
        yield self._event(
            "",
            generated_text=getattr(receipt.results[0], self._asked.task.says),
            details={
                "finish_reason": _finish_reason(receipt, 0),
                "generated_tokens": receipt.output_tokens,
                "input_length": receipt.input_tokens,
                "seed": self._body.parameters.seed,
            },
            energy=energy_fields(receipt.bill),
        )

    def _event(self, text: str, **last: Any) -> bytes:
        # A piece need not be one token: its number and its probability are unknown, not zero.
        token = {"id": None, "text": text, "logprob": None, "special": bool(last)}
        return event({"index": next(self._events), "token": token, "generated_text": None, "details": None, **last})

    def _show(self, receipt: Receipt, number: int) -> Any:
        result = receipt.results[number]
        match result:
            case AnswerResult():
                # No answer is an empty span at the start.
                span = {"start": result.start or 0, "end": result.end or 0}
                return {"answer": result.answer, "score": result.score, **span}
            case SentimentResult():
                scores = sorted(result.scores.model_dump().items(), key=lambda score: -score[1])
                return [{"label": label, "score": score} for label, score in scores[: self._body.parameters.top_k]]
            case GeneratedText():
                return self._generated(receipt, number, result)
            case WrittenText():
                return {_TEXTS.get(self._asked.task.name, "generated_text"): result.text}
        return result.model_dump()

    def _generated(self, receipt: Receipt, number: int, result: GeneratedText) -> dict[str, Any]:
        inputs, text = self._body.inputs, result.text
        if self._body.parameters.return_full_text:
            text = (inputs if isinstance(inputs, str) else inputs[number]) + text
        if result.logprobs is None:
            return {"generated_text": text}
        ids = written(receipt.outputs[number]).output_ids
        details = {
            "finish_reason": _finish_reason(receipt, number),
            "generated_tokens": len(ids),
            "prefill": [],
            "tokens": [
                {"id": token, "text": each.token, "logprob": each.logprob, "special": False}
                for token, each in zip(ids, result.logprobs, strict=True)
            ],
        }
        return {"generated_text": text, "details": details}


def _vectors(receipt: Receipt) -> list[list[float]]:
    return [result.vector for result in receipt.results if isinstance(result, Embedding)]


def _finish_reason(receipt: Receipt, number: int) -> str:
    result, output = receipt.results[number], receipt.outputs[number]
    if finish_reason(result) == "length":
        return "length"
    if isinstance(result, GeneratedText) and result.text != receipt.model.tokenizer.decode(written(output).output_ids):
        return "stop_sequence"
    return "eos_token"
