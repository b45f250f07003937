"""The Containerfile and compose.yaml: linted, and in step with the server and with what they mount."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ml_inference_server import __version__, cli
from ml_inference_server.metrics.http_rules import SECURITY_HEADERS
from ml_inference_server.utils.config import Settings, load_settings
from tests.deploy.containerfile import CONTAINERFILE, FOLDER, ROOT, environment, stages, values

PROGRAMS = Path(sys.executable).parent
# With what is between ${ and } gone.
TEXT = re.sub(r"\$\{\w+:[^}]*\}", "VALUE", (FOLDER / "compose.yaml").read_text(encoding="utf-8"))
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)


def checked(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def settings_of_the_image() -> Settings:
    return load_settings(environment=environment())


def test_hadolint_finds_no_fault(tmp_path: Path) -> None:
    done = checked(PROGRAMS / "hadolint", CONTAINERFILE)
    assert (done.returncode, done.stdout) == (0, "")
    (tmp_path / "Containerfile").write_text(CONTAINERFILE.read_text().replace("WORKDIR /tmp", "WORKDIR tmp"))
    assert "DL3000" in checked(PROGRAMS / "hadolint", tmp_path / "Containerfile").stdout


def test_the_image_starts_the_server_and_lets_nobody_be_root() -> None:
    assert list(stages()) == ["builder", "runtime", "with-model", "server"]
    assert values("runtime", "USER") == ["10001:10001"]
    (entry,) = values("runtime", "ENTRYPOINT")
    (command,) = values("runtime", "CMD")
    assert json.loads(entry) == ["mlis"]
    assert cli.build_parser(["serve"]).parse_args(json.loads(command)).log_format == "json"
    (health,) = values("runtime", "HEALTHCHECK")
    assert json.loads(health.partition("CMD")[2]) == ["mlis", "health"]
    assert "SHELL" not in {name for stage in stages().values() for name, _ in stage}


def test_the_environment_of_the_image_is_settings() -> None:
    settings = settings_of_the_image()
    assert settings.model.name == "/model"
    assert {settings.server.host, settings.metrics.host} == {"0.0.0.0"}
    (exposed,) = values("runtime", "EXPOSE")
    assert exposed.split() == [str(settings.server.port), str(settings.metrics.port)]


def test_labels_say_what_it_is() -> None:
    (labels,) = values("runtime", "LABEL")
    assert set(re.findall(r"org\.opencontainers\.image\.(\w+)=", labels)) == {
        "title", "description", "licenses", "version", "revision",
    }  # fmt: skip
    assert f"VERSION={__version__}" in values("runtime", "ARG")
    assert SECURITY_HEADERS["Server"] in labels


def test_only_what_the_image_needs_is_sent_to_the_builder() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    let_in = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {word for value in values("builder", "COPY") for word in value.split()[:-1]}
    assert "*" in ignored
    assert {word.split("/")[0] for word in copied} == let_in
    assert all((ROOT / word).exists() for word in copied)


def test_compose_has_the_form_of_its_specification(tmp_path: Path) -> None:
    command = (PROGRAMS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec")
    assert checked(*command, FOLDER / "compose.yaml").returncode == 0
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump({"services": {"server": {"readonly": True}}}))
    assert checked(*command, tmp_path / "compose.yaml").returncode == 1


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_services_of_compose_can_do_little(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:")


def test_compose_mounts_files_that_are_there() -> None:
    found = [volume for service in COMPOSE["services"].values() for volume in service["volumes"]]
    folders = [volume.split(":")[0] for volume in found if volume.startswith(".")]
    assert len(folders) == 3
    for folder in folders:
        assert (FOLDER / folder).is_dir()
    named = {volume.split(":")[0] for volume in found if re.match(r"[a-z]", volume)}
    assert named == set(COMPOSE["volumes"])
    mounts = dict(volume.split(":")[:2] for volume in COMPOSE["services"]["grafana"]["volumes"])
    provider = yaml.safe_load((FOLDER / "../grafana/provisioning/dashboards/dashboards.yml").read_text())["providers"][
        0
    ]
    assert provider["options"]["path"] == mounts["../grafana/dashboards"]


def test_prometheus_and_grafana_share_the_network_that_their_files_mean() -> None:
    """Those say localhost: the network is the server's, and so are the ports."""
    services = COMPOSE["services"]
    assert {services[name]["network_mode"] for name in ("prometheus", "grafana")} == {"service:server"}
    scraped = yaml.safe_load((FOLDER / "../prometheus/prometheus.yml").read_text())["scrape_configs"][0]
    settings = settings_of_the_image()
    assert scraped["static_configs"] == [{"targets": [f"localhost:{settings.metrics.port}"]}]
    published = {int(port.rsplit(":", 1)[1]) for port in services["server"]["ports"]}
    assert published == {settings.server.port, settings.metrics.port, 9090, 3000}


def test_compose_gives_a_stop_its_time() -> None:
    server = settings_of_the_image().server
    grace = COMPOSE["services"]["server"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) * 1000 >= server.drain_delay_ms + server.drain_timeout_ms + 10_000


def test_compose_makes_the_folders_of_the_image_writable_that_have_to_be() -> None:
    service = COMPOSE["services"]["server"]
    places = {volume.split(":")[1] for volume in service["volumes"]} | {each.split(":")[0] for each in service["tmpfs"]}
    assert places == {"/cache", "/tmp", "/model"}  # noqa: S108
    assert environment()["MLIS_CACHE_DIR"] in places
