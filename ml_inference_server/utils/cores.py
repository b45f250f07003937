"""How the CPUs of a machine are divided among processes, so that none of them shares one by accident. Linux."""

import contextlib
import itertools
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ml_inference_server.utils.cpu import available_cpus
from ml_inference_server.utils.errors import ConfigError

SYSTEM = Path("/sys/devices/system/cpu")


@dataclass(frozen=True, order=True)
class Cpu:
    """A logical CPU. package, cache, core: the lowest CPU that it shares these with; a core may be two CPUs."""

    package: int
    cache: int
    core: int
    number: int


def described(cpus: Iterable[int], root: Path = SYSTEM) -> list[Cpu]:
    """In an order in which neighbours share most. What a machine does not tell counts as shared (cache) or not (core).

    The last-level cache is the highest level that the system lists.
    """
    return sorted(
        Cpu(
            package=_number(root / f"cpu{number}/topology/physical_package_id", 0),
            cache=_last_level_cache(root / f"cpu{number}/cache"),
            core=_lowest(root / f"cpu{number}/topology/thread_siblings_list", number),
            number=number,
        )
        for number in cpus
    )


def groups(cpus: Iterable[int], root: Path = SYSTEM) -> int:
    """How many last-level caches these CPUs have."""
    return len({(cpu.package, cpu.cache) for cpu in described(cpus, root)})


def worker_count(asked: int) -> int:
    """How many processes `server.workers` means on this machine."""
    if asked or not hasattr(os, "sched_getaffinity"):
        return asked or 1
    return min(groups(os.sched_getaffinity(0)), available_cpus())


def divided(cpus: Iterable[int], count: int, root: Path = SYSTEM) -> list[list[int]]:
    """The CPUs in `count` parts of equal size, give or take a core: what shares a cache stays together where it can.

    The two CPUs of a core stay together unless there are fewer cores than parts. ConfigError for more parts than CPUs.
    """
    ordered = described(cpus, root)
    if len(ordered) < count:
        raise ConfigError(
            f"server.workers is {count}, but this process may use {len(ordered)} CPUs: lower it, or set "
            f"server.pin_workers=false to let workers share CPUs"
        )
    by_core: dict[tuple[int, int], list[int]] = {}
    for cpu in ordered:
        by_core.setdefault((cpu.package, cpu.core), []).append(cpu.number)
    units = list(by_core.values()) if len(by_core) >= count else [[cpu.number] for cpu in ordered]
    cuts = [len(units) * place // count for place in range(count + 1)]
    return [sorted(number for unit in units[begin:end] for number in unit) for begin, end in itertools.pairwise(cuts)]


@contextlib.contextmanager
def claimed(cpus: Sequence[int], name: str = "ml-inference-server-cpu") -> Iterator[None]:
    """No other server that claims its CPUs gets one of these inside. ConfigError where another one has some.

    Names in the abstract namespace of sockets: the kernel forgets them with the process, however it ends. Containers
    with a network of their own do not see each other's.
    """
    with contextlib.ExitStack() as stack:
        taken: list[int] = []
        for number in cpus:
            claim = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            try:
                claim.bind(f"\0{name}-{number}")
            except OSError:
                taken.append(number)
        if taken:
            raise ConfigError(
                f"another server with server.workers has CPUs {listed(taken)}: start each server with CPUs of its own "
                f"(taskset -c 0-7 mlis serve …), or set server.pin_workers=false"
            )
        yield


@contextlib.contextmanager
def threads_stay_free() -> Iterator[None]:
    """Afterwards all threads of this process may run where its caller may, whoever bound them to a core inside."""
    if not hasattr(os, "sched_getaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    try:
        yield
    finally:
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended
                os.sched_setaffinity(int(thread.name), allowed)


def listed(cpus: Iterable[int]) -> str:
    """As Linux writes it: 0-3,8."""
    runs: list[list[int]] = []
    for number in sorted(cpus):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _last_level_cache(folder: Path) -> int:
    """The lowest CPU that shares it; -1 where the machine lists none."""
    levels = {_number(index / "level", 0): index for index in folder.glob("index*")}
    return _lowest(levels[max(levels)] / "shared_cpu_list", -1) if levels else -1


def _lowest(file: Path, otherwise: int) -> int:
    """The first number of a list such as 0-3,8."""
    try:
        return int(file.read_text().split(",")[0].split("-")[0])
    except (OSError, ValueError):
        return otherwise


def _number(file: Path, otherwise: int) -> int:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return otherwise
