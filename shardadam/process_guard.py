"""Ends groups of processes with all that they have started: as the launcher does, and, when that is killed, its guard.

Run as a script, which needs nothing but this file, it is the guard: a process that outlives the launcher.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable

_INTERVAL = 0.02  # seconds
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def signal_groups(groups: Iterable[int], number: int) -> set[int]:
    """Sends a signal (0: none) to whole groups; returns those that still have a process.

    A group's number is not given to another as long as one of its processes is left, though its first one be gone.
    """
    left = set()
    for group in groups:
        # Not permitted: on macOS, where nothing of it is left that runs.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)
            left.add(group)
    return left


def end_groups(groups: Iterable[int], grace: float) -> None:
    """SIGTERM to all processes of these groups, and SIGKILL to what is left after `grace` seconds."""
    deadline = time.monotonic() + grace
    left = signal_groups(groups, signal.SIGTERM)
    while left and time.monotonic() < deadline:
        time.sleep(_INTERVAL)
        left = signal_groups(left, 0)
    signal_groups(left, signal.SIGKILL)


class Guard:
    """A process that ends these groups if this one goes without having done so, by SIGKILL for one.

    It knows that from its pipe, which the system closes then. Linux's PR_SET_PDEATHSIG would not reach the children of
    the groups' processes, and has to be set between fork and exec, where Python is not safe beside threads.

    Args:
      grace: seconds between SIGTERM and SIGKILL.
    """

    def __init__(self, grace: float) -> None:
        self._told: set[int] = set()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(grace)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # not the launcher's: who reads that waits for its end
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # what ends the launcher's group must not end it
        )

    def watch(self, groups: Collection[int]) -> None:
        """These from now on, in place of those before."""
        if self._told != set(groups):
            self._told = set(groups)
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # somebody has killed it
                self._process.stdin.write(f"{' '.join(map(str, groups))}\n".encode())
                self._process.stdin.flush()

    def close(self) -> None:
        """Ends the guard; it does nothing more to groups that it was told of last."""
        self.watch(())
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def main(grace: float) -> None:
    """The guard's life: reads groups until the pipe is closed, then ends the last ones."""
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)
    groups: list[int] = []
    for line in sys.stdin:
        if line.endswith("\n"):  # else the launcher was killed while it wrote
            groups = [int(group) for group in line.split()]
    end_groups(groups, grace)


if __name__ == "__main__":
    main(float(sys.argv[1]))
