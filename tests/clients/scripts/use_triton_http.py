"""The Python package `tritonclient[http]`."""

from typing import Any

import numpy as np
import tritonclient.http as triton
from dialogue import Task, refusal, task, tell


def text_input(name: str, texts: list[str], binary: bool) -> Any:
    tensor = triton.InferInput(name, [len(texts)], "BYTES")
    tensor.set_data_from_numpy(np.array(texts, dtype=np.object_), binary_data=binary)
    return tensor


def ask(client: Any, given: Task) -> dict[str, Any]:
    def infer(
        texts: list[str], *outputs: Any, name: str = "TEXT", model: str = given.model, binary: bool = True
    ) -> Any:
        return client.infer(model, [text_input(name, texts, binary)], outputs=outputs or None, request_id="seven")

    def output(name: str, binary: bool) -> Any:
        return triton.InferRequestedOutput(name, binary_data=binary)

    answer = infer(given.texts)
    as_json = infer(given.texts, output("EMBEDDING", binary=False), binary=False)
    as_bytes = infer(given.texts, output("EMBEDDING", binary=True))
    pairs = [text_input("QUERY", [given.query], True), text_input("TEXT", given.documents, False)]
    scores = client.infer(given.model, pairs, outputs=[output("SCORE", binary=False)])
    handles = [client.async_infer(given.model, [text_input("TEXT", [text], True)]) for text in given.texts]
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(given.model),
        "server": client.get_server_metadata(),
        "metadata": client.get_model_metadata(given.model),
        "config": client.get_model_config(given.model),
        "id": answer.get_response()["id"],
        "vectors": {
            "default": answer.as_numpy("EMBEDDING").tolist(),
            "JSON": as_json.as_numpy("EMBEDDING").tolist(),
            "binary": as_bytes.as_numpy("EMBEDDING").tolist(),
            "at once": [handle.get_result().as_numpy("EMBEDDING")[0].tolist() for handle in handles],
        },
        "counts": answer.as_numpy("TOTAL_TOKENS").tolist(),
        "scores": scores.as_numpy("SCORE").tolist(),
        "statistics": client.get_inference_statistics(given.model),
        "unknown_model": refusal(lambda: infer(["a"], model="no-such-model")),
        "unknown_input": refusal(lambda: infer(["a"], name="NO_SUCH_INPUT", binary=False)),
        "unknown_output": refusal(lambda: infer(["a"], output("NO_SUCH_OUTPUT", binary=True))),
    }


given = task()
with triton.InferenceServerClient(given.http_address, concurrency=8) as client:
    tell(**ask(client, given))
