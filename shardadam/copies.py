"""Who holds the same of an array: along which axes of a mesh, and whether other processes do."""

import math

import jax
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from shardadam.layout import entries


def over_mesh(sharding: Sharding | None) -> NamedSharding | None:
    """A sharding, if it is over a mesh whose devices are known; None otherwise."""
    return sharding if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None


def copied_over(sharding: NamedSharding) -> tuple[str, ...]:
    """The axes of the mesh along which devices hold the same, the first being the major one."""
    used = {axis for axes in entries(P(*sharding.spec), len(sharding.spec)) for axis in axes}
    return tuple(axis for axis, size in sharding.mesh.shape.items() if axis not in used and size > 1)


def num_copies(sharding: NamedSharding) -> int:
    """How many devices hold the same."""
    return math.prod(sharding.mesh.shape[axis] for axis in copied_over(sharding))


def only_here(x: jax.Array) -> bool:
    """Whether only this process of several knows an array: each may have its own."""
    return jax.process_count() > 1 and x.is_fully_addressable
