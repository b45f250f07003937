"""The OpenAI packages for Python and for Node."""

from typing import Any

import pytest

from tests.clients.environments import HERE, Environment
from tests.clients.served import MODEL, TEXTS, Served, same_bits, token_counts


@pytest.fixture(scope="module")
def python(clients: Environment, embedder: Served) -> Any:
    return embedder.script(clients, "use_openai.py")


@pytest.fixture(scope="module")
def node(clients: Environment, embedder: Served) -> Any:
    """A module looks for packages in the folders above it, so that it is started as a text beside node_modules."""
    script = (HERE / "scripts" / "use_openai.mjs").read_text(encoding="utf-8")
    (clients.node_folder / "use_openai.mjs").write_text(script, encoding="utf-8")
    return embedder.run(clients.node, clients.node_folder / "use_openai.mjs")


def test_python_gets_the_vectors_of_embed(python: Any, embedder: Served) -> None:
    expected = embedder.embed(TEXTS)
    same_bits(python["default"], expected)
    same_bits(python["floats"], expected)
    same_bits(python["alone"], expected[:1])
    same_bits(python["at_once"], expected)
    same_bits(python["short"], embedder.embed(TEXTS, dimensions=64))


def test_node_gets_the_vectors_of_embed(node: Any, embedder: Served) -> None:
    expected = embedder.embed(TEXTS)
    same_bits(node["default"], expected)
    same_bits(node["floats"], expected)
    same_bits(node["at_once"], expected)


def test_usage_counts_tokens(python: Any, node: Any, embedder: Served) -> None:
    total = sum(token_counts(TEXTS))
    for answer in (python, node):
        assert answer["usage"] == {"prompt_tokens": total, "total_tokens": total}
        assert answer["model"] == MODEL
    assert python["long"] == {"prompt_tokens": 256, "total_tokens": 256}


def test_the_answer_tells_its_space_and_what_was_done_to_each_text(python: Any, embedder: Served) -> None:
    """Fields that the contract does not know do not disturb the package, and its users can read them."""
    told = python["beside_the_contract"]
    assert told["token_counts"] == told["used_token_counts"] == token_counts(TEXTS)
    assert told["truncated_rows"] == []
    assert python["space_id"] == told["space_id"] == embedder.answer(["a"]).space_id


def test_the_model_is_listed(python: Any, node: Any) -> None:
    for answer in (python, node):
        assert MODEL in answer["models"]
        assert answer["one_model"] == MODEL


def test_errors_arrive_as_the_packages_own_exceptions(python: Any, node: Any) -> None:
    for answer in (python, node):
        assert answer["unknown_model"]["class"] == "NotFoundError"
        assert MODEL in answer["unknown_model"]["text"]
        assert answer["token_ids"]["class"] == "BadRequestError"
        assert "check_embedding_ctx_length=False" in answer["token_ids"]["text"]
    assert python["unknown_model_card"]["class"] == "NotFoundError"
    assert python["nothing"]["class"] == "BadRequestError"
    assert python["too_wide"]["class"] == "BadRequestError"
