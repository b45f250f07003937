"""Runs in Ray's environment: a cluster on this machine, and commands from stdin, each answered with a line."""

import argparse
import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.config import gRPCOptions
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from ml_inference_server.deploy.ray_serve import ServeArguments, changed_batching, settings_of
from ml_inference_server.utils.config import BatchingSettings
from ml_inference_server.utils.errors import ConfigError

STORE_BYTES = 80 * 1024 * 1024


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Steered:
    def __init__(self, nodes: int, cpus: int) -> None:
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False},
        )
        self.nodes = [self.add_node(cpus) for _ in range(nodes)]
        self.cpus = cpus
        self.applications: dict[str, dict[str, Any]] = {}

    def add_node(self, cpus: int) -> Any:
        return self.cluster.add_node(num_cpus=cpus, object_store_memory=STORE_BYTES)

    def start(self) -> dict[str, int]:
        """The ports of the proxy, by protocol."""
        ray.init(address=self.cluster.address, log_to_driver=False)
        ports = {"grpc": free_port(), "http": free_port()}
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": "127.0.0.1", "port": ports["http"], "request_timeout_s": 60},
            grpc_options=gRPCOptions(
                port=ports["grpc"],
                grpc_servicer_functions=["ml_inference_server.deploy.ray_proxy.add_inference_service"],
                request_timeout_s=60,
            ),
        )
        return ports

    def deploy(self, arguments: dict[str, Any], user_config: Any, name: str = "default", wait_s: float = 90) -> str:
        """As `serve deploy` does: all applications at once. Empty once this one runs; else what Ray says of it."""
        deployments = [] if user_config is None else [{"name": "InferenceReplica", "user_config": user_config}]
        self.applications[name] = {
            "name": name,
            "route_prefix": "/" if name == "default" else f"/{name}",
            "import_path": "ml_inference_server.deploy.ray_serve:app",
            "args": arguments,
            "deployments": deployments,
        }
        self._apply()
        give_up_at = time.monotonic() + wait_s
        while time.monotonic() < give_up_at:
            app = serve.status().applications[name]
            if app.status == "RUNNING" and all(each.status == "HEALTHY" for each in app.deployments.values()):
                return ""
            if app.status == "DEPLOY_FAILED":
                return self.messages(name)
            time.sleep(0.1)
        return self.messages(name) or "it did not come to run in time"

    def _apply(self) -> None:
        config = ServeDeploySchema(applications=list(self.applications.values()))
        _get_global_client().deploy_apps(config, _blocking=False)

    def messages(self, name: str = "default") -> str:
        app = serve.status().applications[name]
        return " ".join([app.message, *(each.message for each in app.deployments.values())])

    def states(self, name: str = "default") -> dict[str, int]:
        """How many replicas are in which state."""
        deployments = serve.status().applications[name].deployments
        return {str(state): count for each in deployments.values() for state, count in each.replica_states.items()}

    def remove_node(self) -> None:
        """Without a word, as a machine goes that loses its power."""
        self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)

    def give_node(self) -> None:
        self.nodes.append(self.add_node(self.cpus))

    def read(self, path: str) -> dict[str, Any]:
        """A file for `serve run`: how much gRPC it opens, and what its application makes of its arguments."""
        config = ServeDeploySchema(**yaml.safe_load(Path(path).read_text(encoding="utf-8")))
        args = ServeArguments(**config.applications[0].args)
        settings = settings_of(args)
        return {
            "services": len(gRPCOptions(**config.grpc_options.model_dump()).grpc_servicer_func_callable),
            "experiment": settings.name,
            "threads": settings.model.threads,
            "replicas": args.replicas,
        }

    def explain(self, user_config: Any) -> str:
        """What a replica says to it, where it says no."""
        try:
            changed_batching(BatchingSettings(), user_config)
        except ConfigError as error:
            return str(error)
        return ""

    def forget(self, name: str) -> None:
        del self.applications[name]
        self._apply()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=2)
    args = parser.parse_args()
    steered = Steered(args.nodes, args.cpus)
    for line in sys.stdin:
        said = json.loads(line)
        try:
            answer = {"value": getattr(steered, said.pop("do"))(**said)}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        print("ANSWER", json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
