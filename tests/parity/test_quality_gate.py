"""Damaged weights, from end to end: real servers, a real reference, and a row that nobody may take for a result."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ml_inference_server.benchmark import runner

pytestmark = [pytest.mark.real, pytest.mark.slow]


def damage(folder: Path) -> Path:
    """The same model with noise as large as its weights."""
    (file,) = folder.rglob("*.safetensors")
    random = np.random.default_rng(0)
    noisy = {
        name: (tensor + random.normal(0, tensor.std(), tensor.shape)).astype(tensor.dtype)
        if tensor.ndim == 2
        else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(noisy, file, metadata={"format": "pt"})
    return folder


def test_the_yardstick_is_fp32_whatever_the_environment_says(
    tiny: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes the measured server INT8 must not make its reference INT8 too: the loss would be none."""
    monkeypatch.setenv("MLIS_MODEL__QUANTIZED", "true")
    monkeypatch.setenv("MLIS_MODEL__QUANTIZATION", "int8")
    experiment = tmp_path / "int8.yaml"
    experiment.write_text(
        f"name: int8\nmodel: {{name: {tiny}, backend: pytorch, device: cpu, min_parity: 0}}\n"
        "experiment: {batch_sizes: [1], concurrency_levels: [1], benchmark_requests: 4, warmup_iterations: 2,"
        " repeats: 1, dataset: sample, in_process_s: 0}\n"
    )
    runner.main([str(experiment), "--output", str(tmp_path / "out.md")])
    (server,) = json.loads((tmp_path / "out.json").read_text())["servers"]
    assert server["info"]["resolved"]["dtype"] == "int8"
    assert "pytorch fp32 on cpu" in server["quality"]["reference"]["title"]


def test_damaged_weights_are_struck_through_and_never_the_best(tiny: Path, tmp_path: Path, own_cache: Path) -> None:
    damaged = damage(shutil.copytree(tiny, tmp_path / "damaged"))
    experiment = tmp_path / "damaged.yaml"
    experiment.write_text(
        f"name: damaged\nmodel: {{name: {tiny}, backend: pytorch, device: cpu}}\n"
        "experiment: {batch_sizes: [1], concurrency_levels: [2], benchmark_requests: 20, warmup_iterations: 2,"
        f" repeats: 1, dataset: sample, in_process_s: 0.05, quality: {{max_ndcg_loss: 1}}}}\n"
        f"variants:\n  sound: {{}}\n  damaged: {{model.name: {damaged}, experiment.quality.reference: {tiny}}}\n"
    )
    assert runner.main([str(experiment), "--output", str(tmp_path / "out.md")]) == 0
    document = json.loads((tmp_path / "out.json").read_text())
    sound, broken = (server["quality"] for server in document["servers"])
    assert sound["gate"] == {"passed": True, "reasons": []}
    assert sound["cosine_min"] > 0.9999
    assert sound["ndcg10_difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert broken["gate"]["passed"] is False
    assert broken["cosine_mean"] < 0.97
    for run, server in zip(document["runs"], document["servers"], strict=True):
        inside = server["in_process"]
        assert inside["texts_per_s"] > 0
        assert inside["tokens_per_text"] == run["batches"]["tokens"] / run["texts"], "the same requests, all of them"
    text = (tmp_path / "out.md").read_text()
    assert "| ~~damaged~~ |" in text
    assert "damaged: QUALITY GATE FAILED" in text
    assert text.count("at sound, batch size 1") == 2, "best throughput and best latency"
