"""Documents of results as a benchmark leaves them."""

from collections.abc import Sequence
from typing import Any

from ml_inference_server.benchmark.result.document import (
    Document,
    Gate,
    InProcess,
    MeasuredServer,
    Quality,
    Run,
    ServerFacts,
)
from ml_inference_server.utils.experiment import ExperimentSettings

PASSED = Gate(passed=True, reasons=[])


def make_run(**changes: Any) -> Run:
    run = {
        "variant": "", "batch_size": 4, "concurrency": 2, "rate_per_s": None, "process": None, "streaming": False,
        "workload": "pairs", "repeat": 1, "slo": None, "status": "valid", "cause": None, "reason": "", "lost": False,
        "requests": 200, "by_time": False, "started": 200, "ok": 200, "errors": {}, "unfinished": 0, "pairs": 800,
        "texts": 1600, "distinct_texts": 300, "seconds": 2.0, "requests_per_s": 100.0, "pairs_per_s": 400.0,
        "texts_per_s": 800.0, "latency_ms": {"avg": 10.0, "p50": 9.0, "p95": 15.0, "p99": 19.0}, "fell_behind": None,
        "lag_ms": None, "server_ms": None, "batches": None, "first_error": None, "raw": "run_0001", "conditions": None,
        "client": {"processes": 1, "cpu_share": 0.1},
        "warmup": {"requests": 5, "ok": 5, "errors": {}, "rounds": 2, "settled": True},
    }  # fmt: skip
    return Run.model_validate(run | changes)


def repeats(*speeds: float, **changes: Any) -> list[Run]:
    """One row, measured once for each of `speeds` in pairs/s."""
    return [make_run(repeat=n, pairs_per_s=speed, **changes) for n, speed in enumerate(speeds, 1)]


def make_info(resolved: dict[str, Any] | None = None, **changes: Any) -> ServerFacts:
    info = {
        "server_version": "0", "experiment": "trial", "variant": "", "title": "MiniLM bf16 on cpu", "fallbacks": [],
        "settings": {}, "max_texts": 1024, "instance_id": "i", "pid": 1,
        "requested": {"model": "MiniLM", "backend": "pytorch", "device": "mps", "quantization": "fp16"},
        "resolved": {
            "model": "MiniLM", "backend": "pytorch", "task": "embedding", "device": "cpu", "device_name": "EPYC",
            "dtype": "bfloat16", "instruction_set": "AMX", "threads": 1, "concurrency": 2, "max_tokens": 256,
            "execution_provider": "torch", "weights_file": "model.safetensors", "source": "bundled wheel",
            "weights_sha256": "ab" * 32, "random_weights": False,
        } | (resolved or {}),
    }  # fmt: skip
    return ServerFacts.model_validate(info | changes)


def make_server(**changes: Any) -> MeasuredServer:
    load = ExperimentSettings().model_dump()
    return MeasuredServer.model_validate({"variant": "", "info": make_info(), "load": load} | changes)


def make_document(runs: Sequence[Run], **changes: Any) -> Document:
    document = {
        "kind": "suite", "name": "trial", "description": "A trial.", "command": "run trial", "started_at": "a",
        "finished_at": "b", "interrupted": False, "planned_rows": len(runs),
        "client": {"settings": {}, "channel_options": {}},
        "dataset": {"name": "d", "sha256": "cd" * 32, "rows": 1, "queries": 1, "passages": 1, "note": ""},
        "machine": {"cpu": "EPYC", "instruction_set": "AMX", "cpus": 2, "cpu_quota": None, "memory_gib": 8.0, "os": "L",
                    "load_average_1min": 0.1, "fingerprint": "0123456789ab"},
        "versions": {"python": "3"}, "git": {"commit": "abc", "modified": False}, "not_started": [], "slo": [],
        "servers": [make_server()], "runs": list(runs),
    }  # fmt: skip
    return Document.model_validate(document | changes)


def of_server(runs: Sequence[Run], **changes: Any) -> Document:
    """A document whose one server is other than make_server's in these fields."""
    return make_document(runs, servers=[make_server(**changes)])


def quality(*, without: Sequence[str] = (), **changes: Any) -> Quality:
    """without: fields that an earlier version did not write."""
    found = {
        "slice": {"name": "s", "sha256": "ef", "queries": 40, "pairs": 400},
        "ndcg_gain": "grade", "ndcg10": 0.55, "mrr10": 0.9,
        "cosine_mean": 0.94, "cosine_min": 0.8, "correlation": None, "overlap10": 0.9,
        "ndcg10_difference": {"value": -0.03, "low": -0.05, "high": -0.01},
        "mrr10_difference": {"value": 0.0, "low": 0.0, "high": 0.0},
        "reference": {"title": "FP32 of the same weights", "weights_sha256": "ab" * 32},
        "gate": {"passed": False, "reasons": ["mean cosine to FP32 is 0.9400, quality.min_cosine is 0.97"]},
    }  # fmt: skip
    return Quality.model_validate({name: value for name, value in (found | changes).items() if name not in without})


def inside(*, without: Sequence[str] = (), **changes: Any) -> InProcess:
    """without: fields that an earlier version did not write."""
    found = {
        "title": "MiniLM bf16 on cpu", "texts_per_s": 1000.0, "lowest": 990.0, "highest": 1010.0, "workload": "pairs",
        "batch_size": 4, "tokens_per_text": 50.0,
    }  # fmt: skip
    return InProcess.model_validate({name: value for name, value in (found | changes).items() if name not in without})
