"""Text Embeddings Inference over HTTP."""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from ml_inference_server.door.rights import OPEN
from ml_inference_server.server.answer_headers import length_headers, warning_headers
from ml_inference_server.server.call import Call
from ml_inference_server.server.http.answer import (
    HttpAnswer,
    as_numbers,
    json_bytes,
    json_list,
    written,
)
from ml_inference_server.server.http.endpoint import Endpoints, HttpWork
from ml_inference_server.server.http.tei_answers import DIALECT
from ml_inference_server.server.http.tei_schemas import (
    TeiCut,
    TeiDecodeRequest,
    TeiEmbedRequest,
    TeiPredictRequest,
    TeiRerankRequest,
    TeiSimilarityParameters,
    TeiSimilarityRequest,
    TeiTokenizeRequest,
)
from ml_inference_server.server.observation import Reply
from ml_inference_server.server.options import EmbedOptions, Overflow, RerankOptions, ScoreOptions
from ml_inference_server.server.service import Answered
from ml_inference_server.server.similarity import probability, similarity
from ml_inference_server.server.state import ServerState
from ml_inference_server.server.tei_words import LABEL, timing_headers
from ml_inference_server.server.token_service import TokenService
from ml_inference_server.utils.errors import InvalidRequest, Unavailable, WrongTask

# All of this dialect, but for the root, which is also the page's.
PATHS = (
    "/embed",
    "/rerank",
    "/similarity",
    "/predict",
    "/tokenize",
    "/decode",
    "/invocations",
    "/embed_all",
    "/embed_sparse",
    "/health",
    "/ping",
)


class Tei:
    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def embed(self, request: TeiEmbedRequest, call: Call) -> Reply[HttpAnswer]:
        model = self._state.require_model()
        options = EmbedOptions(
            prompt_name=request.prompt_name,
            overflow=_overflow(request),
            dimensions=request.dimensions,
            normalize=request.normalize,
        )
        answer = await model.service.embed(request.inputs, call, options)
        body = await written(answer.values.size, lambda: json_list(np.ascontiguousarray(answer.values)))
        headers = _headers(model.info.device, answer, request.inputs) | {"x-space-id": answer.space_id}
        return _reply(body, headers, answer, texts=len(request.inputs))

    async def rerank(self, request: TeiRerankRequest, call: Call) -> Reply[HttpAnswer]:
        model = self._state.require_model()
        options = RerankOptions(overflow=_overflow(request))
        ranking = await model.service.rerank(request.query, request.texts, 0, call, options)
        scores = _scores(model.info.similarity, [score for _, score in ranking.ranks], raw=request.raw_scores)
        ranks: list[dict[str, Any]] = []
        for (index, _), score in zip(ranking.ranks, scores, strict=True):
            text = {"text": request.texts[index]} if request.return_text else {}
            ranks.append({"index": index, **text, "score": score})
        headers = _headers(model.info.device, ranking, [*request.texts, *([request.query] * len(request.texts))])
        body = await written(
            len(ranks) + (as_numbers(request.texts) if request.return_text else 0), lambda: json_list(ranks)
        )
        return _reply(body, headers, ranking, pairs=len(request.texts))

    async def similarity(self, request: TeiSimilarityRequest, call: Call) -> Reply[HttpAnswer]:
        """The cosine, whatever the model compares with: that is what is promised."""
        model = self._state.require_model()
        parameters = request.parameters or TeiSimilarityParameters()
        if not request.inputs.sentences:
            message = "at least one is required"
            wrong = [("inputs.sentences", message)]
            raise InvalidRequest(f"inputs.sentences: {message}", reason="EMPTY_REQUEST", violations=wrong)
        texts = [request.inputs.source_sentence, *request.inputs.sentences]
        options = EmbedOptions(prompt_name=parameters.prompt_name, overflow=_overflow(parameters))
        try:
            answer = await model.service.embed(texts, call, options)
        except InvalidRequest as error:
            raise _of_sentences(error) from None
        scores = similarity("cosine", answer.values[:1], answer.values[1:])
        headers = _headers(model.info.device, answer, texts) | {"x-space-id": answer.space_id}
        return _reply(json_bytes(scores), headers, answer, texts=len(texts))

    async def predict(self, request: TeiPredictRequest, call: Call) -> Reply[HttpAnswer]:
        model = self._state.require_model()
        if model.info.task != "cross_encoder":
            raise WrongTask("this model embeds texts and classifies nothing: use /embed, /similarity or /rerank")
        sequences = request.inputs.sequences
        wrong = [
            (f"inputs[{i}]", "this model scores pairs: a query and a text")
            for i, sequence in enumerate(sequences)
            if len(sequence) != 2
        ]
        if wrong:
            raise InvalidRequest(f"{wrong[0][0]}: {wrong[0][1]}", violations=wrong)
        pairs = [(first, second) for first, second in sequences]
        answer = await model.service.score(pairs, call, ScoreOptions(overflow=_overflow(request)))
        scores = _scores(model.info.similarity, answer.values, raw=request.raw_scores)
        predictions = [[{"score": score, "label": LABEL}] for score in scores]
        headers = _headers(model.info.device, answer, [text for pair in pairs for text in pair])
        body = json_bytes(predictions[0]) if request.inputs.single else json_list(predictions)
        return _reply(body, headers, answer, pairs=len(pairs))

    async def tokenize(self, request: TeiTokenizeRequest, call: Call) -> Reply[HttpAnswer]:
        rows = await self._tokens().tokenize(
            request.inputs, call, prompt_name=request.prompt_name, special=request.add_special_tokens
        )
        body = await written(5 * sum(map(len, rows)), lambda: json_list(rows))
        return Reply(HttpAnswer(body))

    async def decode(self, request: TeiDecodeRequest, call: Call) -> Reply[HttpAnswer]:
        texts = await self._tokens().decode(request.ids, call, skip_special=request.skip_special_tokens)
        return Reply(HttpAnswer(json_bytes(texts)))

    def _tokens(self) -> TokenService:
        return TokenService(self._state.require_model(), self._state.settings.server)

    def health(self, _: web.Request) -> web.Response:
        """200 and nothing else."""
        ready, reason = self._state.readiness()
        if not ready:
            raise Unavailable(reason)
        return web.Response(headers={"Cache-Control": "no-store"})


class RerankByBody:
    """/rerank belongs to TEI and to Cohere and its followers; which of them is asked, its body says."""

    def __init__(self, tei: HttpWork[Any], cohere: HttpWork[Any]) -> None:
        self.tei = tei
        self._cohere = cohere

    def choose(self, body: Mapping[str, Any]) -> HttpWork[Any]:
        """InvalidRequest where it does not say."""
        is_tei, is_cohere = (body.get(key) is not None for key in ("texts", "documents"))
        if is_tei == is_cohere:
            found = "both are there" if is_tei else "neither is there"
            message = f"send texts as TEI takes them, or documents as Cohere and Jina do; {found}"
            raise InvalidRequest(message, violations=[("body", message)])
        return self.tei if is_tei else self._cohere


def add_routes(endpoints: Endpoints, state: ServerState, cohere_rerank: HttpWork[Any]) -> None:
    """cohere_rerank: what answers a /rerank that is not TEI's."""
    tei = Tei(state)
    embed = HttpWork(DIALECT, "tei.embed", TeiEmbedRequest, tei.embed)
    rerank = HttpWork(DIALECT, "tei.rerank", TeiRerankRequest, tei.rerank)
    similar = HttpWork(DIALECT, "tei.similarity", TeiSimilarityRequest, tei.similarity)
    predict = HttpWork(DIALECT, "tei.predict", TeiPredictRequest, tei.predict)

    def at_root(body: Mapping[str, Any]) -> HttpWork[Any]:
        """There the model decides; where a body fits one task only, the body does."""
        if "texts" in body:
            return rerank
        if isinstance(body.get("inputs"), dict):
            return similar
        is_pairs = state.model is not None and state.model.info.task == "cross_encoder"
        return predict if is_pairs else embed

    routes: list[tuple[str, HttpWork[Any], str]] = [
        ("/embed", embed, "Embeddings"),
        ("/similarity", similar, "Cosines of one sentence to others"),
        ("/predict", predict, "Scores of pairs, by a cross-encoder"),
        ("/tokenize", HttpWork(DIALECT, "tei.tokenize", TeiTokenizeRequest, tei.tokenize), "The tokens of texts"),
        ("/decode", HttpWork(DIALECT, "tei.decode", TeiDecodeRequest, tei.decode), "The texts of tokens"),
    ]
    for path, work, summary in routes:
        endpoints.work(path, work.dialect, work.metric, work.schema, work.run, summary)
    for path in ("/", "/invocations"):
        endpoints.work_by_body(path, (embed, predict, rerank, similar), at_root, "What the body asks the model for")
    choice = RerankByBody(rerank, cohere_rerank)
    endpoints.work_by_body("/rerank", (rerank, cohere_rerank), choice.choose, "Texts or documents by their relevance")
    for path, what in (("/embed_all", "a vector for each token"), ("/embed_sparse", "sparse vectors")):
        endpoints.raw_work(path, DIALECT, "tei.embed", _refusing(what), f"Refused: {what}")
    for path in ("/health", "/ping"):
        endpoints.question("GET", path, DIALECT, tei.health, "200 while the server is ready, else 503", OPEN)


def _refusing(what: str) -> Callable[[bytes, web.Request, Call], Awaitable[Reply[HttpAnswer]]]:
    async def refuse(_body: bytes, _request: web.Request, _call: Call) -> Reply[HttpAnswer]:
        raise WrongTask(f"this server does not give {what}: it gives one dense vector for a text (/embed)")

    return refuse


def _overflow(request: TeiCut) -> Overflow:
    """TEI cuts where nothing is said."""
    if request.truncate is False:
        return Overflow.REFUSE
    return Overflow.CUT_LEFT if request.truncation_direction in ("Left", "left") else Overflow.CUT


def _scores(similarity_name: str, scores: Any, *, raw: bool) -> NDArray[np.float32]:
    found = np.asarray(scores, np.float32)
    return found if raw else probability(similarity_name, found)


def _headers(device: str, answer: Answered, texts: Sequence[str]) -> dict[str, str]:
    characters = sum(map(len, texts))
    timing = timing_headers(answer.stamps, device, characters, answer.tokens)
    return timing | length_headers(answer.lengths) | warning_headers(answer.warnings)


def _reply(
    body: bytes, headers: Mapping[str, str], answer: Answered, *, texts: int = 0, pairs: int = 0
) -> Reply[HttpAnswer]:
    message = HttpAnswer(body, headers=headers)
    return Reply(message, texts=texts, pairs=pairs, truncated=answer.truncated, stamps=answer.stamps)


def _of_sentences(error: InvalidRequest) -> InvalidRequest:
    """The same error, with the fields of /similarity in place of the list that was made of them."""

    def named(text: str) -> str:
        found = re.match(r"texts\[(\d+)\]", text)
        if found is None:
            return text
        row = int(found[1])
        field = f"inputs.sentences[{row - 1}]" if row else "inputs.source_sentence"
        return field + text[found.end() :]

    violations = [(named(field), message) for field, message in error.violations]
    return InvalidRequest(named(str(error)), reason=error.reason, violations=violations)
