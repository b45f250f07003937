"""What coverage-guided fuzzing calls with bytes: pure functions that refuse in their own way, or give what is sound.

Each takes any bytes. What it raises is a fault of ours.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ml_inference_server.backends.fake import FakeTokenizer
from ml_inference_server.proto import inference_pb2 as pb
from ml_inference_server.proto.foreign import grpc_service_pb2 as triton
from ml_inference_server.server.engine_frames import FrameKind, frame_head, pack_frame, unpack_batch, unpack_rows
from ml_inference_server.server.http.body import parse_json
from ml_inference_server.server.http.cohere_schemas import CohereEmbedRequest, CohereRerankRequest
from ml_inference_server.server.http.endpoint import validated
from ml_inference_server.server.http.open_inference import InferRequest
from ml_inference_server.server.http.openai import EmbeddingsRequest
from ml_inference_server.server.http.tei_schemas import (
    TeiDecodeRequest,
    TeiEmbedRequest,
    TeiPredictRequest,
    TeiRerankRequest,
    TeiSimilarityRequest,
    TeiTokenizeRequest,
)
from ml_inference_server.server.infer_parameters import InferParameters
from ml_inference_server.server.rpc.method_handlers import decoded
from ml_inference_server.server.rpc.native import encoding_of, overflow_of
from ml_inference_server.server.tensors import InputTensor, read_texts
from ml_inference_server.server.texts import Texts, embedding_job, pair_job
from ml_inference_server.utils.config import ServerSettings, Settings, load_settings
from ml_inference_server.utils.errors import ConfigError, InvalidRequest

MAX_TOKENS = 32
LIMITS = ServerSettings(max_texts=16, max_text_bytes=64)
_TEXTS = {is_cross: Texts(FakeTokenizer(MAX_TOKENS), LIMITS, is_cross_encoder=is_cross) for is_cross in (False, True)}
_MESSAGES: tuple[Any, ...] = (pb.EmbedRequest, pb.ScoreRequest, pb.RerankRequest, triton.ModelInferRequest)
_FRAME_START = pack_frame(FrameKind.PING, 0, b"")[:4]
_BODIES = (
    *(
        EmbeddingsRequest,
        TeiEmbedRequest,
        TeiRerankRequest,
        TeiSimilarityRequest,
        TeiPredictRequest,
        TeiTokenizeRequest,
    ),
    *(TeiDecodeRequest, CohereEmbedRequest, CohereRerankRequest, InferRequest),
)


def messages(data: bytes) -> None:
    """A message of the own wire or of Open Inference, as it comes in: decoded, checked, tokenised."""
    kind = _MESSAGES[data[0] % len(_MESSAGES)] if data else _MESSAGES[0]
    with _refusing():
        request = decoded(kind, data[1:])
        if kind is triton.ModelInferRequest:
            _tensors(request)
            return
        overflow = overflow_of(request)
        texts = _TEXTS[kind is pb.ScoreRequest]
        if kind is pb.EmbedRequest:
            encoding_of(request)
            texts.check_count("texts", len(request.texts))
            jobs = [embedding_job(f"texts[{place}]", text, None) for place, text in enumerate(request.texts)]
        elif kind is pb.ScoreRequest:
            texts.check_count("pairs", len(request.pairs))
            pairs = [(("query", pair.query), ("passage", pair.passage)) for pair in request.pairs]
            jobs = [pair_job(f"pairs[{place}]", *pair) for place, pair in enumerate(pairs)]
        else:
            texts.check_count("documents", len(request.documents))
            most = request.max_document_tokens or None
            jobs = [embedding_job("documents", text, None, most) for text in request.documents]
        texts.sizes(jobs)
        encoded = texts.encode([job.key for job in jobs], overflow)
        texts.check_tokens(jobs, range(len(jobs)), encoded, overflow)
        assert len(encoded) == len(jobs)
        assert all(0 < part.length <= MAX_TOKENS for each in encoded for part in each.parts)


def _tensors(request: Any) -> None:
    raw = request.raw_input_contents
    inputs = [
        InputTensor(
            each.name,
            each.datatype,
            tuple(each.shape),
            raw[place] if place < len(raw) else each.contents.bytes_contents,
        )
        for place, each in enumerate(request.inputs)
    ]
    asked = InferParameters({name: getattr(each, each.WhichOneof("parameter_choice") or "int64_param")
                             for name, each in request.parameters.items()})  # fmt: skip
    asked.overflow()
    asked.whole("dimensions")
    asked.text("prompt_name")
    asked.check_known_to_texts()
    queries, texts = read_texts(inputs, needs_query=False, max_texts=LIMITS.max_texts)
    assert len(texts) <= LIMITS.max_texts
    assert queries is None or len(queries) == len(texts)


def bodies(data: bytes) -> None:
    """The body of an HTTP request, held against the schema of a route."""
    schema = _BODIES[data[0] % len(_BODIES)] if data else _BODIES[0]
    with _refusing():
        found = validated(schema, parse_json(data[1:]))
        assert isinstance(found, schema)


def frames(data: bytes) -> None:
    """What comes over the pipe between the server and its engine."""
    with contextlib.suppress(ValueError):
        # Nobody finds the four bytes that each frame begins with, so they are given.
        kind, question, length = frame_head(_FRAME_START + data[:13].ljust(13, b"\0"))
        assert isinstance(kind, FrameKind)
        assert question >= 0
        assert length >= 0
    with contextlib.suppress(ValueError):
        rows = unpack_rows(data).rows
        assert rows.dtype == np.float32
        assert rows.ndim == 2
    with contextlib.suppress(ValueError):
        batch = unpack_batch(data)
        assert len(batch.ids) == batch.starts[-1]
        assert batch.type_ids is None or len(batch.type_ids) == len(batch.ids)
        assert batch.variants is None or len(batch.variants) == len(batch.starts) - 1


class Loader:
    """Settings out of a file."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "fuzzed.yaml"

    def __call__(self, data: bytes) -> None:
        self._file.write_bytes(data)
        try:
            found = load_settings(legacy=self._file, environment={})
        except ConfigError as error:
            _check_line(str(error))
            return
        assert isinstance(found, Settings)
        json.dumps(found.model_dump(mode="json"))


@contextlib.contextmanager
def targets() -> Any:
    """All of them by name, while the block lasts."""
    with tempfile.TemporaryDirectory() as folder:
        found: Mapping[str, Callable[[bytes], None]] = {
            "messages": messages,
            "bodies": bodies,
            "frames": frames,
            "settings": Loader(Path(folder)),
        }
        yield found


@contextlib.contextmanager
def _refusing() -> Any:
    """InvalidRequest is an answer, when it says something."""
    try:
        yield
    except InvalidRequest as error:
        _check_refusal(error)


def _check_refusal(error: InvalidRequest) -> None:
    assert str(error).strip(), "a refusal without a sentence"
    assert len(error.violations) <= 16


def _check_line(text: str) -> None:
    assert text.strip()
    assert text.isprintable(), text
