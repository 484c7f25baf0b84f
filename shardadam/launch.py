"""`shardadam launch`: which processes to start on this machine, and whether to start them again when one fails."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardadam.environment import COUNT_FLAG, LAUNCHER, RESTARTS, simulated_devices
from shardadam.process_group import Failure, ProcessGroup, Signals

_USAGE_ERROR = 2
_MAX_BACKOFF = 300.0
_STOP_GRACE = 600.0


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How many processes, and what to do when one fails."""

    processes: int
    """Processes to start."""
    devices_per_process: int | None = None
    """Devices for each: accelerators of this machine by number, or simulated on CPU; None: as the environment says."""
    max_restarts: int = 0
    """How often the whole group is started anew after a failure."""
    min_processes: int | None = None
    """Go on with fewer processes, down to this, when the group fails twice in a row; None: never with fewer."""
    backoff: float = 1.0
    """Seconds before the first restart; doubled with each that follows in a row, up to 5 minutes."""
    stable_after: float = 600.0
    """A failure after so many seconds is not in a row with the one before it."""
    grace: float = 5.0
    """Seconds between SIGTERM and SIGKILL for the processes that are left after a failure."""
    stop_grace: float | None = None
    """Seconds that processes may take to end when asked; None: `train`'s deadlines of a step and a save, else 600."""

    def __post_init__(self) -> None:
        """Raises ValueError where a number is out of range."""
        for name, value, low in (
            ("processes", self.processes, 1), ("devices-per-process", self.devices_per_process, 1),
            ("max-restarts", self.max_restarts, 0), ("min-processes", self.min_processes, 1),
            ("backoff", self.backoff, 0), ("stable-after", self.stable_after, 0), ("grace", self.grace, 0),
            ("stop-grace", self.stop_grace, 0),
        ):  # fmt: skip
            if value is not None and value < low:
                raise ValueError(f"--{name}: got {value}, wanted {low} or more")
        if (self.min_processes or 1) > self.processes:
            raise ValueError(f"--min-processes: got {self.min_processes}, more than --processes {self.processes}")


def launch(command: Sequence[str], config: LaunchConfig) -> int:
    """Runs a command in several processes that find each other by `shardadam.runtime.initialize`.

    The first failure ends the others, and the group is started anew if `config` says so; except after a usage error
    (exit code 2), which would only come again. Signals are passed on. After one that asks for the end nothing starts,
    and what goes on for too long, or is asked once more, is made to end.

    Args:
      command: the program and its arguments.
      config: how many processes, and what to do about failures.

    Returns:
      0 if all processes ended with 0; else the exit code of the first that failed, 128 + the signal that ended it.

    Raises:
      OSError: the command cannot be started.
    """
    num_processes, restarts, in_a_row = config.processes, 0, 0
    with Signals() as signals:
        while True:
            began = time.monotonic()
            failure = _run(command, num_processes, restarts, config, signals)
            if failure is None:
                return 0
            _say(f"{failure}" + ("; the others were ended" if num_processes > 1 else ""))
            if signals.ending or restarts == config.max_restarts or failure.code == _USAGE_ERROR:
                return failure.exit_code
            restarts += 1
            in_a_row = 1 if time.monotonic() - began > config.stable_after else in_a_row + 1
            pause = min(config.backoff * 2 ** (in_a_row - 1), _MAX_BACKOFF)
            if in_a_row > 1:
                num_processes = fewer_processes(num_processes, config)
            _say(f"restart {restarts} of {config.max_restarts} in {pause:g} s, processes: {num_processes}")
            if signals.ending_within(pause):
                return failure.exit_code


def fewer_processes(num_processes: int, config: LaunchConfig) -> int:
    """The next smaller number that `config` allows and that divides `config.processes`; the same where there is none.

    A divisor, because the global batch stays: what the full number of devices divides, a divisor of it does, too.
    """
    least = config.processes if config.min_processes is None else config.min_processes
    smaller = (n for n in range(num_processes - 1, least - 1, -1) if config.processes % n == 0)
    return next(smaller, num_processes)


def process_environment(
    base: Mapping[str, str], index: int, num_processes: int, devices_per_process: int | None, port: int
) -> dict[str, str]:
    """The environment of one process; `shardadam.runtime.initialize` reads it there.

    Args:
      base: the launcher's own.
      index: which process.
      num_processes: of how many.
      devices_per_process: how many devices it may use; None: as `base` says.
      port: of the coordinator, on the loopback interface.
    """
    result = {name: value for name, value in base.items() if name != "JAX_PROCESS_COUNT"} | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(num_processes),
        "JAX_PROCESS_ID": str(index),
        "PYTHONUNBUFFERED": "1",
    }
    if devices_per_process is None:
        return result
    first = index * devices_per_process
    result["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, range(first, first + devices_per_process)))
    others = [flag for flag in base.get("XLA_FLAGS", "").split() if not flag.startswith(COUNT_FLAG)]
    return result | simulated_devices(result | {"XLA_FLAGS": " ".join(others)}, devices_per_process)


def _run(
    command: Sequence[str], num_processes: int, restarts: int, config: LaunchConfig, signals: Signals
) -> Failure | None:
    stop_grace = _STOP_GRACE if config.stop_grace is None else config.stop_grace
    with _reserved_port() as port:
        base = os.environ | {LAUNCHER: str(os.getpid()), RESTARTS: str(restarts)}
        environments = [
            process_environment(base, index, num_processes, config.devices_per_process, port)
            for index in range(num_processes)
        ]
        return ProcessGroup(command, environments, grace=config.grace, stop_grace=stop_grace).run(signals)


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """A free port that stays so until the coordinator, seconds later, takes it: it binds with SO_REUSEPORT, too."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def _say(text: str) -> None:
    print(f"shardadam launch: {text}", file=sys.stderr, flush=True)
