"""`Target`: what a builder gets, in the process that compiles: the devices of a topology, and meshes of them."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh

from shardadam.topology.accelerators import h100_config
from shardadam.topology.names import Topology


class Target(NamedTuple):
    """The devices to compile for. They can be named in shardings; nothing can be put on them, or run.

    Attributes:
      topology: as it was asked for.
      devices: in JAX's order.
    """

    topology: Topology
    devices: tuple[Any, ...]

    @property
    def device_kind(self) -> str:
        """What JAX calls them, such as "TPU v5"."""
        return self.devices[0].device_kind

    def mesh(self, axis_sizes: Mapping[str, int] | str = "data") -> Mesh:
        """A mesh with Auto axes, laid on the wires as JAX lays it.

        Args:
          axis_sizes: sizes by name, major first, such as {"slice": 2, "data": 256}; or one name, for all devices. With
            an axis "x", as `torus` has it, TPUs are placed by coordinates, row-major.

        Raises:
          ValueError: the sizes do not multiply to the number of devices.
        """
        sizes = {axis_sizes: len(self.devices)} if isinstance(axis_sizes, str) else dict(axis_sizes)
        shape = tuple(sizes.values())
        if math.prod(shape) != len(self.devices):
            raise ValueError(f"mesh: got {sizes}, and {self.topology} has {len(self.devices)} devices")
        types = (jax.sharding.AxisType.Auto,) * len(shape)
        along_wires = self.topology.platform == "tpu" and "x" in sizes
        return Mesh(self._placed(shape, along_wires), tuple(sizes), axis_types=types)

    def torus(self) -> dict[str, int]:
        """Axes that are the wires': of TPUs one for each dim of the torus, of GPUs the slice, the host and the device.

        Sizes of 1 are left out; `mesh(target.torus())` has one axis for each.
        """
        topology = self.topology
        if topology.platform == "gpu":
            sizes = dict(zip(("slice", "host", "device"), topology.dims, strict=True))
        else:
            cores = len(self.devices) // (math.prod(topology.dims) * topology.num_slices)
            sizes = {"slice": topology.num_slices, **dict(zip("xyz", topology.dims, strict=False)), "core": cores}
        return {axis: size for axis, size in sizes.items() if size > 1} or {"x": 1}

    def _placed(self, shape: tuple[int, ...], along_wires: bool) -> np.ndarray:
        devices = list(self.devices)
        if along_wires:
            return np.array(sorted(devices, key=_place)).reshape(shape)
        if self.topology.platform == "gpu":
            return np.array(devices).reshape(shape)
        slices = self.topology.num_slices
        if slices == 1:
            return mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
        # The slow network goes with the first axis, whole or its major part.
        assert shape[0] % slices == 0, (shape, slices)
        within = (shape[0] // slices, *shape[1:])
        across = (slices, *[1] * (len(shape) - 1))
        return mesh_utils.create_hybrid_device_mesh(within, across, devices=devices, allow_split_physical_axes=True)


def _place(device: Any) -> tuple[int, ...]:
    """Where a TPU core is: its slice, its chip's coordinates, its number on the chip."""
    return (getattr(device, "slice_index", 0) or 0, *device.coords, device.core_on_chip)


def load_target(topology: Topology) -> Target:
    """The devices of a topology; the compiler's library must be installed, and its environment set."""
    if topology.platform == "gpu":
        shape = "x".join(map(str, topology.dims))
        described = topologies.get_topology_desc(platform="cuda", topology=shape, target_config=h100_config())
    else:
        more = {"num_slices": topology.num_slices} if topology.num_slices > 1 else {}
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **more)
    return Target(topology, tuple(described.devices))
