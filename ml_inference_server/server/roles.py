"""Roles: what a text is for, in the words of several protocols, and which of the model's prompts that means."""

import json
from collections.abc import Mapping
from typing import NamedTuple

from ml_inference_server.backends.base import DOCUMENT_PROMPTS
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


def unknown_prompt(prompts: Mapping[str, str]) -> str:
    """TEI's words, out of which its clients read the names."""
    known = ", ".join(json.dumps(name) for name in prompts if name)
    return f"not found in the Sentence Transformers prompts. Available prompts: [{known}]"
