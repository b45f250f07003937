"""The server as an application of Ray Serve: one replica is one loaded model with a scheduler, behind Ray's proxy.

    serve run ml_inference_server/deploy/ray/serve.yaml

Ray starts, places, replaces and scales replicas, and its proxies spread calls over them, of gRPC and of HTTP; what a
replica does with a call is what the server does. docs/ray.md says what differs.
"""

import asyncio
import contextlib
import logging
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.grpc_util import RayServegRPCContext
from starlette.requests import Request
from starlette.responses import Response

from ml_inference_server.deploy.ray_entrance import RayEntrance, open_ray_entrance
from ml_inference_server.deploy.ray_http import Relay, loopback_session
from ml_inference_server.deploy.ray_proxy import RETRY_AFTER_MS, Sent
from ml_inference_server.deploy.ray_scaling import BUSY_SHARE, QUEUE_WAIT_MS, QueueWaitPolicy
from ml_inference_server.metrics.view import View
from ml_inference_server.server.entrance import Foyer
from ml_inference_server.server.lifecycle import Server, serving
from ml_inference_server.utils.config import BatchingSettings, Settings, load_settings
from ml_inference_server.utils.errors import EXIT_ENGINE_LOST, ConfigError
from ml_inference_server.utils.layers import Given, experiment_file
from ml_inference_server.utils.logging import set_up_logging
from ml_inference_server.utils.process import end_process

log = logging.getLogger(__name__)

# Calls that a replica may hold beyond the bound of its own queue, which refuses with a hint: its reserve for callers
# who hold little (a fourth), and questions.
_BEYOND_THE_QUEUE = 64
_HEALTH_CHECK_EVERY_S, _HEALTH_CHECK_LIMIT_S = 2.0, 10.0
# Beyond drain_timeout_ms, for the end of engine and sidecar.
_END_S = 10.0
_ONLY_AT_THE_START = {"enabled", "share_equal_texts"}


class ServeArguments(BaseModel):
    """The arguments of `app`: `args` of an application in Serve's YAML, or KEY=VALUE of `serve run`."""

    model_config = ConfigDict(extra="forbid")

    experiment: str = Field("", description="Experiment file, or the name of one that ships; empty: the defaults.")
    variant: str = Field("", description="One of the experiment's variants.")
    set: list[str] = Field([], description="Further settings, each as key.path=value, as those of --set.")
    replicas: int = Field(1, ge=1, le=1000, description="How many there are; with max_replicas, at least.")
    max_replicas: int | None = Field(None, ge=1, le=1000, description="Scale up to so many by the wait in the queue.")
    target_wait_ms: float = Field(50.0, gt=0, description="Wait in the queue that more replicas are started for.")
    upscale_delay_s: float = Field(10.0, ge=0, description="How long the wait must be too long.")
    downscale_delay_s: float = Field(300.0, ge=0, description="How long a replica must be one too many.")
    look_back_s: float = Field(10.0, gt=0, description="Over so long waits are averaged.")
    cpus: float = Field(1.0, gt=0, description="CPUs that Ray reserves for a replica: threads of its engine.")
    gpus: float = Field(0.0, ge=0, description="GPUs that Ray reserves for a replica.")


class _Encoded:
    """A message of bytes, as Ray's replica wants to turn it into bytes itself."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def SerializeToString(self) -> bytes:
        return self._body


class InferenceReplica:
    """A loaded model behind Ray's proxy. Its public methods are what Ray calls: RPCs by their names, and hooks."""

    async def __init__(self, settings_json: str) -> None:  # type: ignore[misc]
        """StartError where the model cannot be loaded: Ray tries a few times, then says so of the deployment."""
        set_up_logging()
        self._entrance: RayEntrance
        self._end = contextlib.AsyncExitStack()
        settings = Settings.model_validate_json(settings_json)
        session = await self._end.enter_async_context(loopback_session())
        self._server: Server = await self._end.enter_async_context(serving(settings, entrance=self._enter))
        self._relay = Relay(self._server, session)
        self._watch = asyncio.create_task(self._end_if_lost())

    async def _end_if_lost(self) -> None:
        """As the server's own process ends: what hangs cannot be answered, and what Ray waits for would never end."""
        await asyncio.wait({self._server.health})
        if not self._server.health.cancelled():
            log.critical("this replica ends, to be started again: %s", self._server.health.exception())
            await self._end.aclose()
            end_process(EXIT_ENGINE_LOST)

    @contextlib.asynccontextmanager
    async def _enter(self, foyer: Foyer, view: View) -> Any:
        async with open_ray_entrance(foyer, view) as self._entrance:
            yield self._entrance

    async def __del__(self) -> None:
        """Ray awaits it once all calls are answered, or too late to be."""
        await self._end.aclose()

    # RPCs. Ray's proxy finds the method by the name of the RPC.

    async def Embed(self, sent: Sent, grpc_context: RayServegRPCContext) -> _Encoded:
        return await self._answer(sent, grpc_context)

    async def Score(self, sent: Sent, grpc_context: RayServegRPCContext) -> _Encoded:
        return await self._answer(sent, grpc_context)

    async def Rerank(self, sent: Sent, grpc_context: RayServegRPCContext) -> _Encoded:
        return await self._answer(sent, grpc_context)

    async def GetMetrics(self, sent: Sent, grpc_context: RayServegRPCContext) -> _Encoded:
        return await self._answer(sent, grpc_context)

    async def GetServerInfo(self, sent: Sent, grpc_context: RayServegRPCContext) -> _Encoded:
        return await self._answer(sent, grpc_context)

    async def Check(self, sent: Sent, grpc_context: RayServegRPCContext) -> _Encoded:
        return await self._answer(sent, grpc_context)

    async def _answer(self, sent: Sent, context: RayServegRPCContext) -> _Encoded:
        """An error is returned, not raised: Ray would drop its details and hints, and log a traceback for each."""
        outcome = await self._entrance.answer(sent, context.invocation_metadata(), context.peer())
        context.set_trailing_metadata(outcome.trailers)
        if outcome.code is not None:
            context.set_code(outcome.code)
            context.set_details(outcome.details)
        return _Encoded(outcome.body)

    async def __call__(self, request: Request) -> Response:
        """An HTTP call through Ray's proxy."""
        end = await self._relay.answer(request.scope, request.stream())
        response = Response(end.body, end.status)
        response.raw_headers = end.headers
        return response

    # Hooks

    async def check_health(self) -> None:
        """Raises where others should get the calls. Ray replaces a replica that does so three times in a row."""
        ready, why = self._server.state.readiness()
        if not ready:
            raise RuntimeError(f"not ready: {why}")

    def record_autoscaling_stats(self) -> dict[str, float]:
        model = self._server.model
        return {QUEUE_WAIT_MS: 1e3 * model.admission.expected_wait_s, BUSY_SHARE: model.batcher.busy_share}

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """user_config: settings of `batching`, laid on those of the experiment, for running replicas."""
        state = self._server.state
        batching = changed_batching(state.settings.batching, user_config)
        self._server.model.change_batching(batching)
        state.settings = state.settings.model_copy(update={"batching": batching})
        log.info("batching is now %s", batching.model_dump_json())


def changed_batching(batching: BatchingSettings, user_config: Any) -> BatchingSettings:
    """ConfigError in one sentence."""
    if not isinstance(user_config, dict):
        raise ConfigError(
            f"user_config: expected settings of batching, such as max_batch_size: 64; got {user_config!r:.100}"
        )
    if fixed := sorted(_ONLY_AT_THE_START & user_config.keys()):
        raise ConfigError(f"user_config.{fixed[0]}: is for the start only: set batching.{fixed[0]} in the experiment")
    try:
        return BatchingSettings.model_validate(batching.model_dump() | user_config)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"user_config.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def settings_of(args: ServeArguments) -> Settings:
    """Those of every replica. ConfigError."""
    file = experiment_file(args.experiment) if args.experiment else None
    # Two replicas may share a machine: each takes a free port for its page and metrics, and says so in its log.
    free = Given("metrics.port", 0, "Ray Serve (a free port for each replica)")
    given = load_settings(file, variant=args.variant, overrides=args.set, programs=[free])
    tls = given.server.tls
    if tls.cert or tls.client_ca:
        raise ConfigError(
            "server.tls: behind Ray Serve calls come through Ray's proxy: leave it out, and put TLS in front"
        )
    if given.server.workers != 1:
        raise ConfigError("server.workers: behind Ray Serve a replica is one process: leave it out, and raise replicas")
    if given.model.threads or given.model.streams:
        return given
    cpus = max(1, int(args.cpus))
    streams = min(2, cpus) if not args.gpus else 1
    model = given.model.model_copy(update={"streams": streams, "threads": max(1, cpus // streams)})
    return given.model_copy(update={"model": model})


def app(args: ServeArguments) -> Application:
    """The application builder, for `import_path`."""
    settings = settings_of(args)
    queue = settings.batching.max_queue_requests
    scaling: dict[str, Any] = {"num_replicas": args.replicas}
    if args.max_replicas is not None:
        policy = AutoscalingPolicy(policy_function=QueueWaitPolicy, policy_kwargs={"target_ms": args.target_wait_ms})
        config = AutoscalingConfig(
            min_replicas=args.replicas,
            max_replicas=args.max_replicas,
            upscale_delay_s=args.upscale_delay_s,
            downscale_delay_s=args.downscale_delay_s,
            look_back_period_s=args.look_back_s,
            policy=policy,
        )
        scaling = {"autoscaling_config": config}
    deployment = serve.deployment(
        InferenceReplica,
        name="InferenceReplica",
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
        max_ongoing_requests=queue + queue // 4 + _BEYOND_THE_QUEUE,
        max_queued_requests=queue,
        backpressure_config={"status_code": 429, "retry_after_s": RETRY_AFTER_MS / 1000},
        health_check_period_s=_HEALTH_CHECK_EVERY_S,
        health_check_timeout_s=_HEALTH_CHECK_LIMIT_S,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.server.drain_timeout_ms / 1000 + _END_S,
        **scaling,
    )
    return deployment.bind(settings.model_dump_json())
