"""The Open Inference Protocol over REST, in JSON and in Triton's binary form, by a client against a real server."""

import json
import struct
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest

from ml_inference_server.backends.fake import fake_embedding, fake_logit
from ml_inference_server.proto import inference_pb2 as own
from tests.integration.http_kit import NO_OBJECTS, HttpClient, HttpReply, float32, http_client

SERVED = "sentence-transformers/all-MiniLM-L6-v2"  # the name in the settings; the fake backend also goes by its own
INFER = "/v2/models/fake/infer"
LENGTH = "Inference-Header-Content-Length"
BINARY = {"binary_data_output": True}
NAMES = ["EMBEDDING", "TOTAL_TOKENS", "USED_TOKENS"]


@pytest.fixture
async def http() -> AsyncIterator[HttpClient]:
    async with http_client() as client:
        yield client


def tensor(name: str, texts: Sequence[Any], **others: Any) -> dict[str, Any]:
    return {"name": name, "shape": [len(texts)], "datatype": "BYTES", "data": list(texts), **others}


def body(*tensors: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"inputs": list(tensors), **others}


def packed(texts: Sequence[str]) -> bytes:
    return b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in texts)


def in_binary(content: dict[str, Any], *tensors: tuple[str, bytes, list[int]]) -> tuple[bytes, dict[str, str]]:
    """(body, headers) of a request as tritonclient sends it, with its tensors behind the JSON."""
    inputs = [
        {"name": name, "shape": shape, "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
        for name, data, shape in tensors
    ]
    head = json.dumps({"inputs": inputs, **content}).encode()
    return head + b"".join(data for _, data, _ in tensors), {LENGTH: str(len(head))}


def arrays(reply: HttpReply) -> dict[str, np.ndarray]:
    """The tensors of an answer, out of its JSON or from behind it."""
    assert reply.status == 200, reply.body
    end = int(reply.headers.get(LENGTH, len(reply.body)))
    start, found = end, {}
    for output in json.loads(reply.body[:end])["outputs"]:
        kind = {"FP32": np.float32, "INT32": np.int32}[output["datatype"]]
        if (size := output.get("parameters", {}).get("binary_data_size")) is not None:
            assert "data" not in output
            values = np.frombuffer(reply.body[start : start + size], np.dtype(kind).newbyteorder("<"))
            start += size
        else:
            values = float32(output["data"]) if kind is np.float32 else np.array(output["data"], kind)
        found[output["name"]] = values.reshape(output["shape"])
    assert start == len(reply.body)
    return found


@pytest.mark.parametrize("path", [INFER, f"/v2/models/{SERVED}/infer", "/v2/models/fake/versions/1/infer"])
async def test_vectors_in_json_are_those_of_embed(http: HttpClient, path: str) -> None:
    texts = ["b", "a", "b", "a longer text, ü 🙂"]
    reply = await http.post(path, body(tensor("TEXT", texts), id="seven"))
    answer = await http.server.stub.Embed(own.EmbedRequest(texts=texts))
    found = arrays(reply)
    assert list(found) == NAMES
    assert found["EMBEDDING"].tobytes() == answer.embeddings
    assert found["TOTAL_TOKENS"].tolist() == list(answer.token_counts)
    told = reply.json
    assert (told["model_name"], told["model_version"], told["id"]) == (SERVED, "1", "seven")
    assert told["parameters"]["space_id"] == answer.space_id
    assert told["parameters"]["truncated"] == 0
    assert reply.headers["Content-Type"].startswith("application/json")


async def test_the_binary_form_brings_the_same_both_ways(http: HttpClient) -> None:
    texts = ["one", "two words, ü", "abc\0def"]
    data, headers = in_binary({"parameters": BINARY}, ("TEXT", packed(texts), [3, 1]))
    for content_type in ({}, {"Content-Type": "application/json"}, {"Content-Type": "application/octet-stream"}):
        reply = await http.send(INFER, data, headers | content_type)
        np.testing.assert_array_equal(arrays(reply)["EMBEDDING"], [fake_embedding(text) for text in texts])
        assert reply.headers["Content-Type"] == "application/octet-stream"


async def test_each_output_travels_as_it_was_asked_for(http: HttpClient) -> None:
    outputs: list[dict[str, Any]] = [
        {"name": "USED_TOKENS"},
        {"name": "EMBEDDING", "parameters": {"binary_data": True}},
    ]
    reply = await http.post(INFER, body(tensor("TEXT", ["a"]), outputs=outputs))
    assert list(arrays(reply)) == ["USED_TOKENS", "EMBEDDING"]
    head = json.loads(reply.body[: int(reply.headers[LENGTH])])
    assert head["outputs"][0]["data"] == [3]
    assert head["outputs"][1]["parameters"] == {"binary_data_size": 32}
    outputs[1]["parameters"] = {"binary_data": False}
    reply = await http.post(INFER, body(tensor("TEXT", ["a"]), outputs=outputs, parameters=BINARY))
    head = json.loads(reply.body[: int(reply.headers[LENGTH])])
    assert float32(head["outputs"][1]["data"]).tolist() == fake_embedding("a").tolist()


async def test_pairs_are_scored_as_score_does(http: HttpClient) -> None:
    documents = ["x", "query", "y"]
    pairs = [own.Pair(query="query", passage=document) for document in documents]
    answer = await http.server.stub.Score(own.ScoreRequest(pairs=pairs))
    reply = await http.post(INFER, body(tensor("QUERY", ["query"]), tensor("TEXT", documents)))
    assert arrays(reply)["SCORE"].tolist() == list(answer.scores)
    data, headers = in_binary({}, ("QUERY", packed(["query"] * 3), [3]), ("TEXT", packed(documents), [3]))
    assert arrays(await http.send(INFER, data, headers))["SCORE"].tolist() == list(answer.scores)
    async with http_client(model={"name": "fake", "task": "cross_encoder"}) as other:
        reply = await other.post(INFER, body(tensor("QUERY", ["q"]), tensor("TEXT", ["a"])))
        assert arrays(reply)["SCORE"].tolist() == [np.float32(fake_logit("q", "a"))]
        reply = await other.post(INFER, body(tensor("TEXT", ["a"])))
        assert (reply.status, "QUERY is missing" in reply.json["error"]) == (400, True)


async def test_parameters_are_those_of_embed(http: HttpClient) -> None:
    asked = {"dimensions": 4, "overflow": "cut", "timeout": 10**400, "content_type": "str"}
    reply = await http.post(INFER, body(tensor("TEXT", ["a"], parameters={"content_type": "str"}), parameters=asked))
    answer = await http.server.stub.Embed(own.EmbedRequest(texts=["a"], dimensions=4))
    assert arrays(reply)["EMBEDDING"].tobytes() == answer.embeddings
    other = {"expect_space_id": "0" * 16}
    reply = await http.post(INFER, body(tensor("TEXT", ["a"]), parameters=other))
    assert (reply.status, list(reply.json)) == (412, ["error"])


WRONG: list[tuple[str, Any, str]] = [
    ("no inputs", {}, "inputs: "),
    ("null inputs", {"inputs": None}, "inputs: "),
    ("empty inputs", {"inputs": []}, "inputs: TEXT is missing"),
    ("a tensor that is none", {"inputs": ["a"]}, "inputs[0]: "),
    ("no name", {"inputs": [{"shape": [1], "datatype": "BYTES", "data": ["a"]}]}, "inputs[0].name: "),
    ("no texts", body(tensor("TEXT", [])), "TEXT: at least one is required"),
    ("empty text", body(tensor("TEXT", ["a", " "])), "TEXT[1]: text is empty"),
    ("a number", body(tensor("TEXT", ["a", 1])), "inputs[0].data[1]: not a string"),
    ("nested too deep", body(tensor("TEXT", [[["a"]]])), "inputs[0].data[0]: not a string"),
    ("lone surrogate", body(tensor("TEXT", ["\ud800"])), "TEXT[0]: not valid Unicode"),
    ("data as text", body(tensor("TEXT", ["a"]) | {"data": "a"}), "inputs[0].data: "),
    ("shape above data", body(tensor("TEXT", ["a"], shape=[2])), "inputs[0].data: the shape says 2 elements, 1 are"),
    ("a huge shape", body(tensor("TEXT", ["a"], shape=[10**400])), "inputs[0].shape[0]: "),
    ("a shape of text", body(tensor("TEXT", ["a"], shape=["1"])), "inputs[0].shape[0]: "),
    ("a shape of truth", body(tensor("TEXT", ["a"], shape=[True])), "inputs[0].shape[0]: "),
    ("too many", body(tensor("TEXT", ["a"] * 1025)), "inputs[0].shape: 1025 items, the limit is 1024"),
    ("another datatype", body(tensor("TEXT", [1.5], datatype="FP32")), "inputs[0].datatype: "),
    ("unknown input", body(tensor("IMAGE", ["a"])), "inputs[0].name: "),
    ("unknown output", body(tensor("TEXT", ["a"]), outputs=[{"name": "SCORE"}]), "outputs[0].name: "),
    ("classes", body(tensor("TEXT", ["a"]), outputs=[{"name": "EMBEDDING", "parameters": {"classification": 2}}]),
     "outputs[0].parameters: "),
    ("shared memory", body(tensor("TEXT", ["a"], parameters={"shared_memory_region": "r"})), "inputs[0].parameters: "),
    ("binary without bytes", body(tensor("TEXT", ["a"], data=None, parameters={"binary_data_size": 5})),
     "inputs[0].parameters: binary_data_size"),
    ("binary and data", body(tensor("TEXT", ["a"], parameters={"binary_data_size": 5})), "inputs[0].data: stands"),
    ("no flag", body(tensor("TEXT", ["a"]), parameters={"binary_data_output": 1}), "parameters: binary_data_output"),
    ("misspelt", body(tensor("TEXT", ["a"]), parameters={"prompt": "a"}), "parameters: one of them is not known"),
    ("dimensions", body(tensor("TEXT", ["a"]), parameters={"dimensions": 10**400}), "dimensions: expected 1 to 8"),
    ("parameters of a list", body(tensor("TEXT", ["a"]), parameters=[]), "parameters: "),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "said"), WRONG, ids=[row[0] for row in WRONG])
async def test_bad_input_is_refused_in_the_protocols_form(http: HttpClient, name: str, content: Any, said: str) -> None:
    reply = await http.post(INFER, content)
    assert reply.status == 400
    assert list(reply.json) == ["error"]
    assert reply.json["error"].startswith(said)
    assert len(reply.body) < 1000
    assert http.server.backend.log == []
    await assert_still_serving(http)


async def assert_still_serving(http: HttpClient) -> None:
    reply = await http.post(INFER, body(tensor("TEXT", ["are you well"])))
    np.testing.assert_array_equal(arrays(reply)["EMBEDDING"], [fake_embedding("are you well")])
    assert http.server.model.admission.requests == 0


@pytest.mark.parametrize("noise", NO_OBJECTS.values(), ids=NO_OBJECTS)
async def test_a_body_that_is_no_object_is_refused(http: HttpClient, noise: bytes) -> None:
    for headers in ({"Content-Type": "application/json"}, {LENGTH: str(len(noise))}):
        reply = await http.send(INFER, noise, headers)
        assert (reply.status, list(reply.json)) == (400, ["error"])
    await assert_still_serving(http)


async def test_bytes_and_their_lengths_must_agree(http: HttpClient) -> None:
    data = packed(["one", "two"])
    sound, headers = in_binary({}, ("TEXT", data, [2]))
    end = int(headers[LENGTH])
    for wrong, length, said in (
        (sound, "-1", LENGTH),
        (sound, "x", LENGTH),
        (sound, str(len(sound) + 1), LENGTH),
        (sound, "9" * 30, LENGTH),
        (sound, "²", LENGTH),
        (sound, str(end - 1), "the body is not valid JSON"),
        (sound, str(end + 1), "the body is not valid JSON"),
        (sound[:-1], str(end), "inputs[0].parameters: binary_data_size"),
        (sound + b"x", str(end), "inputs: 1 bytes behind the JSON are no tensor's"),
    ):
        reply = await http.send(INFER, wrong, {LENGTH: length})
        assert reply.status == 400
        assert reply.json["error"].startswith(said)
    for size in (-1, 2.5, True, "14", None, 10**400):
        content = tensor("TEXT", ["", ""], parameters={"binary_data_size": size})
        del content["data"]
        head = json.dumps(body(content)).encode()
        reply = await http.send(INFER, head + data, {LENGTH: str(len(head))})
        assert (reply.status, reply.json["error"][:20]) == (400, "inputs[0].parameters")
    wrong_shape, headers = in_binary({}, ("TEXT", data, [3]))
    reply = await http.send(INFER, wrong_shape, headers)
    assert (reply.status, reply.json["error"][:15]) == (400, "inputs[0].data:")
    await assert_still_serving(http)


async def test_other_types_encodings_and_methods_are_refused(http: HttpClient) -> None:
    data = json.dumps(body(tensor("TEXT", ["a"]))).encode()
    for headers, status in (
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
    ):
        reply = await http.send(INFER, data, headers)
        assert (reply.status, list(reply.json)) == (status, ["error"])
    reply = await http.get(INFER)
    assert (reply.status, list(reply.json)) == (404, ["error"])
    reply = await http.send("/v2/models/fake", data)
    assert (reply.status in (405, 413), list(reply.json)) == (True, ["error"])
    await assert_still_serving(http)


PATHS = ["", "/ready", "/config", "/stats"]


@pytest.mark.parametrize("name", ["fake", SERVED, SERVED.replace("/", "%2F"), "fake/versions/1"])
async def test_a_model_is_described_under_each_of_its_names(http: HttpClient, name: str) -> None:
    found = {path: await http.get(f"/v2/models/{name}{path}") for path in PATHS}
    assert {path: reply.status for path, reply in found.items()} == dict.fromkeys(PATHS, 200)
    metadata, config = found[""].json, found["/config"].json
    assert (metadata["name"], metadata["versions"]) == (SERVED, ["1"])
    assert metadata["inputs"] == [{"name": "TEXT", "datatype": "BYTES", "shape": [-1, 1]}]
    assert [output["name"] for output in metadata["outputs"]] == NAMES
    assert (config["max_batch_size"], config["input"][0]["data_type"]) == (1024, "TYPE_STRING")
    assert found["/ready"].json["ready"] is True
    assert found["/stats"].json["model_stats"][0]["inference_count"] == 0


async def test_another_model_or_version_is_not_found(http: HttpClient) -> None:
    for name in ("other", "fake/versions/2", "x" * 3000, "fake%0A"):
        for path in PATHS:
            reply = await http.get(f"/v2/models/{name}{path}")
            assert (reply.status, list(reply.json)) == (404, ["error"])
            assert "other" not in reply.json["error"]
        reply = await http.post(f"/v2/models/{name}/infer", body(tensor("TEXT", ["a"])))
        assert (reply.status, list(reply.json)) == (404, ["error"])


async def test_the_server_is_described(http: HttpClient) -> None:
    told = (await http.get("/v2")).json
    assert told["name"] == "ml-inference-server"
    assert told["extensions"] == ["statistics", "model_configuration", "binary_tensor_data"]
    assert (await http.get("/v2/health/live")).json == {"live": True}
    assert (await http.get("/v2/health/ready")).json == {"ready": True, "live": True}
    await http.post(INFER, body(tensor("TEXT", ["a", "b"])))
    (stats,) = (await http.get("/v2/models/stats")).json["model_stats"]
    assert (stats["inference_count"], stats["inference_stats"]["success"]["count"]) == (2, 1)
    reply = await http.get("/v2/nothing")
    assert (reply.status, list(reply.json)) == (404, ["error"])


async def test_while_the_model_loads_it_is_live_and_not_ready(http: HttpClient) -> None:
    model, http.server.state.model = http.server.state.model, None
    assert (await http.get("/v2/health/live")).status == 200
    reply = await http.get("/v2/health/ready")
    assert (reply.status, reply.json) == (503, {"ready": False, "live": False})
    reply = await http.get("/v2/models/fake/ready")
    assert (reply.status, reply.json) == (503, {"name": "fake", "ready": False})
    reply = await http.post(INFER, body(tensor("TEXT", ["a"])))
    assert (reply.status, reply.headers["Retry-After"]) == (503, "1")
    http.server.state.model = model
    await assert_still_serving(http)
