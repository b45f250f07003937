"""Requested against resolved: what the settings ask for, what this machine can run, and how the difference is told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ml_inference_server.backends import backend_class
from ml_inference_server.backends.base import BackendInfo
from ml_inference_server.backends.compiled import native
from ml_inference_server.utils.config import ModelSettings, Quantization
from ml_inference_server.utils.cpu import available_cpus, has_int8_vectors, has_native_bf16
from ml_inference_server.utils.errors import ModelError

# The dtype that a loaded model must report for each precision.
DTYPES: Mapping[Quantization, str] = {"none": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}
PRECISION_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8"}


@dataclass(frozen=True, slots=True)
class Resolution:
    """`model` is concrete: its device, precision, threads and streams are what the backend must run."""

    requested: ModelSettings
    model: ModelSettings
    device: str
    quantization: Quantization
    fallbacks: tuple[str, ...]
    warnings: tuple[str, ...]

    def check(self, info: BackendInfo) -> None:
        """ModelError if the loaded model is not what was resolved: a result must never carry a wrong label."""
        for what, wanted, got in (
            ("backend", self.model.backend, info.backend),
            ("device", self.device, info.device.split(":")[0]),
            ("dtype", DTYPES[self.quantization], info.dtype),
            ("compiled", self.model.compile, info.compiled),
        ):
            if wanted != got:
                raise ModelError(
                    f"the loaded model reports {what} {got}, not {wanted}: refusing to serve a wrong label"
                )
        if (self.quantization == "int8") != (info.quantized_layers > 0):
            raise ModelError(
                f"the loaded model has {info.quantized_layers} quantised layers under quantization {self.quantization}"
            )


def resolve(model: ModelSettings) -> Resolution:
    """What to run. ModelError (exit code 3) where it is not what was asked and `allow_fallback` is off."""
    supported = backend_class(model.backend).supported()
    fallbacks: list[str] = []
    device = _device(model, supported, fallbacks)
    asked_on = device if model.device == "auto" else model.device
    asked = model.requested_quantization(asked_on)
    if asked == "auto":
        raise ValueError("quantization is auto: backends/startup/auto.py chooses one before settings are resolved")
    quantization = _quantization(asked, device, supported[device], model, fallbacks)
    compiled = model.compile and _can_compile(model, device, quantization, fallbacks)
    cpus = available_cpus()
    streams = model.streams or (min(2, cpus) if device == "cpu" else 1)
    concrete = model.model_copy(
        update={
            "device": device,
            "quantized": quantization != "none",
            "quantization": quantization,
            "compile": compiled,
            "streams": streams,
            "threads": model.threads or max(1, cpus // streams),
        }
    )
    slow_bf16 = quantization == "bf16" and device == "cpu" and not has_native_bf16()
    warnings = ("this CPU has no bf16 instructions: bf16 runs as asked, but slower than fp32",) if slow_bf16 else ()
    return Resolution(model, concrete, device, quantization, tuple(fallbacks), warnings)


def _device(model: ModelSettings, supported: Mapping[str, Sequence[Quantization]], fallbacks: list[str]) -> str:
    best = next(iter(supported))
    if model.device in ("auto", best):
        return best
    if model.device in supported:
        return model.device
    there = ", ".join(supported)
    if not model.allow_fallback:
        raise ModelError(
            f"model.device {model.device} is not available to backend {model.backend} here (available: {there}): "
            f"set model.device to one of these, or model.allow_fallback: true to run on what is there"
        )
    fallbacks.append(f"device {model.device} is not available here, running on {best}")
    return best


def _quantization(
    asked: Quantization,
    device: str,
    possible: Sequence[Quantization],
    model: ModelSettings,
    fallbacks: list[str],
) -> Quantization:
    if asked in possible:
        return asked
    if not model.allow_fallback:
        names = ", ".join(PRECISION_NAMES[DTYPES[q]] for q in possible)
        raise ModelError(
            f"{asked} is not available on {device} with backend {model.backend} (available: {names}): "
            f"change model.quantization, or set model.allow_fallback: true to run the nearest precision"
        )
    native = [q for q in possible if not (q == "bf16" and device == "cpu" and not has_native_bf16())]
    order: dict[str, tuple[Quantization, ...]] = {"fp16": ("bf16",), "bf16": ("fp16",), "int8": ("fp16", "bf16")}
    chosen: Quantization = next((q for q in order.get(asked, ()) if q in native), "none")
    fallbacks.append(f"{asked} is not available on {device}, running {PRECISION_NAMES[DTYPES[chosen]]}")
    return chosen


def _can_compile(model: ModelSettings, device: str, quantization: Quantization, fallbacks: list[str]) -> bool:
    """Whether `model.compile` can be had; ModelError where it cannot and `allow_fallback` is off."""
    obstacle = ""
    if model.backend != "pytorch":
        obstacle = f"backend {model.backend} compiles by itself: model.compile is for backend pytorch"
    elif device != "cpu" or quantization not in ("none", "bf16", "int8"):
        obstacle = f"model.compile runs on cpu, not {PRECISION_NAMES[DTYPES[quantization]]} on {device}"
    elif quantization == "int8" and not has_int8_vectors():
        obstacle = "model.compile runs int8 on processors with AVX2 or ARM's dot products, and this one has neither"
    elif native.compiler() is None:
        obstacle = native.no_compiler()
    if obstacle and not model.allow_fallback:
        raise ModelError(obstacle)
    if obstacle:
        fallbacks.append(f"{obstacle}; running without it")
    return not obstacle


def title(resolution: Resolution, info: BackendInfo, cache_mb: int = 0) -> str:
    """What ran, fit for the title of a result; a fallback stands in it, and that answers may come out of a cache."""
    precision = PRECISION_NAMES.get(info.dtype, info.dtype)
    ran = f"{info.device} {precision}"
    compiled = " compiled" if info.compiled else ""
    text = f"{info.model}, {info.backend} {precision}{compiled} on {info.device} ({info.device_name})"
    wanted_model = resolution.requested
    wanted_device = info.device if wanted_model.device == "auto" else wanted_model.device
    asked = wanted_model.requested_quantization(wanted_device)
    wanted = precision if asked == "auto" else PRECISION_NAMES[DTYPES[asked]]
    asked_compiled = compiled if "auto" in (wanted_model.backend, asked) else " compiled" * wanted_model.compile
    if f"{wanted_device} {wanted}{asked_compiled}" != f"{ran}{compiled}":
        text += f": requested {wanted_device} {wanted}{asked_compiled} -> ran {ran}{compiled}"
    if info.random_weights:
        text += ", RANDOM WEIGHTS"
    if cache_mb:
        text += f", cache {cache_mb} MB"
    return text
