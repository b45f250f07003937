"""What a fault does to processes from outside: who runs, who is stopped, and what stands in another one's socket."""

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Iterator
from pathlib import Path

import psutil

_PIDFD_GETFD = 438  # the same number on all architectures
MARK = "MLIS_TEST_MARK"


def engine_pids(server_pid: int) -> list[int]:
    """The processes of the engine, those that are just starting as well."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(server_pid).children() if _is_engine(child)]
    return []


def _is_engine(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "spawn_main" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
    return False


def is_gone(pid: int) -> bool:
    """Ended, whether or not its parent has noticed."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def is_stopped(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


def marked(mark: str) -> list[int]:
    """All processes that live and were started, through however many others, with MARK=mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in (folder / "environ").read_bytes().split(b"\0") and not is_gone(int(folder.name)):
                    found.append(int(folder.name))
    return found


@contextlib.contextmanager
def socket_of(pid: int) -> Iterator[socket.socket]:
    """The one socket that a process of the engine has, which is that to its server, as a descriptor of our own."""
    numbers = [
        int(link.name)
        for link in Path(f"/proc/{pid}/fd").iterdir()
        if str(link.readlink()).startswith("socket:") and int(link.name) > 2
    ]
    assert len(numbers) == 1, f"process {pid} has {len(numbers)} sockets"
    handle = os.pidfd_open(pid)
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        ours = libc.syscall(_PIDFD_GETFD, handle, numbers[0], 0)
    finally:
        os.close(handle)
    if ours < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    with socket.socket(fileno=ours) as connection:
        yield connection


def unread_bytes(connection: socket.socket) -> int:
    """What was written into this end and not read at the other one."""
    return int(struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))[0])


def waiting_bytes(connection: socket.socket) -> int:
    """What the other end has written and this one has not read."""
    return int(struct.unpack("i", fcntl.ioctl(connection, termios.FIONREAD, bytes(4)))[0])
