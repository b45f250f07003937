"""What runs before the server says it is ready."""

from collections.abc import Sequence

import numpy as np

from ml_inference_server.backends.base import Backend, Encoded, Progress, TokenBatch
from ml_inference_server.utils.errors import ModelError

# (texts, tokens): allocators, thread pools and kernels are then warm.
_WARMUP_SHAPES = ((1, 16), (1, 128), (8, 16), (8, 64), (8, 256), (32, 32))


def run_warmup(backend: Backend, progress: Progress, shapes: Sequence[tuple[int, int]] = _WARMUP_SHAPES) -> None:
    """Run `shapes` of (texts, tokens) through `infer`. ModelError if an answer is not finite or has a wrong shape."""
    text = _some_text(backend, max(tokens for _, tokens in shapes))
    # Where texts take several ways through a model, the limit of this one may be below the model's.
    limit = text.length if text.truncated else backend.info.max_tokens
    for done, (texts, tokens) in enumerate(shapes):
        row = Encoded(np.resize(text.ids, min(tokens, limit)))
        rows = backend.infer(TokenBatch.of([row] * texts))
        if rows.shape != (texts, backend.info.dimension) or not np.isfinite(rows).all():
            raise ModelError(f"the model's warm-up answer has shape {rows.shape} or is not finite: not fit to serve")
        progress(done + 1, len(shapes))


def _some_text(backend: Backend, tokens: int) -> Encoded:
    """A text of `tokens` or more: of words, since not every number below the vocabulary's size need be a token."""
    sentence = " ".join("the quick brown fox jumps over the lazy dog" for _ in range(1 + tokens // 9))
    if backend.info.task == "cross_encoder":
        return backend.tokenizer.encode_pairs([(sentence, sentence)])[0]
    name = next(iter(backend.tokenizer.prompts)) if backend.tokenizer.needs_prompt_name else None
    return backend.tokenizer.encode([sentence], name)[0]
