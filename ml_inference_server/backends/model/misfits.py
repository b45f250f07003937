"""Parts of a model that do not belong together, named with a remedy: what a library says of them helps nobody."""

import logging
from typing import Any

import torch
from sentence_transformers.base.modules import Transformer
from tokenizers import Tokenizer

from ml_inference_server.backends.files.file_checks import check_safetensors
from ml_inference_server.backends.files.model_errors import one_line
from ml_inference_server.backends.files.model_files import ModelFiles
from ml_inference_server.utils.errors import ModelError

log = logging.getLogger(__name__)

_INTEGERS = ("BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")


def check_fit(model: Any, files: ModelFiles) -> None:
    """ModelError for a loaded model whose numbers are none, or whose tokenizer has tokens without a row."""
    for name, parameter in model.named_parameters():
        # A sum is the cheapest look at every number; one too large for FP32 is no proof.
        if parameter.is_floating_point() and not parameter.sum().isfinite() and not parameter.isfinite().all():
            raise ModelError(f"model {files.folder} has NaN or infinity in its weights ({name}): download it again")
    for part in model.modules():
        if isinstance(part, Transformer):
            _check_vocabulary(part, files)
            if getattr(part.model.config, "quantization_config", None) is None:
                _check_weights_are_numbers(files)


def _check_vocabulary(part: Transformer, files: ModelFiles) -> None:
    """Of the vocabulary proper: tokens that were added for other uses (images) often have no row, and do no harm."""
    tokenizer = getattr(part.tokenizer, "backend_tokenizer", None)
    table = getattr(part.model, "get_input_embeddings", lambda: None)()
    if not isinstance(tokenizer, Tokenizer) or not isinstance(table, torch.nn.Embedding):
        return
    added = tokenizer.get_added_tokens_decoder()
    ids = [number for number in tokenizer.get_vocab(with_added_tokens=False).values() if number not in added]
    if max(ids, default=0) >= table.num_embeddings:
        raise ModelError(
            f"the tokenizer of model {files.folder} has tokens up to {max(ids)}, its weights have rows for "
            f"{table.num_embeddings}: it is another model's tokenizer; download the model again"
        )


def _check_weights_are_numbers(files: ModelFiles) -> None:
    """transformers takes integers as if they were the weights: those of a quantised file mean nothing by themselves."""
    for file in files.folder.rglob("*.safetensors"):
        for name, tensor in check_safetensors(file).items():
            if name.endswith(".weight") and tensor["dtype"] in _INTEGERS:
                raise ModelError(
                    f"{file} holds {tensor['dtype']} integers as {name}, and no config.json says what they mean: use "
                    f"the weights in floating point; this server quantises by itself (model.quantized)"
                )


def cannot_load(files: ModelFiles, error: Exception) -> ModelError:
    """The one line for whatever a library raises about a model's files."""
    log.debug("loading failed", exc_info=error)
    reason = _tokenizer_fault(files) or one_line(error)
    if "ignore_mismatched_sizes" in reason:
        reason = "its weights have other shapes than its config.json says"
    return ModelError(f"model {files.folder} cannot be loaded ({reason}): check its files, or download it again")


def _tokenizer_fault(files: ModelFiles) -> str:
    """The libraries look for another kind of model where a tokenizer is damaged, and complain of that."""
    found = sorted(files.folder.rglob("tokenizer.json"))
    for file in found:
        try:
            Tokenizer.from_file(str(file))
        except Exception as error:  # the library has no type of its own
            return f"{file.relative_to(files.folder)} cannot be read: {one_line(error)}"
    others = ("vocab.txt", "vocab.json", "*.model", "tokenizer*.json", "sentencepiece*")
    if not found and not any(any(files.folder.rglob(pattern)) for pattern in others):
        return "it holds no tokenizer: no tokenizer.json, vocab.txt or *.model"
    return ""
