"""Ray in an environment of its own, and one cluster for all tests of this folder."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.environments import ClientsMissing
from tests.ray.cluster import Cluster, cluster, ray_python


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The first test may have to build the environment; the limit covers that.

    RAY_SLICE=1 leaves out those of this folder that are not marked with `ray_slice`.
    """
    left_out = []
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(600))
            if os.environ.get("RAY_SLICE") and item.get_closest_marker("ray_slice") is None:
                left_out.append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def python(request: pytest.FixtureRequest) -> Path:
    """Python with Ray; where it cannot be had the tests skip, or fail with REQUIRE_CLIENTS=1."""
    try:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            return ray_python()
    except ClientsMissing as missing:
        if os.environ.get("REQUIRE_CLIENTS"):
            raise
        pytest.skip(f"Ray is not here: {missing}")


@pytest.fixture(scope="session")
def ray(python: Path) -> Iterator[Cluster]:
    """A head without room for replicas, and two nodes with room for two each."""
    with cluster(python) as running:
        yield running
