"""`auto`: the fastest that passes the gate, asked once, explained, and never taken down by one of its candidates."""

import dataclasses
import importlib.metadata
import logging
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from ml_inference_server.backends import BACKENDS
from ml_inference_server.backends.fake import FakeBackend
from ml_inference_server.backends.startup import auto, race
from ml_inference_server.backends.startup import resolve as resolve_module
from ml_inference_server.backends.startup.auto import Candidates, candidates, choose
from ml_inference_server.backends.startup.race import Closeness, Measured, probe
from ml_inference_server.backends.startup.resolve import resolve, title
from ml_inference_server.backends.startup.start import start_backend
from ml_inference_server.server.state import ServerState
from ml_inference_server.utils import config
from ml_inference_server.utils.config import ModelSettings, Quantization, Settings
from ml_inference_server.utils.errors import ConfigError, ModelError
from tests.conftest import FakeServer

CPU: Mapping[str, Sequence[Quantization]] = {"cpu": ("none", "bf16", "int8")}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLIS_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder that holds no weights: enough to be found and hashed."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    return path


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make `auto` believe that there are these backends, each name with what it supports; an error stands for none."""

    def have(native_bf16: bool = False, **supported: Mapping[str, Sequence[Quantization]] | Exception) -> None:
        def find(name: str) -> type[FakeBackend]:
            answer = supported[name]
            if isinstance(answer, Exception):
                raise answer
            return type("Backend", (FakeBackend,), {"supported": staticmethod(lambda: answer)})

        monkeypatch.setattr(auto, "BACKENDS", {**dict.fromkeys(supported, ""), "fake": BACKENDS["fake"]})
        for module in (auto, resolve_module):
            monkeypatch.setattr(module, "backend_class", find)
            monkeypatch.setattr(module, "has_native_bf16", lambda: native_bf16)
        monkeypatch.setattr(auto, "slow_bf16", lambda: "" if native_bf16 else "no bf16 instructions")

    return have


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch, backends: Callable[..., None]) -> Iterator[Callable[..., list[str]]]:
    """Answer for the processes: what each "backend precision" measures, or the error it ends with; returns the log."""
    ran: list[str] = []
    ended: list[str] = []

    def set_to(**by_backend: Mapping[str, float | tuple[float, Closeness] | ModelError]) -> list[str]:
        precisions: dict[str, tuple[Quantization, ...]] = {
            name: tuple("none" if each == "fp32" else each for each in rates)  # type: ignore[misc]
            for name, rates in by_backend.items()
        }
        backends(**{name: {"cpu": each} for name, each in precisions.items()})

        class Process:
            """In the place of a process that probes: the same figures at every time it is asked."""

            def __init__(self, work: object, model: ModelSettings) -> None:
                assert work is probe
                precision = model.quantization or "fp32"
                self._name = f"{model.backend} {precision}"
                self._answer = by_backend[model.backend][precision]
                self._asked = 0
                ran.append(self._name)

            def begin(self) -> None:
                pass

            def ask(self) -> Measured:
                self._asked += 1
                if isinstance(self._answer, ModelError):
                    raise self._answer
                given = self._answer if isinstance(self._answer, tuple) else (self._answer, Closeness(1.0, 0.97, False))
                rate, closeness = given
                if self._asked == 1:
                    return Measured()
                return Measured(closeness=closeness) if self._asked == 3 else Measured((rate, rate))

            def close(self) -> None:
                ended.append(self._name)

        def run(work: object, model: ModelSettings) -> Candidates:
            assert work is candidates
            return candidates(model)

        monkeypatch.setattr(auto, "in_own_process", run)
        monkeypatch.setattr(race, "OwnProcess", Process)
        return ran

    yield set_to
    assert not ran or sorted(ended) == sorted(ran), "a process that nobody ends"


def measured(texts_per_s: float, closeness: float | None = 1.0, *, fp32: bool = False) -> tuple[float, Closeness]:
    return texts_per_s, Closeness(closeness, 0.97, fp32)


def wish(**keys: object) -> ModelSettings:
    return ModelSettings.model_validate({"backend": "auto", "quantized": True, "quantization": "auto", **keys})


def silent(phase: str) -> None:
    pass


# What takes part


def test_everything_takes_part_and_what_is_absent_has_its_reason(backends: Callable[..., None]) -> None:
    missing = ModelError("model.backend c needs the package c: pip install -r requirements.txt")
    backends(a={"cuda": ("none", "fp16"), "cpu": ("none", "int8")}, b={"cpu": ("none",)}, c=missing)
    found = candidates(wish())
    assert list(found.able) == ["a fp32 on cuda", "a fp16 on cuda", "a fp32", "a int8", "b fp32"]
    assert found.skipped["c"] == str(missing)
    assert found.skipped["a int8 on cuda"] == "not on cuda"
    assert found.skipped["b int8"] == "not on cpu"
    chosen = found.able["a int8"]
    assert (chosen.backend, chosen.device, chosen.quantized, chosen.quantization) == ("a", "cpu", True, "int8")


def test_a_broken_package_does_not_take_the_others_along(backends: Callable[..., None]) -> None:
    backends(a=OSError("libsomething.so.1: cannot open shared object file"), b=CPU)
    found = candidates(wish())
    assert found.skipped["a"].startswith("OSError: libsomething")
    assert "b fp32" in found.able


@pytest.mark.parametrize(
    ("native", "gain", "why"),
    [
        (False, 9.0, "no bf16 instructions"),
        (True, 0.5, "bf16 products take 2.0x the time of fp32 ones"),
        (True, 1.0, ""),
    ],
)
def test_bf16_that_does_not_pay_is_told(monkeypatch: pytest.MonkeyPatch, native: bool, gain: float, why: str) -> None:
    monkeypatch.setattr(auto, "has_native_bf16", lambda: native)
    monkeypatch.setattr(auto, "bf16_gain", lambda: gain)
    auto.slow_bf16.cache_clear()
    assert auto.slow_bf16() == why
    auto.slow_bf16.cache_clear()


@pytest.mark.parametrize("keys", [{}, {"quantization": "bf16"}])
def test_emulated_bf16_is_no_candidate_even_if_it_was_named(
    backends: Callable[..., None], keys: dict[str, object]
) -> None:
    backends(a=CPU)
    assert candidates(wish(**keys)).skipped["a bf16"] == "no bf16 instructions"
    backends(a=CPU, native_bf16=True)
    assert "a bf16" in candidates(wish(**keys)).able


@pytest.mark.parametrize(
    ("flags", "can"),
    [
        ({"asimd", "asimddp"}, True),
        ({"neon", "feat_dotprod", "feat_i8mm"}, True),
        ({"avx2", "fma"}, True),
        ({"asimd", "bf16"}, False),
    ],
)
def test_compiled_int8_takes_part_where_the_processor_has_the_instructions(
    backends: Callable[..., None], monkeypatch: pytest.MonkeyPatch, flags: set[str], can: bool
) -> None:
    monkeypatch.setattr("ml_inference_server.utils.cpu.cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr("ml_inference_server.backends.compiled.native.compiler", lambda: "g++")
    backends(pytorch={"cpu": ("none", "int8")})
    found = candidates(wish())
    assert ("pytorch int8 compiled" in found.able) == can
    assert "pytorch fp32 compiled" in found.able
    if not can:
        assert "ARM's dot products" in found.skipped["pytorch int8 compiled"]


def test_only_what_is_auto_is_left_open(backends: Callable[..., None]) -> None:
    backends(a=CPU, b=CPU)
    assert list(candidates(wish(quantized=False, quantization=None)).able) == ["a fp32", "b fp32"]
    assert list(candidates(wish(quantization=None)).able) == ["a int8", "b int8"], "the rule for the device"
    assert list(candidates(wish(backend="b")).able) == ["b fp32", "b int8"]


def test_a_missing_device_is_refused_or_falls_back_as_everywhere(backends: Callable[..., None]) -> None:
    backends(a=CPU)
    assert candidates(wish(device="mps")).able == {}
    found = candidates(wish(device="mps", allow_fallback=True))
    assert list(found.able) == ["a fp32", "a int8"], "and a precision that is not there is not tried under another name"
    assert resolve(found.able["a int8"]).fallbacks == ("device mps is not available here, running on cpu",)


# The choice


def test_the_fastest_that_passes_wins_and_the_sentence_tells_all(
    outcomes: Callable[..., list[str]], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    phases: list[str] = []
    outcomes(
        a={"fp32": 100.0, "int8": measured(900, 0.9612)},
        b={"fp32": 90.0, "int8": 310.0},
        c={"fp32": ModelError("its process died with exit code -11")},
    )
    choice = choose(wish(name=str(folder)), phases.append)
    assert (choice.model.backend, choice.model.quantization, choice.model.name) == ("b", "int8", str(folder))
    assert choice.sentence.startswith(
        "auto chose b int8 (3.1x of a fp32; tried: a fp32 1.0x, "
        "a int8 failed the quality gate (parity 0.9612, limit 0.97), b int8 3.1x, "
        "b fp32 not tried (b int8 is no slower), "
        "c fp32 failed (its process died with exit code -11); skipped: a fp16 (not on cpu)"
    )
    assert caplog.text.count(choice.sentence) == 1
    assert "auto: trying a fp32, a int8 (2/5)" in phases


def test_a_second_start_reads_the_choice(
    outcomes: Callable[..., list[str]], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ran = outcomes(a={"fp32": 100.0, "int8": 200.0})
    first = choose(wish(name=str(folder)), silent)
    assert ran == ["a fp32", "a int8"]
    assert choose(wish(name=str(folder)), silent) == first
    assert len(ran) == 2
    assert "measured earlier" in caplog.text


@pytest.mark.parametrize("change", ["weights", "settings", "versions", "cpu"])
def test_another_model_or_machine_is_measured_anew(
    outcomes: Callable[..., list[str]], folder: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    ran = outcomes(a={"fp32": 100.0})
    model = wish(name=str(folder))
    choose(model, silent)
    if change == "weights":
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", 3) + b"{ }")
    elif change == "settings":
        model = wish(name=str(folder), min_parity=0.5)
    elif change == "versions":
        monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.0.1")
    else:
        monkeypatch.setattr(auto, "cpu_name", lambda: "another")
    choose(model, silent)
    assert len(ran) == 2


def test_a_choice_that_does_not_run_any_more_is_made_again(
    outcomes: Callable[..., list[str]], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes(a={"fp32": 100.0, "int8": 200.0})
    choose(wish(name=str(folder)), silent)
    outcomes(a={"fp32": 100.0})
    assert choose(wish(name=str(folder)), silent).model.quantized is False
    assert "what auto chose earlier does not run any more: int8 is not available" in caplog.text


def test_nothing_that_passes_is_an_error_that_tells_everything(
    outcomes: Callable[..., list[str]], folder: Path
) -> None:
    ran = outcomes(a={"int8": measured(900, 0.5)}, b={"fp32": ModelError("no memory")})
    for _ in range(2):
        with pytest.raises(ModelError, match=r"a int8 failed the quality gate .*b fp32 failed \(no memory\).*Name a"):
            choose(wish(name=str(folder)), silent)
    assert len(ran) == 4, "a failure is not remembered"


def test_one_that_cannot_win_any_more_is_given_up_and_not_compared(
    outcomes: Callable[..., list[str]], folder: Path
) -> None:
    broken = measured(30, 0.1)  # would be refused, if it were compared
    outcomes(a={"fp32": 100.0}, b={"int8": 300.0}, c={"int8": broken})
    sentence = choose(wish(name=str(folder)), silent).sentence
    assert "c int8 0.3x" in sentence
    assert "gate" not in sentence


def test_a_fast_one_that_is_unfit_drives_nobody_out(outcomes: Callable[..., list[str]], folder: Path) -> None:
    outcomes(a={"fp32": 100.0}, b={"int8": 120.0}, c={"int8": measured(900, 0.5)})
    choice = choose(wish(name=str(folder)), silent)
    assert choice.model.backend == "b"


def test_fp32_is_not_tried_where_fewer_bits_of_the_same_are_fit_and_is_where_they_are_not(
    outcomes: Callable[..., list[str]], folder: Path
) -> None:
    ran = outcomes(a={"fp32": 100.0}, b={"fp32": 110.0, "int8": 300.0}, c={"fp32": 120.0, "int8": measured(400, 0.5)})
    sentence = choose(wish(name=str(folder)), silent).sentence
    assert "b fp32 not tried (b int8 is no slower)" in sentence
    assert ran == ["a fp32", "b int8", "c int8", "c fp32"]


def test_without_a_reference_only_fp32_is_trusted() -> None:
    assert Closeness(None, 0.97, fp32=True).verdict == ""
    assert Closeness(None, 0.97, fp32=False).verdict == "could not be compared with FP32"
    assert Closeness(float("nan"), 0.97, fp32=False).verdict.startswith("failed the quality gate")
    assert Closeness(0.97, 0.97, fp32=False).verdict == ""


# The probe


def test_the_probe_measures_speed_and_parity_as_the_server_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[FakeBackend] = []
    load = FakeBackend.load_model

    def load_and_log(backend: FakeBackend) -> None:
        ran.append(backend)
        backend.keep_log()
        load(backend)

    monkeypatch.setattr(FakeBackend, "load_model", load_and_log)
    asked = probe(ModelSettings(backend="fake", streams=2))
    loaded, first, compared, second = (next(asked) for _ in range(4))
    asked.close()
    assert loaded == Measured()
    for each in (first, second):
        queries_per_s, passages_per_s = each.rates
        assert queries_per_s > 0
        assert passages_per_s > 0
    assert compared.closeness is not None
    assert compared.closeness.parity == pytest.approx(1)
    assert (compared.closeness.limit, compared.closeness.fp32) == (0.9999, True)
    timed = [batch for batch in ran[0].log if len(batch.rows) > 8]
    assert max(batch.padded_tokens for batch in timed) <= 2048
    assert max(len(batch.rows) for batch in timed if batch.padded_tokens < 400) <= race.QUERY_BATCH
    assert len({row for batch in timed for row in batch.rows}) >= race.PROBE_TEXTS


def test_the_probe_of_a_cross_encoder_scores_pairs() -> None:
    asked = probe(ModelSettings(backend="fake", task="cross_encoder"))
    assert next(asked) == Measured()
    assert len(next(asked).rates) == 1
    closeness = next(asked).closeness
    assert closeness is not None
    assert closeness.parity == pytest.approx(1)
    asked.close()


# What the rest of the server makes of it


def test_auto_without_quantized_is_refused() -> None:
    with pytest.raises(ConfigError, match="quantization is auto but model.quantized is false: set quantized: true"):
        config.load_settings(overrides=["model.quantization=auto"])


def test_nothing_is_loaded_or_resolved_while_the_precision_is_auto() -> None:
    with pytest.raises(ValueError, match="quantization is auto"):
        resolve(wish(backend="fake"))
    with pytest.raises(ValueError, match="quantization is auto"):
        _ = wish().precision


def test_what_was_requested_stays_auto_and_is_no_fallback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, with the fake backend as the only candidate: a real process probes it, then it serves."""
    settings = Settings.model_validate({"model": {"backend": "fake", "quantized": True, "quantization": "auto"}})
    model = settings.model.model_copy(update={"name": str(folder)})
    phases: list[str] = []
    started = start_backend(model, phases.append)
    assert started.resolution.requested == model
    assert started.resolution.model.quantized is False
    assert started.auto_choice.startswith("auto chose fake fp32 (1.0x of fake fp32; tried: fake fp32 1.0x; skipped: ")
    assert "requested" not in title(started.resolution, started.info)
    assert "auto: trying fake fp32 (1/1)" in phases
    monkeypatch.setattr(auto, "in_own_process", pytest.fail)
    again = start_backend(model, silent)
    assert again.auto_choice == started.auto_choice


async def test_server_info_tells_the_choice_and_is_silent_without_one(server: FakeServer) -> None:
    assert server.state.as_dict()["auto_choice"] == ""
    state = ServerState(Settings.model_validate({"model": wish().model_dump()}))
    assert (state.requested()["backend"], state.requested()["quantization"]) == ("auto", "auto")
    described = dataclasses.replace(server.model.described, auto_choice="auto chose x")
    state.model = dataclasses.replace(server.model, described=described)
    assert state.as_dict()["auto_choice"] == "auto chose x"
