"""tei.v1, the gRPC interface of Hugging Face's Text Embeddings Inference: messages to plain arguments and back.

As there: a text that is too long is refused unless `truncate` says otherwise; a message of Embed has one text, and
batches are made by the server; streams answer in the order of their messages, and end with the first one that fails.
"""

from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np

from ml_inference_server import __version__
from ml_inference_server.proto.foreign import tei_pb2 as pb
from ml_inference_server.server.answer_headers import length_headers, warning_headers
from ml_inference_server.server.call import Call
from ml_inference_server.server.calls import Calls
from ml_inference_server.server.observation import Reply
from ml_inference_server.server.options import EmbedOptions, Overflow, RerankOptions, ScoreOptions
from ml_inference_server.server.ready_model import ReadyModel
from ml_inference_server.server.rpc.method_handlers import MethodHandlers
from ml_inference_server.server.rpc.services import service_handlers
from ml_inference_server.server.rpc.status import RpcDialect
from ml_inference_server.server.service import TOKENIZE_THREADS, Answered
from ml_inference_server.server.similarity import probability
from ml_inference_server.server.state import ServerState
from ml_inference_server.server.tei_words import FIELDS, LABEL, timing_headers, worded
from ml_inference_server.server.token_service import TokenService
from ml_inference_server.utils.errors import InvalidRequest, WrongTask

_SERVICES = pb.DESCRIPTOR.services_by_name
_DIALECT = RpcDialect(
    codes=dict.fromkeys(("BACKEND_ERROR", "NON_FINITE_OUTPUT", "OUT_OF_MEMORY"), grpc.StatusCode.FAILED_PRECONDITION),
    fields=FIELDS,
    worded=worded,
)
_NO_SPARSE = "this model has no sparse vectors: use Embed"
_ONE_VECTOR = "this server answers with one vector for a text, not one for each token: use Embed"
_MISSING = {
    "EmbedSparse": _NO_SPARSE,
    "EmbedSparseStream": _NO_SPARSE,
    "EmbedAll": _ONE_VECTOR,
    "EmbedAllStream": _ONE_VECTOR,
}
_NO_CLASSIFIER = "model is not a classifier model: it embeds texts (Embed) and compares them (Rerank)"
_ONLY_PAIRS = "this model scores pairs of a query and a text: use PredictPair or Rerank"


class TeiServicer:
    def __init__(self, state: ServerState, calls: Calls) -> None:
        self._state = state
        self._handlers = MethodHandlers(calls, _DIALECT)

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        make, draining = self._handlers, self._state.draining
        limits = self._state.settings.server

        def both(method: str, name: str, request: Any, run: Any) -> dict[str, Any]:
            """The unary RPC `name`, and its stream."""
            return {
                name: make.work(method, request, run),
                f"{name}Stream": make.ordered(method, request, run, draining),
            }

        rerank_stream = make.collected(
            "tei.rerank",
            pb.RerankStreamRequest,
            self.rerank_stream,
            max_messages=limits.max_texts,
            max_bytes=limits.max_message_bytes,
        )
        served: dict[str, dict[str, Any]] = {
            "Info": {"Info": make.question("Info", pb.InfoRequest, self.info)},
            "Embed": both("tei.embed", "Embed", pb.EmbedRequest, self.embed),
            "Predict": {
                **both("tei.predict", "Predict", pb.PredictRequest, self.predict),
                **both("tei.predict", "PredictPair", pb.PredictPairRequest, self.predict_pair),
            },
            "Rerank": {
                "Rerank": make.work("tei.rerank", pb.RerankRequest, self.rerank),
                "RerankStream": rerank_stream,
            },
            "Tokenize": {
                **both("tei.tokenize", "Tokenize", pb.EncodeRequest, self.tokenize),
                **both("tei.decode", "Decode", pb.DecodeRequest, self.decode),
            },
        }
        return [service_handlers(_SERVICES[name], methods, _MISSING) for name, methods in served.items()]

    def services(self) -> dict[str, bool]:
        """Embed has nothing to say for a cross-encoder, nor Predict for an embedding model."""
        model = self._state.model
        scores_pairs = model is not None and model.info.task == "cross_encoder"
        able = {"Info": True, "Embed": not scores_pairs, "Predict": scores_pairs, "Rerank": True, "Tokenize": True}
        return {_SERVICES[name].full_name: is_able for name, is_able in able.items()}

    def info(self, request: pb.InfoRequest) -> pb.InfoResponse:
        model = self._state.require_model()
        info, settings = model.info, self._state.settings
        is_reranker = info.task == "cross_encoder"
        return pb.InfoResponse(
            version=__version__,
            model_id=model.service.names.served,
            model_sha=info.model_sha256 or None,
            model_dtype=info.dtype,
            model_type=pb.MODEL_TYPE_RERANKER if is_reranker else pb.MODEL_TYPE_EMBEDDING,
            max_concurrent_requests=settings.batching.max_queue_requests,
            max_input_length=info.max_tokens,
            max_batch_tokens=model.batcher.max_batch_tokens,
            max_batch_requests=settings.batching.max_batch_size,
            max_client_batch_size=settings.server.max_texts,
            tokenization_workers=TOKENIZE_THREADS,
        )

    async def embed(self, request: pb.EmbedRequest, call: Call) -> Reply[pb.EmbedResponse]:
        model = self._state.require_model()
        options = EmbedOptions(
            prompt_name=request.prompt_name if request.HasField("prompt_name") else None,
            overflow=_overflow(request),
            dimensions=request.dimensions if request.HasField("dimensions") else None,
            normalize=request.normalize if request.HasField("normalize") else True,
        )
        answer = await model.service.embed([request.inputs], call, options)
        characters = len(request.inputs)
        message = pb.EmbedResponse(
            embeddings=answer.values[0].tolist(), metadata=_metadata(answer, characters, answer.tokens)
        )
        metadata = (*_headers(model, answer, characters), ("x-space-id", answer.space_id))
        return Reply(message, texts=1, truncated=answer.truncated, stamps=answer.stamps, metadata=metadata)

    async def predict(self, request: pb.PredictRequest, call: Call) -> Reply[pb.PredictResponse]:
        """One text alone: nothing that is served here can classify it."""
        raise WrongTask(_ONLY_PAIRS if self._model_scores_pairs() else _NO_CLASSIFIER)

    async def predict_pair(self, request: pb.PredictPairRequest, call: Call) -> Reply[pb.PredictResponse]:
        if not self._model_scores_pairs():
            raise WrongTask(_NO_CLASSIFIER)
        if len(request.inputs) == 1:
            raise WrongTask(_ONLY_PAIRS)
        if len(request.inputs) != 2:
            said = f"`inputs` must have a single or two elements. Given: {len(request.inputs)}"
            raise InvalidRequest(said, violations=[("inputs", said)])
        model = self._state.require_model()
        pair = (request.inputs[0], request.inputs[1])
        answer = await model.service.score([pair], call, ScoreOptions(overflow=_overflow(request)))
        score = float(_scores(model, answer.values, raw=request.raw_scores)[0])
        characters = len(pair[0]) + len(pair[1])
        message = pb.PredictResponse(
            predictions=[pb.Prediction(score=score, label=LABEL)],
            metadata=_metadata(answer, characters, answer.tokens),
        )
        return _pairs_reply(message, model, answer, characters, pairs=1)

    async def rerank(self, request: pb.RerankRequest, call: Call) -> Reply[pb.RerankResponse]:
        return await self._rank(request.query, request.texts, request, call)

    async def rerank_stream(self, messages: Sequence[Any], call: Call) -> Reply[pb.RerankResponse]:
        """One text in each message; as there, raw_scores and return_text of the first one hold."""
        first = messages[0] if messages else pb.RerankStreamRequest()
        for place, message in enumerate(messages):
            for name in ("query", "truncate", "truncation_direction"):
                if getattr(message, name) != getattr(first, name):
                    said = "differs from that of the first message: open a stream for each"
                    raise InvalidRequest(f"messages[{place}].{name}: {said}", violations=[(name, said)])
        return await self._rank(first.query, [message.text for message in messages], first, call)

    async def tokenize(self, request: pb.EncodeRequest, call: Call) -> Reply[pb.EncodeResponse]:
        rows = await self._tokens().tokenize(
            [request.inputs],
            call,
            prompt_name=request.prompt_name if request.HasField("prompt_name") else None,
            special=request.add_special_tokens,
        )
        tokens = [
            pb.SimpleToken(id=each.id, text=each.text, special=each.special, start=each.start, stop=each.stop)
            for each in rows[0]
        ]
        return Reply(pb.EncodeResponse(tokens=tokens))

    async def decode(self, request: pb.DecodeRequest, call: Call) -> Reply[pb.DecodeResponse]:
        texts = await self._tokens().decode([list(request.ids)], call, skip_special=request.skip_special_tokens)
        return Reply(pb.DecodeResponse(text=texts[0]))

    async def _rank(self, query: str, texts: Sequence[str], asked: Any, call: Call) -> Reply[pb.RerankResponse]:
        """asked: the message that says how."""
        model = self._state.require_model()
        ranking = await model.service.rerank(query, texts, 0, call, RerankOptions(overflow=_overflow(asked)))
        scores = _scores(model, [score for _, score in ranking.ranks], raw=asked.raw_scores).tolist()
        ranks = [
            pb.Rank(index=index, text=texts[index] if asked.return_text else None, score=score)
            for (index, _), score in zip(ranking.ranks, scores, strict=True)
        ]
        characters = sum(map(len, texts)) + len(query) * len(texts)
        message = pb.RerankResponse(ranks=ranks, metadata=_metadata(ranking, characters, ranking.tokens))
        return _pairs_reply(message, model, ranking, characters, pairs=len(texts))

    def _tokens(self) -> TokenService:
        return TokenService(self._state.require_model(), self._state.settings.server)

    def _model_scores_pairs(self) -> bool:
        return self._state.require_model().info.task == "cross_encoder"


def _overflow(request: Any) -> Overflow:
    direction = request.truncation_direction
    if direction not in pb.TruncationDirection.values():
        message = "expected 0 (right) or 1 (left)"
        field = "truncation_direction"
        raise InvalidRequest(f"{field}: {message}", violations=[(field, message)])
    if not request.truncate:
        return Overflow.REFUSE
    return Overflow.CUT_LEFT if direction == pb.TRUNCATION_DIRECTION_LEFT else Overflow.CUT


def _scores(model: ReadyModel, scores: Any, *, raw: bool) -> Any:
    found = np.asarray(scores, np.float32)
    return found if raw else probability(model.info.similarity, found)


def _metadata(answer: Answered, characters: int, tokens: int) -> pb.Metadata:
    stamps = answer.stamps
    return pb.Metadata(
        compute_chars=characters,
        compute_tokens=tokens,
        total_time_ns=_ns(stamps.gathered_at - stamps.received_at),
        tokenization_time_ns=_ns(stamps.tokenized_at - stamps.admitted_at),
        queue_time_ns=_ns(stamps.engine_started_at - stamps.tokenized_at),
        inference_time_ns=_ns(stamps.engine_ended_at - stamps.engine_started_at),
    )


def _ns(seconds: float) -> int:
    return max(0, round(1e9 * seconds))


def _headers(model: ReadyModel, answer: Answered, characters: int) -> tuple[tuple[str, str], ...]:
    timing = timing_headers(answer.stamps, model.info.device, characters, answer.tokens)
    return tuple((timing | length_headers(answer.lengths) | warning_headers(answer.warnings)).items())


def _pairs_reply(message: Any, model: ReadyModel, answer: Answered, characters: int, *, pairs: int) -> Reply[Any]:
    return Reply(
        message,
        pairs=pairs,
        truncated=answer.truncated,
        stamps=answer.stamps,
        metadata=_headers(model, answer, characters),
    )
