"""How each kind of server is asked, and where its answer holds tokens, times and joules. Knows nothing of Locust."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from loadtests.inputs import Query

PROMPTS = {
    "translate": "Translate into German. Answer with the translation only.\n\n{text}",
    "generate": "{text}",
    "answer": "Answer with a few words of the text.\n\n{context}\n\nQuestion: {text}",
    "sentiment": "Is the sentiment positive, neutral or negative? Answer with one word.\n\n{text}",
    "summarize": "Summarise the dialogue in one or two sentences.\n\n{text}",
}
"""The five tasks for a server that only chats."""
MAX_TOKENS = {"translate": 96, "answer": 32, "sentiment": 4, "summarize": 96}
"""Of a chatting server's answer, where the query does not say; without a limit some never end."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What an answer says about itself; None is what it does not say."""

    model: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    queue_ms: float | None = None
    compute_ms: float | None = None
    active_j: float | None = None
    allocated_j: float | None = None
    gco2e: float | None = None
    quality: str | None = None
    settled: bool = False


class Dialect(Protocol):
    """One way to ask."""

    lists: ClassVar[bool]
    """Whether a request may hold several texts."""
    streams: ClassVar[bool]

    def path(self, query: Query) -> str:
        """Where the query goes."""

    def body(self, query: Query) -> dict[str, Any]:
        """The request's JSON."""


class Wattle:
    """The native routes, one per task."""

    lists = True
    streams = True

    def __init__(self, model: str | None = None) -> None:
        self._model = model

    def path(self, query: Query) -> str:
        """One route per task."""
        return f"/v1/{query.task}"

    def body(self, query: Query) -> dict[str, Any]:
        """The texts under the task's own names; long ones are cut, for lengths are drawn without a model in mind."""
        if query.task == "answer":
            body: dict[str, Any] = {"question": _one_or_list(query.texts), "context": _one_or_list(query.contexts)}
        else:
            body = {"input": _one_or_list(query.texts)}
        return body | {"truncate": True} | _given(model=self._model, max_tokens=query.max_tokens, stream=query.stream)


class OpenAI:
    """Chat completions: llama-server, vLLM, and whatever else speaks OpenAI's dialect."""

    lists = False
    streams = True

    def __init__(self, model: str | None = None) -> None:
        self._model = model or "default"

    def path(self, query: Query) -> str:
        """Every task is a chat."""
        return "/v1/chat/completions"

    def body(self, query: Query) -> dict[str, Any]:
        """One user turn that states the task; greedy, so that a run can be repeated."""
        context = query.contexts[0] if query.contexts else ""
        prompt = PROMPTS[query.task].format(text=query.texts[0], context=context)
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": query.max_tokens or MAX_TOKENS.get(query.task, 64),
            "temperature": 0,
        }
        # Without this a stream ends without saying how many tokens it was.
        return body | ({"stream": True, "stream_options": {"include_usage": True}} if query.stream else {})


class HuggingFace:
    """``{"inputs": ...}``: text-embeddings-inference, inference endpoints, a pipeline behind HTTP."""

    lists = True
    streams = False

    def __init__(self, model: str | None = None) -> None:
        pass

    def path(self, query: Query) -> str:
        """A model has a URL; where the server has several, the plan says which."""
        return "/"

    def body(self, query: Query) -> dict[str, Any]:
        """The texts as ``inputs``; question answering has a pair of its own."""
        if query.task == "answer":
            pairs = [{"question": q, "context": c} for q, c in zip(query.texts, query.contexts, strict=True)]
            return {"inputs": pairs if len(pairs) > 1 else pairs[0]}
        parameters = _given(max_new_tokens=query.max_tokens if query.task == "generate" else None)
        return {"inputs": _one_or_list(query.texts)} | _given(parameters=parameters)


DIALECTS: dict[str, type[Wattle] | type[OpenAI] | type[HuggingFace]] = {
    "wattle": Wattle,
    "openai": OpenAI,
    "huggingface": HuggingFace,
}


def read_reply(document: Any, headers: Mapping[str, str]) -> Reply:
    """What an answer says of tokens, times and energy, in its body or in its headers."""
    body: dict[str, Any] = document if isinstance(document, dict) else {}
    usage, timings = _part(body, "usage"), _part(body, "timings")
    energy = _part(body, "energy") or _part(usage, "energy")
    return Reply(
        model=body.get("model") if isinstance(body.get("model"), str) else None,
        input_tokens=_first(usage, "input_tokens", "prompt_tokens"),
        output_tokens=_first(usage, "output_tokens", "completion_tokens"),
        queue_ms=_first(timings, "queue_ms", default=_number(headers.get("x-queue-time"))),
        compute_ms=_first(timings, "compute_ms", default=_number(headers.get("x-inference-time"))),
        active_j=energy.get("active_j"),
        allocated_j=energy.get("allocated_j", _number(headers.get("x-energy-joules"))),
        gco2e=energy.get("gco2e", _number(headers.get("x-energy-gco2e"))),
        quality=energy.get("quality", headers.get("x-energy-quality")),
        settled=bool(energy.get("settled", False)),
    )


class StreamReader:
    """Reads server-sent events line by line; the last event that has a figure wins."""

    def __init__(self) -> None:
        self.wrote = False
        """Whether text has come."""
        self.ended = False
        self.error: str | None = None
        self._merged: dict[str, Any] = {}

    def feed(self, line: bytes) -> None:
        """One line of the body."""
        if not line.startswith(b"data:"):
            return
        data = line[5:].strip()
        if data == b"[DONE]":
            self.ended = True
            return
        try:
            event = json.loads(data)
        except ValueError:
            self.error = f"an event is not JSON: {data[:80]!r}"
            return
        if not isinstance(event, dict):
            return
        if event.get("error"):
            error = event["error"]
            self.error = str(error.get("message", error) if isinstance(error, dict) else error)
        # Wattle's native streams end with the whole answer, others with [DONE].
        self.ended = self.ended or bool(event.get("results"))
        self._merged |= {key: value for key, value in event.items() if value is not None}
        self.wrote = self.wrote or _has_text(event)

    def reply(self, headers: Mapping[str, str]) -> Reply:
        """What the stream has said of itself."""
        return read_reply(self._merged, headers)


def _has_text(event: Mapping[str, Any]) -> bool:
    """Whether an event carries written text, in any of the dialects."""
    inner = (part for key in ("choices", "results") for part in event.get(key) or () if isinstance(part, dict))
    for part in (event, *inner):
        delta = part.get("delta")
        written = delta.get("content") if isinstance(delta, dict) else delta
        if written or part.get("text"):
            return True
    return False


def _one_or_list(texts: tuple[str, ...]) -> str | list[str]:
    return texts[0] if len(texts) == 1 else list(texts)


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value}


def _part(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = body.get(name)
    return part if isinstance(part, dict) else {}


def _first(fields: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), default)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
