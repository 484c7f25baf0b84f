"""Which leaves one program takes: starting a program for each would take the loop longer than all else in a save."""

import math
from collections.abc import Hashable, Iterator, Mapping
from typing import TypeVar

from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from shardadam.layout import entries

Leaf = TypeVar("Leaf")

_TOGETHER = 32  # Leaves in a program: more would take longer to compile, and gain little.


def in_programs(kinds: Mapping[tuple[Hashable, ...], list[Leaf]]) -> Iterator[list[Leaf]]:
    """Leaves by the program that takes them: as many of a kind as it may, so that it serves again; all others together.

    Args:
      kinds: leaves that make the same program, by what makes it so; first by the devices, which are one program's.
    """
    left: dict[Hashable, list[Leaf]] = {}
    for (devices, *_), leaves in kinds.items():
        full = len(leaves) // _TOGETHER * _TOGETHER
        yield from _cut(leaves[:full])
        left.setdefault(devices, []).extend(leaves[full:])
    for leaves in left.values():
        yield from _cut(leaves)


def over_mesh(sharding: Sharding) -> NamedSharding | None:
    """A sharding, if it is over a mesh whose devices are known; None otherwise."""
    return sharding if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None


def copied_over(sharding: NamedSharding) -> tuple[str, ...]:
    """The axes of a mesh along which devices hold the same, the first being the major one."""
    used = {axis for axes in entries(P(*sharding.spec), len(sharding.spec)) for axis in axes}
    return tuple(axis for axis, size in sharding.mesh.shape.items() if axis not in used and size > 1)


def num_copies(sharding: NamedSharding) -> int:
    """How many devices hold the same of an array."""
    return math.prod(sharding.mesh.shape[axis] for axis in copied_over(sharding))


def _cut(leaves: list[Leaf]) -> Iterator[list[Leaf]]:
    return (leaves[first : first + _TOGETHER] for first in range(0, len(leaves), _TOGETHER))
