"""The names of topologies, such as "v5p:4x8x8" and "h100:1x32x8", and what they say."""

import math
import re
from typing import Literal, NamedTuple

_TPU_DIMS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
_CORES = {"tpu7x": 2}  # Devices on a chip, where they are not one.
_EXAMPLES = "v5p:4x8x8, v5e:16x16, v6e:16x16, tpu7x:4x4x4 or h100:1x32x8 (slices x hosts x devices)"


class Topology(NamedTuple):
    """Devices of one kind, and how they are wired.

    Attributes:
      name: such as "v5p:4x8x8".
      chip: "v5p".
      platform: "tpu" or "gpu".
      dims: (4, 8, 8): of a TPU, the chips along each dim of a slice's torus; of GPUs (slices, hosts in each, devices in
        each), where a slice is what one fast fabric connects.
      num_slices: of TPUs, how many such tori a data center's network connects; of GPUs the first of `dims`.
    """

    name: str
    chip: str
    platform: Literal["tpu", "gpu"]
    dims: tuple[int, ...]
    num_slices: int

    @property
    def num_devices(self) -> int:
        """How many devices JAX has on it."""
        slices = self.num_slices if self.platform == "tpu" else 1
        return math.prod(self.dims) * slices * _CORES.get(self.chip, 1)

    @property
    def extra(self) -> str:
        """The extra of this package with the compiler."""
        return f"aot-{self.platform}"

    def __str__(self) -> str:
        return self.name if self.platform == "gpu" or self.num_slices == 1 else f"{self.num_slices} x {self.name}"


def parse_topology(name: str, num_slices: int = 1) -> Topology:
    """What a topology's name says.

    Args:
      name: "chip:AxB" or "chip:AxBxC".
      num_slices: how many of them are connected by a data center's network; of GPUs the name says it.

    Raises:
      ValueError: a name that is not of this form, or of a chip that is not known.

    Example:
      >>> parse_topology("v5e:16x16", num_slices=2).num_devices, parse_topology("h100:1x32x8").num_devices
      (512, 256)
    """
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)+)", name)
    if not match:
        raise ValueError(f"topology: got {name!r}, wanted a name such as {_EXAMPLES}")
    chip, dims = match[1], tuple(map(int, match[2].split("x")))
    if chip != "h100" and chip not in _TPU_DIMS:
        raise ValueError(f"topology: got the chip {chip!r}, wanted one of {', '.join(_TPU_DIMS)} or h100")
    wanted = _TPU_DIMS.get(chip, 3)
    if len(dims) != wanted:
        raise ValueError(f"topology: got {name!r} with {len(dims)} dims, {chip} has {wanted}: {_EXAMPLES}")
    if not isinstance(num_slices, int) or num_slices < 1:
        raise ValueError(f"num_slices: got {num_slices!r}, wanted a number, 1 or more")
    if chip == "h100":
        if num_slices != 1:
            raise ValueError(f"num_slices: got {num_slices} for {name!r}; of GPUs the name says it: h100:2x4x8 has 2")
        return Topology(name, chip, "gpu", dims, dims[0])
    return Topology(name, chip, "tpu", dims, num_slices)
