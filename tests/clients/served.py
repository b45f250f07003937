"""A real server for the clients, and what its own wire answers: the yardstick for every other one."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from ml_inference_server.backends.files.model_files import find_model
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto import inference_pb2_grpc as rpc
from ml_inference_server.utils.config import ModelSettings
from tests.clients.environments import HERE, Environment
from tests.integration.script_copies import clean_env
from tests.integration.server_process import server_process

Vectors = npt.NDArray[np.float32]

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
TEXTS = [
    "What is the capital of France?",
    'Grüße aus Köln — 東京 🎉 \u0000 \\ " </script>',
    "a",
    "line one\nline two\tand a tab",
    "The quick brown fox jumps over the lazy dog. " * 5,
]
# Its beginning is another text than its end.
LONG = "one word after another " * 100 + "the price of bread in the city " * 100
QUERY = "What is the capital of France?"
DOCUMENTS = [
    "Berlin is the capital of Germany.",
    "Bread is baked in an oven.",
    "Paris is the capital of France.",
    "France is a country in Europe, and its capital has many museums.",
    "A river carries water to the sea.",
]
# No telemetry of the frameworks: nothing but the server is spoken to.
SILENT = {"HAYSTACK_TELEMETRY_ENABLED": "False", "DO_NOT_TRACK": "1", "LANGSMITH_TRACING": "false", "NO_PROXY": "*"}


@dataclass
class Served:
    """A running server, and its own answers."""

    grpc: str
    http: str
    model: str
    texts: list[str] = field(default_factory=lambda: list(TEXTS))
    long: str = LONG
    query: str = QUERY
    documents: list[str] = field(default_factory=lambda: list(DOCUMENTS))

    def run(self, *program: str | Path) -> Any:
        """The JSON document that a client's script prints when it is given this server."""
        task, env = json.dumps(asdict(self)), clean_env(**SILENT)
        done = subprocess.run(program, input=task, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def script(self, clients: Environment, name: str, *arguments: str) -> Any:
        return self.run(clients.python, HERE / "scripts" / name, *arguments)

    @contextlib.contextmanager
    def _stub(self) -> Iterator[Any]:
        with grpc.insecure_channel(self.grpc) as channel:
            yield rpc.InferenceServiceStub(channel)

    def answer(self, texts: list[str], **options: Any) -> pb.EmbedResponse:
        """options: fields of the request."""
        with self._stub() as stub:
            reply: pb.EmbedResponse = stub.Embed(pb.EmbedRequest(texts=texts, **options), timeout=60)
        return reply

    def embed(self, texts: list[str], **options: Any) -> Vectors:
        reply = self.answer(texts, **options)
        return np.frombuffer(reply.embeddings, "<f4").reshape(reply.count, reply.dimension)

    def ranks(self) -> list[tuple[int, float]]:
        """Place in the documents and raw score, best first."""
        with self._stub() as stub:
            reply = stub.Rerank(pb.RerankRequest(query=self.query, documents=self.documents), timeout=60)
        return [(rank.index, rank.score) for rank in reply.ranks]


@contextlib.contextmanager
def served(folder: Path, model: str, *extra: str) -> Iterator[Served]:
    """One text in a batch: the last bit of a vector depends on which texts it was computed with."""
    settings = {"model.name": model, "model.backend": "pytorch", "model.device": "cpu", "batching.max_batch_size": "1"}
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    with server_process(folder, *options, *extra) as server:
        ports = server.ready()
        yield Served(f"127.0.0.1:{ports['grpc_port']}", f"http://127.0.0.1:{ports['http_port']}", model)


def same_bits(vectors: Any, expected: Vectors) -> None:
    """`vectors` as a client gave them, whatever it holds numbers in."""
    got = np.array(vectors, dtype=np.float32)
    assert got.shape == expected.shape
    assert got.tobytes() == expected.tobytes(), f"they differ by up to {np.abs(got - expected).max()}"


def token_counts(texts: list[str]) -> list[int]:
    """Tokens of each text with special ones, by the model's own tokenizer file."""
    tokenizer = Tokenizer.from_file(str(find_model(ModelSettings().name).folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [len(tokenizer.encode(text).ids) for text in texts]


def likeness(raw: float) -> float:
    """A cosine within 0..1, as the dialects whose scores are probabilities get it."""
    return (1 + raw) / 2
