"""How long Python's threads run while others wait for their turn."""

import contextlib
import sys
import threading
from collections.abc import Iterator

_SHORT = 1e-4  # seconds

_lock = threading.Lock()
_within = 0
_usual = 0.0


@contextlib.contextmanager
def short_turns() -> Iterator[None]:
    """Within, a thread runs for 0.1 ms while others wait, not for 5 ms; several threads may be within at a time.

    For the beginning of a save: at every file and thread that it makes it would else wait for Orbax's threads, which
    write already, for so long.
    """
    global _within, _usual
    with _lock:
        if not _within:
            _usual = sys.getswitchinterval()
            sys.setswitchinterval(min(_usual, _SHORT))
        _within += 1
    try:
        yield
    finally:
        with _lock:
            _within -= 1
            if not _within:
                sys.setswitchinterval(_usual)
