"""A loaded, warm model, and all that stands between it and a request: admission, batcher, service."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from ml_inference_server.backends.base import BackendInfo, enable_faults
from ml_inference_server.backends.startup.start import Described, start_backend
from ml_inference_server.metrics.registry import Metrics
from ml_inference_server.server.admission import Admission
from ml_inference_server.server.answer_cache import BYTES_PER_MB, AnswerCache
from ml_inference_server.server.caller_limits import NO_LIMITS, CallerLimits
from ml_inference_server.server.engine_rate import EngineRate
from ml_inference_server.server.names import ModelNames
from ml_inference_server.server.process_worker import ProcessWorker
from ml_inference_server.server.scheduler import DynamicBatcher, batch_limits
from ml_inference_server.server.service import InferenceService
from ml_inference_server.server.workers import ThreadWorker, Worker
from ml_inference_server.utils.config import BatchingSettings, Settings
from ml_inference_server.utils.errors import ConfigError
from ml_inference_server.utils.limit_settings import LimitSettings

T = TypeVar("T")

Load = Callable[[Settings, Callable[[str], None]], Awaitable[tuple[Described, Worker]]]
"""From settings to a loaded, warm model and the worker that runs it; says in a sentence what it is busy with."""


async def load_model(settings: Settings, phase: Callable[[str], None]) -> tuple[Described, Worker]:
    """In processes of its own, or in threads of this one, as the settings say."""
    model = settings.model
    faults = settings.server.enable_test_faults
    if model.process_per_stream:
        worker = ProcessWorker(hang_timeout_s=settings.server.hang_timeout_ms / 1000, faults=faults)
        return await worker.start(model, phase), worker
    started = await _in_daemon_thread(lambda: start_backend(model, phase))
    if faults:
        enable_faults(started.backend)
    return started, ThreadWorker(started.backend)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyModel:
    described: Described
    worker: Worker
    admission: Admission
    batcher: DynamicBatcher
    service: InferenceService

    @property
    def info(self) -> BackendInfo:
        return self.described.info

    def change_batching(self, settings: BatchingSettings) -> None:
        """Batches and bounds of the queue from now on; ConfigError where the model cannot run so.

        `enabled` and `share_equal_texts` are for the start only, and stay what they were.
        """
        _check_batch_tokens(settings, self.info)
        limits = batch_limits(settings, self.info)
        self.batcher.change_limits(limits)
        self.admission.change(settings, batch_tokens=limits.max_batch_tokens)

    def close(self) -> None:
        """End at once: requests that wait are answered with Unavailable."""
        self.batcher.close()
        self.service.close()


def assemble(
    settings: Settings,
    described: Described,
    worker: Worker,
    metrics: Metrics,
    *,
    limits_of: Callable[[str], CallerLimits] | None = None,
) -> ReadyModel:
    """ConfigError where settings and model disagree. limits_of: a caller; None: `server.limits` for each."""
    info = described.info
    _check_batch_tokens(settings.batching, info)
    rate = EngineRate()
    limits = batch_limits(settings.batching, info)
    admission = Admission(
        settings.batching,
        rate,
        batch_tokens=limits.max_batch_tokens,
        stuck=lambda: worker.stuck,
        limits_of=limits_of or same_limits(settings.server.limits),
    )
    batcher = DynamicBatcher(
        worker,
        limits,
        rate,
        metrics,
        share_equal_texts=settings.batching.share_equal_texts,
        hang_timeout_s=settings.server.hang_timeout_ms / 1000,
        cache=AnswerCache(settings.cache.max_mb * BYTES_PER_MB) if settings.cache.max_mb else None,
    )
    names = ModelNames(
        settings.model.name,
        (info.model, *settings.server.model_aliases),
        accept_any=settings.server.accept_any_model,
    )
    service = InferenceService(described.tokenizer, info, admission, batcher, settings.server, metrics, names)
    return ReadyModel(described=described, worker=worker, admission=admission, batcher=batcher, service=service)


def _check_batch_tokens(settings: BatchingSettings, info: BackendInfo) -> None:
    if settings.max_batch_tokens and settings.max_batch_tokens < info.max_tokens:
        raise ConfigError(
            f"batching.max_batch_tokens is {settings.max_batch_tokens}, but one text may have "
            f"{info.max_tokens} tokens: raise it, or lower model.max_tokens"
        )


def same_limits(settings: LimitSettings) -> Callable[[str], CallerLimits]:
    """For each caller but the server itself, whose health probe has none."""
    limits = CallerLimits(settings.requests_per_s, settings.tokens_per_s, settings.queue_share)
    if limits == NO_LIMITS:
        return lambda caller: NO_LIMITS
    return lambda caller: limits if caller else NO_LIMITS


def _in_daemon_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """Like run_in_executor, but the interpreter does not wait for it at exit: loading can take minutes."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(result)

    done.set_running_or_notify_cancel()
    threading.Thread(target=run, name="load", daemon=True).start()
    return asyncio.wrap_future(done)
