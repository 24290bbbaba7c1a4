"""OpenAI's own client over a real socket: it gets what it expects, good and bad."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from service.core import Service
from service.engine.types import EngineClosed, Overloaded
from tests.service.fakes import byte_tokenizer, wait_until

BYTES = byte_tokenizer()
ENERGY = {"active_j": 1.5, "allocated_j": 2.0, "gco2e": 0.25, "quality": "measured", "settled": True}
HELLO = [{"role": "user", "content": "good"}]


def ids(text: str) -> tuple[int, ...]:
    return tuple(BYTES.encode(text, add_special_tokens=False).ids)


@pytest.fixture
def api(address: str) -> Iterator[Any]:
    """A client that tries once."""
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as api:
        yield api


def test_models_are_listed_with_their_aliases(api: Any) -> None:
    listed = {model.id: model for model in api.models.list()}
    assert set(listed) == {
        *(f"tiny-{task}" for task in ("translate", "generate", "answer", "sentiment", "summarize")),
        "gpt-4o-mini",
    }
    assert listed["gpt-4o-mini"].root == "tiny-generate"
    assert api.models.retrieve("tiny-translate").languages == ["en", "de"]
    with pytest.raises(openai.NotFoundError, match="gpt-4o-mini"):
        api.models.retrieve("nobody")


def test_a_conversation_goes_on(api: Any, service: Service) -> None:
    service.engine.writes = ids("fine, and you?")
    answer = api.chat.completions.create(
        model="gpt-4o-mini",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "how "}, {"type": "text", "text": "are you"}]},
            {"role": "assistant", "content": None},
            {"role": "user", "content": "hello?"},
        ],
        max_completion_tokens=4096,
        user="somebody",
        presence_penalty=0.5,
        metadata={"a": "b"},
        tools=[{"type": "function", "function": {"name": "f"}}],
    )
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        "fine, and you?",
        "stop",
    )
    assert answer.model == "tiny-generate"
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == answer.usage.total_tokens
    assert answer.usage.energy == ENERGY
    assert answer.id in service.account.records
    (item,) = service.engine.items
    assert item.sampling.max_tokens == 64
    assert BYTES.decode(item.input_ids, skip_special_tokens=False) == (
        "<|system|>\nbe brief<|end|>\n<|user|>\nhow are you<|end|>\n<|assistant|>\n<|end|>\n"
        "<|user|>\nhello?<|end|>\n<|assistant|>\n"
    )


@pytest.mark.parametrize(
    ("model", "text", "said"),
    [
        ("tiny-translate", "good dog", "good dog"),
        ("tiny-summarize", "good dog", "Good dog"),
        ("tiny-sentiment", "good good", "positive"),
        ("tiny-generate", "good", None),
    ],
)
def test_every_task_is_done_on_the_last_message(api: Any, model: str, text: str, said: str | None) -> None:
    messages = [{"role": "system", "content": "bad"}, {"role": "user", "content": text}]
    choice = api.chat.completions.create(model=model, messages=messages).choices[0]
    assert said in (None, choice.message.content)
    assert hasattr(choice, "result") == (model == "tiny-sentiment")


def test_a_question_is_answered_from_what_stands_before_it(api: Any) -> None:
    messages = [
        {"role": "system", "content": "the capital of france is paris"},
        {"role": "assistant", "content": "what is it?"},
        {"role": "user", "content": "what is the capital"},
    ]
    choice = api.chat.completions.create(model="tiny-answer", messages=messages).choices[0]
    assert choice.message.content == "paris"
    assert choice.result["start"] == 25
    with pytest.raises(openai.UnprocessableEntityError, match=r"messages: .* needs a context"):
        api.chat.completions.create(model="tiny-answer", messages=messages[-1:])


def test_parameters_of_the_task_come_along(api: Any, service: Service) -> None:
    api.chat.completions.create(model="tiny-translate", messages=HELLO, extra_body={"beams": 3})
    assert service.engine.items[-1].sampling.beams == 3
    with pytest.raises(openai.UnprocessableEntityError, match="truncate"):
        api.chat.completions.create(model="tiny-generate", messages=[{"role": "user", "content": "good " * 99}])
    long = [{"role": "user", "content": "old " * 99}, {"role": "assistant", "content": "no"}, *HELLO]
    api.chat.completions.create(model="tiny-generate", messages=long, extra_body={"truncate": True})
    assert "old" not in BYTES.decode(service.engine.items[-1].input_ids)


def test_several_choices_have_seeds_of_their_own(api: Any, service: Service) -> None:
    answer = api.chat.completions.create(model="tiny-generate", messages=HELLO, n=3, seed=2**63 - 1, temperature=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [item.sampling.seed for item in service.engine.items] == [2**63 - 1, 0, 1]
    with pytest.raises(openai.UnprocessableEntityError, match="n: the model tiny-translate writes one text"):
        api.chat.completions.create(model="tiny-translate", messages=HELLO, n=2)
    with pytest.raises(openai.UnprocessableEntityError, match="messages: holds 33 texts"):
        api.chat.completions.create(model="tiny-generate", messages=HELLO, n=33)


def test_values_at_the_edge_of_what_is_allowed_there(api: Any, service: Service) -> None:
    asked: dict[str, Any] = {"model": "tiny-generate", "messages": HELLO, "logprobs": False, "top_logprobs": 0}
    api.chat.completions.create(**asked, seed=-1, top_p=0, temperature=1)
    chosen = service.engine.items[-1].sampling
    assert (chosen.seed, chosen.top_p, chosen.top_k) == (2**63 - 1, 1.0, 1)


def test_what_was_refused_once_may_be_told_again(api: Any, service: Service) -> None:
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "i will not"}]}
    api.chat.completions.create(model="tiny-generate", messages=[*HELLO, refusal, *HELLO])
    assert "i will not<|end|>" in BYTES.decode(service.engine.items[-1].input_ids, skip_special_tokens=False)


def test_probabilities_of_tokens(api: Any, service: Service) -> None:
    service.engine.writes = ids("né")
    asked = {"model": "tiny-generate", "messages": HELLO, "logprobs": True, "top_logprobs": 2}
    (choice,) = api.chat.completions.create(**asked).choices
    first, second, third = choice.logprobs.content
    assert (first.token, first.bytes, first.logprob) == ("n", [110], -0.5)
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("n", -0.5), ("m", -1.5)]
    assert (second.token, second.bytes) == (third.token, third.bytes) == ("\ufffd", None)
    *_, last = api.chat.completions.create(**asked, stream=True)
    assert last.choices[0].logprobs.to_dict() == choice.logprobs.to_dict()
    legacy = api.completions.create(model="tiny-generate", prompt="good", logprobs=2).choices[0].logprobs
    assert legacy.tokens[0] == "n" and legacy.text_offset[:2] == [0, 1]
    assert legacy.top_logprobs[0] == {"n": -0.5, "m": -1.5}
    response = api.responses.create(
        model="tiny-generate", input="good", include=["message.output_text.logprobs"], top_logprobs=2
    )
    assert response.output[0].content[0].logprobs[0].logprob == -0.5


@pytest.mark.parametrize("model", ["tiny-translate", "tiny-generate", "tiny-summarize", "tiny-sentiment"])
def test_a_stream_of_a_chat_says_what_a_single_answer_says(api: Any, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": HELLO}
    whole = api.chat.completions.create(**asked)
    *chunks, last = api.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)
    assert (last.choices, last.usage) == ([], whole.usage)
    with api.chat.completions.stream(**asked) as stream:
        assert stream.get_final_completion().choices[0].message.content == whole.choices[0].message.content


def test_texts_are_continued(api: Any, service: Service) -> None:
    answer = api.completions.create(
        model="tiny-generate", prompt=["one", "two"], n=2, stop="e", max_tokens=9, best_of=2
    )
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "on"), (1, "on"), (2, "two"), (3, "two")]
    assert answer.usage.energy == ENERGY
    assert service.engine.items[-1].input_ids == ids("two")
    chunks = list(api.completions.create(model="tiny-generate", prompt=["one", "two"], stream=True))
    texts = ["".join(c.choices[0].text for c in chunks if c.choices[0].index == n) for n in (0, 1)]
    assert texts == ["one", "two"]


def test_responses(api: Any, service: Service) -> None:
    asked: dict[str, Any] = {"model": "tiny-generate", "input": "good", "instructions": "be brief", "store": False}
    whole = api.responses.create(**asked)
    assert whole.status == "completed"
    assert whole.output_text == BYTES.decode(service.engine.items[-1].input_ids[:64])
    assert whole.usage.energy == ENERGY
    assert (whole.metadata, api.responses.create(**asked, metadata={"a": "b"}).metadata) == ({}, {"a": "b"})
    events = list(api.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == whole.output_text
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text and len(deltas) > 3
    with api.responses.stream(**asked) as stream:
        assert stream.get_final_response().output_text == whole.output_text
    cut = api.responses.create(**asked, max_output_tokens=3)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    turns = [{"role": "user", "content": [{"type": "input_text", "text": "good dog"}]}]
    assert api.responses.create(model="tiny-translate", input=turns).output_text == "good dog"


def test_embeddings(api: Any, embedder: str) -> None:
    texts = ["bad bad fine fine good", "good", "dog"]
    answer = api.embeddings.create(model=embedder, input=texts)  # asks for base64
    assert [each.embedding for each in answer.data] == [pytest.approx([2 / 3, 2 / 3, 1 / 3]), [0, 0, 1], [0, 0, 0]]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    assert answer.usage.energy == ENERGY
    (short,) = api.embeddings.create(model=embedder, input=texts[0], encoding_format="float", dimensions=2).data
    assert short.embedding == pytest.approx([0.5**0.5, 0.5**0.5])
    assert api.models.retrieve(embedder).tasks == []


def test_whoever_fills_an_index_sends_hundreds(api: Any, embedder: str, service: Service) -> None:
    submit, groups = service.engine.submit, []

    def count(model: str, items: Any, key: str) -> Any:
        groups.append(len(items))
        return submit(model, items, key)

    service.engine.submit = count
    texts = [("good " * number + "bad").strip() for number in range(100)]
    answer = api.embeddings.create(model=embedder, input=texts)
    assert [each.index for each in answer.data] == list(range(100))
    assert [each.embedding[0] > 0 for each in answer.data] == [True] * 100
    assert groups == [32, 32, 32, 4]
    with pytest.raises(openai.UnprocessableEntityError, match="holds 2049 texts; at most 2048"):
        api.embeddings.create(model=embedder, input=["good"] * 2049)


def test_embeddings_are_for_models_that_make_them(api: Any, address: str, embedder: str) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="tiny-generate makes no embeddings"):
        api.embeddings.create(model="gpt-4o-mini", input="good")
    with pytest.raises(openai.UnprocessableEntityError, match="makes embeddings, and nothing else"):
        api.chat.completions.create(model=embedder, messages=HELLO)
    for wrong, param in (
        ({"input": [[1, 2, 3]]}, "input"),
        ({"input": ""}, "input"),
        ({"input": "good " * 500}, "input"),
        ({"dimensions": 33}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
    ):
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            api.embeddings.create(**{"model": embedder, "input": "good", **wrong})
        assert caught.value.param == param


def test_without_a_model_that_embeds_there_are_no_embeddings(client: TestClient) -> None:
    response = client.post("/v1/embeddings", json={"input": "good"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert "no model is loaded for the task embed" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format: the format 'json_object' is not supported"),
        ({"tool_choice": "required"}, "tool_choice: "),
        ({"top_logprobs": 3}, "top_logprobs: goes with"),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "user", "content": ""}]}, "messages: the text is empty"),
        ({"messages": [{"role": "assistant", "content": "good"}]}, "messages: the last message must be the user's"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages: a part of the type 'image_url' cannot be read",
        ),
        ({"temperature": 3}, "temperature: "),
        ({"stop": ["a"] * 5}, "stop: "),
        ({"seed": 2**63}, "seed: "),
        ({"top_p": -0.1}, "top_p: "),
        ({"max_tokens": 0}, "max_tokens: "),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_cannot_be_done_is_refused_by_name(api: Any, call: dict[str, Any], message: str, stream: bool) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        api.chat.completions.create(**{"model": "tiny-generate", "messages": HELLO, "stream": stream, **call})
    assert message in caught.value.message
    assert caught.value.param == message.partition(":")[0]


@pytest.mark.parametrize(
    ("call", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"background": True}, "background"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {}}}}, "text"),
        ({"input": []}, "input"),
        ({"input": "good " * 99}, "input"),
        ({"model": "tiny-answer"}, "input"),
    ],
    ids=str,
)
def test_what_a_response_cannot_do_is_refused_by_name(api: Any, call: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        api.responses.create(**{"model": "tiny-generate", "input": "good", **call})
    assert caught.value.param == param


@pytest.mark.parametrize("param", ["echo", "suffix"])
def test_what_a_completion_cannot_do_is_refused_by_name(api: Any, param: str) -> None:
    wanted: Any = {"echo": True, "suffix": "end"}[param]
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        api.completions.create(model="tiny-generate", prompt="good", **{param: wanted})
    assert caught.value.param == param


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (Overloaded(2.4), openai.RateLimitError),
        (EngineClosed("draining"), openai.InternalServerError),
        (RuntimeError("broken"), openai.InternalServerError),
    ],
)
def test_errors_are_the_clients_own(api: Any, service: Service, refusal: Exception, kind: Any, stream: bool) -> None:
    service.engine.refusal = refusal
    with pytest.raises(kind) as caught:
        api.chat.completions.create(model="tiny-generate", messages=HELLO, stream=stream)
    assert caught.value.request_id.startswith("req-")
    assert caught.value.type in ("rate_limit_error", "server_error")


def test_an_unknown_model_and_a_body_too_large(api: Any) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        api.chat.completions.create(model="gpt-5", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.APIStatusError) as large:
        api.completions.create(model="tiny-generate", prompt="a" * 3_000_000)
    assert large.value.status_code == 413


def test_the_client_tries_again_when_it_is_told_to(address: str, service: Service) -> None:
    submit, refused = service.engine.submit, []

    def busy_twice(model: str, items: Any, key: str) -> Any:
        if len(refused) < 2:
            refused.append(model)
            raise Overloaded(0.01)
        return submit(model, items, key)

    service.engine.submit = busy_twice
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=2) as patient:
        answer = patient.chat.completions.create(model="tiny-translate", messages=HELLO)
    assert (answer.choices[0].message.content, len(refused)) == ("good", 2)


def test_a_failure_inside_a_stream_reaches_the_caller(api: Any, service: Service) -> None:
    service.engine.breaks = True
    heard = []
    with pytest.raises(openai.APIError, match="an internal error"):
        for chunk in api.completions.create(model="tiny-generate", prompt="good", stream=True):
            heard.append(chunk.choices[0].text)
    assert heard == ["g"]


def test_a_caller_that_closes_its_stream_frees_its_row(api: Any, service: Service) -> None:
    service.engine.holds = True
    with api.chat.completions.create(model="tiny-generate", messages=HELLO, stream=True) as stream:
        assert next(iter(stream)).choices[0].delta.role == "assistant"
    wait_until(lambda: service.engine.tickets[0].future.cancelled())
    wait_until(lambda: [each.request.status for each in service.account.records.values()] == ["cancelled"])


def test_the_asynchronous_client(address: str, service: Service) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as api:
            stream = await api.chat.completions.create(
                model="tiny-translate", messages=[{"role": "user", "content": "good dog"}], stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask()) == "good dog"


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": 3}', b'{"messages": 3, "prompt": {}, "input": 1}'])
def test_a_malformed_body_is_a_clear_error(client: TestClient, path: str, content: bytes) -> None:
    response = client.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422)
    assert set(json.loads(response.text)["error"]) == {"message", "type", "param", "code"}
