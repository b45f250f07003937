"""KServe's runtimes: their pods by Kubernetes' schema, the rest by the classes of KServe's own SDK, our settings."""

import ast
import subprocess
import sys
import zipfile
from typing import Any

import kubernetes_validate
import pytest

from ml_inference_server.metrics.http_rules import allowed_hosts, is_host_allowed
from tests.deploy.manifests import FOLDER, Manifest, render, settings_of

# The SDK holds back packages that the server needs newer, so that it is read and not installed.
SDK = "kserve==0.21.0"
# What a pod may take to end, where nobody says otherwise.
DEFAULT_GRACE_MS = 30_000


@pytest.fixture(scope="module")
def runtimes() -> list[Manifest]:
    found = render(FOLDER / "kserve")
    assert [each["kind"] for each in found] == ["ServingRuntime", "ServingRuntime"]
    return found


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The SDK's classes: their fields, as JSON has them, each with its type."""
    folder = tmp_path_factory.mktemp("sdk")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), SDK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        pytest.skip(f"{SDK} cannot be had: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, dict[str, str]] = {}
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("kserve/models/v1alpha1_"):
                found |= _classes_of(archive.read(name).decode())
    return found


def _classes_of(source: str) -> dict[str, dict[str, str]]:
    found = {}
    for each in ast.parse(source).body:
        if isinstance(each, ast.ClassDef):
            tables = {
                target.id: ast.literal_eval(line.value)
                for line in each.body
                if isinstance(line, ast.Assign)
                for target in line.targets
                if isinstance(target, ast.Name) and target.id in ("openapi_types", "attribute_map")
            }
            names = tables["attribute_map"]
            found[each.name] = {names[field]: kind for field, kind in tables["openapi_types"].items()}
    return found


PLAIN = {"str": str, "bool": bool, "int": int}


def check(value: Any, kind: str, classes: dict[str, dict[str, str]], where: str = "") -> None:
    """AssertionError where a field is not known or of another type. What Kubernetes defines is left to its schema."""
    if kind.startswith("list["):
        assert isinstance(value, list), where
        for number, each in enumerate(value):
            check(each, kind[len("list[") : -1], classes, f"{where}[{number}]")
    elif kind in classes:
        assert isinstance(value, dict), where
        for name, each in value.items():
            assert name in classes[kind], f"{where}.{name} is no field of {kind}"
            check(each, classes[kind][name], classes, f"{where}.{name}")
    elif kind in PLAIN:
        assert isinstance(value, PLAIN[kind]), where
    else:
        assert kind.startswith(("V1", "dict(str, str)")), f"{where}: {kind}"


@pytest.mark.slow
def test_runtimes_have_the_fields_of_the_sdk(runtimes: list[Manifest], classes: dict[str, dict[str, str]]) -> None:
    for runtime in runtimes:
        check(runtime, "V1alpha1ServingRuntime", classes)
    with pytest.raises(AssertionError):
        check({**runtimes[0], "spec": {"protocols": ["v2"]}}, "V1alpha1ServingRuntime", classes)


@pytest.mark.parametrize("release", ["1.29.0", kubernetes_validate.latest_version()])
def test_their_pods_have_the_form_of_a_pod(runtimes: list[Manifest], release: str) -> None:
    for runtime in runtimes:
        spec = {key: runtime["spec"][key] for key in ("containers", "volumes")}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
        kubernetes_validate.validate(pod, release, strict=True)


@pytest.mark.parametrize(("number", "protocol", "port_name"), [(0, "v2", None), (1, "grpc-v2", "h2c")])
def test_they_say_what_the_server_does(
    number: int, protocol: str, port_name: str | None, runtimes: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = runtimes[number]["spec"]
    (container,) = spec["containers"]
    filled = {**container, "args": [_filled(each) for each in container["args"]]}
    settings = settings_of(filled, {}, monkeypatch)
    assert spec["protocolVersions"] == [protocol]
    (port,) = container["ports"]
    expected = settings.metrics.port if protocol == "v2" else settings.server.port
    assert (port["containerPort"], port.get("name")) == (expected, port_name)
    assert settings.server.model_aliases == ["minilm"]
    assert settings.model.name == "/mnt/models"
    assert settings.server.drain_delay_ms + settings.server.drain_timeout_ms + 5_000 <= DEFAULT_GRACE_MS


def test_routes_of_kserve_reach_the_server(runtimes: list[Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    (container,) = runtimes[0]["spec"]["containers"]
    settings = settings_of({**container, "args": [_filled(each) for each in container["args"]]}, {}, monkeypatch)
    known = allowed_hosts(settings.metrics.host, "pod-1", *settings.metrics.hosts)
    for host in ("minilm-predictor.inference.svc.cluster.local", "minilm-inference.example.com"):
        assert is_host_allowed(host, known, settings.metrics.host)


def _filled(argument: str) -> str:
    return argument.replace("{{.Name}}", "minilm").replace("{{.Namespace}}", "inference")


def test_the_sdk_is_read_right() -> None:
    source = 'class A:\n    openapi_types = {"a_b": "str"}\n    attribute_map = {"a_b": "aB"}\n'
    assert _classes_of(source) == {"A": {"aB": "str"}}
    check({"aB": "x"}, "A", {"A": {"aB": "str"}})
    for wrong in ({"a_b": "x"}, {"aB": 1}):
        with pytest.raises(AssertionError):
            check(wrong, "A", {"A": {"aB": "str"}})
