"""The Kubernetes manifests against the schemas of Kubernetes and its operators, and against the server's settings."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PrometheusRule, ServiceMonitor

from ml_inference_server.metrics.http_rules import allowed_hosts, is_host_allowed
from ml_inference_server.utils.config import Settings
from tests.deploy.containerfile import ROOT, environment, values
from tests.deploy.manifests import (
    FOLDER,
    NAMESPACE,
    Manifest,
    arguments_of,
    only,
    pod_of,
    render,
    settings_of,
    with_components,
)

# The oldest release with all fields in use, and the newest whose schemas are here.
RELEASES = ["1.29.0", "1.33.0", kubernetes_validate.latest_version()]
OPERATORS: dict[str, Any] = {"ScaledObject": ScaledObject, "ServiceMonitor": ServiceMonitor}
COMBINATIONS = [
    (),
    ("hpa",),
    ("keda",),
    ("tls",),
    ("keys",),
    ("model-claim", "monitoring", "tls", "keys", "keda"),
    ("model-claim", "monitoring", "tls", "keys", "hpa"),
]
NAME = {"app.kubernetes.io/name": "ml-inference-server"}
GRACE_FOR_THE_PROCESS_MS = 10_000


@pytest.fixture(scope="module", params=COMBINATIONS, ids="+".join)
def manifests(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    return with_components(tmp_path_factory.mktemp("overlay"), *request.param)


@pytest.fixture
def container(manifests: list[Manifest]) -> Manifest:
    (found,) = pod_of(only(manifests, "Deployment"))["containers"]
    return found  # type: ignore[no-any-return]


@pytest.fixture
def settings(
    manifests: list[Manifest], container: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Settings:
    """An unknown setting ends here, wherever the manifests name it."""
    content = only(manifests, "ConfigMap")["data"]["settings.yaml"]
    (tmp_path / "settings.yaml").write_text(content)
    return settings_of(container, {"/settings/settings.yaml": tmp_path / "settings.yaml"}, monkeypatch)


def check(manifest: Manifest, release: str) -> None:
    """By Kubernetes' own schema, or by its operator's, where a field that it does not know is one too many."""
    operator = OPERATORS.get(manifest["kind"])
    if operator is None:
        kubernetes_validate.validate(manifest, release, strict=True)
        return
    known = operator.model_validate(manifest).model_dump(mode="json", by_alias=True, exclude_unset=True)
    assert known == manifest


@pytest.mark.parametrize("release", RELEASES)
def test_every_manifest_has_the_form_of_its_kind(manifests: list[Manifest], release: str) -> None:
    for manifest in manifests:
        check(manifest, release)


def test_the_example_is_rendered_and_has_the_form_of_its_kinds() -> None:
    found = render(FOLDER / "example")
    assert {"Deployment", "ScaledObject", "ServiceMonitor"} <= {each["kind"] for each in found}
    for manifest in found:
        check(manifest, RELEASES[-1])


@pytest.mark.parametrize("place", [("spec",), ("spec", "scaleTargetRef"), ("spec", "advanced")])
def test_a_field_that_an_operator_does_not_know_is_noticed(place: tuple[str, ...]) -> None:
    manifest = yaml.safe_load((FOLDER / "components/keda/scaled_object.yaml").read_text(encoding="utf-8"))
    inner = manifest
    for part in place:
        inner = inner[part]
    inner["replicaz"] = 1
    with pytest.raises(AssertionError):
        check(manifest, RELEASES[-1])


def test_a_field_that_kubernetes_does_not_know_is_noticed(manifests: list[Manifest]) -> None:
    broken = json.loads(json.dumps(only(manifests, "Deployment")))
    pod_of(broken)["containers"][0]["readinessProbes"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        check(broken, RELEASES[-1])


def test_the_pod_is_given_the_time_that_a_stop_may_take(
    manifests: list[Manifest], container: Manifest, settings: Settings
) -> None:
    pre_stop_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    server = settings.server
    needed_ms = pre_stop_s * 1000 + server.drain_delay_ms + server.drain_timeout_ms + GRACE_FOR_THE_PROCESS_MS
    assert pod_of(only(manifests, "Deployment"))["terminationGracePeriodSeconds"] * 1000 >= needed_ms
    assert server.drain_timeout_ms >= server.default_timeout_ms, "the longest call would be cut off"


def test_a_pod_is_out_of_the_endpoints_before_it_refuses(container: Manifest, settings: Settings) -> None:
    probe = container["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] * 1000 <= settings.server.drain_delay_ms / 2


def test_new_pods_get_calls_and_no_call_is_cut_off_for_it(settings: Settings) -> None:
    server = settings.server
    assert 0 < server.max_connection_age_s <= 300
    assert server.max_connection_age_grace_s * 1000 >= server.default_timeout_ms


def test_ports_and_probes_are_those_of_the_server(
    manifests: list[Manifest], container: Manifest, settings: Settings
) -> None:
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports == {"grpc": settings.server.port, "http": settings.metrics.port}
    assert {"0.0.0.0"} == {settings.server.host, settings.metrics.host}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container[name]
        if "grpc" in probe:
            assert not settings.server.tls.cert, "the kubelet speaks no TLS over gRPC"
            assert probe["grpc"]["port"] == settings.server.port
        else:
            assert probe["httpGet"]["path"] == ("/healthz" if name == "livenessProbe" else "/readyz")
            assert probe["httpGet"].get("scheme", "HTTP") == ("HTTPS" if settings.server.tls.cert else "HTTP")
    for service in (each for each in manifests if each["kind"] == "Service"):
        assert {each["port"] for each in service["spec"]["ports"]} <= set(ports.values())


def test_http_is_answered_under_the_names_of_the_service(manifests: list[Manifest], settings: Settings) -> None:
    known = allowed_hosts(settings.metrics.host, "pod-1", *settings.metrics.hosts)
    service = only(manifests, "Service", "ml-inference-server")["metadata"]["name"]
    for name in (service, *(f"{service}.{NAMESPACE}{end}" for end in ("", ".svc", ".svc.cluster.local"))):
        assert is_host_allowed(f"{name}:{settings.metrics.port}", known, settings.metrics.host)
    assert not is_host_allowed("elsewhere.example", known, settings.metrics.host)


def test_the_container_can_do_nothing_that_it_does_not_need(manifests: list[Manifest], container: Manifest) -> None:
    (user,) = values("runtime", "USER")
    pod = pod_of(only(manifests, "Deployment"))
    security = pod["securityContext"]
    assert user == f"{security['runAsUser']}:{security['runAsGroup']}"
    assert security["runAsNonRoot"]
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod["automountServiceAccountToken"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    writable = {each["mountPath"] for each in container["volumeMounts"] if not each.get("readOnly")}
    assert writable == {"/tmp", environment()["MLIS_CACHE_DIR"]}  # noqa: S108


def test_files_that_settings_name_are_mounted(container: Manifest, settings: Settings) -> None:
    mounted = tuple(f"{each['mountPath']}/" for each in container["volumeMounts"])
    named = [settings.server.tls.cert, settings.server.tls.key, settings.server.auth.keys_file]
    assert all(path.startswith(mounted) for path in named if path)
    assert settings.model.name == "/model"


def selectors(manifests: list[Manifest]) -> Iterator[dict[str, Any]]:
    for each in manifests:
        spec = each.get("spec", {})
        if each["kind"] == "Service":
            yield spec["selector"]
        elif each["kind"] == "NetworkPolicy":
            yield spec["podSelector"]["matchLabels"]
        elif each["kind"] in ("Deployment", "PodDisruptionBudget", "ServiceMonitor"):
            yield spec["selector"]["matchLabels"]


def test_every_selector_means_our_pods_and_no_others(manifests: list[Manifest]) -> None:
    found = list(selectors(manifests))
    assert len(found) >= 5
    assert all(each == NAME for each in found)
    pod = only(manifests, "Deployment")["spec"]["template"]
    assert pod["metadata"]["labels"] == NAME


def test_whoever_scales_alone_says_how_many(manifests: list[Manifest]) -> None:
    scaled = {each["kind"] for each in manifests} & {"ScaledObject", "HorizontalPodAutoscaler"}
    assert ("replicas" in only(manifests, "Deployment")["spec"]) != bool(scaled)


def test_the_monitor_scrapes_what_the_rules_know(manifests: list[Manifest], settings: Settings) -> None:
    monitors = [each for each in manifests if each["kind"] == "ServiceMonitor"]
    if not monitors:
        return
    (endpoint,) = monitors[0]["spec"]["endpoints"]
    assert endpoint["path"] == "/metrics/prometheus"
    assert endpoint.get("scheme", "http") == ("https" if settings.server.tls.cert else "http")
    assert ("authorization" in endpoint) == bool(settings.server.auth.keys_file)
    rules = (FOLDER.parent / "prometheus" / "alerts.yml").read_text(encoding="utf-8")
    service = only(manifests, "Service", "ml-inference-server")
    assert f'job="{service["metadata"]["labels"][monitors[0]["spec"]["jobLabel"]]}"' in rules


def test_the_command_for_the_alerts_makes_an_object_of_the_operator() -> None:
    """As docs/deployment.md has it, without what applies it."""
    text = (ROOT / "ml_inference_server/docs/deployment.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^\(printf .*?\) (?=\| kubectl)", text, re.MULTILINE | re.DOTALL)
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    made = yaml.safe_load(done.stdout)
    known = PrometheusRule.model_validate(made).model_dump(mode="json", by_alias=True, exclude_unset=True)
    assert known == made
    assert len(made["spec"]["groups"][0]["rules"]) > 5


def test_arguments_that_the_server_does_not_know_are_noticed(container: Manifest) -> None:
    with pytest.raises(SystemExit):
        arguments_of({**container, "args": [*container["args"], "--no-such-flag"]}, {})
