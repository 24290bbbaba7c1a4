"""Documents, and how they are read from the body of a request. Knows nothing of passages or storage.

JSON holds one document or a list of them, JSON Lines one a line; Markdown and plain text are one document each.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from service.errors import InvalidValue, MalformedBody

JSON = "application/json"
JSON_LINES = ("application/jsonl", "application/x-ndjson", "application/ndjson", "application/jsonlines")
MARKDOWN = "text/markdown"
PLAIN = "text/plain"
MEDIA_TYPES = (JSON, *JSON_LINES, MARKDOWN, PLAIN)
_ID = re.compile(r"[^\x00-\x1f\x7f]{1,256}")
_FIELDS = {"id", "text", "metadata"}


@dataclass(frozen=True, slots=True)
class Document:
    """A text that answers are looked for in."""

    id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Whatever the caller wants back with a passage; any JSON object."""
    markdown: bool = False


def read_documents(body: bytes, media_type: str, document_id: str | None) -> list[Document]:
    """The documents of a request's body; of several with the same id, the last.

    ``document_id`` names a document that is Markdown or plain text. Raises ``MalformedBody`` or ``InvalidValue``,
    naming the document and its line.
    """
    if media_type not in MEDIA_TYPES:
        raise MalformedBody(f"the header content-type must say what the body is, one of {', '.join(MEDIA_TYPES)}")
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = body.count(b"\n", 0, error.start) + 1
        raise MalformedBody(f"line {line}: not UTF-8 (byte {error.start} of the body)") from None
    if media_type in (MARKDOWN, PLAIN):
        if document_id is None:
            raise InvalidValue("id", f"a document of the type {media_type} needs one: add ?id=NAME to the address")
        row = {"id": document_id, "text": text}
        return [_document(row, "the document", markdown=media_type == MARKDOWN)]
    if document_id is not None:
        raise InvalidValue("id", "documents in JSON bring their own; ?id= goes with Markdown and plain text")
    documents = list(_from_json(text) if media_type == JSON else _from_lines(text))
    if not documents:
        raise InvalidValue("documents", "the body holds none")
    return list({document.id: document for document in documents}.values())


def _from_json(text: str) -> Iterator[Document]:
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise MalformedBody(f"line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise MalformedBody(f"not JSON that can be read: {error}") from None
    rows = parsed if isinstance(parsed, list) else [parsed]
    for number, row in enumerate(rows, start=1):
        yield _document(row, f"document {number}")


def _from_lines(text: str) -> Iterator[Document]:
    # Not splitlines: a JSON string may hold U+2028 and its like as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise MalformedBody(f"line {number}, column {error.colno}: not JSON: {error.msg}") from None
        except (RecursionError, ValueError) as error:
            raise MalformedBody(f"line {number}: not JSON that can be read: {error}") from None
        yield _document(row, f"line {number}")


def _document(row: Any, where: str, markdown: bool = False) -> Document:
    """A document from its fields; ``where`` it stands is said in every complaint."""
    if not isinstance(row, dict):
        raise InvalidValue("documents", f'{where}: must be an object like {{"id": "a", "text": "..."}}')
    identity = row.get("id")
    if not isinstance(identity, str) or not _ID.fullmatch(identity):
        raise InvalidValue("id", f"{where}: must be a text of 1 to 256 characters, without control characters")
    where = f"{where} ({identity!r})"
    unknown = sorted(row.keys() - _FIELDS)
    if unknown:
        raise InvalidValue("documents", f"{where}: there is no field {unknown[0]!r}; metadata may hold anything")
    text, metadata = row.get("text"), row.get("metadata", {})
    if not isinstance(text, str) or not text.strip():
        raise InvalidValue("text", f"{where}: must be a text that is not empty")
    if not isinstance(metadata, dict):
        raise InvalidValue("metadata", f"{where}: must be an object")
    try:
        (identity + text + json.dumps(metadata, ensure_ascii=False)).encode()
    except UnicodeEncodeError:
        raise InvalidValue("text", f"{where}: holds half a surrogate pair") from None
    return Document(identity, text, metadata, markdown)
