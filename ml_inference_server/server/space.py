"""The space of a vector: two vectors can be compared exactly if their space ids are equal.

An id is 16 hexadecimal digits over everything that decides which vector a text gets, but for the precision: the
model's files (weights, pooling and later modules, tokenizer), the prompt that was applied, the limit at which texts
are cut, and how many dimensions were kept. Precision moves a vector within its space; how far is its parity.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from ml_inference_server.backends.base import BackendInfo, TextTokenizer

# Raise it when the same words below come to mean another space.
_VERSION = "mlis-space-1"


@dataclass(frozen=True, slots=True)
class Spaces:
    """Of one loaded embedding model. prompts: name ("" is the default) to what a text under it is treated with."""

    model: str
    max_tokens: int
    prompts: Mapping[str, str]

    def id(self, prompt_name: str | None, dimension: int) -> str:
        """Of vectors of `dimension` numbers of texts under a prompt. KeyError for a prompt that the model lacks."""
        return _digest(_VERSION, self.model, self.prompts[prompt_name or ""], str(self.max_tokens), str(dimension))

    def all(self, dimension: int) -> dict[str, str]:
        """By the name of the prompt; "" is the model's default."""
        return {name: self.id(name, dimension) for name in self.prompts}


@lru_cache(maxsize=1024)  # asked for with each request, and a model has few
def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()[:16]


def spaces_of(info: BackendInfo, tokenizer: TextTokenizer) -> Spaces:
    """What a text is treated with is its prompt, and where a model has several ways for texts, which of them."""
    names: list[str | None] = [*filter(None, tokenizer.prompts)]
    if not tokenizer.needs_prompt_name:
        names.insert(0, None)
    treated = {}
    for name in names:
        prompt = tokenizer.prompts[name] if name is not None else tokenizer.prompts.get("", "")
        variant = tokenizer.encode(["a"], name)[0].variant
        treated[name or ""] = f"{variant}:{prompt}"
    weights = "random" if info.random_weights else info.weights_sha256
    model = f"{info.model_sha256 or info.model}:{weights}"
    return Spaces(model, info.max_tokens, treated)
