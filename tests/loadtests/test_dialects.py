"""Dialects: what is sent, and what is read from answers and streams."""

import json

from loadtests.dialects import DIALECTS, HuggingFace, OpenAI, StreamReader, Wattle, read_reply
from loadtests.inputs import Query

ONE = Query("translate", ("A dog.",))
TWO = Query("sentiment", ("Good.", "Bad."))
ASKED = Query("answer", ("Who?",), ("Tom ran.",))


def test_wattle() -> None:
    assert Wattle().path(ASKED) == "/v1/answer"
    assert Wattle().body(ASKED) == {"question": "Who?", "context": "Tom ran.", "truncate": True}
    assert Wattle("m").body(TWO) == {"input": ["Good.", "Bad."], "truncate": True, "model": "m"}
    streamed = Wattle().body(Query("generate", ("Hi",), stream=True, max_tokens=8))
    assert streamed == {"input": "Hi", "truncate": True, "stream": True, "max_tokens": 8}


def test_openai() -> None:
    body = OpenAI("m").body(ASKED)
    assert (OpenAI().path(ASKED), body["model"], body["temperature"]) == ("/v1/chat/completions", "m", 0)
    assert "Who?" in body["messages"][0]["content"] and "Tom ran." in body["messages"][0]["content"]
    assert body["max_tokens"] > 0, "a chat without a limit may never end"
    streamed = OpenAI().body(Query("generate", ("Hi",), stream=True))
    assert streamed["stream_options"] == {"include_usage": True}


def test_huggingface() -> None:
    assert HuggingFace().path(ONE) == "/"
    assert HuggingFace().body(TWO) == {"inputs": ["Good.", "Bad."]}
    assert HuggingFace().body(ASKED) == {"inputs": {"question": "Who?", "context": "Tom ran."}}
    assert HuggingFace().body(Query("generate", ("Hi",), max_tokens=8))["parameters"] == {"max_new_tokens": 8}


def test_every_dialect_asks_every_task() -> None:
    for dialect in DIALECTS.values():
        for task in ("translate", "generate", "answer", "sentiment", "summarize"):
            query = Query(task, ("text",), ("context",) if task == "answer" else ())
            assert "text" in json.dumps(dialect().body(query))


def test_what_an_answer_does_not_say_is_unknown() -> None:
    for document in ([{"label": "POSITIVE"}], {}, None, {"usage": None, "energy": "much", "model": 3}):
        reply = read_reply(document, {})
        assert reply.allocated_j is None and reply.output_tokens is None and reply.model is None


def test_the_body_of_an_answer_and_its_headers() -> None:
    energy = {"active_j": 0.5, "allocated_j": 1.5, "gco2e": 0.1, "quality": "measured", "settled": True}
    body = {"model": "m", "usage": {"prompt_tokens": 3, "completion_tokens": 2}, "energy": energy}
    reply = read_reply(body, {"x-energy-joules": "9", "x-queue-time": "1.5"})
    assert (reply.input_tokens, reply.output_tokens, reply.allocated_j, reply.queue_ms) == (3, 2, 1.5, 1.5)
    assert reply.settled
    assert read_reply({"usage": {"energy": energy}}, {}).allocated_j == 1.5, "OpenAI's answers keep it with the tokens"
    headers = {"x-energy-joules": "0.25", "x-energy-quality": "estimated", "x-energy-gco2e": "?"}
    only_headers = read_reply({}, headers)
    assert (only_headers.allocated_j, only_headers.quality, only_headers.gco2e) == (0.25, "estimated", None)
    assert not only_headers.settled


def read(*lines: str) -> StreamReader:
    reader = StreamReader()
    for line in lines:
        reader.feed(line.encode() + b"\n")
    return reader


def test_a_native_stream() -> None:
    final = {"model": "m", "results": [{"text": "Ein Hund"}], "usage": {"output_tokens": 2}}
    begun = read('data: {"index": 0, "delta": ""}', "", ": comment")
    assert not begun.wrote and not begun.ended
    done = read('data: {"index": 0, "delta": "Ein"}', f"data: {json.dumps(final)}")
    assert done.wrote and done.ended and done.error is None
    assert done.reply({}).output_tokens == 2


def test_a_stream_that_breaks_off_has_not_ended() -> None:
    assert not read('data: {"index": 0, "delta": "Ein"}', 'data: {"choices": [{"delta": {"content": "Hi"}}]}').ended


def test_an_openai_stream() -> None:
    role = 'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}], "usage": null}'
    assert not read(role).wrote
    last = 'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 9}}'
    done = read(role, 'data: {"choices": [{"delta": {"content": "Hi"}}]}', last, "data: [DONE]")
    assert done.wrote and done.reply({}).output_tokens == 9


def test_a_failure_inside_a_stream() -> None:
    assert read('data: {"error": {"message": "the engine stopped"}}').error == "the engine stopped"
    assert "not JSON" in str(read("data: {").error)
