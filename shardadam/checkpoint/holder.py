"""Who holds a checkpoint directory for writing, as its lock file says it, and whether that process is still there."""

import dataclasses
import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import NamedTuple, Self

_STAT_STATE, _STAT_START = 0, 19  # Fields 3 and 22 of /proc/PID/stat, counted after the command's closing bracket.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder:
    """One process of one run.

    Attributes:
      token: drawn anew for every holding, so that none is taken for another.
      run_id: the run's name.
      host: its host's name.
      boot_id: of that host's kernel, since it was booted; None where the system has none.
      pid_namespace: in which `pid` counts: containers have their own.
      pid: the process.
      started: when it was, in the kernel's ticks: another process may get the same pid later.
      since: when it took the directory, in UTC.
    """

    token: str
    run_id: str
    host: str
    boot_id: str | None
    pid_namespace: str | None
    pid: int
    started: int | None
    since: str

    @classmethod
    def this_process(cls, run_id: str) -> Self:
        """This process, from now on."""
        return cls(
            token=uuid.uuid4().hex,
            run_id=run_id,
            since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            pid=os.getpid(),
            started=start_of(os.getpid()),
            **_here()._asdict(),
        )

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Inverse of `to_text`. What is cut off or foreign is a holder of whom nothing is known but that it is one."""
        try:
            holder = cls(**json.loads(text))
            if holder.token.isalnum():  # It becomes part of a file's name.
                return holder
        except (ValueError, TypeError, AttributeError, RecursionError):
            pass
        return cls(
            token="unreadable", run_id="unknown", host="unknown", boot_id=None, pid_namespace=None, pid=0,
            started=None, since="unknown",
        )  # fmt: skip

    def to_text(self) -> str:
        """JSON, for people too."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def is_here(self) -> bool:
        """Whether its pid means something to this process: same host, same boot, same namespace."""
        return _Place(self.host, self.boot_id, self.pid_namespace) == _here()

    def is_running(self) -> bool:
        """Whether the process, if it is here, is there and the one that it was."""
        if self.boot_id is None:  # No /proc: the pid alone has to do.
            return _exists(self.pid)
        return start_of(self.pid) == self.started

    def __str__(self) -> str:
        return f"run {self.run_id}, process {self.pid} on host {self.host}, since {self.since}"


class _Place(NamedTuple):
    """Where pids are told apart."""

    host: str
    boot_id: str | None
    pid_namespace: str | None


def _here() -> _Place:
    boot_id, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return _Place(
        socket.gethostname(),
        boot_id.read_text().strip() if boot_id.exists() else None,
        os.readlink(namespace) if namespace.is_symlink() else None,
    )


def start_of(pid: int) -> int | None:
    """When a process was started; None where there is none, or only its exit code is left."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[_STAT_STATE] in "ZX" else int(fields[_STAT_START])


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
