"""Several processes as one program: joining them, agreeing on a value, leaving when one cannot go on."""

import contextlib
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import jax

_ADDRESS = "JAX_COORDINATOR_ADDRESS"
_INDEX = "JAX_PROCESS_ID"
_COUNTS = ("JAX_NUM_PROCESSES", "JAX_PROCESS_COUNT")
# Variables by which a cluster's scheduler says how many processes there are, though JAX may not find that cluster.
_CLUSTER_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")

MIN_HEARTBEAT, MAX_HEARTBEAT = 10, 30  # seconds


class RuntimeSettingsError(ValueError):
    """What the environment says about processes is contradictory or incomplete."""


class Settings(NamedTuple):
    """Which process this is, and of how many."""

    coordinator_address: str | None
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None


def initialize(*, heartbeat_seconds: int = 20, timeout_seconds: int = 300) -> int:
    """Joins the processes of this program; to be called before JAX is used. Does nothing where there is one process.

    Processes are found in the environment: by `JAX_COORDINATOR_ADDRESS`, `JAX_PROCESS_ID` and `JAX_NUM_PROCESSES` (or
    `JAX_PROCESS_COUNT`), as `shardadam launch` and Kubeflow set them; else as `jax.distributed.initialize` finds them:
    Slurm, Open MPI, TPU pods, Kubernetes.

    Args:
      heartbeat_seconds: a process that is silent for so long ends all others; 10 to 30.
      timeout_seconds: how long to wait for the other processes.

    Returns:
      The number of processes.

    Raises:
      RuntimeSettingsError: the settings contradict each other, some are missing, or a scheduler started several
        processes in a way that JAX does not detect; the message names them.
      ValueError: `heartbeat_seconds` is out of range.

    Example:
      >>> initialize()
      1
    """
    if not MIN_HEARTBEAT <= heartbeat_seconds <= MAX_HEARTBEAT:
        raise ValueError(f"heartbeat_seconds: got {heartbeat_seconds}, wanted {MIN_HEARTBEAT} to {MAX_HEARTBEAT}")
    if jax.distributed.is_initialized():
        return _joined().num_processes  # jax.process_count() would start the devices
    settings = given_settings(os.environ) or _detected_settings(timeout_seconds)
    if settings is None or settings.num_processes == 1:
        return 1
    jax.distributed.initialize(
        *settings,
        cluster_detection_method="deactivate",  # or Slurm, around a launcher of its own, would choose the devices
        initialization_timeout=timeout_seconds,
        heartbeat_timeout_seconds=heartbeat_seconds,
    )
    return settings.num_processes


def given_settings(environment: Mapping[str, str]) -> Settings | None:
    """What the `JAX_` variables say; None where they leave it to the cluster.

    Raises:
      RuntimeSettingsError: they contradict each other, or some are missing.
    """
    counts = {name: _number(name, environment[name], least=1) for name in _COUNTS if environment.get(name)}
    if len(set(counts.values())) > 1:
        said = " and ".join(f"{name}={value}" for name, value in counts.items())
        raise RuntimeSettingsError(f"{said}: they name two numbers of processes; unset one of them")
    count = next(iter(counts.values()), None)
    if count == 1 and not environment.get(_INDEX):
        return Settings(None, 1, 0)
    names = {_ADDRESS: environment.get(_ADDRESS), _INDEX: environment.get(_INDEX), _COUNTS[0]: count}
    if not names[_INDEX] and count is None:
        return None  # an address alone goes to a cluster's processes, see `_detected_settings`
    if missing := [name for name, value in names.items() if not value and not (name == _ADDRESS and count == 1)]:
        given = ", ".join(f"{name}={value}" for name, value in names.items() if value)
        raise RuntimeSettingsError(f"got {given}, but not {' and '.join(missing)}; set all three, or none on a cluster")
    assert count is not None
    index = _number(_INDEX, environment[_INDEX])
    if not 0 <= index < count:
        raise RuntimeSettingsError(f"{_INDEX}={index} with {next(iter(counts))}={count}: wanted 0 to {count - 1}")
    if count > 1 and not environment[_ADDRESS].rpartition(":")[2].isdecimal():
        raise RuntimeSettingsError(f"{_ADDRESS}={environment[_ADDRESS]}: wanted HOST:PORT")
    return Settings(environment.get(_ADDRESS), count, index)


def _detected_settings(timeout_seconds: int) -> Settings | None:
    """What JAX finds of Slurm, Open MPI, TPU pods and Kubernetes; None where it finds none of them."""
    # Not public, but the public function cannot be asked whether there is a cluster, and binds a lone Slurm task to one
    # of its GPUs.
    from jax._src.clusters import ClusterEnv

    found = ClusterEnv.auto_detect_unset_distributed_params(
        os.environ.get(_ADDRESS), None, None, None, None, timeout_seconds
    )
    address, count, index, device_ids = found
    if count is not None and index is not None:
        return Settings(address, count, index, None if device_ids is None else list(device_ids))
    if address is not None:
        raise RuntimeSettingsError(
            f"got {_ADDRESS}={address}, but not {_INDEX} and {_COUNTS[0]}, and JAX detects no cluster; set all three"
        )
    for name in _CLUSTER_COUNTS:
        if int(os.environ.get(name) or 1) > 1:
            raise RuntimeSettingsError(
                f"{name}={os.environ[name]}, but JAX does not detect this cluster: each process would train alone; set "
                f"{_ADDRESS}, {_INDEX} and {_COUNTS[0]} (Open MPI 5 needs them, or mpi4py)"
            )
    if os.environ.get("KUBERNETES_SERVICE_HOST") and os.environ.get("JOB_COMPLETION_INDEX"):
        raise RuntimeSettingsError(
            f"this is pod {os.environ['JOB_COMPLETION_INDEX']} of an indexed Job, and JAX cannot ask Kubernetes about "
            f"the others: pip install 'jax[k8s]', or set {_ADDRESS}, {_INDEX} and {_COUNTS[0]} ({_COUNTS[0]}=1 for one)"
        )
    return None


def _number(name: str, text: str, *, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise RuntimeSettingsError(f"{name}={text!r}: wanted a whole number of {least} or more")
    return int(text)


def coordination_client() -> Any:
    """The client of the processes' key-value store; None where there is one process."""
    return _joined().client


def _joined() -> Any:
    # Not public, but there is no other way to the key-value store; Orbax takes the same one.
    from jax._src import distributed

    return distributed.global_state


_said: dict[str, int] = {}
_said_lock = threading.Lock()


def from_process_zero(name: str, value: str, *, timeout_seconds: float = 600) -> str:
    """Process 0's value, on all processes. All call it in the same order, and none waits for those after it.

    Args:
      name: what the value is.
      value: this process's own.
      timeout_seconds: how long to wait for process 0.

    Returns:
      `value` of process 0.
    """
    client = coordination_client()
    if client is None:
        return value
    key = _next_key(name)
    if jax.process_index() == 0:
        client.key_value_set(key, value)
        return value
    return client.blocking_key_value_get(key, int(timeout_seconds * 1000))


def from_every_process(name: str, value: str, *, timeout_seconds: float = 600) -> list[str]:
    """Each process's value, on all processes. All call it in the same order, and each waits for all others.

    Args:
      name: what the value is.
      value: this process's own.
      timeout_seconds: how long to wait for each of the others.

    Returns:
      The values, by process index.
    """
    client = coordination_client()
    if client is None:
        return [value]
    key = _next_key(name)
    client.key_value_set(f"{key}/{jax.process_index()}", value)
    timeout = int(timeout_seconds * 1000)
    return [client.blocking_key_value_get(f"{key}/{index}", timeout) for index in range(jax.process_count())]


def tell_every_process(name: str, value: str) -> None:
    """This process's value for the others' `from_every_process` of that name, whose values it does not want."""
    if (client := coordination_client()) is not None:
        client.key_value_set(f"{_next_key(name)}/{jax.process_index()}", value)


def _next_key(name: str) -> str:
    with _said_lock:
        _said[name] = _said.get(name, 0) + 1  # a key of the store is written once
        return f"shardadam/{name}/{_said[name]}"


def leave(code: int) -> NoReturn:
    """Ends this process at once, as one of several: its exit handlers would wait for the others, and they for it."""
    with contextlib.suppress(OSError, ValueError):  # Where the launcher is gone, so is who reads its pipes.
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
