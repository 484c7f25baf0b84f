"""A process that is stuck ends itself: whatever waits for it can only wait."""

import faulthandler
import os
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from shardadam.environment import LAUNCHER

EXIT_STUCK = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed when it is run again
EXIT_ORPHANED = 76

_INTERVAL = 0.25
_GRACE = 5.0
_STDERR = 2  # the descriptor: a stuck main thread may hold the lock of sys.stderr


class Watchdog:
    """Context manager: ends the process, with every thread's stack on stderr, when it overruns a deadline.

    The main thread says what it begins, by `begin`. A thread of the watchdog's compares the clock, also while the main
    thread waits in a collective, in XLA's compiler or in a loop of Python's. Where even that thread cannot run, because
    C code keeps the interpreter's lock, faulthandler's timer, which needs no lock, ends the process 5 seconds later,
    with exit code 1.

    A process whose launcher is gone ends, too: another launcher may start the same run.

    Args:
      seconds: the deadlines by name; 0: none.
    """

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self._seconds = dict(seconds)
        self._lock = threading.Lock()
        self._what, self._allowed, self._due = "", 0.0, float("inf")
        self._end = threading.Event()
        self._launcher = int(os.environ.get(LAUNCHER) or 0)  # 0: none
        self._parent = os.getppid()  # the launcher, or what it has started this process by
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def begin(self, what: str, *, times: int = 1) -> None:
        """From now on the process does `what`, and may take `times` its deadline until it begins something else."""
        allowed = self._seconds[what] * times
        with self._lock:
            self._what, self._allowed = what, allowed
            self._due = time.monotonic() + allowed if allowed else float("inf")
        if allowed:
            faulthandler.dump_traceback_later(allowed + _GRACE, exit=True, file=_STDERR)
        else:
            faulthandler.cancel_dump_traceback_later()

    def __enter__(self) -> Self:
        self._check_launcher()  # it may have gone while this process was starting
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(_INTERVAL):
            with self._lock:
                overdue = time.monotonic() > self._due
            if overdue:
                self._exit(EXIT_STUCK, f"'{self._what}' has taken more than {self._allowed:g} s, its deadline")
            self._check_launcher()

    def _check_launcher(self) -> None:
        if self._launcher and (os.getppid() != self._parent or not _exists(self._launcher)):
            self._exit(EXIT_ORPHANED, f"the launcher, process {self._launcher}, is gone")

    def _exit(self, code: int, why: str) -> None:
        try:
            os.write(_STDERR, f"watchdog: {why}; ending process {os.getpid()}, exit code {code}\n".encode())
            faulthandler.dump_traceback(file=_STDERR, all_threads=True)
        finally:  # Where the launcher is gone, so is who reads its pipe.
            os._exit(code)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)  # no signal, only the check
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
