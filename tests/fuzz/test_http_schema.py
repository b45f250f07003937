"""What schemathesis makes of /openapi.json: requests that fit it and requests that do not, answered as it describes."""

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import given
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.fuzz.budget import FACTOR, SCHEMA_REQUESTS, fuzzing
from tests.fuzz.http_wire import quiet_wire

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


async def test_requests_made_of_the_description(
    caplog: pytest.LogCaptureFixture, record_property: Callable[[str, object], None]
) -> None:
    async with quiet_wire(caplog, server={"accept_any_model": True}) as wire:
        schema = schemathesis.openapi.from_dict(dict(wire.described))
        schema.config.update(base_url=wire.server.url)
        operations = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
        assert len(operations) == sum(map(len, wire.described["paths"].values()))
        statuses: Counter[int] = Counter()

        # What does not fit can only be sent where there is a body that could; the others are tried a few times.
        modes = [
            (operation, mode)
            for operation in operations
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
            if mode is GenerationMode.POSITIVE or operation.body
        ]
        with_body = sum(bool(operation.body) for operation, _ in modes)

        def send_all() -> None:
            for operation, mode in modes:

                @fuzzing(math.ceil(SCHEMA_REQUESTS / with_body), batch=1)
                @given(operation.as_strategy(generation_mode=mode))
                def property_(case: Any) -> None:
                    statuses[case.call_and_validate(checks=CHECKS).status_code] += 1

                property_()

        await asyncio.to_thread(send_all)
    record_property("requests", statuses.total())
    record_property("server_errors", sum(count for status, count in statuses.items() if status >= 500))
    assert statuses.total() >= SCHEMA_REQUESTS * FACTOR
