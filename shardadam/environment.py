"""Variables of the environment that the launcher and a training process both know; read and made without JAX."""

import os
from collections.abc import Mapping

# Set by the launcher: its own number, and how often this process's group has been started anew.
LAUNCHER, RESTARTS = "SHARDADAM_LAUNCHER", "SHARDADAM_RESTARTS"
COUNT_FLAG = "--xla_force_host_platform_device_count"
_POOL_FLAG = "--xla_cpu_multi_thread_eigen"


def simulated_devices(base: Mapping[str, str], count: int, *, own_threads: bool = True) -> dict[str, str]:
    """The variables with which XLA simulates `count` devices on CPU. What `base` sets already stands.

    Args:
      base: an environment.
      count: how many devices.
      own_threads: Simulated devices run their operations in one pool of threads. Where all of these wait in collectives
        for a device that finds none, XLA aborts after 40 s. Without the pool each device has a thread of its own, which
        is faster, too, as the devices fill the cores by themselves; NPROC is how many threads XLA:CPU starts.
    """
    before = base.get("XLA_FLAGS", "")
    wanted = {COUNT_FLAG: str(count)} | ({_POOL_FLAG: "false"} if own_threads else {})
    added = [f"{flag}={value}" for flag, value in wanted.items() if flag not in before]
    made = {"XLA_FLAGS": " ".join([before, *added]).strip()}
    if own_threads:
        made["NPROC"] = base.get("NPROC") or str(max(os.cpu_count() or 1, 4 * count))
    return made
