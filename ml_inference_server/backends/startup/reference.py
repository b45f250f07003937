"""What plain sentence-transformers answers in FP32 on the CPU, text by text: the yardstick of every backend.

Nothing of the server's own way is in it: not its tokeniser, its batches or its kernels. So a prompt, a template, a
module or a limit that gets lost on the server's way is found when the two are compared. Made once for a model and kept
in the cache, under a hash of everything that an answer depends on.
"""

import gc
import hashlib
import importlib.metadata
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml_inference_server.backends.base import DOCUMENT_PROMPTS
from ml_inference_server.backends.files.file_checks import check_safetensors
from ml_inference_server.backends.files.model_errors import errors_of_the_model
from ml_inference_server.backends.files.model_files import ModelFiles
from ml_inference_server.backends.files.model_kind import Task
from ml_inference_server.backends.text.probes import PROBES
from ml_inference_server.utils import sample
from ml_inference_server.utils.cache import cached, find
from ml_inference_server.utils.config import ModelSettings
from ml_inference_server.utils.errors import ModelError

log = logging.getLogger(__name__)

# Raise it when probes or what is kept of them change.
_VERSION = 2
_PASSAGES, _QUERIES = 20, 6
# Longer texts are compared by their tokens only: their vectors would take minutes on a CPU.
_LONGEST_TOKENS = 512
# No probe is made for a limit above this: what takes more (StaticEmbedding takes any text) cuts nothing.
_LONGEST_LIMIT = 32_768
# A model of more weights is not loaded a second time: only a reference that is there already is used.
_MOST_PARAMETERS = 1_000_000_000
_ROWS, _PROBES = "rows.npy", "probes.json"


@dataclass(frozen=True, slots=True)
class Reference:
    """texts: text or (query, passage) of each probe; names: its prompt name. tokens: its ids; None: not known.

    rows: (probes, dimension); NaN in the rows of texts that are compared by their tokens only.
    """

    texts: Sequence[str | tuple[str, str]]
    names: Sequence[str | None]
    tokens: Sequence[Sequence[int]] | None
    rows: NDArray[np.float32]


def reference_for(settings: ModelSettings, *, of_any_size: bool = False) -> Reference | None:
    """From the cache, or made now; None, with a log line, where the model is too large to be loaded for it.

    of_any_size: however large it is.
    """
    if settings.backend == "fake":
        return _of_the_fake(settings)
    from ml_inference_server.backends.model.loading import locate

    files, kind = locate(settings)
    task = kind.task
    key = {
        "version": _VERSION,
        "model": files.model_sha256,
        "task": task,
        "random_weights": settings.random_weights,
        "max_tokens": settings.max_tokens,
        "sample": hashlib.sha256(sample.PAIRS.read_bytes()).hexdigest(),
        "packages": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "sentence-transformers")
        },
    }

    def make(folder: Path) -> None:
        log.info("computing what sentence-transformers answers in FP32 (once for this model)")
        write_reference(folder, _answers(settings, files, task))

    is_small = of_any_size or _parameters(files) <= _MOST_PARAMETERS
    entry = cached("reference", key, make) if is_small else find("reference", key)
    if entry is None:
        log.warning("parity was not checked: the model has more than %d million weights", _MOST_PARAMETERS // 1_000_000)
        return None
    return read_reference(entry)


def _parameters(files: ModelFiles) -> int:
    """Of what the files hold, from their headers."""
    total = 0
    for file in files.folder.glob("*.safetensors"):
        total += sum(math.prod(tensor["shape"]) for tensor in check_safetensors(file).values())
    return total


def probes(names: Sequence[str | None], limit: int) -> list[tuple[str, str | None]]:
    """(text, prompt name): sample texts and odd ones, of one token to above `limit`, under each prompt name."""
    pairs = sample.sample_pairs()
    step = len(pairs) // _PASSAGES
    passages = [passage for _, passage in pairs[::step][:_PASSAGES]]
    queries = [query for query, _ in pairs[5::step][:_QUERIES]]
    limit = min(limit, _LONGEST_LIMIT)
    words = " ".join(passages).split() * (1 + 2 * limit // 1000)
    # Words have some 1.3 tokens: about at the limit, and well above it.
    long = [" ".join(words[start : start + int(share * limit)]) for start, share in ((7, 0.75), (3, 2.0))]
    if limit > _LONGEST_TOKENS:
        long.append(" ".join(words[5 : 5 + int(0.6 * _LONGEST_TOKENS)]))
    first = names[0]
    found = [(text, first) for text in [*passages, *queries, *PROBES, *long]]
    for name in names[1:]:
        found += [(text, name) for text in (queries[0], PROBES[1])]
    return found


def _answers(settings: ModelSettings, files: ModelFiles, task: Task) -> Reference:
    from ml_inference_server.backends.model.loading import plain_model

    model = plain_model(settings, files, task)
    with errors_of_the_model(files):
        limit = _limit(model, settings.max_tokens, task)
        if task == "cross_encoder":
            asked: list[tuple[Any, str | None]] = [(text, None) for text in _pairs(limit)]
        else:
            asked = list(probes(_prompt_names(model), limit))
        answers = _asked(model, asked, task, files)
    del model
    gc.collect()
    return answers


def _asked(model: Any, asked: Sequence[tuple[Any, str | None]], task: Task, files: ModelFiles) -> Reference:
    import torch

    document = next((name for name in DOCUMENT_PROMPTS if name in model.prompts), None)
    tokens: list[list[int]] = []
    rows: list[NDArray[np.float32] | None] = []
    for text, name in asked:
        options: dict[str, Any] = {} if name is None else {"prompt_name": name}
        kind = {"query": "query", document: "document"}.get(name) if name is not None else None
        prompt = model._resolve_prompt(None, name)  # noqa: SLF001
        features = model.preprocess([text], prompt=prompt, **({"task": kind} if kind else {}))
        ids = features["input_ids"].reshape(-1)
        tokens.append(ids.tolist())
        if len(ids) > max(_LONGEST_TOKENS, 0) and "attention_mask" in features:
            rows.append(None)
        elif task == "cross_encoder":
            identity = torch.nn.Identity()
            score = model.predict([text], batch_size=1, activation_fn=identity, show_progress_bar=False)
            rows.append(np.asarray(score, np.float32).reshape(1))
        else:
            encode = {"query": model.encode_query, "document": model.encode_document}.get(kind or "", model.encode)
            row = encode([text], batch_size=1, show_progress_bar=False, **options)
            rows.append(np.asarray(row, np.float32)[0])
    _check_sense([row for row in rows if row is not None], task, files)
    width = next(len(row) for row in rows if row is not None)
    blank = np.full(width, np.nan, np.float32)
    texts = [text for text, _ in asked]
    names = [name for _, name in asked]
    return Reference(texts, names, tokens, np.stack([blank if row is None else row for row in rows]))


def _check_sense(rows: Sequence[NDArray[np.float32]], task: Task, files: ModelFiles) -> None:
    """ModelError for answers that say nothing of the text."""
    every = np.stack(rows)
    if not np.isfinite(every).all():
        fault = "answers NaN or infinity"
    elif not every.any():
        fault = "gives every text a vector of zeros" if task == "embedding" else "gives every pair the score 0"
    elif np.ptp(every, axis=0).max() <= 1e-6 * np.abs(every).max():
        fault = f"gives every {'text the same vector' if task == 'embedding' else 'pair the same score'}"
    else:
        return
    raise ModelError(
        f"model {files.folder} {fault}, in FP32 with sentence-transformers: its weights are damaged, or its "
        f"configuration is another model's; download it again"
    )


def _limit(model: Any, max_tokens: int | None, task: Task) -> int:
    """The most tokens of a text: set, and checked against what the library itself can run."""
    from sentence_transformers.base.modules import Transformer

    from ml_inference_server.backends.text import limits
    from ml_inference_server.backends.text.text_input import NO_LIMIT_TOLD_TOKENS, set_limits

    is_transformer = isinstance(model[0], Transformer)
    told = (limits.told_tokens(model[0]) if is_transformer else None) or NO_LIMIT_TOLD_TOKENS
    limit = set_limits(model[0], max_tokens)
    if is_transformer and limit < min(told, max_tokens or told):
        _check_limit(model, limit, task)
    return limit


def _check_limit(model: Any, limit: int, task: str) -> None:
    """ModelError if the library runs more tokens than the server found usable, and so would answer otherwise."""
    text = "word " * (limit + 1)
    model[0].max_seq_length = limit + 1
    try:
        if task == "cross_encoder":
            model.predict([(text, text)], show_progress_bar=False)
        else:
            model.encode([text], show_progress_bar=False)
    except (IndexError, RuntimeError, ValueError):
        return
    finally:
        model[0].max_seq_length = limit
    raise ModelError(
        f"texts would be cut at {limit} tokens, but sentence-transformers runs more with this model: refusing to serve "
        f"answers to another text. This is a bug of the server for this model; please report it"
    )


def _pairs(limit: int) -> list[tuple[str, str]]:
    """Sample pairs, and odd and long texts against each other."""
    texts = [text for text, _ in probes([None], limit)]
    odd = texts[_PASSAGES + _QUERIES :]
    pairs = sample.sample_pairs()
    step = len(pairs) // _PASSAGES
    found = pairs[::step][:_PASSAGES]
    return [*found, *zip(odd, odd[3:] + odd[:3], strict=True), (odd[1], texts[0])]


def _prompt_names(model: Any) -> list[str | None]:
    """The default, where there is one, and each prompt of the model, at most six."""
    names: list[str | None] = [None, *list(model.prompts)[:6]]
    try:
        model.preprocess(["x"], prompt=model._resolve_prompt(None, None))  # noqa: SLF001
    except ValueError:  # a Router without a default route
        return names[1:]
    return names


def _of_the_fake(settings: ModelSettings) -> Reference:
    from ml_inference_server.backends.fake import fake_embedding, fake_logit

    limit = settings.max_tokens or 256
    if settings.task == "cross_encoder":
        pairs = _pairs(limit)
        logits = [[fake_logit(*pair, max_tokens=limit)] for pair in pairs]
        return Reference(pairs, [None] * len(pairs), None, np.array(logits, np.float32))
    texts = [text for text, _ in probes([None], limit)]
    rows = np.stack([fake_embedding(text, limit) for text in texts])
    return Reference(texts, [None] * len(texts), None, rows)


def write_reference(folder: Path, reference: Reference) -> None:
    np.save(folder / _ROWS, reference.rows)
    probes = {"texts": reference.texts, "names": reference.names, "tokens": reference.tokens}
    (folder / _PROBES).write_text(json.dumps(probes))


def read_reference(folder: Path) -> Reference:
    kept = json.loads((folder / _PROBES).read_text())
    texts = [tuple(text) if isinstance(text, list) else text for text in kept["texts"]]
    return Reference(texts, kept["names"], kept["tokens"], np.load(folder / _ROWS))
