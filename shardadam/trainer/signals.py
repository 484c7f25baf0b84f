"""Ctrl-C and SIGTERM: the first asks the run to stop after its step, the second ends the process at once."""

import contextlib
import os
import signal
import socket
import sys
import threading
from types import TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Context manager: while it is open, `requested` tells whether a signal has asked to stop.

    Python runs a signal's handler between two of its own instructions, which may be minutes away while XLA compiles.
    So a thread listens at the wakeup descriptor, to which the interpreter writes the moment a signal comes.
    Outside of the main thread, which alone may set handlers, signals are left as they are.
    """

    def __init__(self) -> None:
        self.requested = threading.Event()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)  # as set_wakeup_fd demands
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="stop-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if not self._previous:
            return
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            # None: a handler of C's, as jax.distributed has one for SIGTERM; Python cannot set it again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._writer.close()  # ends the thread's recv
        self._thread.join()
        self._reader.close()

    def _listen(self) -> None:
        while received := self._reader.recv(1):
            number = received[0]
            if number not in _SIGNALS:
                continue
            name = signal.Signals(number).name
            if self.requested.is_set():
                try:
                    print(f"\n{name} again: stopping at once, without saving", file=sys.stderr, flush=True)
                finally:  # whether anybody reads it or not
                    os._exit(128 + number)  # sys.exit would only end this thread
            self.requested.set()
            with contextlib.suppress(OSError):
                print(
                    f"\n{name}: finishing the step, then saving; once more stops at once", file=sys.stderr, flush=True
                )
