"""Between an array that several devices hold copies of and the slices of it that each of them writes and reads."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from shardadam.layout import entries


class Cut(NamedTuple):
    """How an array with copies lies, and the dim along which each copy's part of it is cut."""

    sharding: NamedSharding
    dim: int

    @property
    def slices(self) -> NamedSharding:
        """Of the slices: those of a shard are in the order of its copies."""
        split = entries(P(*self.sharding.spec), max(len(self.sharding.spec), self.dim + 1))
        split = [axes + copied_over(self.sharding) if dim == self.dim else axes for dim, axes in enumerate(split)]
        return NamedSharding(self.sharding.mesh, P(*split))


def over_mesh(sharding: Sharding | None) -> NamedSharding | None:
    """A sharding, if it is over a mesh whose devices are known; None otherwise."""
    return sharding if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None


def copied_over(sharding: NamedSharding) -> tuple[str, ...]:
    """The axes of a mesh along which devices hold the same, the first being the major one."""
    used = {axis for axes in entries(P(*sharding.spec), len(sharding.spec)) for axis in axes}
    return tuple(axis for axis, size in sharding.mesh.shape.items() if axis not in used and size > 1)


def cut_of(sharding: Sharding | None, shape: tuple[int, ...], dtype: Any) -> Cut | None:
    """How to cut an array: as Orbax does, along the first dim where a shard divides by the number of its copies.

    None where there are no copies, no dim divides, or the array is of less than a byte an element, which not every
    backend gathers.
    """
    named = over_mesh(sharding)
    if named is None or math.prod(shape) == 0 or jax.dtypes.itemsize_bits(dtype) < 8:
        return None
    count = _num_copies(named)
    dims = (dim for dim, size in enumerate(named.shard_shape(shape)) if size % count == 0)
    return None if count == 1 or (dim := next(dims, None)) is None else Cut(named, dim)


@functools.cache
def slicer(cuts: tuple[Cut, ...]) -> Callable[[Sequence[jax.Array]], list[jax.Array]]:
    """The slices of arrays on one mesh; nothing is communicated. Compiled once for arrays that lie so.

    Inverse of `gatherer`.
    """

    def own(blocks: Sequence[jax.Array]) -> list[jax.Array]:
        return [_own_slice(block, cut) for block, cut in zip(blocks, cuts, strict=True)]

    specs = tuple(cut.sharding.spec for cut in cuts)
    # Manual, so that Auto and Explicit axes go one way.
    return jax.jit(
        jax.shard_map(
            own,
            mesh=cuts[0].sharding.mesh,
            in_specs=(specs,),
            out_specs=[cut.slices.spec for cut in cuts],
            check_vma=False,
        )
    )


@functools.cache
def gatherer(cut: Cut) -> Callable[[jax.Array], jax.Array]:
    """The array of which there are slices, a copy for each device, which may be donated: by one all-gather.

    Inverse of `slicer`, to the bit.
    """

    def whole(block: jax.Array) -> jax.Array:
        # XLA:CPU would gather shorter floats as float32, and a NaN loses its payload on the way.
        short = jnp.issubdtype(block.dtype, jnp.floating) and block.dtype.itemsize < 4
        bits = jax.lax.bitcast_convert_type(block, f"uint{8 * block.dtype.itemsize}") if short else block
        found = jax.lax.all_gather(bits, copied_over(cut.sharding), axis=cut.dim, tiled=True)
        return jax.lax.bitcast_convert_type(found, block.dtype) if short else found

    # Manual, as in `slicer`; the sharding is said once more, as a shard_map may spell it in another way.
    over = {"mesh": cut.sharding.mesh, "in_specs": cut.slices.spec, "out_specs": cut.sharding.spec}
    return jax.jit(jax.shard_map(whole, **over, check_vma=False), out_shardings=cut.sharding)


def _own_slice(block: jax.Array, cut: Cut) -> jax.Array:
    size = block.shape[cut.dim] // _num_copies(cut.sharding)
    return jax.lax.dynamic_slice_in_dim(block, jax.lax.axis_index(copied_over(cut.sharding)) * size, size, cut.dim)


def _num_copies(sharding: NamedSharding) -> int:
    return math.prod(sharding.mesh.shape[axis] for axis in copied_over(sharding))
