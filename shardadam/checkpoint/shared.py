"""What the processes of a run settle about their checkpoint directory: that they share it, and who holds it."""

import contextlib
import logging
import socket
import time
import uuid
from pathlib import Path

import jax

from shardadam import runtime
from shardadam.checkpoint import lock
from shardadam.checkpoint.errors import CheckpointError
from shardadam.checkpoint.together import on_process_zero

_SEEN_WITHIN = 10.0  # seconds
_POLL = 0.05

log = logging.getLogger("shardadam.checkpoint")


def check_shared(directory: Path, *, seconds: float = _SEEN_WITHIN) -> None:
    """Finds out whether all processes see one and the same directory: process 0 writes a file, the others look for it.

    Does nothing where there is one process, and where process 0 cannot write there, as a run cannot that only reads.

    Args:
      directory: as each process has it.
      seconds: how long a file may take to be seen.

    Raises:
      CheckpointError: in every process, naming those that do not see the file: process, host, path.
    """
    if runtime.coordination_client() is None:
        return
    token = directory / f"{lock.NAME}.shared.{uuid.uuid4().hex}"  # Left by a process that was killed, a lock sweeps it.
    name = runtime.from_process_zero("shared", _written(token))
    blind = "" if not name or _seen(directory / name, seconds) else f"host {socket.gethostname()}, {directory}"
    said = runtime.from_every_process("sharing", blind)
    if jax.process_index() == 0:
        token.unlink(missing_ok=True)
    if any(said):
        wrong = "; ".join(f"process {index} ({where})" for index, where in enumerate(said) if where)
        raise CheckpointError(
            f"{directory}: not one directory for all processes: what process 0 wrote there is not seen by {wrong}; "
            "give all of them a directory on one shared file system"
        )


def acquire_for_all(held: lock.WriterLock) -> None:
    """Process 0 takes the lock for the run; every process calls this, and all raise where it cannot.

    Raises:
      CheckpointError: another run holds the directory.
      OSError: process 0 cannot write there.
    """
    on_process_zero("writer", held.acquire)


def _written(token: Path) -> str:
    """The file's name; empty where it could not be written."""
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):
            token.write_text("")
            return token.name
        log.info("%s cannot be written, so it is not known whether all processes share it", token.parent)
    return ""


def _seen(path: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True
