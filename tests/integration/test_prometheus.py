"""A real Prometheus on the files under deploy/: it scrapes a real server, and every query of the dashboard has data."""

import asyncio
import json
import re
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import yaml

import ml_inference_server
from ml_inference_server.metrics.table import TABLE
from ml_inference_server.proto import inference_pb2 as pb
from tests.conftest import FakeServer, fake_server

DEPLOY = Path(ml_inference_server.__file__).parent / "deploy"
RULES = DEPLOY / "prometheus"
GRAFANA = json.loads((DEPLOY / "grafana" / "dashboards" / "ml-inference-server.json").read_text(encoding="utf-8"))
QUERIES = [
    (f"{panel['title']} {target['refId']}", target["expr"])
    for panel in GRAFANA["panels"]
    for target in panel.get("targets", [])
]
OPENMETRICS = {"Accept": "application/openmetrics-text; version=1.0.0"}


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is missing: apt-get install prometheus")
    return found


@pytest.mark.parametrize(
    "arguments",
    [["check", "config", "prometheus.yml"], ["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]],
)
def test_promtool_accepts_the_files(arguments: list[str]) -> None:
    done = subprocess.run([program("promtool"), *arguments], cwd=RULES, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_and_dashboard_name_only_metrics_of_the_table() -> None:
    known = {row.name for row in TABLE} | {"up"}
    known |= {f"{row.name}_{part}" for row in TABLE if row.kind == "histogram" for part in ("bucket", "sum", "count")}
    rules = yaml.safe_load((RULES / "alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
    expressions = [rule["expr"] for rule in rules] + [expression for _, expression in QUERIES]
    named = {name for text in expressions for name in re.findall(r"\b(?:mlis_|process_)\w+", text)}
    assert len(named) > 15
    assert named <= known


def test_every_alert_is_described() -> None:
    rules = yaml.safe_load((RULES / "alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
    described = re.findall(r"^\| `(\w+)` \|", (DEPLOY / "README.md").read_text(encoding="utf-8"), re.M)
    assert described == [rule["alert"] for rule in rules]


async def load(server: FakeServer) -> None:
    """Requests of every kind, some of which fail, until it is cancelled."""
    while True:
        texts = [" ".join(["word"] * length) for length in (3, 9, 30)]
        await server.stub.Embed(pb.EmbedRequest(texts=texts))
        await server.stub.Rerank(pb.RerankRequest(query="a query", documents=texts))
        with pytest.raises(grpc.aio.AioRpcError):
            await server.stub.Embed(pb.EmbedRequest(texts=[""]))
        await asyncio.sleep(0.02)


async def test_promtool_finds_no_fault_with_the_metrics() -> None:
    promtool = program("promtool")
    async with fake_server() as server:
        await server.stub.Embed(pb.EmbedRequest(texts=["a text"]))
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{server.url}/metrics/prometheus") as got,
        ):
            text = await got.read()
    done = await asyncio.to_thread(
        subprocess.run, [promtool, "check", "metrics"], input=text, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@asynccontextmanager
async def prometheus(target: int, folder: Path) -> AsyncIterator[str]:
    """Debian's Prometheus with the shipped configuration, its target and its interval changed; its URL."""
    config: dict[str, Any] = yaml.safe_load((RULES / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "250ms", "evaluation_interval": "250ms"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{target}"]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    shutil.copy(RULES / "alerts.yml", folder)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        program("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}/api/v1"
    finally:
        process.kill()
        await process.wait()


async def ask(session: aiohttp.ClientSession, url: str, **parameters: str) -> Any:
    async with session.get(url, params=parameters) as answer:
        told = await answer.json()
    assert told["status"] == "success", told
    return told["data"]


def is_data(result: list[dict[str, Any]]) -> bool:
    """At least one series with a number in it (0 / 0 is NaN: no data)."""
    return any(series["value"][1] != "NaN" for series in result)


async def test_a_real_prometheus_answers_every_query_of_the_dashboard(tmp_path: Path) -> None:
    async with fake_server() as server, prometheus(server.server.http_port, tmp_path) as url:
        working = asyncio.create_task(load(server))
        async with aiohttp.ClientSession() as session:
            missing = dict(QUERIES)
            while missing:  # pytest's timeout is the limit
                await asyncio.sleep(0.2)
                assert not working.done(), working.exception()
                for name, expression in list(missing.items()):
                    query = expression.replace("$__rate_interval", "10s").replace("$instance", ".*")
                    try:
                        result = await ask(session, f"{url}/query", query=query)
                    except aiohttp.ClientError:
                        break  # it is still starting
                    if is_data(result["result"]):
                        del missing[name]
            [target] = (await ask(session, f"{url}/targets"))["activeTargets"]
            rules = (await ask(session, f"{url}/rules"))["groups"][0]["rules"]
            exemplars = await ask(
                session, f"{url}/query_exemplars", query="mlis_request_duration_seconds_bucket", start="0", end="9e9"
            )
            scraped = await ask(session, f"{url}/query", query='sum(mlis_requests_total{code="OK"})')
        working.cancel()
    assert (target["health"], target["lastError"]) == ("up", "")
    assert {rule["health"] for rule in rules} == {"ok"}
    assert {
        exemplar["labels"]["request_id"].split("-")[0] for series in exemplars for exemplar in series["exemplars"]
    } == {server.state.instance_id[:8]}
    assert float(scraped["result"][0]["value"][1]) > 0
