"""What a loaded model can really take: how many tokens, and which texts together. Found by trying, not by names."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ml_inference_server.backends.base import Company, Encoded, TokenBatch
from ml_inference_server.backends.files.model_errors import one_line
from ml_inference_server.backends.files.model_files import ModelFiles
from ml_inference_server.utils.errors import ModelError

if TYPE_CHECKING:
    from ml_inference_server.backends.text.text_input import Prepared

log = logging.getLogger(__name__)

# Above this a limit is none: tokenizers tell 1e30 where they know nothing.
_NO_LIMIT = 1 << 24
# An answer alone and one in company may differ by so much of the largest value: rounding is a hundred times smaller,
# the influence of a neighbour a hundred times larger.
_SAME = 1e-3
# The longest text that is tried in company.
_LONG_TOKENS = 64


def told_tokens(transformer: Any) -> int | None:
    """What tokenizer and configuration say; None where they know no limit."""
    told = transformer.max_seq_length
    return int(told) if told is not None and 0 < told < _NO_LIMIT else None


def usable_tokens(model: Any, told: int) -> int:
    """The most tokens, up to `told`, that `model` (a Hugging Face model) can run.

    Only a table of positions sets a hard limit, and it may be smaller than what is told: RoBERTa's has 514 rows of
    which two are never used. So the limit is tried where a table is that small.
    """
    tables = [
        module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and "position" in name.rpartition(".")[2]
    ]
    offset = int(getattr(model.config, "pad_token_id", None) or 0) + 1
    if not tables or told + offset < min(tables) or _runs(model, told):
        return told
    low, high = 0, min(told, max(tables) + 1)  # `low` runs, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _runs(model, middle) else (low, middle)
    if low < 2:
        raise ModelError(
            "the model cannot run a text of two tokens: its files do not belong together; download it again"
        )
    return low


def _runs(model: Any, tokens: int) -> bool:
    ids = torch.full((1, tokens), _harmless_id(model), dtype=torch.int64)
    try:
        with torch.inference_mode():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError, ValueError) as error:
        log.debug("%d tokens cannot be run", tokens, exc_info=error)
        return False
    return True


def _harmless_id(model: Any) -> int:
    """A token that is not the padding: models that count positions by it would count none."""
    return 0 if getattr(model.config, "pad_token_id", None) not in (0, None) else 1


def keep_one_attention(model: Any, max_tokens: int, files: ModelFiles) -> None:
    """BigBird switches to full attention at the first short text, for good: refuse what would depend on the past."""
    if getattr(model.config, "attention_type", None) != "block_sparse":
        return
    config = model.config
    short_tokens = (5 + 2 * int(config.num_random_blocks)) * int(config.block_size)
    if max_tokens > short_tokens:
        raise ModelError(
            f"{files.folder}: this model's answers depend on the texts before them (transformers switches it from "
            f"sparse to full attention at the first text of up to {short_tokens} tokens, and never back): set "
            f'model.max_tokens: {short_tokens}, or "attention_type": "original_full" in its config.json'
        )
    for module in model.modules():
        if hasattr(module, "set_attention_type"):
            module.set_attention_type("original_full")
            break


def find_company(module: torch.nn.Module, prepared: "Prepared") -> Company:
    """Which texts may share a batch: each probe is run alone and together. ModelError if one cannot be run alone."""
    allowed = Company.ANY
    for probes in prepared.probes:
        texts = _of_many_lengths(probes, prepared.tokenizer.max_tokens)
        if allowed is Company.ANY and not _undisturbed(module, texts, prepared.tokenizer.pad_id):
            allowed = Company.EQUAL_LENGTHS
        if allowed is Company.EQUAL_LENGTHS:
            shortest = min(text.length for text in texts)
            equal = [_head(text, shortest) for text in texts]
            if not _undisturbed(module, equal, prepared.tokenizer.pad_id):
                return Company.NONE
    return allowed


def run_alone(module: torch.nn.Module, text: Encoded) -> NDArray[np.float32]:
    """(1, dimension)."""
    return _run(module, [text], 0)


def _of_many_lengths(probes: Sequence[Encoded], max_tokens: int) -> list[Encoded]:
    longest = max(probes, key=lambda each: each.length)
    texts = [probes[1], probes[0], probes[2], _head(longest, min(_LONG_TOKENS, max_tokens))]
    return [text for text in texts if text.length]


def _head(text: Encoded, length: int) -> Encoded:
    types = None if text.type_ids is None else text.type_ids[:length]
    return Encoded(text.ids[:length], types, variant=text.variant)


def _undisturbed(module: torch.nn.Module, texts: Sequence[Encoded], pad_id: int) -> bool:
    try:
        alone = np.concatenate([run_alone(module, text) for text in texts])
    except Exception as error:
        log.debug("a probe failed", exc_info=error)
        raise ModelError(
            f"the model cannot run a text ({one_line(error)}): its files do not belong together; download it again"
        ) from error
    try:
        together = _run(module, texts, pad_id)
    except Exception as error:
        log.debug("the texts cannot run together", exc_info=error)
        return False
    scale = max(float(np.abs(alone).max()), 1e-12)
    return alone.shape == together.shape and bool(np.abs(alone - together).max() <= _SAME * scale)


def _run(module: torch.nn.Module, texts: Sequence[Encoded], pad_id: int) -> NDArray[np.float32]:
    batch = TokenBatch.of(texts).padded(pad_id)
    types = None if batch.token_type_ids is None else torch.from_numpy(batch.token_type_ids)
    with torch.inference_mode():
        rows: NDArray[np.float32] = module(
            torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask), types, texts[0].variant
        ).numpy()
    return rows
