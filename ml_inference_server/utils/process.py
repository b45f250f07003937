"""How every program of ours begins and ends: its standard streams, the limits it runs under, what it leaves behind."""

import contextlib
import errno
import logging
import os
import select
import signal
import stat
import sys
from collections.abc import Callable
from typing import NoReturn

from ml_inference_server.utils.cache import remove_temporary
from ml_inference_server.utils.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, ConfigError, StartError
from ml_inference_server.utils.installation import extra_of, pip_install

if sys.platform != "win32":
    import resource

# Measured at the start: about 40 with PyTorch. Every connection takes one more.
_LEAST_FILES = 128
# Below these, libraries abort, crash or wait for ever, where no exception can be caught: gRPC's threads do not start,
# or one of the numerical libraries that come with an engine asks for memory again and again.
_LEAST_ADDRESS_SPACE_BYTES = 1 << 30
ENGINE_ADDRESS_SPACE_BYTES = 3 << 30
log = logging.getLogger(__name__)

_STREAMS = ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w"))


def begin_process() -> None:
    """First thing in a program. ConfigError where a limit (ulimit) lets it not even start."""
    _open_closed_streams()
    if sys.platform == "win32":
        return
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < _LEAST_FILES:
        raise ConfigError(
            f"only {files} files may be open at once, and {_LEAST_FILES} are needed, more for many connections: "
            f"ulimit -n 4096"
        )
    check_address_space(_LEAST_ADDRESS_SPACE_BYTES)


def run_to_exit_code(work: Callable[[], int]) -> int:
    """Begin the process and run `work`: its exit code, or that of what it raised, told in one line on stderr."""
    try:
        begin_process()
        return work()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except StartError as caught:
        return _told(limit_behind(caught.__cause__) or caught)
    except ModuleNotFoundError as error:
        extra = extra_of(error.name or "")
        if extra is None:
            log.exception("a module is missing")
            return EXIT_INTERNAL
        return _told(ConfigError(f"the package {error.name} is not installed: {pip_install(extra)}"))
    except Exception as error:
        if (limit := limit_behind(error)) is None:
            log.exception("the program failed")
            return EXIT_INTERNAL
        log.debug("a limit was met", exc_info=error)
        return _told(limit)


def _told(error: StartError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def check_address_space(least_bytes: int) -> None:
    """ConfigError if this process may not have as much."""
    if sys.platform == "win32":
        return
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY and space < least_bytes:
        raise ConfigError(
            f"the address space is limited to {space >> 20} MiB, and {least_bytes >> 20} MiB are needed, with a large "
            f"model more: ulimit -v unlimited"
        )


def end_process(code: int) -> NoReturn:
    """At once, whatever other threads do: one that loads, or hangs in a library, must not keep the process alive."""
    remove_temporary()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def limit_behind(error: BaseException | None) -> ConfigError | None:
    """What to say where a limit of the process or a full disk is behind `error`; None where it is something else."""
    while error is not None:
        text = str(error).lower()
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.EMFILE, errno.ENFILE):
            return ConfigError(f"no more files may be open at once ({error}): raise the limit, ulimit -n 4096")
        if number in (errno.ENOSPC, errno.EDQUOT) or "no space left on device" in text:
            reason = " ".join(str(error).split())[:200]
            return ConfigError(f"the disk is full ({reason}): make room there, or set MLIS_CACHE_DIR and TMPDIR")
        if number == errno.EFBIG:
            return ConfigError(f"a file would be larger than this process may write ({error}): ulimit -f unlimited")
        no_memory = ("failed to map segment", "cannot allocate memory", "can't allocate memory", "bad_alloc")
        if isinstance(error, MemoryError) or number == errno.ENOMEM or any(each in text for each in no_memory):
            reason = " ".join(str(error).split())[:200] or "out of memory"
            return ConfigError(f"there is not enough memory ({reason}): free some, or ulimit -v unlimited")
        if "can't start new thread" in text:
            return ConfigError("no more threads can be started: raise the limits, ulimit -u and ulimit -v unlimited")
        error = error.__cause__ or error.__context__
    return None


def hangup_signal() -> signal.Signals | None:
    """SIGHUP, unless whoever started this process (nohup) had it ignored."""
    if sys.platform == "win32" or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return None
    return signal.SIGHUP


def leave_dead_streams() -> None:
    """Turn output to nowhere whose terminal or reader has gone: a program that has files to write must not fail."""
    for number in (1, 2):
        if _is_dead(number):
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)
            os.close(null)


def _is_dead(number: int) -> bool:
    mode = os.fstat(number).st_mode
    if stat.S_ISCHR(mode):
        return not os.isatty(number)
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        poll = select.poll()
        poll.register(number, 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    return False


def _open_closed_streams() -> None:
    """Libraries would take the free numbers 0 to 2 for their sockets, and print into them or abort at the end."""
    for number, name, mode in _STREAMS:
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
