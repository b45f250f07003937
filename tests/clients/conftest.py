"""The environments of the clients, and the servers that all tests of this folder ask."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.environments import ClientsMissing, Environment, environment
from tests.clients.served import MODEL, Served, served
from tests.parity.zoo import CROSS_ENCODERS, PLAIN_CROSS_ENCODER


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test may have to build the environment; the limit covers that."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for mark in (pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(600)):
                item.add_marker(mark)


@pytest.fixture(scope="session")
def clients(request: pytest.FixtureRequest) -> Environment:
    """Everything that the scripts import; where it cannot be had the tests skip, or fail with REQUIRE_CLIENTS=1."""
    try:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            return environment()
    except ClientsMissing as missing:
        if os.environ.get("REQUIRE_CLIENTS"):
            raise
        pytest.skip(f"the foreign clients are not here: {missing}")


@pytest.fixture(scope="session")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("embedder"), MODEL) as server:
        yield server


@pytest.fixture(scope="session")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A cross-encoder, tiny and with random weights: the clients that want one look at nothing but its kind."""
    model = CROSS_ENCODERS[PLAIN_CROSS_ENCODER](tmp_path_factory.mktemp("cross_encoder"))
    with served(tmp_path_factory.mktemp("reranker"), str(model)) as server:
        yield server
