"""The same backend without a server, timed in a process of its own: what the server's share is measured against."""

import asyncio
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_inference_server.benchmark.dataset import Workload
from ml_inference_server.benchmark.machine import child_environment

_MODULE = "ml_inference_server.backends.ceiling"


async def time_in_process(
    python: str, experiment: Sequence[str], workload: Workload, seconds: float, timeout_s: float
) -> dict[str, Any]:
    """texts_per_s with its lowest and highest, and the title of what ran; `error` alone where it cannot be had.

    experiment: the arguments that name the settings. The server under test must be idle or gone meanwhile.
    """
    items = workload.items
    texts = [text for pair in items for text in pair] if workload.kind == "pairs" else list(items)
    with tempfile.TemporaryDirectory(prefix="ml_inference_server-") as folder:
        given, out = Path(folder) / "texts.txt", Path(folder) / "out.json"
        given.write_text("".join(" ".join(text.split()) + "\n" for text in dict.fromkeys(texts)), encoding="utf-8")
        process = await asyncio.create_subprocess_exec(
            *(python, "-m", _MODULE, *experiment),
            *("--workload", "queries" if workload.kind == "queries" else "passages"),
            *("--texts", str(given), "--seconds", str(seconds), "--json", str(out)),
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
            return {"error": f"it took longer than {timeout_s:g} s"}
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            last = next((line for line in reversed(stderr.decode(errors="replace").splitlines()) if line.strip()), "")
            return {"error": last.strip().removeprefix("error: ") or f"exit code {process.returncode}"}
        try:
            found = json.loads(out.read_text(encoding="utf-8"))
            return {
                "title": str(found["title"]),
                "texts_per_s": float(found["texts_per_s"]),
                "lowest": float(found["lowest"]),
                "highest": float(found["highest"]),
                "roofline_texts_per_s": found["roofline_texts_per_s"],
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            return {"error": f"{_MODULE} gave no figures: {type(error).__name__}: {error}"}
