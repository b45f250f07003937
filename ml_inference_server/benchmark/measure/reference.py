"""FP32 answers of a model to the labelled texts: asked once of a server that is started for it, then cached."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ml_inference_server.benchmark.load.channel import Target
from ml_inference_server.benchmark.measure.progress import Progress
from ml_inference_server.benchmark.measure.quality import Answers, QualityUnknown, Slice, ask, gate, judge
from ml_inference_server.benchmark.result.document import Gate, Quality, QualityNotMeasured, ReferenceFacts, ServerFacts
from ml_inference_server.benchmark.target.interrupt import Stop
from ml_inference_server.benchmark.target.server_process import LOOPBACK, ServerOptions, ServerProcess
from ml_inference_server.utils.cache import cached, find
from ml_inference_server.utils.errors import StartError
from ml_inference_server.utils.experiment import ExperimentSettings

_FILE = "answers.npz"
_DRAIN_S = 10.0


@dataclass(frozen=True)
class QualityCheck:
    """Quality through one server, against FP32 of the same weights.

    log, start_timeout_s: of a server in FP32, where one has to be started.
    """

    info: ServerFacts
    load: ExperimentSettings
    labelled: Slice
    log: Path
    start_timeout_s: float
    stop: Stop
    progress: Progress

    async def run(self, target: Target) -> Quality | QualityNotMeasured | None:
        """The `quality` entry of a server: figures, gate, and what FP32 was; None where quality means nothing.

        A quality that cannot be found out is no pass: the gate says why. Interrupted when the stop comes first.
        """
        if self.info.resolved.random_weights or not self.info.resolved.weights_sha256:
            return None
        cross_encoder = self.info.resolved.task == "cross_encoder"
        timeout_s = self.load.request_timeout_ms / 1e3
        self.progress.begin("quality, on labelled texts", 0.0, counts=False)
        try:
            ours = await self.stop.race(ask(target, self.labelled, cross_encoder, timeout_s, self.progress.at))
            fp32, reference = await self._reference(ours)
        except (QualityUnknown, StartError) as unknown:
            gate_closed = Gate(passed=False, reasons=[f"not measured: {unknown}"])
            return QualityNotMeasured(slice=self.labelled.facts(), gate=gate_closed)
        found = judge(self.labelled, ours, fp32)
        return Quality(**dict(found), reference=reference, gate=gate(found, self.load.quality))

    async def _reference(self, ours: Answers) -> tuple[Answers, ReferenceFacts]:
        """(answers, what gave them). StartError or QualityUnknown where FP32 cannot be had."""
        ran = self.info.resolved
        key = {
            # A server of before tells only the hash of its weights.
            "model": ran.model_sha256 or ran.weights_sha256,
            "task": ran.task,
            "max_tokens": ran.max_tokens,
            "slice": self.labelled.sha256,
        }
        other = self.load.quality.reference
        entry = None if other else find("benchmark_reference", key)
        if entry is not None:
            return _load(entry), ReferenceFacts(title="FP32 of the same weights", weights_sha256=ran.weights_sha256)
        is_plain = (ran.backend, ran.device, ran.dtype, ran.compiled) == ("pytorch", "cpu", "float32", False)
        if not other and is_plain:
            _keep(key, ours)
            return ours, ReferenceFacts(title="this server itself, which is FP32", weights_sha256=ran.weights_sha256)
        self.progress.say("starting a server in FP32 for the yardstick (once for these weights and texts)")
        settings = {
            "model.name": other or ran.model,
            "model.task": ran.task,
            "model.backend": "pytorch",
            "model.device": "cpu",
            "model.max_tokens": ran.max_tokens,
        }
        arguments = ["--host", LOOPBACK, "--port", "0", "--http-port", "0"]
        for name, value in settings.items():
            arguments += ["--set", f"{name}={value}"]
        options = ServerOptions(arguments, self.log, self.start_timeout_s, _DRAIN_S, takes_environment=False)
        async with ServerProcess(options, self.stop) as server:
            ports = await self.stop.race(server.start())
            async with Target(LOOPBACK, ports["grpc_port"]) as target:
                theirs = ServerFacts.model_validate(await self.stop.race(target.server_info()))
                if not other and theirs.resolved.model_sha256 != ran.model_sha256:
                    raise QualityUnknown("the model of this machine is not that of the server, so there is no FP32")
                if theirs.resolved.dtype != "float32":
                    raise QualityUnknown(f"the yardstick is to run in FP32, and it ran as {theirs.title}")
                cross_encoder = ran.task == "cross_encoder"
                timeout_s = self.load.request_timeout_ms / 1e3
                fp32 = await self.stop.race(ask(target, self.labelled, cross_encoder, timeout_s, self.progress.at))
        if not other:
            _keep(key, fp32)
        return fp32, ReferenceFacts(title=theirs.title, weights_sha256=theirs.resolved.weights_sha256)


def _keep(key: dict[str, Any], answers: Answers) -> None:
    vectors = np.empty((0, 0), np.float32) if answers.vectors is None else answers.vectors
    cached("benchmark_reference", key, lambda folder: np.savez(folder / _FILE, scores=answers.scores, vectors=vectors))


def _load(entry: Path) -> Answers:
    with np.load(entry / _FILE, allow_pickle=False) as file:
        vectors = file["vectors"]
        return Answers(file["scores"], vectors if vectors.size else None)
