"""INT8 on the CPU with PyTorch: the one place that touches torch.ao, which is deprecated and may move."""

import logging
import warnings

import torch

from ml_inference_server.utils.errors import ModelError

log = logging.getLogger(__name__)

# First of these that the build supports. On Apple's machines the build's own default is "none", which cannot run.
_ENGINES = ("x86", "fbgemm", "onednn", "qnnpack")
# Parts of the names of layers that stay in FP32: the first transformer layer, whose error all others inherit. What
# else was tried, and what each choice loses, stands in docs/backends.md.
KEEP_FP32 = ("layer.0.", "layers.0.")


def choose_engine() -> str:
    """The quantised engine to run, set for the process. ModelError if this build of PyTorch has none."""
    supported = torch.backends.quantized.supported_engines
    for engine in _ENGINES:
        if engine in supported:
            torch.backends.quantized.engine = engine
            return engine
    raise ModelError("this build of PyTorch has no INT8 engine: use model.backend onnx, or quantization bf16")


def quantize_linears(module: torch.nn.Module, keep: tuple[str, ...] = KEEP_FP32) -> int:
    """Replace the Linear layers of `module` by INT8 ones with per-channel weights; how many were replaced.

    keep: a layer whose name holds one of these stays in FP32.
    """
    quantization = getattr(torch.ao, "quantization", None)
    if quantization is None or not hasattr(quantization, "quantize_dynamic"):
        raise ModelError("this PyTorch has no quantize_dynamic any more: use model.backend onnx for INT8")
    names = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear) and not any(part in name for part in keep)
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.ao.quantization.*", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.ao\.")
        spec = dict.fromkeys(names, quantization.per_channel_dynamic_qconfig)
        quantization.quantize_dynamic(module, spec, dtype=torch.qint8, inplace=True)
    return count_quantized(module)


def count_quantized(module: torch.nn.Module) -> int:
    """How many layers of `module` really are INT8."""
    from torch.ao.nn.quantized.dynamic import Linear

    return sum(isinstance(layer, Linear) for layer in module.modules())
