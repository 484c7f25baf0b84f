"""Of leaves that several devices hold copies of, the slice that each one writes."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.dtypes import itemsize_bits
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from shardadam.checkpoint.logical import Slot, is_key, is_offloaded
from shardadam.checkpoint.programs import in_programs
from shardadam.copies import copied_over, num_copies, only_here, over_mesh
from shardadam.layout import canonical_spec, entries

_LARGEST = np.iinfo(np.int32).max  # Of a dim that is cut: XLA counts the start of a slice so.


def sliced(slots: Iterable[Slot]) -> list[Slot]:
    """The same leaves with fewer copies: where devices hold some of a leaf, each keeps the slice of it that it writes.

    Orbax makes the same slices, by a program for each leaf and device, which at stage 2 takes the loop most of a save.
    Here one program makes those of many leaves. They are arrays of their own, which no train step waits for; a device
    holds 1/copies of its part of the leaf in them until it is written.

    As they are go packed leaves, which are cut on their way to their logical shape, and those where no dim of a shard
    divides by the number of copies. Typed PRNG keys and what lies in host memory are left to Orbax.
    """
    slots = list(slots)
    kinds: dict[Any, list[tuple[int, jax.Array, _Cut]]] = {}
    for place, slot in enumerate(slots):
        x = slot.like
        if slot.packed is None and (cut := _cut_of(x)) is not None:
            kinds.setdefault((cut.sharding.mesh, cut, x.shape, x.dtype), []).append((place, x, cut))
    for leaves in in_programs(kinds):
        places, xs, cuts = zip(*leaves, strict=True)
        with jax.set_mesh(cuts[0].sharding.mesh):  # Whatever mesh the caller has set.
            found = _slicer(cuts)(xs)
        for place, x in zip(places, found, strict=True):
            slots[place] = dataclasses.replace(slots[place], like=x)
    return slots


class _Cut(NamedTuple):
    """How a leaf lies, and the dim along which its copies are cut."""

    sharding: NamedSharding
    dim: int

    @property
    def spec(self) -> P:
        """The spec of the slices, which within a shard are in the order of its copies."""
        split = list(entries(P(*self.sharding.spec), self.dim + 1))
        split[self.dim] += copied_over(self.sharding)
        return canonical_spec(tuple(split))


def _cut_of(x: Any) -> _Cut | None:
    """How to cut a leaf: as Orbax does, along the first dim that divides; None if it goes as it is."""
    if not isinstance(x, jax.Array) or is_key(x.dtype) or x.size == 0 or is_offloaded(x.sharding):
        return None
    if (sharding := over_mesh(x.sharding)) is None or only_here(x):
        return None
    count, shard = num_copies(sharding), sharding.shard_shape(x.shape)
    dim = next((dim for dim, size in enumerate(shard) if size % count == 0), None)
    return None if count == 1 or dim is None or shard[dim] > _LARGEST else _Cut(sharding, dim)


@functools.cache
def _slicer(cuts: tuple[_Cut, ...]) -> Callable[[Sequence[jax.Array]], list[jax.Array]]:
    """Compiled once for leaves that lie so, on one mesh; nothing is communicated."""

    def own(blocks: Sequence[jax.Array]) -> list[jax.Array]:
        return [_own_slice(block, cut) for block, cut in zip(blocks, cuts, strict=True)]

    mesh, specs = cuts[0].sharding.mesh, tuple(cut.sharding.spec for cut in cuts)
    # Manual, so that Auto and Explicit axes go one way; the shardings are said once more, as in the digests' programs.
    over = {"mesh": mesh, "in_specs": (specs,), "out_specs": [cut.spec for cut in cuts]}
    return jax.jit(
        jax.shard_map(own, **over, check_vma=False), out_shardings=[NamedSharding(mesh, cut.spec) for cut in cuts]
    )


def _own_slice(block: jax.Array, cut: _Cut) -> jax.Array:
    # By the bits: XLA:CPU has taken short floats through longer ones, which changes what a NaN says.
    short = jnp.issubdtype(block.dtype, jnp.floating) and itemsize_bits(block.dtype) < 32
    bits = jax.lax.bitcast_convert_type(block, f"uint{itemsize_bits(block.dtype)}") if short else block
    size = block.shape[cut.dim] // num_copies(cut.sharding)
    start = jax.lax.axis_index(copied_over(cut.sharding)) * size
    found = jax.lax.dynamic_slice_in_dim(bits, start, size, cut.dim)
    return jax.lax.bitcast_convert_type(found, block.dtype) if short else found
