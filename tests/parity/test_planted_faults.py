"""Faults planted on the server's own way of running a model: each is found by the comparison at the start."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer import modules
from transformers import BertModel

from ml_inference_server.backends.model import loading
from ml_inference_server.backends.text import limits, text_input
from tests.parity import parts, zoo
from tests.parity.tiny_model import refused, start

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("own_cache")]
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tail(width: int) -> list[torch.nn.Module]:
    return [modules.Pooling(width, "mean"), modules.Dense(width, width)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that has everything that can get lost."""
    options: dict[str, Any] = {
        "prompts": {"query": "query: ", "document": "passage: "},
        "default_prompt_name": "document",
        "truncate_dim": 20,
    }
    network = BertModel(zoo.bert_config(num_hidden_layers=1))
    return parts.embedder(tmp_path_factory.mktemp("model"), network, parts.wordpiece(), tail, **options)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.chat_decoder(tmp_path_factory.mktemp("chat"))


def change_what_is_served(patch: Patch, change: Callable[[Any], Any]) -> None:
    """`change` a loaded model on its way to the backend; the reference never passes there."""
    right = loading.TokenModule.__init__

    def changed(self: Any, model: Any, variants: Any, truncate_dim: int | None) -> None:
        right(self, change(model) or model, variants, truncate_dim)

    patch.setattr(loading.TokenModule, "__init__", changed)


def drop_a_module(patch: Patch) -> None:
    change_what_is_served(patch, lambda model: model.__delitem__(2))


class _WithoutTheFirstToken(torch.nn.Module):
    def __init__(self, pooling: torch.nn.Module) -> None:
        super().__init__()
        self.pooling = pooling

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        later = torch.cat([torch.zeros_like(features["attention_mask"][:, :1]), features["attention_mask"][:, 1:]], 1)
        pooled: dict[str, Any] = self.pooling({**features, "attention_mask": later})
        return pooled


def pool_off_by_one(patch: Patch) -> None:
    def change(model: Any) -> None:
        model[1] = _WithoutTheFirstToken(model[1])

    change_what_is_served(patch, change)


def drop_the_default_prompt(patch: Patch) -> None:
    right = text_input.prompts_of

    def without(model: Any, is_pairs: bool) -> Any:
        known, asked = right(model, is_pairs)
        return {name: text for name, text in known.items() if name}, {**asked, None: ("", None)}

    patch.setattr(text_input, "prompts_of", without)


def drop_a_named_prompt(patch: Patch) -> None:
    right = text_input.prompts_of

    def without(model: Any, is_pairs: bool) -> Any:
        known, asked = right(model, is_pairs)
        return {**known, "query": ""}, {**asked, "query": ("", "query")}

    patch.setattr(text_input, "prompts_of", without)


def shorten_the_limit(patch: Patch) -> None:
    right = text_input.prepare
    patch.setattr(loading, "prepare", lambda model, max_tokens, files: right(model, parts.LIMIT_TOKENS - 1, files))


def find_a_limit_that_is_too_short(patch: Patch) -> None:
    """In what the reference uses as well, since no library knows the usable limit."""
    right = limits.usable_tokens
    patch.setattr(limits, "usable_tokens", lambda model, told: right(model, told) - 1)


def drop_truncate_dim(patch: Patch) -> None:
    right = loading.TokenModule.__init__
    patch.setattr(
        loading.TokenModule, "__init__", lambda self, model, variants, truncate_dim: right(self, model, variants, None)
    )


FAULTS: dict[Callable[[Patch], None], str] = {
    drop_a_module: "parity",
    pool_off_by_one: "parity",
    drop_the_default_prompt: "tokens here and",
    drop_a_named_prompt: "tokens here and",
    shorten_the_limit: "tokens here and",
    find_a_limit_that_is_too_short: "sentence-transformers runs more",
    drop_truncate_dim: "parity",
}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_what_gets_lost_between_the_files_and_the_backend_is_found(
    plant: Callable[[Patch], None], model: Path, monkeypatch: Patch
) -> None:
    plant(monkeypatch)
    assert FAULTS[plant] in refused(model, "pytorch")


@pytest.mark.slow
@pytest.mark.parametrize("plant", [drop_a_module, shorten_the_limit, drop_truncate_dim])
def test_what_gets_lost_on_the_way_to_a_graph_is_found_as_well(
    plant: Callable[[Patch], None], model: Path, monkeypatch: Patch
) -> None:
    plant(monkeypatch)
    assert FAULTS[plant] in refused(model, "onnx")


def test_without_a_fault_the_same_models_are_served(model: Path, chat: Path) -> None:
    assert start(model, "pytorch").info.dimension == 20
    start(chat, "pytorch")


def test_a_lost_chat_template_is_found(chat: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(text_input, "_why_not_fast", lambda module, variants: "")
    monkeypatch.setattr(text_input, "_agree", lambda fast, exact, names, is_pairs: True)
    assert "tokens here and" in refused(chat, "pytorch")


def test_a_chat_template_that_only_looks_plain_is_noticed_before(chat: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(text_input, "_why_not_fast", lambda module, variants: "")
    start(chat, "pytorch")


@pytest.mark.slow
def test_the_graph_of_another_model_under_this_models_key_is_found(
    model: Path, own_cache: Path, tmp_path: Path
) -> None:
    def entry_of(folder: Path) -> Path:
        before = set(own_cache.glob("onnx/*/model.onnx"))
        start(folder)
        (graph,) = set(own_cache.glob("onnx/*/model.onnx")) - before
        return graph.parent

    other = shutil.copytree(model, tmp_path / "other")
    parts.change_json(other / "1_Pooling" / "config.json", pooling_mode="cls")
    mine, others = entry_of(model), entry_of(other)
    shutil.rmtree(mine)
    shutil.copytree(others, mine)
    assert "parity" in refused(model, "onnx")
