"""What /openapi.json promises, tried with requests that schemathesis makes up: no 5xx, and answers as described.

MINIMAX_M1_EXAMPLES sets how many requests each route gets.
"""

import os

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
SHORT = 3  # tokens of an answer here: what is tried are requests, not the model
NUM_EXAMPLES = int(os.environ.get("MINIMAX_M1_EXAMPLES", "15"))


@pytest.mark.slow
def test_every_route(server) -> None:
    schema = schemathesis.openapi.from_dict(httpx.get(f"{server.url}/openapi.json").json())
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 18
    for operation in operations:
        if operation.path != "/v1/embeddings":  # which answers 501
            for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
                try_operation(operation, mode, server.url)


def try_operation(operation, mode, url: str) -> None:
    """Send requests that fit the description, or that do not."""

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=NUM_EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def send(case) -> None:
        if isinstance(case.body, dict):
            if mode is schemathesis.GenerationMode.POSITIVE:  # made-up names would be 404s
                case.body.pop("model", None)
                case.body.pop("previous_response_id", None)
            for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                if isinstance(case.body.get(name), int) and case.body[name] > SHORT:
                    case.body[name] = SHORT
        response = case.call(base_url=url, timeout=60)
        case.validate_response(response, checks=CHECKS)

    try:
        send()
    except Unsatisfiable:
        assert mode is schemathesis.GenerationMode.NEGATIVE  # a route without parameters cannot be asked wrongly


def test_embeddings_are_refused(server) -> None:
    answer = httpx.post(f"{server.url}/v1/embeddings", json={"input": "pear"})
    assert answer.status_code == 501 and answer.json()["error"]["message"].startswith("embeddings")
