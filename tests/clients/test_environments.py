"""What the clients run in."""

from tests.clients.environments import Environment

# The clients must not decide about the engine, and 3 GB of it would have to be fetched for nothing.
ENGINES = {"torch", "transformers", "onnxruntime", "tensorflow"}


def test_no_client_brings_an_engine(clients: Environment) -> None:
    installed = clients.packages()
    assert not ENGINES & set(installed)
    assert {"openai", "cohere", "huggingface-hub", "tritonclient", "tei-client"} <= set(installed)
    assert (clients.node_folder / "node_modules" / "openai").is_dir()
