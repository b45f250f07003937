"""PyTorch on cpu, cuda and mps in FP32, FP16 and BF16, loaded through sentence-transformers.

The model works as its own files say (pooling, Dense, normalisation, prompts, maximum length), but its modules run on
the batcher's token ids instead of on text, so that nothing is tokenised or sorted twice.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ml_inference_server.backends.base import BackendInfo, Progress, TokenBatch
from ml_inference_server.backends.model_files import ModelFiles, check_safetensors, find_model
from ml_inference_server.backends.tokenizer import FastTokenizer
from ml_inference_server.utils.config import ModelSettings, Quantization
from ml_inference_server.utils.cpu import cpu_name, instruction_set
from ml_inference_server.utils.errors import ModelError

log = logging.getLogger(__name__)

_DTYPES = {"none": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# (texts, tokens) run before the server says it is ready: allocators, thread pools and kernels are then warm.
_WARMUP_SHAPES = ((1, 16), (1, 128), (8, 16), (8, 64), (8, 256), (32, 32))


class PyTorchBackend:
    """One sentence-transformers model on one device."""

    def __init__(self, model: ModelSettings) -> None:
        self._settings = model
        self._device = torch.device(model.device)
        self._dtype = _DTYPES[model.quantization or "none"]

    @staticmethod
    def supported() -> Mapping[str, Sequence[Quantization]]:
        """FP32 everywhere; FP16 on the GPUs only (CPUs run it many times slower than FP32)."""
        devices: dict[str, Sequence[Quantization]] = {}
        if torch.cuda.is_available():
            devices["cuda"] = ("none", "fp16", "bf16") if torch.cuda.is_bf16_supported() else ("none", "fp16")
        if torch.backends.mps.is_available():
            devices["mps"] = ("none", "fp16", "bf16")
        devices["cpu"] = ("none", "bf16")
        return devices

    def load_model(self) -> None:
        """Load and verify. ModelError if the files, the weights or the device are not fit."""
        torch.set_num_threads(self._settings.threads)
        self._files = find_model(self._settings.name)
        self._model = _load(self._files, self._device)
        transformer = self._model[0]
        _check_weights(transformer.model, self._files)
        if self._dtype != torch.float32:
            transformer.to(self._dtype)
            # Pooling, Dense and normalisation stay in FP32: averaging in half precision loses digits for nothing.
            transformer.register_forward_hook(_upcast)
        self._model.eval().requires_grad_(False)
        self._tokenizer = _tokenizer(self._model, self._settings.max_tokens)
        self._info = self._describe()

    def _describe(self) -> BackendInfo:
        import sentence_transformers
        import transformers

        weights = next(p for p in self._model[0].parameters() if p.ndim == 2)
        return BackendInfo(
            backend="pytorch",
            model=self._settings.name,
            task="embedding",
            device=str(weights.device.type),
            device_name=_device_name(weights.device),
            dtype=str(weights.dtype).removeprefix("torch."),
            quantized_layers=0,
            execution_provider=f"PyTorch {torch.__version__}",
            instruction_set=instruction_set() if weights.device.type == "cpu" else "",
            threads=torch.get_num_threads(),
            concurrency=self._settings.streams,
            max_tokens=self._tokenizer.max_tokens,
            dimension=int(self._model.get_embedding_dimension() or 0),
            weights_sha256=self._files.weights_sha256,
            weights_file=self._files.weights_file,
            source=self._files.source,
            parameters=sum(p.numel() for p in self._model.parameters()),
            versions={
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "sentence-transformers": sentence_transformers.__version__,
            },
        )

    def warmup(self, progress: Progress) -> None:
        """Run a few shapes; ModelError if the model cannot run them or answers with NaN."""
        for done, (texts, tokens) in enumerate(_WARMUP_SHAPES):
            ids = np.full((texts, min(tokens, self._tokenizer.max_tokens)), self._tokenizer.pad_id + 1, np.int64)
            rows = self.infer(TokenBatch(ids, np.ones_like(ids)))
            if rows.shape != (texts, self._info.dimension) or not np.isfinite(rows).all():
                raise ModelError(
                    f"the model's warm-up answer has shape {rows.shape} or is not finite: not fit to serve"
                )
            progress(done + 1, len(_WARMUP_SHAPES))

    @torch.inference_mode()
    def infer(self, batch: TokenBatch) -> NDArray[np.float32]:
        """(batch, dimension) float32."""
        features = {"input_ids": self._tensor(batch.input_ids), "attention_mask": self._tensor(batch.attention_mask)}
        if batch.token_type_ids is not None:
            features["token_type_ids"] = self._tensor(batch.token_type_ids)
        rows: NDArray[np.float32] = self._model(features)["sentence_embedding"].float().cpu().numpy()
        return rows

    def _tensor(self, array: NDArray[np.int64]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor.to(self._device)

    @property
    def info(self) -> BackendInfo:
        return self._info

    @property
    def tokenizer(self) -> FastTokenizer:
        return self._tokenizer


def _load(files: ModelFiles, device: torch.device) -> Any:
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model = SentenceTransformer(
            str(files.folder),
            device=str(device),
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True, "dtype": torch.float32},
        )
    except Exception as error:
        log.debug("loading failed", exc_info=True)
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"model {files.folder} cannot be loaded: {reason[0] if reason else type(error).__name__}"
        ) from error
    for module in model:
        if getattr(module, "include_prompt", True) is False and any(model.prompts.values()):
            raise ModelError("the model's pooling leaves its prompt out (Instructor models): this is not supported")
    return model


def _check_weights(model: torch.nn.Module, files: ModelFiles) -> None:
    """ModelError if a tensor of the model has no weights in the files: it would run with random numbers."""
    stored: set[str] = set()
    for file in (*files.folder.glob("*.safetensors"), *files.folder.glob("*/*.safetensors")):
        stored |= set(check_safetensors(file))
    missing = [
        name
        for name, _ in model.named_parameters()
        # The pooler is not part of an embedding; many files leave it out.
        if not name.startswith("pooler.") and not any(key == name or key.endswith("." + name) for key in stored)
    ]
    if missing:
        raise ModelError(
            f"{files.weights_file} holds no weights for {missing[0]} and {len(missing) - 1} more tensors: "
            f"the files belong to another architecture"
        )


def _upcast(module: torch.nn.Module, inputs: Any, features: dict[str, Any]) -> dict[str, Any]:
    return {k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in features.items()}


def _tokenizer(model: Any, max_tokens: int | None) -> FastTokenizer:
    fast = getattr(model.tokenizer, "backend_tokenizer", None)
    if fast is None:
        raise ModelError(
            "the model has no fast tokenizer (tokenizer.json): convert it with transformers' AutoTokenizer"
        )
    limit = int(model.max_seq_length or 512)
    if max_tokens is not None and max_tokens > limit:
        raise ModelError(f"model.max_tokens is {max_tokens}, but this model takes at most {limit} tokens")
    prompts = dict(model.prompts)
    if model.default_prompt_name is not None:
        prompts[""] = prompts[model.default_prompt_name]
    return FastTokenizer(
        _copy(fast),
        max_tokens=max_tokens or limit,
        pad_id=int(model.tokenizer.pad_token_id or 0),
        side=model.tokenizer.truncation_side,
        prompts=prompts,
    )


def _copy(fast: Any) -> Any:
    from tokenizers import Tokenizer

    # transformers keeps padding and truncation of the last call in the shared object: take our own.
    description = json.loads(fast.to_str()) | {"truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(description))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name() if device.type == "cpu" else "Apple GPU"
