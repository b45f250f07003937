"""The worked example of docs/adding_a_backend.md as it stands: started, served over gRPC, refused where it must be."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from ml_inference_server import backends
from ml_inference_server.backends.startup.start import Started, start_backend
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.utils.config import Settings
from ml_inference_server.utils.errors import EXIT_MODEL, ModelError
from tests.conftest import RunningServer, free_ports, running
from tests.integration.server_process import ROOT

pytestmark = pytest.mark.real
DOCUMENT = (ROOT / "ml_inference_server/docs/adding_a_backend.md").read_text(encoding="utf-8")
MODULE, ROW = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
(EXPERIMENT,) = re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file in the package's path and the row in the table, as the document says."""
    monkeypatch.setenv("MLIS_CACHE_DIR", str(cache))
    (tmp_path / "token_mean.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(tmp_path)])
    name, target = re.findall(r'"(\w+)": "([\w.:]+)",\n', ROW)[0]
    monkeypatch.setitem(backends.BACKENDS, name, target)


def settings(**model: object) -> Settings:
    tree = yaml.safe_load(EXPERIMENT)
    tree["model"] |= {"device": "cpu", **model}
    return Settings.model_validate(free_ports(tree))


def start(**model: object) -> Started:
    return start_backend(settings(**model).model, lambda phase: None)


async def test_the_example_serves_its_answers_over_grpc() -> None:
    texts = ["bread", "the price of bread in the town", "a river"]
    async with running(RunningServer, settings()) as server:
        reply = await server.stub.Embed(pb.EmbedRequest(texts=texts))
        info = await server.stub.GetServerInfo(pb.GetServerInfoRequest())
        backend = server.backend
    rows = np.frombuffer(reply.embeddings, "<f4").reshape(len(texts), -1)
    table = vars(backend)["_table"]
    for text, row in zip(texts, rows, strict=True):
        expected = table[backend.tokenizer.encode([text])[0].ids].mean(axis=0)
        np.testing.assert_allclose(row, expected / np.linalg.norm(expected), atol=1e-5)
    ran = info.resolved
    assert (ran.backend, ran.device, ran.dimension, ran.weights_file) == ("token_mean", "cpu", 384, "model.safetensors")


def test_what_it_reports_is_true_and_its_parity_is_shown() -> None:
    info = start().info
    assert (info.dtype, info.quantized_layers, info.parameters) == ("float32", 0, 30522 * 384)
    assert info.parity_mean is not None
    assert 0 < info.parity_mean < 0.9  # related to the model's answers, and far from them


def test_it_cannot_pass_for_the_real_model() -> None:
    with pytest.raises(ModelError, match=r"too far from FP32.* model.min_parity is 0.9999") as caught:
        start(min_parity=None)
    assert caught.value.exit_code == EXIT_MODEL


def test_under_another_backends_name_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "onnx", backends.BACKENDS["token_mean"])
    with pytest.raises(ModelError, match=r"reports backend token_mean, not onnx: refusing to serve a wrong label"):
        start(backend="onnx")


def test_a_precision_that_it_does_not_have_is_refused() -> None:
    with pytest.raises(ModelError, match=r"int8 is not available on cpu with backend token_mean \(available: fp32\)"):
        start(quantized=True, quantization="int8")
