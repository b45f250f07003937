"""Two replicas behind Ray Serve's real proxy: what callers get, and that each setting reaches the replicas."""

import functools
import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from ml_inference_server.backends.fake import fake_embedding
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.server.rpc.native import SERVICE
from tests.integration.script_copies import ROOT
from tests.ray.cluster import Cluster
from tests.ray.load import Load

LIMIT_S = 60.0


@pytest.fixture(scope="module", autouse=True)
def replicas(ray: Cluster) -> None:
    assert ray.deploy("model.name=fake:base_ms=2", replicas=2) == ""


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str, dict[str, str | bytes]]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code(), error.details(), dict(error.trailing_metadata())


def info_of(trailers: dict[str, str | bytes]) -> error_details_pb2.ErrorInfo:
    status, info = status_pb2.Status(), error_details_pb2.ErrorInfo()
    status.ParseFromString(bytes(trailers["grpc-status-details-bin"]))  # type: ignore[arg-type]
    assert any(detail.Unpack(info) for detail in status.details)
    return info


@pytest.mark.ray_slice
def test_two_replicas_answer_embed_rerank_and_health(ray: Cluster) -> None:
    texts = ["what is the capital of France?", "Grüße 東京", "a"]
    with ray.channel() as channel, ray.stub() as stub:
        replicas = set()
        for _ in range(100):
            reply, call = stub.Embed.with_call(pb.EmbedRequest(texts=texts), timeout=30)
            got = np.frombuffer(reply.embeddings, "<f4").reshape(reply.count, reply.dimension)
            np.testing.assert_array_equal(got, [fake_embedding(text) for text in texts])
            replicas.add(dict(call.trailing_metadata())["replica"])
        assert len(replicas) == 2
        ranks = stub.Rerank(pb.RerankRequest(query="a", documents=["b", "a"]), timeout=30).ranks
        assert [rank.index for rank in ranks] == [1, 0]
        check = health_pb2_grpc.HealthStub(channel).Check
        for service in ("", SERVICE):
            assert check(health_pb2.HealthCheckRequest(service=service), timeout=30).status == 1  # SERVING
    assert len(ray.pids(2)) == 2


@pytest.mark.ray_slice
def test_a_caller_gets_the_status_and_the_details_of_the_server(ray: Cluster) -> None:
    with ray.channel() as channel, ray.stub() as stub:
        embed: Any = channel.unary_unary(f"/{SERVICE}/Embed")
        code, text, trailers = refused(lambda: stub.Embed(pb.EmbedRequest(), timeout=30))
        assert (code, text) == (grpc.StatusCode.INVALID_ARGUMENT, "texts: at least one is required")
        assert info_of(trailers).metadata["request_id"] == trailers["request-id"]
        header = (("x-request-id", "mine"),)
        code, text, trailers = refused(
            lambda: stub.Embed(pb.EmbedRequest(texts=["!raise"]), timeout=30, metadata=header)
        )
        assert (code, trailers["request-id"]) == (grpc.StatusCode.INTERNAL, "mine")
        assert text == "the model failed on this input, twice, on its own"
        code, text, trailers = refused(lambda: embed(b"\xff\xff", timeout=30))
        assert (code, info_of(trailers).reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")
        check = health_pb2_grpc.HealthStub(channel).Check
        code, _, _ = refused(lambda: check(health_pb2.HealthCheckRequest(service="nobody"), timeout=30))
        assert code is grpc.StatusCode.NOT_FOUND


def test_what_a_replica_cannot_do_is_refused_in_a_sentence(ray: Cluster) -> None:
    with ray.channel() as channel, ray.stub() as stub:
        code, text, _ = refused(lambda: list(stub.EmbedStream(iter([pb.EmbedStreamRequest(id=1)]), timeout=30)))
        assert (code, text[:37]) == (grpc.StatusCode.UNIMPLEMENTED, "a stream would stay with one replica,")
        watch = health_pb2_grpc.HealthStub(channel).Watch
        code, text, _ = refused(lambda: list(watch(health_pb2.HealthCheckRequest(), timeout=30)))
        assert (code, text[-10:]) == (grpc.StatusCode.UNIMPLEMENTED, "call Check")


def test_the_callers_deadline_reaches_the_replica(ray: Cluster) -> None:
    """Unless the proxy's cancellation comes first, which is counted as such, the replica gives a late call up."""
    before = _counted(ray, "DEADLINE_EXCEEDED")
    give_up_at = time.monotonic() + LIMIT_S
    with ray.stub() as stub:
        while _counted(ray, "DEADLINE_EXCEEDED") == before:
            late = functools.partial(stub.Embed, pb.EmbedRequest(texts=["!slow:600"]), timeout=0.2)
            assert refused(late)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
            assert time.monotonic() < give_up_at


def _counted(ray: Cluster, code: str) -> int:
    """Requests that ended so, on all replicas."""
    by_replica: dict[str, int] = {}
    with ray.stub() as stub:
        while len(by_replica) < 2:
            reply, call = stub.GetMetrics.with_call(pb.GetMetricsRequest(), timeout=30)
            by_replica[dict(call.trailing_metadata())["replica"]] = reply.requests_by_code[code]
    return sum(by_replica.values())


def test_the_file_that_ships_is_one_of_serve(ray: Cluster) -> None:
    path = ROOT / "ml_inference_server" / "deploy" / "ray" / "serve.yaml"
    assert ray.tell("read", path=str(path)) == {"services": 1, "experiment": "quickstart", "threads": 1, "replicas": 2}


def test_reflection_names_the_services(ray: Cluster) -> None:
    with ray.channel() as channel:
        assert {SERVICE, "grpc.health.v1.Health"} <= set(ProtoReflectionDescriptorDatabase(channel).get_services())


def test_user_config_changes_batching_of_running_replicas(ray: Cluster) -> None:
    """The queue takes one request then, and who is refused is told when to come back."""
    pids = ray.pids(2)
    small = {"max_queue_requests": 1, "max_batch_size": 1}
    assert ray.deploy("model.name=fake:base_ms=2", replicas=2, user_config=small) == ""
    with Load(ray, workers=24, texts=["!slow:50 x"], retries=False) as load:
        load.until(lambda: load.codes["RESOURCE_EXHAUSTED"] > 20 and load.codes["OK"] > 20)
    assert set(load.codes) == {"OK", "RESOURCE_EXHAUSTED"}
    assert all(hint > 0 for hint in load.hints_ms["RESOURCE_EXHAUSTED"])
    assert ray.pids(2) == pids  # none was started anew


@pytest.mark.parametrize(
    ("user_config", "said"),
    [
        ({"max_batch_size": 0}, "user_config.max_batch_size: Input should be greater than or equal to 1"),
        ({"enabled": False}, "user_config.enabled: is for the start only"),
        ({"nonsense": 1}, "user_config.nonsense: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_user_config_is_told_in_a_sentence(ray: Cluster, user_config: dict[str, object], said: str) -> None:
    told = ray.tell("explain", user_config=user_config)
    assert told.startswith(said)


def test_a_second_replica_starts_when_texts_wait_too_long(ray: Cluster) -> None:
    scaling: dict[str, Any] = {
        "replicas": 1,
        "max_replicas": 2,
        "target_wait_ms": 20,
        "upscale_delay_s": 0.5,
        "look_back_s": 2,
    }
    settings = ("model.name=fake:base_ms=20", "batching.max_batch_size=2")
    assert ray.deploy(*settings, replicas=1) == ""  # Ray would keep the two that there are
    assert ray.deploy(*settings, **scaling) == ""
    assert len(ray.pids(2, limit_s=2)) == 1
    with Load(ray, workers=32, texts=["x"], different=True, retries=False) as load:
        load.until(lambda: ray.tell("states").get("RUNNING") == 2)
    assert set(load.codes) == {"OK"}
    assert len(ray.pids(2)) == 2
