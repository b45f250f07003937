"""The tiny model, its exported graph, and a cache of its own for each test that asks for one."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
)

from ml_inference_server.backends.model.export import export
from ml_inference_server.utils.cache import remove_temporary
from tests.parity.exported_kit import write
from tests.parity.tiny_model import SHAPE, save, settings


@pytest.fixture(autouse=True)
def nothing_stands_in() -> Iterator[None]:
    """A folder that stands in for a cache lasts as long as the program; here, as the test that could not write it."""
    yield
    remove_temporary()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A BERT of one layer: its export takes a second."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield save(BertModel(BertConfig(num_hidden_layers=1, **SHAPE)), tmp_path_factory.mktemp("tiny"))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def filled_cache(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the exported graph."""
    folder = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLIS_CACHE_DIR", str(folder))
        export(settings(tiny))
    return folder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLIS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model in a folder that a test may write to."""
    return shutil.copytree(tiny, tmp_path / "copy")


@pytest.fixture
def graph_file(filled_cache: Path) -> Path:
    return next(filled_cache.glob("onnx/*/model.onnx"))


@pytest.fixture(scope="module")
def export_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Graphs and references that the tests of a module share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLIS_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def exported(export_cache: None, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("exported") / "folder"
    write(tiny, folder)
    return folder


@pytest.fixture
def changeable(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "changeable")
