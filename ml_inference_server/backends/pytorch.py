"""PyTorch on cpu, cuda and mps: FP32, FP16, BF16, and INT8 on the cpu.

The model works as its own files say (pooling, Dense, normalisation, prompts, maximum length), but its modules run on
the batcher's token ids instead of on text, so that nothing is tokenised or sorted twice.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ml_inference_server.backends.base import (
    BackendInfo,
    Progress,
    TextTokenizer,
    TokenBatch,
    run_in_company,
)
from ml_inference_server.backends.model.loading import load_model
from ml_inference_server.backends.model.quantize_torch import choose_engine, count_quantized, quantize_linears
from ml_inference_server.backends.model.warmup import run_warmup
from ml_inference_server.utils.config import ModelSettings, Quantization
from ml_inference_server.utils.cpu import cpu_name, instruction_set

# oneDNN, which computes for PyTorch on the CPU, keeps a kernel for every shape that it meets, 1,024 of them if nobody
# says otherwise: gigabytes under mixed lengths. With 256 memory stays flat and the speed is the same; with 32, single
# queries in BF16 take a third longer. It reads this once, at its first product. OpenVINO has a oneDNN of its own, which
# reads it too and has another bound: so it is not set for all backends.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

if TYPE_CHECKING:
    from ml_inference_server.backends.compiled.graph import CompiledModel

_DTYPES = {"none": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}


class PyTorchBackend:
    """One sentence-transformers model or cross-encoder on one device."""

    def __init__(self, model: ModelSettings) -> None:
        self._settings = model
        self._device = torch.device(model.device)
        self._quantization = model.precision
        self.compiled: CompiledModel | None = None

    @staticmethod
    def supported() -> Mapping[str, Sequence[Quantization]]:
        """FP16 on the GPUs only (CPUs run it many times slower than FP32), INT8 on the cpu only."""
        devices: dict[str, Sequence[Quantization]] = {}
        if torch.cuda.is_available():
            devices["cuda"] = ("none", "fp16", "bf16") if torch.cuda.is_bf16_supported() else ("none", "fp16")
        if torch.backends.mps.is_available():
            devices["mps"] = ("none", "fp16", "bf16")
        devices["cpu"] = ("none", "bf16", "int8")
        return devices

    def load_model(self) -> None:
        """Load and verify. ModelError if the files, the weights or the device are not fit."""
        torch.set_num_threads(self._settings.threads)
        self._loaded = load_model(self._settings)
        self.module = self._loaded.module
        self._parameters = sum(p.numel() for p in self.module.parameters())
        engine = ""
        if self._quantization == "int8" and not self._settings.compile:
            engine = choose_engine()
            quantize_linears(self._loaded.transformer)
        dtype = _DTYPES[self._quantization]
        if dtype != torch.float32:
            self._loaded.transformer.to(dtype)
            # Pooling, Dense and normalisation stay in FP32: averaging in half precision loses digits for nothing.
            self._loaded.transformer.register_forward_hook(_upcast)
        self.module.to(self._device)
        self._info = self._describe(engine)
        if self._settings.compile:
            from ml_inference_server.backends.compiled.graph import CompiledModel, keep_freed_memory

            keep_freed_memory()
            self.compiled = CompiledModel(self._loaded, self._settings.threads, int8=self._quantization == "int8")
            quantized_layers = self.compiled.quantized_layers
            self._info = dataclasses.replace(
                self._info,
                execution_provider=f"{self._info.execution_provider}, compiled, {self.compiled.attention}",
                compiled=True,
                padding_free=True,
                dtype="int8" if quantized_layers else self._info.dtype,
                quantized_layers=quantized_layers,
            )

    def _describe(self, engine: str) -> BackendInfo:
        import sentence_transformers
        import transformers

        weights = next(p for p in self._loaded.transformer.parameters() if p.ndim == 2)
        quantized_layers = count_quantized(self.module)
        return BackendInfo(
            backend="pytorch",
            model=self._settings.name,
            task=self._loaded.task,
            similarity=self._loaded.similarity,
            device=str(weights.device.type),
            device_name=_device_name(weights.device),
            dtype="int8" if quantized_layers else str(weights.dtype).removeprefix("torch."),
            quantized_layers=quantized_layers,
            execution_provider=f"PyTorch {torch.__version__}" + (f", INT8 engine {engine}" if engine else ""),
            instruction_set=instruction_set() if weights.device.type == "cpu" else "",
            threads=torch.get_num_threads(),
            concurrency=self._settings.streams,
            max_tokens=self._loaded.tokenizer.max_tokens,
            dimension=self._loaded.dimension,
            weights_sha256=self._loaded.files.weights_sha256,
            weights_file=self._loaded.files.weights_file,
            model_sha256=self._loaded.files.model_sha256,
            source=self._loaded.files.source,
            parameters=self._parameters,
            random_weights=self._settings.random_weights,
            versions={
                "torch": str(torch.__version__),  # its own type would have whoever unpickles it import torch
                "transformers": transformers.__version__,
                "sentence-transformers": sentence_transformers.__version__,
            },
        )

    def warmup(self, progress: Progress) -> None:
        """Run what real traffic will look like; ModelError if the model cannot run it or answers with NaN."""
        if self.compiled is None:
            run_warmup(self, progress)
        else:
            run_warmup(self, progress, self.compiled.warmup_shapes(self.info.max_tokens))

    def infer(self, batch: TokenBatch) -> NDArray[np.float32]:
        """(batch, dimension) float32."""
        if self.compiled is not None:
            return self.compiled(batch)
        return run_in_company(batch, self._loaded.company, self._run)

    def _run(self, batch: TokenBatch) -> NDArray[np.float32]:
        variant = 0 if batch.variants is None else int(batch.variants[0])
        with torch.inference_mode():
            padded = batch.padded(self.tokenizer.pad_id)
            types = None if padded.token_type_ids is None else self._tensor(padded.token_type_ids)
            rows = self.module(self._tensor(padded.input_ids), self._tensor(padded.attention_mask), types, variant)
            out: NDArray[np.float32] = rows.float().cpu().numpy()
        return out

    def bare_call(self, batch: TokenBatch) -> object:
        """The engine's own call and nothing of ours but the padding: what `infer` is measured against."""
        if self.compiled is not None:
            return self.compiled.run(self.compiled.pack(batch))
        padded = batch.padded(self.tokenizer.pad_id)
        with torch.inference_mode():
            return self.module(self._tensor(padded.input_ids), self._tensor(padded.attention_mask))

    def _tensor(self, array: NDArray[np.int64]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor.to(self._device)

    @property
    def info(self) -> BackendInfo:
        return self._info

    @property
    def tokenizer(self) -> TextTokenizer:
        return self._loaded.tokenizer


def _upcast(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
    """What half precision computed, in FP32."""
    return {k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in output.items()}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name() if device.type == "cpu" else "Apple GPU"
