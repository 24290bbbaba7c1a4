"""Hugging Face's own client over a real socket, with a model's URL in place of its name."""

from collections.abc import Callable
from typing import Any

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, TextGenerationError
from starlette.testclient import TestClient

from service.core import Service
from service.engine.types import Overloaded
from tests.service.fakes import byte_tokenizer

BYTES = byte_tokenizer()
Of = Callable[[str], InferenceClient]


@pytest.fixture
def of(address: str) -> Of:
    """The client of the tiny model of a task."""
    return lambda task: InferenceClient(f"{address}/hf/tiny-{task}", token="none")


def test_translation(of: Of, service: Service) -> None:
    answer = of("translate").translation(
        "good dog", src_lang="en", tgt_lang="de", generate_parameters={"num_beams": 3}
    )
    assert answer.translation_text == "good dog"
    assert service.engine.items[-1].sampling.beams == 3
    with pytest.raises(HfHubHTTPError, match="language pair is not available"):
        of("translate").translation("good dog", src_lang="en", tgt_lang="fr")


def test_summarization(of: Of) -> None:
    answer = of("summarize").summarization("good dog and city", generate_parameters={"max_new_tokens": 3})
    assert answer.summary_text == "Good dog"
    long = "good " * 500
    with pytest.raises(HfHubHTTPError, match="too_many_tokens"):
        of("summarize").summarization(long)
    assert of("summarize").summarization(long, truncation="only_first").summary_text


def test_question_answering(of: Of) -> None:
    ask = of("answer").question_answering
    answer: Any = ask(question="what is the capital", context="the capital of france is paris")
    assert (answer.answer, answer.start, answer.end) == ("paris", 25, 30)
    nothing: Any = ask(question="what?", context="good dog", handle_impossible_answer=True)
    assert (nothing.answer, nothing.start, nothing.end) == ("", 0, 0)
    some: Any = ask(question="what?", context="good dog")
    assert some.answer != ""


def test_text_classification(of: Of) -> None:
    labels = of("sentiment").text_classification("good good bad")
    assert [label.label for label in labels] == ["positive", "negative", "neutral"]
    assert sum(label.score for label in labels) == pytest.approx(1)
    assert [label.label for label in of("sentiment").text_classification("bad", top_k=1)] == ["negative"]


def test_text_generation(of: Of, service: Service) -> None:
    write = of("generate").text_generation
    assert write("one two", max_new_tokens=5) == "one t"
    assert service.engine.items[-1].input_ids == tuple(BYTES.encode("one two").ids)
    assert write("one two", stop=["two"], return_full_text=True) == "one twoone "
    write("one", do_sample=False, temperature=1.5, seed=3)
    assert (service.engine.items[-1].sampling.temperature, service.engine.items[-1].sampling.seed) == (0.0, 3)


@pytest.mark.parametrize(
    ("how", "reason"), [({}, "eos_token"), ({"max_new_tokens": 4}, "length"), ({"stop": ["two"]}, "stop_sequence")]
)
def test_a_stream_of_text_generation(of: Of, how: dict[str, Any], reason: str) -> None:
    client = of("generate")  # closes its streams when it goes
    whole = client.text_generation("one two", **how)
    assert "".join(client.text_generation("one two", stream=True, **how)) == whole
    *_, last = client.text_generation("one two", stream=True, details=True, **how)
    assert last.generated_text == whole
    assert last.details is not None and last.details.finish_reason == reason
    assert last["energy"]["allocated_j"] == 2.0


def test_feature_extraction(of: Of, embedder: str) -> None:
    vectors = of("embed").feature_extraction(["bad bad fine fine good", "good"])
    assert vectors.tolist() == [pytest.approx([2 / 3, 2 / 3, 1 / 3]), [0, 0, 1]]
    assert of("embed").feature_extraction("good " * 500, truncate=True, dimensions=2).tolist() == [[0, 0]]
    with pytest.raises(HfHubHTTPError, match="inputs: the text has 500 tokens"):
        of("embed").feature_extraction("good " * 500)


def test_a_conversation(of: Of) -> None:
    client = of("translate")
    answer = client.chat_completion([{"role": "user", "content": "good dog"}])
    assert answer.choices[0].message.content == "good dog"
    chunks = client.chat_completion([{"role": "user", "content": "good dog"}], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "good dog"


def test_errors_are_the_clients_own(of: Of, address: str, service: Service) -> None:
    with pytest.raises(HfHubHTTPError, match="'nobody' is not loaded") as unknown:
        InferenceClient(f"{address}/hf/nobody", token="none").translation("good")
    assert unknown.value.response.status_code == 404
    with pytest.raises(HfHubHTTPError, match="inputs: the text is empty"):
        of("sentiment").text_classification(" ")
    with pytest.raises(HfHubHTTPError, match="grammar: is not supported"):
        of("generate").text_generation("one", grammar={"type": "json", "value": {}})  # type: ignore[arg-type]
    service.engine.breaks = True
    client = of("generate")
    with pytest.raises(TextGenerationError, match="an internal error"):
        list(client.text_generation("one", stream=True))
    service.engine.refusal = Overloaded(1.0)
    with pytest.raises(HfHubHTTPError) as busy:
        of("translate").translation("good")
    assert busy.value.response.status_code == 429


def test_no_parameters_may_be_said_so(client: TestClient) -> None:
    response = client.post("/hf/tiny-translate", json={"inputs": "good dog", "parameters": None})
    assert response.json() == [{"translation_text": "good dog"}]


@pytest.mark.parametrize(
    "inputs", [None, 3, {}, [], [""], {"question": "what?"}, {"question": 1, "context": 2}], ids=str
)
@pytest.mark.parametrize("task", ["translate", "generate", "answer", "sentiment", "summarize"])
def test_wrong_inputs_are_refused_by_name(client: TestClient, task: str, inputs: Any) -> None:
    response = client.post(f"/hf/tiny-{task}", json={"inputs": inputs})
    assert (response.status_code, response.json()["error"]["param"]) == (422, "inputs")


def test_lists_are_answered_in_their_order(client: TestClient) -> None:
    labels = client.post("/hf/tiny-sentiment", json={"inputs": ["good", "bad"]}).json()
    assert [each[0]["label"] for each in labels] == ["positive", "negative"]
    pair = {"question": "what?", "context": "paris"}
    answers = client.post("/hf/tiny-answer", json={"inputs": [pair, pair]}).json()
    assert [answer["answer"] for answer in answers] == ["paris", "paris"]
    texts = client.post("/hf/tiny-generate", json={"inputs": ["one", "two"]}).json()
    assert texts == [{"generated_text": "one"}, {"generated_text": "two"}]
