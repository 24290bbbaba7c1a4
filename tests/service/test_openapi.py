"""Whatever the OpenAPI document allows, and much that it does not: no answer that it does not foresee."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from service.app import create_app
from service.settings import Settings

EXAMPLES = 4
"""Of each operation, and as many of what it does not allow."""
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
FORESEEN = (503, 504)
"""Statuses of a server that says what it lacks, or how long it takes; of a 500, it does not know."""
DOCUMENT = schemathesis.openapi.from_dict(create_app(Settings()).openapi())
OPERATIONS = [result.ok() for result in DOCUMENT.get_all_operations()]


# Where nothing but a path can be sent, nothing wrong can be sent.
TRIED = [(operation, GenerationMode.POSITIVE) for operation in OPERATIONS] + [
    (operation, GenerationMode.NEGATIVE) for operation in OPERATIONS if operation.body or operation.query
]


@pytest.mark.parametrize(("operation", "mode"), TRIED, ids=lambda each: getattr(each, "label", each))
def test_every_answer_is_one_that_the_document_foresees(address: str, operation: Any, mode: GenerationMode) -> None:
    strategy = operation.as_strategy(generation_mode=mode)

    @settings(max_examples=EXAMPLES, phases=(Phase.generate,), database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        case = data.draw(strategy)
        response = case.call(base_url=address)
        assert response.status_code < 500 or response.status_code in FORESEEN, response.text
        case.validate_response(response, checks=CHECKS)

    check()
