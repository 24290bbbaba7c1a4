"""The page at `/docs`: the OpenAPI document as HTML that needs nothing from anywhere else. Knows no routes."""

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

Schema = Mapping[str, Any]
_HTML = Path(__file__).with_name("docs.html")
_STYLE = re.compile(r"<style>(.*?)</style>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Field:
    """One line of a table: a parameter of a request or a field of an answer."""

    name: str
    type: str
    required: bool
    default: str
    description: str


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path."""

    id: str
    tag: str
    method: str
    path: str
    summary: str
    curl: str
    parameters: list[Field]
    answer: list[Field]
    errors: list[tuple[str, str]]


def docs_page(openapi: Schema, base_url: str) -> tuple[str, str]:
    """The whole page, in which everything from the document is escaped; and the content security policy that lets it
    have its own style, and nothing else."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["code"] = _code
    template = environment.from_string(_HTML.read_text(encoding="utf-8"))
    page = template.render(info=openapi["info"], operations=list(_operations(openapi, base_url)))
    (style,) = _STYLE.findall(page)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    return page, f"{policy}; frame-ancestors 'none'"


def _code(text: str) -> Markup:
    """Escaped text in which what stands in backticks is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _operations(openapi: Schema, base_url: str) -> Iterator[Operation]:
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            answer = operation["responses"].get("200", {}).get("content", {}).get("application/json", {})
            yield Operation(
                id=operation["operationId"],
                tag=operation["tags"][0],
                method=method.upper(),
                path=path,
                summary=operation["summary"],
                curl=_curl(method.upper(), base_url + path, body.get("example")),
                parameters=sorted(_fields(openapi, _request(operation, body)), key=lambda field: not field.required),
                answer=_fields(openapi, answer.get("schema", {})),
                errors=[
                    (status, response["description"])
                    for status, response in operation["responses"].items()
                    if status != "200"
                ],
            )


def _request(operation: Schema, body: Schema) -> Schema:
    """What a caller may say: in the body, or in the path and the query."""
    asked = operation.get("parameters", ())
    return body.get("schema") or {
        "properties": {each["name"]: {**each["schema"], **_described(each)} for each in asked},
        "required": [each["name"] for each in asked if each["required"]],
    }


def _described(parameter: Schema) -> Schema:
    return {"description": parameter["description"]} if "description" in parameter else {}


def _curl(method: str, url: str, example: Any) -> str:
    if example is None:
        return f"curl -s {shlex.quote(url)}" + ("" if method == "GET" else f" -X {method}")
    body = shlex.quote(json.dumps(example, ensure_ascii=False))
    verb = "" if method == "POST" else f" -X {method}"
    return f"curl -s {shlex.quote(url)}{verb} \\\n  -H 'content-type: application/json' \\\n  -d {body}"


def _fields(openapi: Schema, schema: Schema, prefix: str = "") -> list[Field]:
    """The properties of an object, and those of the objects inside it, by their path."""
    schema = _resolve(openapi, schema)
    fields = []
    for name, part in schema.get("properties", {}).items():
        description = part.get("description", "")
        default = json.dumps(part["default"]) if part.get("default") is not None else ""
        fields.append(
            Field(prefix + name, _type(openapi, part), name in schema.get("required", ()), default, description)
        )
        inner = part.get("items", part)
        fields += _fields(openapi, inner, f"{prefix}{name}{'[]' if 'items' in part else ''}.")
    return fields


def _type(openapi: Schema, schema: Schema) -> str:
    """A schema in a few words."""
    schema = _resolve(openapi, schema)
    if "anyOf" in schema:
        return " or ".join(_type(openapi, each) for each in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(json.dumps(value) for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(openapi, schema.get('items', {}))}"
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    bounds = ("" if low is None else f" from {low:g}") + ("" if high is None else f" to {high:g}")
    return f"{schema.get('format', schema.get('type', 'any'))}{bounds}"


def _resolve(openapi: Schema, schema: Schema) -> Schema:
    if "$ref" not in schema:
        return schema
    resolved: Schema = openapi["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return resolved
