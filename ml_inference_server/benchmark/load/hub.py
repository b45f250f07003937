"""MS MARCO from the Hugging Face hub, in a process of its own that can be given up at any moment.

A name look-up that hangs cannot be interrupted from inside Python, and importing `datasets` takes seconds: so a child
process first asks whether the hub answers at all, and is killed when that takes too long. It writes JSON lines:
{"reached": true}, then {"record": ...} for each record, then {"end": true}; or {"failed": "why"} at any point.
"""

import asyncio
import json
import os
import sys
from typing import Any

from ml_inference_server.utils.installation import child_environment

HUB_CONFIGS = ("v1.1", "v2.1")
# About 8,000 pairs: more than the shipped suites send in one row.
RECORDS = 1000
REACH_TIMEOUT_S = 8.0
FETCH_TIMEOUT_S = 120.0
_REPOSITORY = "microsoft/ms_marco"


class HubUnreachable(Exception):
    """MS MARCO could not be had; the message says why, in a few words."""


async def fetch_ms_marco(config: str, records: int = RECORDS, reach_timeout_s: float = REACH_TIMEOUT_S) -> list[Any]:
    """The first `records` records of the validation split, in the hub's own layout."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", __name__, config, str(records)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=child_environment(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_TELEMETRY="1"),
        limit=1 << 24,  # one record is one line
        start_new_session=True,
    )
    assert child.stdout is not None  # noqa: S101 - for the type checker: it was asked for above
    found: list[Any] = []
    limit_s = reach_timeout_s
    try:
        async with asyncio.timeout(limit_s) as limit:
            async for line in child.stdout:
                message = json.loads(line)
                if "failed" in message:
                    raise HubUnreachable(message["failed"])
                if "end" in message:
                    return found
                if "reached" in message:
                    limit_s = FETCH_TIMEOUT_S
                    limit.reschedule(asyncio.get_running_loop().time() + limit_s)
                else:
                    found.append(message["record"])
        raise HubUnreachable("the fetching process died")
    except TimeoutError:
        raise HubUnreachable(f"no answer within {limit_s:g} s") from None
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


def _say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def _main(config: str, records: int) -> None:
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _say(failed="HF_HUB_OFFLINE is set")
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=REACH_TIMEOUT_S).close()  # noqa: S310 - an https address
    except urllib.error.HTTPError as error:
        return _say(failed=f"the hub answers HTTP {error.code}")
    except OSError as error:
        return _say(failed=f"no network: {getattr(error, 'reason', error)}")
    _say(reached=True)
    try:
        from datasets import load_dataset

        stream = load_dataset(_REPOSITORY, config, split="validation", streaming=True)
        for record in stream.take(records):
            _say(record={key: record[key] for key in ("query_id", "query", "passages")})
    except Exception as error:
        return _say(failed=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return _say(end=True)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
    # The stream's threads can crash an orderly exit of the interpreter.
    os._exit(0)
