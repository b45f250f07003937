"""Roles: what a text is for, in the words of several protocols, and which of the model's prompts that means."""

import json
from collections.abc import Mapping
from typing import NamedTuple

from ml_inference_server.backends.base import DOCUMENT_PROMPTS, TextTokenizer
from ml_inference_server.utils.errors import InvalidRequest

# Word of a protocol -> names under which models keep the prompt for it, the first one that is there.
_PROMPTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("query", "search_query", "retrieval.query", "retrieval_query"), ("query",)),
    **dict.fromkeys(
        ("document", "passage", "search_document", "retrieval.passage", "retrieval_document"), DOCUMENT_PROMPTS
    ),
    "classification": ("classification",),
    "clustering": ("clustering", "separation"),
    "separation": ("separation", "clustering"),
    "text-matching": ("text-matching", "sts"),
}


class Chosen(NamedTuple):
    """prompt_name: None for the model's default. warning: one sentence where the role changes nothing, else empty."""

    prompt_name: str | None
    warning: str


def is_role(word: str, prompts: Mapping[str, str]) -> bool:
    """Whether `prompt_for` takes it."""
    return word in _PROMPTS or (word != "" and word in prompts)


def prompt_for(role: str, prompts: Mapping[str, str]) -> Chosen:
    """The model's prompt for `role`: one of the words above, or the name of a prompt. InvalidRequest for another word.

    A model without such a prompt takes the role, and the answer says that it changed nothing.
    """
    if role in prompts and role:
        return Chosen(role, "")
    if role not in _PROMPTS:
        known = ", ".join(sorted({*_PROMPTS, *filter(None, prompts)}))
        message = f"no such role; there are: {known}"
        raise InvalidRequest(f"input_type: {message}", violations=[("input_type", message)])
    for name in _PROMPTS[role]:
        if name in prompts:
            return Chosen(name, "")
    has = ", ".join(filter(None, prompts))
    rest = f"its prompts are: {has}" if has else "it treats all texts alike"
    return Chosen(None, f"this model has no prompt for the role {role}, so the role changes nothing; {rest}")


def check_prompt(prompt_name: str | None, tokenizer: TextTokenizer) -> None:
    """InvalidRequest for a prompt that the model lacks, and for none where it needs one."""
    prompts = tokenizer.prompts
    if prompt_name is None:
        if not tokenizer.needs_prompt_name:
            return
        message = f"this model needs one: it treats {' and '.join(prompts)} differently"
    elif prompt_name in prompts:
        return
    else:
        # TEI's words, out of which its clients read the names.
        known = ", ".join(json.dumps(name) for name in prompts if name)
        message = f"not found in the Sentence Transformers prompts. Available prompts: [{known}]"
    raise InvalidRequest(f"prompt_name: {message}", violations=[("prompt_name", message)])
