"""The Python package `tritonclient[grpc]`."""

import threading
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from dialogue import Task, refusal, task, tell


def text_input(name: str, texts: list[str]) -> Any:
    """A BYTES tensor in its binary form, as `set_data_from_numpy` makes it."""
    tensor = triton.InferInput(name, [len(texts)], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode() for text in texts], dtype=np.object_))
    return tensor


def at_once(client: Any, given: Task) -> list[list[float]]:
    """Through `async_infer`, which answers by callback."""
    answers: dict[int, Any] = {}
    done = threading.Semaphore(0)

    def callback(number: int) -> Any:
        def keep(result: Any, error: Any) -> None:
            answers[number] = error or result.as_numpy("EMBEDDING")[0].tolist()
            done.release()

        return keep

    for number, text in enumerate(given.texts):
        client.async_infer(given.model, [text_input("TEXT", [text])], callback(number))
    for _ in given.texts:
        assert done.acquire(timeout=30)
    return [answers[number] for number in range(len(given.texts))]


def ask(client: Any, given: Task) -> dict[str, Any]:
    def infer(texts: list[str], *outputs: str, name: str = "TEXT", model: str = given.model) -> Any:
        wanted = [triton.InferRequestedOutput(output) for output in outputs]
        return client.infer(model, [text_input(name, texts)], outputs=wanted or None, request_id="seven")

    answer = infer(given.texts)
    pairs = [text_input("QUERY", [given.query]), text_input("TEXT", given.documents)]
    scores = client.infer(given.model, pairs, outputs=[triton.InferRequestedOutput("SCORE")])
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(given.model),
        "server": client.get_server_metadata(as_json=True),
        "metadata": client.get_model_metadata(given.model, as_json=True),
        "config": client.get_model_config(given.model, as_json=True),
        "id": answer.get_response().id,
        "vectors": {
            "default": answer.as_numpy("EMBEDDING").tolist(),
            "asked for": infer(given.texts, "EMBEDDING").as_numpy("EMBEDDING").tolist(),
            "at once": at_once(client, given),
        },
        "counts": answer.as_numpy("TOTAL_TOKENS").tolist(),
        "scores": scores.as_numpy("SCORE").tolist(),
        "statistics": client.get_inference_statistics(given.model, as_json=True),
        "unknown_model": refusal(lambda: infer(["a"], model="no-such-model")),
        "unknown_input": refusal(lambda: infer(["a"], name="NO_SUCH_INPUT")),
        "unknown_output": refusal(lambda: infer(["a"], "NO_SUCH_OUTPUT")),
    }


given = task()
with triton.InferenceServerClient(given.grpc) as client:
    tell(**ask(client, given))
