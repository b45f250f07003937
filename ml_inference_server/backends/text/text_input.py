"""How a loaded model takes text: its tokenizer, its limit, its prompts, and what else it is given with each text."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Router, Transformer

from ml_inference_server.backends.base import DOCUMENT_PROMPTS, Encoded, TextTokenizer
from ml_inference_server.backends.files.model_files import ModelFiles
from ml_inference_server.backends.text import limits
from ml_inference_server.backends.text.library_tokenizer import (
    LibraryTokenizer,
    Variant,
    Way,
    input_module,
    variant_of,
)
from ml_inference_server.backends.text.probes import PROBES
from ml_inference_server.backends.text.tokenizer import FastTokenizer
from ml_inference_server.backends.text.vocabulary import without_limits
from ml_inference_server.utils.errors import ModelError

log = logging.getLogger(__name__)

# The limit where neither tokenizer nor model tells one: T5, BLOOM, StaticEmbedding. Attention takes memory with the
# square of it; a bag of tokens does not.
NO_LIMIT_TOLD_TOKENS = 4096
BAG_TOKENS = 1 << 20
_DISAGREES = "its tokenizer gives other tokens under sentence-transformers than by itself"


@dataclass(frozen=True, slots=True)
class Prepared:
    """variants: what the model is given besides tokens, by `Encoded.variant`. probes: some texts for each of them.

    pad_id_is_free: no text ends with the padding id, so that a head may look for the last token by it.
    """

    tokenizer: TextTokenizer
    variants: tuple[Variant, ...]
    probes: tuple[tuple[Encoded, ...], ...]
    takes_token_type_ids: bool
    pad_id_is_free: bool


def prepare(model: Any, max_tokens: int | None, files: ModelFiles) -> Prepared:
    """Find the limit, set it, and choose a tokenizer that gives what the model's own code gives.

    max_tokens: of the settings. ModelError if it is above the model's limit, or the model takes something else than
    text.
    """
    first = model[0]
    limit = set_limits(first, max_tokens)
    module = input_module(first)
    is_pairs = isinstance(model, CrossEncoder)
    prompts, asked = prompts_of(model, is_pairs)
    ways, variants = _ways(module, asked, is_pairs, _leaves_prompts_out(model))
    hf_tokenizer = module.tokenizer if isinstance(module, Transformer) else None
    pad_id = _pad_id(first, hf_tokenizer)
    takes_segments = "token_type_ids" in getattr(hf_tokenizer, "model_input_names", ())
    reason = _why_not_fast(module, variants)
    fast = None if reason else _fast(hf_tokenizer, limit, pad_id, prompts, takes_segments)
    exact = LibraryTokenizer(
        module,
        pad_id=pad_id,
        prompts=prompts,
        ways=ways,
        truncation_side=str(getattr(hf_tokenizer, "truncation_side", "right")),
        reason=reason or ("its tokenizer has no tokenizer.json form" if fast is None else _DISAGREES),
    )
    tokenizer: TextTokenizer = exact
    if fast is not None and _agree(fast, exact, ways, is_pairs):
        tokenizer = fast
    else:
        log.info("texts are tokenised by sentence-transformers' own code, which is slower: %s", exact.reason)
    probes = tuple(
        tuple(_encode(exact, next(name for name, way in ways.items() if way.variant == number), is_pairs))
        for number in range(len(variants))
    )
    is_free = not any(len(each.ids) and each.ids[-1] == pad_id for group in probes for each in group)
    return Prepared(tokenizer, variants, probes, takes_segments, is_free)


def set_limits(first: torch.nn.Module, max_tokens: int | None) -> int:
    """Set the limit of each module that takes text; the longest of them. Whatever tells none gets one here."""
    routes = first.sub_modules.values() if isinstance(first, Router) else ()
    inputs = [next(parts.children()) for parts in routes] or [first]
    transformers = [each for each in inputs if isinstance(each, Transformer)]
    if max_tokens is not None and not transformers:
        raise ModelError(f"model.max_tokens is {max_tokens}, but this model cuts no text: leave it out")
    found = [BAG_TOKENS] if len(transformers) < len(inputs) else []
    for each in transformers:
        told = limits.told_tokens(each)
        usable = limits.usable_tokens(each.model, told or max_tokens or NO_LIMIT_TOLD_TOKENS)
        if max_tokens is not None and max_tokens > usable and len(inputs) == 1:
            raise ModelError(f"model.max_tokens is {max_tokens}, but this model takes at most {usable} tokens")
        if told is None and max_tokens is None:
            log.warning(
                "the model tells no limit of tokens: texts are cut at %d; model.max_tokens sets another", usable
            )
        elif told is not None and usable < told:
            log.info("the model tells a limit of %d tokens, of which %d can be used", told, usable)
        each.max_seq_length = min(usable, max_tokens or usable)
        found.append(each.max_seq_length)
    return max(found)


def prompts_of(model: Any, is_pairs: bool) -> tuple[dict[str, str], dict[str | None, tuple[str, str | None]]]:
    """(prompts by name, "" being the default; prompt and task by the name that a request may give)."""
    known = {str(name): str(text or "") for name, text in (model.prompts or {}).items()}
    default = known.get(model.default_prompt_name, "") if model.default_prompt_name is not None else ""
    asked: dict[str | None, tuple[str, str | None]] = {None: (default, None)}
    if is_pairs:
        return {"": default}, asked
    document = next((name for name in DOCUMENT_PROMPTS if name in known), None)
    for name, text in known.items():
        asked[name] = (text, "query" if name == "query" else "document" if name == document else None)
    return known | ({"": default} if model.default_prompt_name is not None else {}), asked


def _ways(
    module: Any, asked: Mapping[str | None, tuple[str, str | None]], is_pairs: bool, needs_prompt_length: bool
) -> tuple[dict[str | None, Way], tuple[Variant, ...]]:
    ways: dict[str | None, Way] = {}
    variants: dict[Variant, int] = {}
    for name, (prompt, task) in asked.items():
        options = {} if task is None else {"task": task}
        text: Any = (PROBES[0], PROBES[0]) if is_pairs else PROBES[0]
        try:
            features = dict(module.preprocess([text], prompt=prompt or None, **options))
        except ValueError:
            if name is None and isinstance(module, Router):
                continue  # it has no default route: a request must name a prompt
            raise
        if not needs_prompt_length:
            features.pop("prompt_length", None)
        variant = variant_of(features)
        number = variants.setdefault(variant, len(variants))
        ways[name] = Way(prompt, task, number, _limit(module, task, features.get("modality")))
    return ways, tuple(variants)


def _limit(module: Any, task: str | None, modality: Any) -> int:
    """The most tokens of the part of `module` that takes such a text."""
    if isinstance(module, Router):
        module = next(module.sub_modules[str(module._resolve_route(task=task, modality=modality))].children())  # noqa: SLF001
    return int(module.max_seq_length) if isinstance(module, Transformer) else BAG_TOKENS


def _leaves_prompts_out(model: Any) -> bool:
    """Whether a pooling leaves the prompt out (Instructor models)."""
    return any(not getattr(module, "include_prompt", True) for module in model.modules())


def _pad_id(first: torch.nn.Module, tokenizer: Any) -> int:
    """What the model looks for, where it looks for one; else the tokenizer's."""
    told = getattr(first.model.config, "pad_token_id", None) if isinstance(first, Transformer) else None
    if told is None:
        told = getattr(tokenizer, "pad_token_id", None)
    return int(told) if isinstance(told, int) and told >= 0 else 0


def _why_not_fast(module: Any, variants: Sequence[Variant]) -> str:
    """What stands between a text and its tokens besides a prompt and the tokenizer; "" if nothing does."""
    if not isinstance(module, Transformer):
        return f"it begins with a {type(module).__name__}"
    if len(variants) > 1:
        return "its pooling leaves prompts out"
    if "message" in module.modality_config:
        return "it has a chat template"
    settings = ("query_length", "document_length", "query_expansion", "processing_kwargs")
    if module.processor is not module.tokenizer or any(getattr(module, name, None) for name in settings):
        return "its configuration changes how texts are tokenised"
    return ""


def _fast(
    tokenizer: Any, limit: int, pad_id: int, prompts: Mapping[str, str], takes_segments: bool
) -> FastTokenizer | None:
    plain = without_limits(tokenizer)
    if plain is None:
        return None
    return FastTokenizer(
        plain,
        max_tokens=limit,
        pad_id=pad_id,
        side=tokenizer.truncation_side,
        prompts=prompts,
        takes_segments=takes_segments,
    )


def _agree(fast: TextTokenizer, exact: TextTokenizer, names: Sequence[str | None] | Any, is_pairs: bool) -> bool:
    """Whether both give the same tokens for all probes, under every prompt."""
    return all(
        _same(a, b)
        for name in names
        for a, b in zip(_encode(fast, name, is_pairs), _encode(exact, name, is_pairs), strict=True)
    )


def _same(a: Encoded, b: Encoded) -> bool:
    segments = [None if each.type_ids is None else each.type_ids.tolist() for each in (a, b)]
    cut = [(each.truncated, each.total_tokens) for each in (a, b)]
    return a.ids.tolist() == b.ids.tolist() and segments[0] == segments[1] and cut[0] == cut[1]


def _encode(tokenizer: TextTokenizer, name: str | None, is_pairs: bool) -> list[Encoded]:
    long = " ".join(PROBES) + " " + "words upon words " * (min(tokenizer.max_tokens, 1024) // 2)
    texts = [*PROBES, long]
    if is_pairs:
        return tokenizer.encode_pairs([*zip(texts, texts[2:] + texts[:2], strict=True), (long, long)])
    return tokenizer.encode(texts, name)
