"""The worker asked for what its OpenAPI description says may be sent, and for more, by its owner and by strangers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.types import Receive, Scope, Send

from sheily_train.colab.batches import BINARY_FORM
from sheily_train.colab.worker import WorkerSettings, create_app
from tests.colab.tiny_learner import TinyLearner

TOKEN = "a-token-of-the-tests-0123456789"
RIGHT = {"Authorization": f"Bearer {TOKEN}"}
OPERATIONS = (
    "POST /train_layer2",
    "POST /feedback_dendritas",
    "POST /predict",
    "GET /status",
    "GET /health",
    "GET /info",
    "POST /diagnostico",
    "GET /metricas",
    "GET /run",
    "POST /run",
    "GET /state",
    "PUT /state",
    "GET /metrics",
)
PUBLIC = "GET /health"
BATCHES = ("POST /train_layer2", "POST /predict")
BRIEF = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
"""A batch that is as described has thousands of numbers, which takes long to make up: there are fewer of them."""


@schemathesis.serializer(BINARY_FORM)
def as_they_are(_context: object, value: Any) -> bytes:
    """Bytes in the place of a binary body; what is no bytes (a wrong body) as JSON."""
    data = getattr(value, "data", value)
    return data if isinstance(data, bytes) else json.dumps(data).encode()


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("worker")
    worker = create_app(WorkerSettings(folder, TOKEN, seed=7, reorder_seconds=0.05), TinyLearner)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        """The worker, which every call would end by ASGI's lifespan otherwise."""
        if scope["type"] == "http":
            await worker(scope, receive, send)

    yield schemathesis.openapi.from_asgi("/openapi.json", app, headers=RIGHT)
    worker.close()


def requests(operation: APIOperation) -> st.SearchStrategy[Case]:
    """Requests as described and, where anything is described, otherwise."""
    described = operation.as_strategy(GenerationMode.POSITIVE)
    if not (operation.headers or operation.body):
        return described
    return described | operation.as_strategy(GenerationMode.NEGATIVE)


def test_every_operation_is_asked(api: Any) -> None:
    """The list here is the description's."""
    assert {found.ok().label for found in api.get_all_operations()} == set(OPERATIONS)


@pytest.mark.parametrize("label", OPERATIONS)
def test_every_answer_is_as_described(api: Any, label: str) -> None:
    """No request of the owner ends in a 5xx; status, media type and content are among those that are described."""
    operation = api.find_operation_by_label(label)

    @settings(BRIEF, max_examples=6 if label in BATCHES else 15)
    @given(requests(operation))
    def ask(case: Case) -> None:
        answer = case.call(headers=RIGHT)
        case.validate_response(
            answer,
            checks=[
                not_a_server_error,
                status_code_conformance,
                content_type_conformance,
                response_schema_conformance,
            ],
        )

    ask()


@pytest.mark.parametrize("label", OPERATIONS)
def test_strangers_get_nothing(api: Any, label: str) -> None:
    """Without a token, or with another one, every operation but /health refuses every request, and as described."""
    operation = api.find_operation_by_label(label)

    @settings(BRIEF, max_examples=6 if label in BATCHES else 15)
    @given(requests(operation), st.sampled_from(["", "Bearer", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}"]))
    def ask(case: Case, shown: str) -> None:
        answer = case.call(headers={"Authorization": shown}, params={"token": TOKEN, "access_token": TOKEN})
        expected = {200} if label == PUBLIC else {401, 429}
        assert answer.status_code in expected
        case.validate_response(answer, checks=[status_code_conformance, response_schema_conformance])

    ask()
