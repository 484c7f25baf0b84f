"""From the config's mesh string to a `Mesh` of devices, simulated where there are none."""

import math
import os
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from shardadam.environment import COUNT_FLAG, simulated_devices
from shardadam.trainer.config import ConfigError, TrainConfig

AXES = ("data", "model")


def parse_mesh(text: str) -> dict[str, int]:
    """'data=4,model=2' -> {'data': 4, 'model': 2}; 'auto' is 'data=-1', and -1 means all the devices that are left."""
    wanted = "wanted axes and sizes such as 'data=4,model=2', with -1 for all devices that are left"
    sizes: dict[str, int] = {}
    for part in ("data=-1" if text.strip() == "auto" else text).split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(-?\d+)\s*", part)
        if not match or (int(match[2]) < 1 and int(match[2]) != -1):
            raise ConfigError(f"'mesh' is {text!r}: cannot read {part.strip()!r}; {wanted}")
        if match[1] not in AXES or match[1] in sizes:
            problem = "is given twice" if match[1] in sizes else "is unknown: the axes are 'data' and 'model'"
            raise ConfigError(f"'mesh' is {text!r}: axis '{match[1]}' {problem}")
        sizes[match[1]] = int(match[2])
    if "data" not in sizes:
        raise ConfigError(f"'mesh' is {text!r}: no 'data' axis, over which Adam's state is sharded; {wanted}")
    if list(sizes.values()).count(-1) > 1:
        raise ConfigError(f"'mesh' is {text!r}: more than one -1; {wanted}")
    return sizes


def fill_mesh(sizes: dict[str, int], num_devices: int) -> dict[str, int]:
    """Replaces a -1 by what is left of `num_devices`."""
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values() and (num_devices < fixed or num_devices % fixed):
        raise ConfigError(
            f"'mesh': {num_devices} devices cannot be split over {mesh_text(sizes)}; change 'mesh' or 'cpu_devices'"
        )
    return {axis: num_devices // fixed if size == -1 else size for axis, size in sizes.items()}


def mesh_text(sizes: dict[str, int]) -> str:
    """{'data': 4, 'model': 2} -> 'data=4,model=2'. Inverse of `parse_mesh`."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def start_devices(config: TrainConfig, num_processes: int = 1) -> None:
    """Asks for this process's part of the simulated CPU devices. Harmless where there are accelerators.

    Must run before JAX starts its backend.
    """
    sizes = parse_mesh(config.mesh)
    count = config.cpu_devices if -1 in sizes.values() else math.prod(sizes.values())
    count = max(count // num_processes, 1)
    os.environ.update(simulated_devices(os.environ, count, own_threads=count > 1))
    if config.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")


def build_mesh(config: TrainConfig) -> Mesh:
    """The config's mesh with Auto axes, over the first devices there are.

    Raises:
      ConfigError: the mesh needs more devices than there are.
    """
    devices = jax.devices()
    sizes = fill_mesh(parse_mesh(config.mesh), len(devices))
    needed = math.prod(sizes.values())
    if needed > len(devices):
        if devices[0].platform == "cpu":
            remedy = f"unset {COUNT_FLAG} in XLA_FLAGS, or set it to {needed}"
        else:
            remedy = "use a smaller mesh, or simulate with --platform cpu"
        raise ConfigError(
            f"'mesh' is '{mesh_text(sizes)}', which needs {needed} devices; "
            f"there are {len(devices)} ({devices[0].platform}): {remedy}"
        )
    if needed < len(devices) and jax.process_count() > 1:
        raise ConfigError(
            f"'mesh' is '{mesh_text(sizes)}', {needed} devices of {len(devices)}; several processes must use all"
        )
    chosen = np.array(devices[:needed]).reshape(tuple(sizes.values()))
    return Mesh(chosen, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def planned_mesh(config: TrainConfig) -> dict[str, int]:
    """The mesh as numbers alone, for planning on a machine without its devices; -1 is filled up from `cpu_devices`."""
    return fill_mesh(parse_mesh(config.mesh), config.cpu_devices)
