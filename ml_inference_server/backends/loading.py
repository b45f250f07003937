"""A model's own files as a torch module that takes token ids: what PyTorch runs and what the export writes as ONNX."""

import json
import logging
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer

from ml_inference_server.backends.model_files import ModelFiles, architecture_of, check_safetensors, find_model
from ml_inference_server.backends.tokenizer import FastTokenizer
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import ModelError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """FP32 on the CPU, in evaluation mode.

    module: forward(input_ids, attention_mask, token_type_ids or None) -> (batch, dimension) for an embedding model,
    (batch, 1) raw logits for a cross-encoder. transformer: the part of it whose precision may be changed. base: the
    Hugging Face model in it that turns token ids into hidden states.
    """

    module: torch.nn.Module
    transformer: torch.nn.Module
    base: Any
    files: ModelFiles
    tokenizer: FastTokenizer
    dimension: int
    takes_token_type_ids: bool


def _features(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    features = {"input_ids": input_ids, "attention_mask": attention_mask}
    return features if token_type_ids is None else features | {"token_type_ids": token_type_ids}


class _SentenceModule(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows: torch.Tensor = self.model(_features(input_ids, attention_mask, token_type_ids))["sentence_embedding"]
        return rows


class _CrossEncoderModule(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        # Raw logits in FP32: a sigmoid in half precision saturates, and then good answers tie.
        logits: torch.Tensor = self.model(**_features(input_ids, attention_mask, token_type_ids)).logits.float()
        return logits


def load_model(settings: ModelSettings) -> LoadedModel:
    """Find, verify and load `settings.name`. ModelError if it is not fit to run."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    files = architecture_of(settings.name) if settings.random_weights else find_model(settings.name)
    loaded = _cross_encoder(settings, files) if settings.task == "cross_encoder" else _embedding(settings, files)
    loaded.module.eval().requires_grad_(False)
    return loaded


def _embedding(settings: ModelSettings, files: ModelFiles) -> LoadedModel:
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(
            str(files.folder),
            device="cpu",
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True, "dtype": torch.float32},
        )
    except Exception as error:
        raise _cannot_load(files, error) from error
    for module in model:
        if getattr(module, "include_prompt", True) is False and any(model.prompts.values()):
            raise ModelError("the model's pooling leaves its prompt out (Instructor models): this is not supported")
    transformer = model[0]
    if settings.random_weights:
        _randomise(transformer.model)
    else:
        _check_weights(transformer.model, files)
    prompts = dict(model.prompts)
    if model.default_prompt_name is not None:
        prompts[""] = prompts[model.default_prompt_name]
    return LoadedModel(
        module=_SentenceModule(model),
        transformer=transformer,
        base=transformer.model,
        files=files,
        tokenizer=_tokenizer(model.tokenizer, int(model.max_seq_length or 512), settings.max_tokens, prompts),
        dimension=int(model.get_embedding_dimension() or 0),
        takes_token_type_ids="token_type_ids" in model.tokenizer.model_input_names,
    )


def _cross_encoder(settings: ModelSettings, files: ModelFiles) -> LoadedModel:
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(files.folder, local_files_only=True, trust_remote_code=False)
        config = AutoConfig.from_pretrained(files.folder, local_files_only=True, trust_remote_code=False)
        if settings.random_weights:
            config.num_labels = 1
            model = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
            _randomise(model)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(
                files.folder, config=config, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
    except Exception as error:
        raise _cannot_load(files, error) from error
    if model.config.num_labels != 1:
        raise ModelError(f"a cross-encoder gives one score; this model has {model.config.num_labels} labels")
    if not settings.random_weights:
        _check_weights(model, files, optional=())
    limit = min(int(tokenizer.model_max_length), int(getattr(config, "max_position_embeddings", 512)))
    return LoadedModel(
        module=_CrossEncoderModule(model),
        transformer=model,
        base=model.base_model,
        files=files,
        tokenizer=_tokenizer(tokenizer, limit, settings.max_tokens, {}),
        dimension=1,
        takes_token_type_ids="token_type_ids" in tokenizer.model_input_names,
    )


def _randomise(model: Any) -> None:
    """Seeded weights of the right shape: for speed work, where the numbers do not matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.05, generator=generator)


def _cannot_load(files: ModelFiles, error: Exception) -> ModelError:
    log.debug("loading failed", exc_info=error)
    lines = str(error).strip().splitlines()
    return ModelError(f"model {files.folder} cannot be loaded: {lines[0] if lines else type(error).__name__}")


def _check_weights(model: Any, files: ModelFiles, optional: tuple[str, ...] = ("pooler.",)) -> None:
    """ModelError if a tensor of the model has no weights in the files: it would run with random numbers.

    `optional`: prefixes that may be missing; the pooler is no part of an embedding, and many files leave it out.
    """
    stored: set[str] = set()
    for file in (*files.folder.glob("*.safetensors"), *files.folder.glob("*/*.safetensors")):
        stored |= set(check_safetensors(file))
    missing = [
        name
        for name, _ in model.named_parameters()
        if not name.startswith(optional) and not any(key == name or key.endswith("." + name) for key in stored)
    ]
    if missing:
        raise ModelError(
            f"{files.weights_file} holds no weights for {missing[0]} and {len(missing) - 1} more tensors: "
            f"the files belong to another architecture"
        )


def _tokenizer(tokenizer: Any, limit: int, max_tokens: int | None, prompts: Any) -> FastTokenizer:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        raise ModelError(
            "the model has no fast tokenizer (tokenizer.json): convert it with transformers' AutoTokenizer"
        )
    if max_tokens is not None and max_tokens > limit:
        raise ModelError(f"model.max_tokens is {max_tokens}, but this model takes at most {limit} tokens")
    # transformers keeps padding and truncation of the last call in the shared object: take our own.
    description = json.loads(fast.to_str()) | {"truncation": None, "padding": None}
    return FastTokenizer(
        Tokenizer.from_str(json.dumps(description)),
        max_tokens=max_tokens or limit,
        pad_id=int(tokenizer.pad_token_id or 0),
        side=tokenizer.truncation_side,
        prompts=prompts,
    )
