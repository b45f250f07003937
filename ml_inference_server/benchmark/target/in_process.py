"""The same backend without a server, timed in a process of its own: what the server's share is measured against."""

import asyncio
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ml_inference_server.benchmark.load.dataset import Workload
from ml_inference_server.benchmark.result.document import InProcess, InProcessFailed
from ml_inference_server.utils.installation import child_environment

_MODULE = "ml_inference_server.engine_bench.ceiling"


def requests_of(workload: Workload, batch_size: int, most: int | None) -> Iterable[list[Any]]:
    """The first requests that a row of this batch size sends, at most `most`, until the workload starts over."""
    count = -(-len(workload.items) // batch_size)
    return (workload.batch(index, batch_size) for index in range(count if most is None else min(count, most)))


async def time_in_process(
    python: str, experiment: Sequence[str], requests: Iterable[list[Any]], seconds: float, timeout_s: float
) -> InProcess | InProcessFailed:
    """Its texts per second and the title of what ran; what was sent is for the caller to say.

    experiment: the arguments that name the settings. requests: of texts or pairs; the program takes the first of them.
    The server under test must be idle or gone meanwhile.
    """
    with tempfile.TemporaryDirectory(prefix="ml_inference_server-") as folder:
        given, out = Path(folder) / "requests.jsonl", Path(folder) / "out.json"
        given.write_text("".join(json.dumps(request) + "\n" for request in requests), encoding="utf-8")
        process = await asyncio.create_subprocess_exec(
            *(python, "-m", _MODULE, *experiment),
            *("--requests", str(given), "--seconds", str(seconds), "--json", str(out)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=child_environment(),
            start_new_session=True,  # Ctrl-C in the terminal reaches the runner only
        )
        try:
            async with asyncio.timeout(timeout_s):
                _, stderr = await process.communicate()
        except TimeoutError:
            return InProcessFailed(error=f"it took longer than {timeout_s:g} s")
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            last = next((line for line in reversed(stderr.decode(errors="replace").splitlines()) if line.strip()), "")
            return InProcessFailed(error=last.strip().removeprefix("error: ") or f"exit code {process.returncode}")
        try:
            found = json.loads(out.read_text(encoding="utf-8"))
            return InProcess(
                title=str(found["title"]),
                texts_per_s=float(found["texts_per_s"]),
                lowest=float(found["lowest"]),
                highest=float(found["highest"]),
                tokens_per_text=float(found["tokens_per_text"]),
                roofline_texts_per_s=found["roofline_texts_per_s"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            return InProcessFailed(error=f"{_MODULE} gave no figures: {type(error).__name__}: {error}")
