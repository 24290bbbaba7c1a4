"""Documents of every format are read as they are; what is wrong is named with its document and line."""

import json

import pytest

from service.errors import InvalidValue, MalformedBody
from service.knowledge.documents import JSON, JSON_LINES, MARKDOWN, PLAIN, Document, read_documents

LINES = JSON_LINES[0]


def test_every_format_is_read() -> None:
    danube = {"id": "danube", "text": "It rises.", "metadata": {"title": "The Danube", "tags": ["river"]}}
    wanted = Document("danube", "It rises.", danube["metadata"])
    assert read_documents(json.dumps(danube).encode(), JSON, None) == [wanted]
    assert read_documents(json.dumps([danube, {"id": "b", "text": "B"}]).encode(), JSON, None)[1] == Document("b", "B")
    for media_type in JSON_LINES:
        body = f'{json.dumps(danube)}\n\n{{"id": "b", "text": "B\\u2028"}}\r\n'.encode()
        assert read_documents(body, media_type, None) == [wanted, Document("b", "B\u2028")]
    assert read_documents("# É\n".encode(), MARKDOWN, "e.md") == [Document("e.md", "# É\n", markdown=True)]
    assert read_documents("\ufeffÉ".encode(), PLAIN, "e") == [Document("e", "É")]


def test_the_last_of_several_with_one_id_counts() -> None:
    body = b'[{"id": "a", "text": "1"}, {"id": "b", "text": "2"}, {"id": "a", "text": "3"}]'
    assert [(each.id, each.text) for each in read_documents(body, JSON, None)] == [("a", "3"), ("b", "2")]


@pytest.mark.parametrize(
    ("body", "media_type", "identity", "said"),
    [
        (b'{"id": "a",\n"text"}', JSON, None, "line 2, column 7: not JSON"),
        (b'{"id": "a", "text": "A"}\n{"id": }', LINES, None, "line 2, column 8: not JSON"),
        (b"[" * 100_000, JSON, None, "not JSON that can be read"),
        (b"\n" + b'{"a":' * 100_000, LINES, None, "line 2: not JSON that can be read"),
        (b"A\nB\n\xff", PLAIN, "a", "line 3: not UTF-8"),
        (b'{"id": "a", "text": "\xe9"}', JSON, None, "line 1: not UTF-8"),
        (b"A", "", None, "content-type must say"),
        (b"a=b", "application/x-www-form-urlencoded", None, "content-type must say"),
    ],
)
def test_what_is_no_such_format_is_named_by_line(
    body: bytes, media_type: str, identity: str | None, said: str
) -> None:
    with pytest.raises(MalformedBody, match=said):
        read_documents(body, media_type, identity)


@pytest.mark.parametrize(
    ("body", "media_type", "identity", "param", "said"),
    [
        (b"A", MARKDOWN, None, "id", r"\?id=NAME"),
        (b'{"id": "a", "text": "A"}', JSON, "a", "id", "bring their own"),
        (b" \n", PLAIN, "a", "text", r"the document \('a'\): must be a text that is not empty"),
        (b"A", PLAIN, "a\n", "id", "1 to 256 characters"),
        (b"[]", JSON, None, "documents", "holds none"),
        (b"\n\n", LINES, None, "documents", "holds none"),
        (b'[{"id": "a", "text": "A"}, 3]', JSON, None, "documents", "document 2: must be an object"),
        (b'[{"text": "A"}]', JSON, None, "id", "document 1: must be a text of 1"),
        (b'{"id": "a", "text": "A"}\n\n{"id": "b"}', LINES, None, "text", r"line 3 \('b'\): must be a text"),
        (b'{"id": "b", "text": ["B"]}', LINES, None, "text", r"line 1 \('b'\): must be a text"),
        (b'{"id": "b", "text": "B", "title": "C"}', LINES, None, "documents", r"line 1 \('b'\): .*'title'"),
        (b'{"id": "b", "text": "B", "metadata": 3}', LINES, None, "metadata", r"line 1 \('b'\): must be an object"),
        (b'{"id": "b", "text": "\\ud800"}', LINES, None, "text", r"line 1 \('b'\): holds half a surrogate"),
        (b'{"id": "b", "text": "B", "metadata": {"\\udc00": 1}}', JSON, None, "text", "half a surrogate"),
        (b'{"id": "\\ud800", "text": "B"}', JSON, None, "text", "half a surrogate"),
    ],
)
def test_a_wrong_document_is_named_with_its_place(
    body: bytes, media_type: str, identity: str | None, param: str, said: str
) -> None:
    with pytest.raises(InvalidValue, match=said) as raised:
        read_documents(body, media_type, identity)
    assert raised.value.param == param
