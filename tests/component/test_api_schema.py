"""The API's description, and that whatever is asked is answered as it says: schemathesis over the real engine."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from openapi_spec_validator import OpenAPIV31SpecValidator
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from orchestrator.service.api import openapi
from orchestrator.service.api.routes import EVENTS, ROUTES
from tests.component.http import free_port
from tests.component.test_admission import opened
from tests.component.world import MIB, World, make_world

TOKEN = "0123456789abcdef0123456789abcdef"
EXAMPLES = 12


def test_the_description_is_valid_and_whole() -> None:
    document = openapi.document()
    OpenAPIV31SpecValidator(document).validate()
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert {(route.method, route.path) for route in ROUTES} < described
    identities = [one["operationId"] for methods in document["paths"].values() for one in methods.values()]
    assert len(identities) == len(set(identities))
    for methods in document["paths"].values():
        for method, operation in methods.items():
            assert ("security" in operation) == (method == "post")
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    schema = response["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ErrorBody"}
            assert ("security" in operation) == (
                "202" in operation["responses"] or "clean" in operation["operationId"]
            )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The engine over a fake QEMU, in a thread with a loop of its own: schemathesis asks synchronously."""
    folder = tmp_path_factory.mktemp("api")
    (folder / "token").touch(0o600)
    (folder / "token").write_text(TOKEN)
    port = free_port()
    ready, ended = threading.Event(), threading.Event()
    world: World = make_world(folder, disks={"vda": MIB})
    more = f'listen = "127.0.0.1:{port}"\ntoken_file = "{folder}/token"\n'

    async def serve() -> None:
        async with opened(world, supervise=True, daemon=more, retries=0):
            ready.set()
            await asyncio.to_thread(ended.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(20)
        yield f"http://127.0.0.1:{port}"
    finally:
        ended.set()
        thread.join()


Check = Callable[..., Any]
schema = schemathesis.openapi.from_dict(openapi.document())


@pytest.mark.filterwarnings("ignore")  # schemathesis's own
@schema.exclude(path=EVENTS).parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_whatever_is_asked_is_answered_as_described(case: Any, base: str) -> None:
    case.call_and_validate(
        base_url=base,
        headers={"Authorization": f"Bearer {TOKEN}"},
        checks=[
            not_a_server_error,
            status_code_conformance,
            content_type_conformance,
            response_schema_conformance,
            negative_data_rejection,
        ],
        timeout=20,
    )
