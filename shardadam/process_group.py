"""A program in several processes on this machine: started, listened to, and ended together."""

import contextlib
import math
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from shardadam.process_guard import Guard, end_groups, signal_groups

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_INSISTING = (signal.SIGINT, signal.SIGTERM)  # not SIGHUP, which systemd sends along with SIGTERM
_INTERVAL = 0.05  # seconds


class Failure(NamedTuple):
    """The first process of a group that failed."""

    index: int
    code: int  # as Popen has it: negative for a signal
    why: str = ""

    @property
    def exit_code(self) -> int:
        """As a shell tells it: 128 + the number of the signal."""
        return self.code if self.code >= 0 else 128 - self.code

    def __str__(self) -> str:
        how = f"exit code {self.code}" if self.code >= 0 else signal.Signals(-self.code).name
        return f"process {self.index} ended with {how}{self.why}"


class Signals:
    """Context manager: collects the signals that come meanwhile, for the processes to get them."""

    def __init__(self) -> None:
        self.ending = False  # whether one of them asks for the end
        self._received: queue.SimpleQueue[int] = queue.SimpleQueue()

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._receive) for number in _FORWARDED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take(self) -> int | None:
        """One that has not been taken yet; None if there is none."""
        with contextlib.suppress(queue.Empty):
            return self._received.get_nowait()
        return None

    def ending_within(self, seconds: float) -> bool:
        """Waits; True as soon as one asks for the end."""
        deadline = time.monotonic() + seconds
        while not self.ending and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, _INTERVAL))
        return self.ending

    def _receive(self, number: int, frame: object) -> None:
        self.ending = self.ending or number in _ENDING
        self._received.put(number)


class ProcessGroup:
    """One command in several processes. Their lines come out with the process's number in front.

    Whatever ends it, this process's end by SIGKILL too, ends all that they have started, as long as that has stayed in
    its process's session.

    Args:
      command: the program and its arguments.
      environments: one for each process.
      grace: seconds between SIGTERM and SIGKILL for the processes that are left after a failure.
      stop_grace: seconds that they may take to end after a signal that asks for it.
    """

    def __init__(
        self, command: Sequence[str], environments: Sequence[Mapping[str, str]], *, grace: float, stop_grace: float
    ) -> None:
        self._grace, self._stop_grace = grace, stop_grace
        self._due, self._asked = math.inf, False  # when they have to have ended; by SIGINT or SIGTERM
        self._ended: queue.Queue[tuple[int, int]] = queue.Queue()
        self._writing = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._guard, self._groups = Guard(grace), set[int]()  # those of which any process is left
        try:
            for environment in environments:
                self._processes.append(self._start(command, environment))
                self._groups.add(self._processes[-1].pid)
                self._guard.watch(self._groups)
        except OSError:
            self._end_all()
            raise

    def run(self, signals: Signals) -> Failure | None:
        """Waits for the end of all; after the first failure ends the others. Passes signals on.

        After a second SIGINT or SIGTERM, or `stop_grace` seconds after the first, ends all.

        Returns:
          The failure; None if all processes ended with 0.
        """
        width = len(str(len(self._processes) - 1))
        for index, process in enumerate(self._processes):
            prefix = f"[{index:{width}}] ".encode()
            self._thread(self._copy, process.stdout, sys.stdout.buffer, prefix)
            self._thread(self._copy, process.stderr, sys.stderr.buffer, prefix)
            self._thread(self._await, index, process)
        failure, running = None, len(self._processes)
        try:
            while running and failure is None and time.monotonic() < self._due:
                self._pass_on(signals)
                self._forget_ended_groups()
                with contextlib.suppress(queue.Empty):
                    index, code = self._ended.get(timeout=_INTERVAL)
                    running -= 1
                    failure = Failure(index, code) if code else None
        finally:
            self._end_all()
        while running and failure is None:
            index, code = self._ended.get()
            running -= 1
            failure = Failure(index, code, "; it was asked to end, and then made to") if code else None
        for thread in self._threads:
            thread.join(self._grace)  # not forever: what has left the session may keep a pipe open
        return failure

    @staticmethod
    def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C goes to its whole group: they would get it twice
        )

    def _pass_on(self, signals: Signals) -> None:
        while (number := signals.take()) is not None:
            for process in self._processes:
                process.send_signal(number)  # does nothing where the process has ended
            if number in _ENDING:
                again = self._asked and number in _INSISTING
                self._asked = self._asked or number in _INSISTING
                self._due = min(self._due, time.monotonic() + (0 if again else self._stop_grace))

    def _forget_ended_groups(self) -> None:
        """So that no signal goes to whoever has got their numbers since."""
        self._groups = signal_groups(self._groups, 0)
        self._guard.watch(self._groups)

    def _end_all(self) -> None:
        """Ends what is left, and all that it has started, and what ended ones have."""
        end_groups(self._groups, self._grace)
        for process in self._processes:
            process.wait()
        self._guard.close()

    def _thread(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _await(self, index: int, process: subprocess.Popen[bytes]) -> None:
        self._ended.put((index, process.wait()))

    def _copy(self, source: BinaryIO, target: BinaryIO, prefix: bytes) -> None:
        """Whole lines at a time, so that those of two processes do not mix."""
        with source:
            for line in source:
                with self._writing:
                    target.write(prefix + line.rstrip(b"\r\n") + b"\n")
                    target.flush()
