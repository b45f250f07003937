"""`auto` with real candidates: probed in their processes at the first start, read from the cache at the second."""

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ml_inference_server.backends.compiled import native
from ml_inference_server.backends.startup import auto, race
from ml_inference_server.backends.startup.auto import candidates
from ml_inference_server.backends.startup.own_process import OwnProcess
from ml_inference_server.backends.startup.race import Measured, probe
from ml_inference_server.backends.startup.start import start_backend
from ml_inference_server.utils.config import ModelSettings


def silent(phase: str) -> None:
    pass


@pytest.mark.real
def test_two_real_candidates_are_probed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLIS_CACHE_DIR", str(tmp_path))
    caplog.set_level(logging.INFO)
    threads = torch.get_num_threads()
    # With native bf16 or a compiler there would be more; this test is about the two that every CPU runs.
    monkeypatch.setattr(native, "compiler", lambda: None)
    monkeypatch.setattr(auto, "DTYPES", {"none": "float32", "int8": "int8"})
    model = ModelSettings(backend="pytorch", device="cpu", quantized=True, quantization="auto")
    processes: list[object] = []

    def count_candidates(work: object, settings: ModelSettings) -> object:
        processes.append(work)
        return candidates(settings)

    class Counted(OwnProcess[Measured]):
        def __init__(self, work: Callable[[ModelSettings], Iterator[Measured]], settings: ModelSettings) -> None:
            processes.append(work)
            super().__init__(work, settings)

    monkeypatch.setattr(auto, "in_own_process", count_candidates)
    monkeypatch.setattr(race, "OwnProcess", Counted)
    started = start_backend(model, silent)
    assert processes == [candidates, probe, probe]
    assert re.fullmatch(
        r"auto chose pytorch (fp32|int8) \((\d+\.\d)x of pytorch fp32; tried: pytorch fp32 1\.0x, "
        r"pytorch int8 (\d+\.\d)x; skipped: pytorch fp32 compiled \(model\.compile needs a C\+\+ compiler.*\)\)",
        started.auto_choice,
    )
    assert started.auto_choice.startswith(f"auto chose pytorch {'int8' if started.info.dtype == 'int8' else 'fp32'} ")
    assert started.info.parity_mean is not None
    again = start_backend(model, silent)
    assert len(processes) == 3
    assert (again.auto_choice, again.info.dtype) == (started.auto_choice, started.info.dtype)
    assert "measured earlier" in caplog.text
    torch.set_num_threads(threads)
