"""The families of models that the README lists: each is tried, and the tables say what happened."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ml_inference_server.backends.compiled import native
from tests.parity import families
from tests.parity.families import BACKENDS, DOCS, README, YES, between_markers, read_table, try_family
from tests.parity.tiny_model import start
from tests.parity.zoo import FAMILIES

pytestmark = pytest.mark.real
TABLE = read_table(between_markers(DOCS, "families"))
REFUSALS = between_markers(DOCS, "refusals")
needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler (g++ or clang++)")
# A few of the others: each way through the export, and refusals. All of them: python -m tests.parity.families
ELSEWHERE = [
    ("BERT, mean (MiniLM, E5, GTE)", "onnx"),
    ("FNet", "onnx"),
    ("Qwen3 cross-encoder", "onnx"),
    ("Router (queries static, documents BERT)", "onnx"),
    ("RoBERTa (all-distilroberta, SimCSE)", "openvino"),
    ("Shortened vectors (truncate_dim)", "openvino"),
    pytest.param("MPNet (all-mpnet)", "compile", marks=needs_compiler),
    pytest.param("Padding id in the last row, no special tokens", "compile", marks=needs_compiler),
]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("families")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLIS_CACHE_DIR", str(place / "cache"))
        yield place
    torch.set_num_threads(threads)


def hold_against_the_table(family: str, backend: str, folder: Path) -> None:
    outcome = try_family(family, backend, folder)
    assert TABLE[family][backend] == (YES if outcome == YES else "no"), outcome
    if outcome != YES:
        assert outcome.removeprefix("refused: ") in REFUSALS


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_on_pytorch_is_as_the_table_says(family: str, folder: Path) -> None:
    hold_against_the_table(family, "pytorch", folder)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "backend"), ELSEWHERE)
def test_a_family_on_another_backend_is_as_the_table_says(family: str, backend: str, folder: Path) -> None:
    hold_against_the_table(family, backend, folder)


def test_the_tables_name_every_family_and_say_the_same_in_both_places() -> None:
    assert list(TABLE) == list(FAMILIES)
    assert all(list(found) == list(BACKENDS) for found in TABLE.values())
    assert between_markers(README, "families") == families.summary(TABLE)
    for family, found in TABLE.items():
        for backend, cell in found.items():
            assert (f"{family} ({backend})" in REFUSALS) is (cell != YES)


def test_a_backend_that_answers_something_else_is_not_called_right(folder: Path) -> None:
    """What the tables rest on can fail."""
    model = families.built("BERT, mean (MiniLM, E5, GTE)", folder)
    names, expected = families.plain_answers(model, is_pairs=False)
    backend = start(model, **BACKENDS["pytorch"]).backend
    families.check_answers(backend, names, expected)
    wrong = expected.copy()
    wrong[4] = expected[6]
    with pytest.raises(AssertionError, match="off"):
        families.check_answers(backend, names, wrong)
