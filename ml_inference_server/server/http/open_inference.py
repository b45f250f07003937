"""The Open Inference Protocol (KServe v2) over REST, with Triton's extension for tensors in binary form.

In that form the JSON comes first, the header Inference-Header-Content-Length says where it ends, and the tensors follow
in the order in which the JSON names them, each as long as its parameter `binary_data_size` says.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from aiohttp import web
from pydantic import Field

from ml_inference_server.door.rights import METRICS, MODEL_FACTS, OPEN, Needs
from ml_inference_server.metrics.view import View
from ml_inference_server.server.call import Call
from ml_inference_server.server.http.answer import HttpAnswer, json_bytes, written
from ml_inference_server.server.http.body import parse_json
from ml_inference_server.server.http.dialect import Dialect, Refusal
from ml_inference_server.server.http.endpoint import Endpoints, Question, Schema, example, read, validated
from ml_inference_server.server.http.text_fields import Echoed, JsonKey
from ml_inference_server.server.observation import Reply
from ml_inference_server.server.open_inference import EXTENSIONS, Inference, InferenceAnswer, OpenInference
from ml_inference_server.server.state import ServerState
from ml_inference_server.server.tensors import InputTensor, OutputTensor, RequestedOutput
from ml_inference_server.utils.errors import InvalidRequest

_JSON_LENGTH = "Inference-Header-Content-Length"
_SIZE = "binary_data_size"
_MOST_TENSORS = 1024
# The second one is also that of a body without a type, which is what tritonclient sends.
_CONTENT_TYPES = ("application/json", "application/octet-stream")


def _error(refusal: Refusal) -> Mapping[str, Any]:
    return {"error": refusal.message}


DIALECT = Dialect("Open Inference", _error, fields={"texts": "TEXT"})


Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class InferTensor(Schema):
    """A tensor of BYTES, one string for each text."""

    name: str = Field(description="TEXT, or QUERY for pairs.")
    shape: Annotated[list[Int64], Field(fail_fast=True)] = Field(
        description="[n] or [n, 1]; one QUERY stands for all TEXT."
    )
    datatype: str = Field(description="BYTES.")
    parameters: dict[JsonKey, Any] | None = Field(
        None, description="binary_data_size: the tensor stands behind the JSON."
    )
    data: list[Any] | None = Field(None, description="The strings, or nothing where binary_data_size is set.")


class InferOutput(Schema):
    name: str = Field(description="EMBEDDING, or SCORE for pairs; TOTAL_TOKENS, USED_TOKENS.")
    parameters: dict[JsonKey, Any] | None = Field(None, description="binary_data: send it behind the JSON.")


class InferRequest(Schema):
    model_config = example(inputs=[{"name": "TEXT", "shape": [1], "datatype": "BYTES", "data": ["what is a cell"]}])

    id: Echoed | None = Field(None, description="Comes back in the answer.")
    parameters: dict[JsonKey, Any] | None = Field(
        None,
        description="prompt_name or input_type, overflow, dimensions, normalize, expect_space_id, timeout "
        "(microseconds), binary_data_output.",
    )
    inputs: Annotated[list[InferTensor], Field(fail_fast=True, max_length=_MOST_TENSORS)]
    outputs: Annotated[list[InferOutput], Field(fail_fast=True, max_length=_MOST_TENSORS)] | None = Field(
        None, description="Left out: all of them."
    )


class OpenInferenceRoutes:
    def __init__(self, open_inference: OpenInference) -> None:
        self._open_inference = open_inference

    def server(self, _: web.Request) -> web.Response:
        return _json(self._open_inference.server_metadata((*EXTENSIONS, "binary_tensor_data")))

    def live(self, _: web.Request) -> web.Response:
        return _json({"live": True})

    def ready(self, _: web.Request) -> web.Response:
        """The protocol's text calls the field `live` here too, KServe's client reads `ready`."""
        ready = self._open_inference.is_ready()
        return _json({"ready": ready, "live": ready}, 200 if ready else 503)

    def model_ready(self, request: web.Request) -> web.Response:
        name, version = _asked(request)
        ready = self._open_inference.is_model_ready(name, version)
        return _json({"name": name, "ready": ready}, 200 if ready else 503)

    def model(self, request: web.Request) -> web.Response:
        return _json(self._open_inference.model_metadata(*_asked(request)))

    def config(self, request: web.Request) -> web.Response:
        return _json(self._open_inference.model_config(*_asked(request)))

    async def statistics(self, request: web.Request) -> web.Response:
        return _json(await self._open_inference.statistics(*_asked(request)))

    async def infer(self, body: bytes, request: web.Request, call: Call) -> Reply[HttpAnswer]:
        end = _json_length(request.headers.get(_JSON_LENGTH), len(body))
        asked = await read(body, lambda: validated(InferRequest, parse_json(body[:end])))
        name, version = _asked(request)
        inference = Inference(
            model_name=name,
            model_version=version,
            id=asked.id or "",
            parameters=asked.parameters or {},
            inputs=_inputs(asked.inputs, memoryview(body)[end:]),
            outputs=[RequestedOutput(output.name, output.parameters or {}) for output in asked.outputs or ()],
        )
        is_binary = _binary_outputs(asked)
        reply = await self._open_inference.infer(inference, call)
        answer = reply.message
        numbers = sum(output.values.size for output in answer.outputs)
        message = await written(numbers, lambda: _answer(answer, is_binary))
        return Reply(message, reply.texts, reply.pairs, reply.truncated, reply.stamps)


def add_routes(endpoints: Endpoints, state: ServerState, view: View) -> None:
    routes = OpenInferenceRoutes(OpenInference(state, view))
    model = "/v2/models/{model:.+}"
    # A name may hold slashes, so that the longer paths come first.
    paths = (f"{model}/versions/{{version}}", model)
    questions: list[tuple[str, Question, str, Needs]] = [
        ("/v2", routes.server, "What the server is", MODEL_FACTS),
        ("/v2/health/live", routes.live, "200 while the process answers", OPEN),
        ("/v2/health/ready", routes.ready, "200 while the server is ready, else 503", OPEN),
        ("/v2/models/stats", routes.statistics, "What the model did since the start", METRICS),
    ]
    for path in paths:
        endpoints.raw_work(
            f"{path}/infer",
            DIALECT,
            "kserve.infer",
            routes.infer,
            "Texts as tensors to embeddings or scores as tensors",
            InferRequest,
            content_types=_CONTENT_TYPES,
        )
        questions += [
            (f"{path}/ready", routes.model_ready, "200 while the model is ready, else 503", MODEL_FACTS),
            (f"{path}/config", routes.config, "The model as Triton configures one", MODEL_FACTS),
            (f"{path}/stats", routes.statistics, "What the model did since the start", METRICS),
        ]
    questions += [(path, routes.model, "The model's inputs and outputs", MODEL_FACTS) for path in paths]
    for path, run, summary, needs in questions:
        endpoints.question("GET", path, DIALECT, run, summary, needs)


def _asked(request: web.Request) -> tuple[str, str]:
    """(name, version) of the path; empty where it has none."""
    return request.match_info.get("model", ""), request.match_info.get("version", "")


def _json_length(header: str | None, body_bytes: int) -> int:
    if header is None:
        return body_bytes
    if not (header.isascii() and header.isdigit() and len(header) < 12 and int(header) <= body_bytes):
        raise _wrong(_JSON_LENGTH, f"expected how many of the body's {body_bytes} bytes are its JSON")
    return int(header)


def _inputs(tensors: list[InferTensor], binary: memoryview) -> list[InputTensor]:
    """Each with its data out of the JSON, or the next of the bytes behind it, all of which must be somebody's."""
    inputs = []
    start = 0
    for place, tensor in enumerate(tensors):
        at, parameters = f"inputs[{place}]", tensor.parameters or {}
        data: memoryview | list[Any] = tensor.data or []
        if _SIZE in parameters:
            size = parameters[_SIZE]
            if tensor.data is not None:
                raise _wrong(f"{at}.data", f"stands beside {_SIZE}: send one of them")
            if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(binary) - start:
                raise _wrong(f"{at}.parameters", f"{_SIZE} is not one of the {len(binary) - start} bytes that are left")
            data = binary[start : start + size]
            start += size
        inputs.append(InputTensor(tensor.name, tensor.datatype, tuple(tensor.shape), data, parameters))
    if start != len(binary):
        raise _wrong("inputs", f"{len(binary) - start} bytes behind the JSON are no tensor's: set {_SIZE}")
    return inputs


def _binary_outputs(asked: InferRequest) -> Callable[[str], bool]:
    """Which outputs travel behind the JSON."""
    default = _flag(asked.parameters or {}, "binary_data_output", "parameters", default=False)
    flags = {
        output.name: _flag(output.parameters or {}, "binary_data", f"outputs[{place}].parameters", default=default)
        for place, output in enumerate(asked.outputs or ())
    }
    return lambda name: flags.get(name, default)


def _flag(parameters: Mapping[str, Any], name: str, at: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise _wrong(at, f"{name} is true or false")
    return value


def _answer(answer: InferenceAnswer, is_binary: Callable[[str], bool]) -> HttpAnswer:
    """The data of each tensor is flat, row by row."""
    binary: list[bytes] = []

    def written_output(output: OutputTensor) -> dict[str, Any]:
        head = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
        if not is_binary(output.name):
            return {**head, "data": output.values.ravel()}
        binary.append(output.raw())
        return {**head, "parameters": {_SIZE: len(binary[-1])}}

    content = json_bytes(
        {
            "model_name": answer.model_name,
            "model_version": answer.model_version,
            **({"id": answer.id} if answer.id else {}),
            "parameters": answer.parameters,
            "outputs": [written_output(output) for output in answer.outputs],
        }
    )
    if not binary:
        return HttpAnswer(content)
    return HttpAnswer(b"".join((content, *binary)), _CONTENT_TYPES[1], {_JSON_LENGTH: str(len(content))})


def _json(content: Any, status: int = 200) -> web.Response:
    return web.Response(
        status=status,
        body=json_bytes(content),
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )


def _wrong(at: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{at}: {message}", violations=[(at, message)])
