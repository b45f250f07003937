"""What goes wrong with one of two replicas behind Ray Serve's real proxy, and what callers see of it."""

import os
import signal
import threading
from typing import Any

import grpc
import psutil
import pytest

from ml_inference_server.proto import inference_pb2 as pb
from tests.ray.cluster import Cluster
from tests.ray.load import Load, trailers_of

WORKERS = 8


def two_replicas(ray: Cluster, *settings: str, **arguments: Any) -> set[int]:
    assert (
        ray.deploy("model.name=fake:base_ms=50", "batching.max_batch_size=2", *settings, replicas=2, **arguments) == ""
    )
    return ray.pids(2)


def only_told_to_come_again(load: Load) -> None:
    """Of callers without a retry policy."""
    assert set(load.codes) <= {"OK", "UNAVAILABLE", "RESOURCE_EXHAUSTED"}, (load.codes, load.details)
    for code in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"):
        assert all(hint > 0 for hint in load.hints_ms[code])
        assert all("\n" not in text and "Traceback" not in text for text in load.details[code])


@pytest.mark.ray_slice
def test_no_call_is_lost_when_a_replica_is_killed(ray: Cluster) -> None:
    two_replicas(ray)
    with (
        Load(ray, workers=WORKERS, texts=["x"], different=True, retries=True) as patient,
        Load(ray, workers=WORKERS, texts=["y"], different=True, retries=False) as bare,
    ):
        while not bare.codes["UNAVAILABLE"]:  # Ray may have kept to the other one for a moment
            patient.more(20)
            os.kill(victim := ray.pids().pop(), signal.SIGKILL)
            patient.until(lambda gone=victim: not psutil.pid_exists(gone) and ray.tell("states") == {"RUNNING": 2})  # type: ignore[misc]
        patient.more(50)
    assert set(patient.codes) == {"OK"}, (patient.codes, patient.details)
    only_told_to_come_again(bare)
    assert bare.details["UNAVAILABLE"] == {"the replica that worked on the request is lost; retry in 1000 ms"}


def test_a_replica_whose_engine_hangs_is_replaced(ray: Cluster) -> None:
    pids = two_replicas(ray, "server.hang_timeout_ms=1000")
    ended: list[grpc.RpcError] = []

    def hang() -> None:
        with ray.stub() as stub, pytest.raises(grpc.RpcError) as caught:
            stub.Embed(pb.EmbedRequest(texts=["!hang"]), timeout=60)
        ended.append(caught.value)

    with Load(ray, workers=WORKERS, texts=["x"], different=True, retries=True) as load:
        hanging = threading.Thread(target=hang, daemon=True)
        hanging.start()
        load.until(lambda: bool(ended))
        load.until(lambda: ray.tell("states") == {"RUNNING": 2} and not pids <= ray.pids(2))
        load.more(50)
    assert ended[0].code() is grpc.StatusCode.UNAVAILABLE
    assert int(trailers_of(ended[0])["grpc-retry-pushback-ms"]) > 0
    assert set(load.codes) == {"OK"}, (load.codes, load.details)


def test_a_replica_that_cannot_load_its_model_leaves_the_other_at_work(ray: Cluster) -> None:
    """As in a roll-out of a model that is not there: the first new replica fails, and an old one goes on."""
    two_replicas(ray)
    with Load(ray, workers=WORKERS, texts=["x"], different=True, retries=True) as load:
        said = ray.deploy("model.name=fake:nonsense=1", replicas=2)
        assert "model.name fake:nonsense=1: expected fake:base_ms=NUMBER" in said
        load.more(50)
    assert set(load.codes) == {"OK"}, (load.codes, load.details)


def test_callers_of_a_deployment_that_never_came_up_are_told_so(ray: Cluster) -> None:
    two_replicas(ray)
    said = ray.deploy("model.name=fake:nonsense=1", name="broken", replicas=1)
    assert "expected fake:base_ms=NUMBER" in said
    with ray.stub() as stub:
        with pytest.raises(grpc.RpcError) as caught:
            stub.Embed(pb.EmbedRequest(texts=["a"]), timeout=30, metadata=(("application", "broken"),))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "no replica of this deployment runs" in (caught.value.details() or "")
        assert stub.Embed(pb.EmbedRequest(texts=["a"]), timeout=30, metadata=(("application", "default"),)).count == 1
        with pytest.raises(grpc.RpcError) as caught:
            stub.Embed(pb.EmbedRequest(texts=["a"]), timeout=30)  # which of the two?
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    ray.tell("forget", name="broken")


def test_no_call_is_lost_when_a_node_goes(ray: Cluster) -> None:
    two_replicas(ray, cpus=2)  # one on each node
    with (
        Load(ray, workers=WORKERS, texts=["x"], different=True, retries=True) as patient,
        Load(ray, workers=WORKERS, texts=["y"], different=True, retries=False) as bare,
    ):
        patient.more(20)
        ray.tell("remove_node")
        patient.until(lambda: ray.tell("states").get("RUNNING") == 1)
        patient.more(50)
        assert len(ray.pids(2, limit_s=2)) == 1
        ray.tell("give_node")
        patient.until(lambda: ray.tell("states") == {"RUNNING": 2})
        patient.more(50)
    assert set(patient.codes) == {"OK"}, (patient.codes, patient.details)
    only_told_to_come_again(bare)


def test_a_stopped_replica_is_drained_first(ray: Cluster) -> None:
    """Two become one, without a retry policy: nobody notices."""
    settings = ("model.name=fake:base_ms=50", "batching.max_batch_size=2")
    two_replicas(ray)
    with Load(ray, workers=WORKERS, texts=["x"], different=True, retries=False) as load:
        load.more(20)
        assert ray.deploy(*settings, replicas=1) == ""
        load.until(lambda: ray.tell("states") == {"RUNNING": 1})
        load.more(50)
    assert set(load.codes) == {"OK"}, (load.codes, load.details)


@pytest.mark.skipif(not os.environ.get("RAY_LONG"), reason="takes a minute: RAY_LONG=1 runs it")
def test_a_replica_that_is_stopped_like_a_hung_process_is_replaced(ray: Cluster) -> None:
    pids = two_replicas(ray)
    with Load(ray, workers=WORKERS, texts=["x"], different=True, retries=True) as load:
        load.more(20)
        os.kill(victim := pids.pop(), signal.SIGSTOP)
        load.until(lambda: not psutil.pid_exists(victim) and ray.tell("states") == {"RUNNING": 2})
        load.more(50)
    # What it holds waits for the end of a process that Ray grants a time to drain: some deadlines pass before.
    assert set(load.codes) <= {"OK", "DEADLINE_EXCEEDED"}, (load.codes, load.details)
    assert load.codes["DEADLINE_EXCEEDED"] <= WORKERS
