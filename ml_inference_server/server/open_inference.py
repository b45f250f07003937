"""The Open Inference Protocol (KServe v2, Triton) without its transports: gRPC and REST answer with what stands here.

What describes the server and its model is written as the fields of the messages in proto/foreign/grpc_service.proto.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ml_inference_server import __version__
from ml_inference_server.metrics.view import View
from ml_inference_server.server.call import Call
from ml_inference_server.server.infer_parameters import InferParameters
from ml_inference_server.server.observation import Reply
from ml_inference_server.server.options import EmbedOptions, ScoreOptions
from ml_inference_server.server.ready_model import ReadyModel
from ml_inference_server.server.service import Answer
from ml_inference_server.server.state import ServerState
from ml_inference_server.server.tensors import (
    EMBEDDING,
    QUERY,
    SCORE,
    TEXT,
    TOTAL_TOKENS,
    USED_TOKENS,
    InputTensor,
    OutputTensor,
    RequestedOutput,
    read_texts,
    select_outputs,
)
from ml_inference_server.utils.errors import InvalidRequest, ModelNotFound

SERVER_NAME = "ml-inference-server"
EXTENSIONS = ("statistics", "model_configuration")
"""Those that are served over every transport."""

_VERSION = "1"
_COUNTS = (TOTAL_TOKENS, USED_TOKENS)
_NUMBER_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """A request, as any transport brings it."""

    model_name: str
    model_version: str = ""
    id: str = ""
    parameters: Mapping[str, object] = field(default_factory=dict)
    inputs: Sequence[InputTensor]
    outputs: Sequence[RequestedOutput] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceAnswer:
    model_name: str
    model_version: str = _VERSION
    id: str
    parameters: Mapping[str, str | int]
    outputs: Sequence[OutputTensor]


class OpenInference:
    """One model of one version. Raises any ServiceError; ModelNotFound for other names and versions."""

    def __init__(self, state: ServerState, view: View) -> None:
        self._state = state
        self._view = view

    def is_ready(self) -> bool:
        return self._state.readiness()[0]

    def is_model_ready(self, name: str, version: str) -> bool:
        """Until it is loaded nobody knows its names, and every model is one that is not ready."""
        if self._state.model is None:
            return False
        self._model(name, version)
        return self.is_ready()

    def server_metadata(self, extensions: Sequence[str] = EXTENSIONS) -> dict[str, Any]:
        return {"name": SERVER_NAME, "version": __version__, "extensions": list(extensions)}

    def model_metadata(self, name: str, version: str) -> dict[str, Any]:
        """With the dimension of the batch, -1, in front of what `model_config` says."""
        model = self._model(name, version)
        inputs, outputs = _tensors_of(model)
        return {
            "name": model.service.names.served,
            "versions": [_VERSION],
            "platform": model.info.backend,
            "inputs": [_described(*each) for each in inputs],
            "outputs": [_described(*each) for each in outputs],
        }

    def model_config(self, name: str, version: str) -> dict[str, Any]:
        """As Triton writes a config.pbtxt.

        A max_batch_size above 0 says that the first dimension of every tensor is the batch, and is not in `dims`. With
        0, perf_analyzer refuses any -b but 1; as it is, its -b N sends TEXT of shape [N, 1], of N texts. Clients that
        take no notice of a configuration, such as tritonclient, may as well send [N].
        """
        model = self._model(name, version)
        inputs, outputs = _tensors_of(model)
        info, batching = model.info, self._state.settings.batching
        kind = "KIND_CPU" if info.device == "cpu" else "KIND_GPU"
        delay_us = round(batching.timeout_ms * 1e3)
        return {
            "name": model.service.names.served,
            "backend": info.backend,
            "version_policy": {"latest": {"num_versions": 1}},
            "max_batch_size": self._state.settings.server.max_texts,
            "input": [_configured(*each) for each in inputs],
            "output": [_configured(*each) for each in outputs],
            "instance_group": [{"name": info.device, "count": info.concurrency, "kind": kind}],
            **({"dynamic_batching": {"max_queue_delay_microseconds": delay_us}} if batching.enabled else {}),
        }

    async def statistics(self, name: str, version: str) -> dict[str, Any]:
        """Of the model since the start, whatever protocol asked it."""
        model = self._model(name, version)
        counted = await self._view.model_figures()
        stages = counted.stages_s

        def spent(*names: str) -> dict[str, int]:
            return {"count": counted.answered, "ns": round(1e9 * sum(stages[name] for name in names))}

        return {
            "model_stats": [
                {
                    "name": model.service.names.served,
                    "version": _VERSION,
                    "last_inference": round(1e3 * counted.last_batch_unix_s),
                    "inference_count": counted.rows,
                    "execution_count": counted.batches,
                    "inference_stats": {
                        "success": spent(*stages),
                        "fail": {"count": counted.failed, "ns": round(1e9 * counted.failed_s)},
                        "queue": spent("queue"),
                        "compute_input": spent("receive", "tokenize"),
                        "compute_infer": spent("engine"),
                        "compute_output": spent("scatter", "reply"),
                    },
                }
            ]
        }

    def index(self, *, only_ready: bool) -> dict[str, Any]:
        """The one model there is, with the reason where it is not ready."""
        ready, reason = self._state.readiness()
        if only_ready and not ready:
            return {"models": []}
        name = self._state.require_model().service.names.served
        state = {"state": "READY"} if ready else {"state": "UNAVAILABLE", "reason": reason}
        return {"models": [{"name": name, "version": _VERSION, **state}]}

    async def infer(
        self, request: Inference, call: Call, *, max_answer_bytes: int | None = None
    ) -> Reply[InferenceAnswer]:
        """max_answer_bytes: what the transport can send; a request for more is refused before it is computed."""
        model = self._model(request.model_name, request.model_version)
        asked = InferParameters(request.parameters)
        queries, texts = read_texts(
            request.inputs,
            needs_query=model.info.task == "cross_encoder",
            max_texts=self._state.settings.server.max_texts,
        )
        call = asked.within_timeout(call)
        values = EMBEDDING if queries is None else SCORE
        names = select_outputs(request.outputs, (values, *_COUNTS))
        if queries is None:
            options = EmbedOptions(
                prompt_name=asked.text("prompt_name"),
                role=asked.text("input_type") or "",
                overflow=asked.overflow(),
                dimensions=asked.whole("dimensions"),
                normalize=asked.flag("normalize"),
                expect_space_id=asked.text("expect_space_id") or "",
                model=request.model_name,
            )
            asked.check_known_to_texts()
            numbers = min(options.dimensions or model.info.dimension, model.info.dimension)
            _check_size(len(texts), _NUMBER_BYTES * (numbers + len(_COUNTS)), max_answer_bytes)
            answer = await model.service.embed(texts, call, options)
        else:
            asked.check_known_to_pairs()
            pairs = list(zip(queries, texts, strict=True))
            answer = await model.service.score(
                pairs, call, ScoreOptions(overflow=asked.overflow(), model=request.model_name)
            )
        tensors = {
            values: OutputTensor(values, "FP32", answer.values),
            TOTAL_TOKENS: OutputTensor(TOTAL_TOKENS, "INT32", np.array(answer.lengths.total, np.int32)),
            USED_TOKENS: OutputTensor(USED_TOKENS, "INT32", np.array(answer.lengths.used, np.int32)),
        }
        message = InferenceAnswer(
            model_name=model.service.names.served,
            id=request.id,
            parameters=_told(answer),
            outputs=[tensors[name] for name in names],
        )
        return Reply(
            message,
            texts=len(texts) if queries is None else 0,
            pairs=0 if queries is None else len(texts),
            truncated=answer.truncated,
            stamps=answer.stamps,
        )

    def _model(self, name: str, version: str) -> ReadyModel:
        model = self._state.require_model()
        model.service.check_model(name)
        if version not in ("", _VERSION):
            raise ModelNotFound(f"there is no such version of the model: leave it out, or ask for {_VERSION}")
        return model


_Tensor = tuple[str, str, tuple[int, ...]]
"""Name, datatype, and the dimensions behind that of the batch."""


def _tensors_of(model: ReadyModel) -> tuple[list[_Tensor], list[_Tensor]]:
    """(inputs, outputs) that go together in one request, because perf_analyzer sends and asks for all that it finds.

    So an embedding model does not list QUERY and SCORE, although it scores pairs too.
    """
    text, query = (TEXT, "BYTES", (1,)), (QUERY, "BYTES", (1,))
    counts: list[_Tensor] = [(name, "INT32", ()) for name in _COUNTS]
    if model.info.task == "cross_encoder":
        return [query, text], [(SCORE, "FP32", ()), *counts]
    return [text], [(EMBEDDING, "FP32", (model.info.dimension,)), *counts]


def _described(name: str, datatype: str, dims: tuple[int, ...]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [-1, *dims]}


def _configured(name: str, datatype: str, dims: tuple[int, ...]) -> dict[str, Any]:
    kind = "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
    return {"name": name, "data_type": kind, "dims": list(dims)}


def _check_size(rows: int, row_bytes: int, most_bytes: int | None) -> None:
    if most_bytes is not None and rows * row_bytes > most_bytes:
        split = f"send at most {most_bytes // row_bytes} at once, or " if most_bytes >= row_bytes else ""
        message = (
            f"the answer would have {rows * row_bytes} bytes, the limit is {most_bytes}: "
            f"{split}raise server.max_message_bytes"
        )
        raise InvalidRequest(f"{TEXT}: {message}", reason="REPLY_TOO_LARGE", violations=[(TEXT, message)])


def _told(answer: Answer) -> dict[str, str | int]:
    """What an answer says beside its tensors; a space only where there are embeddings."""
    told: dict[str, str | int] = {"tokens": answer.tokens, "truncated": answer.truncated}
    if answer.space_id:
        told |= {"space_id": answer.space_id, "prompt_name": answer.prompt_name}
    if answer.warnings:
        told["warnings"] = " ".join(answer.warnings)
    return told
