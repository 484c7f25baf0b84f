"""Of leaves that several devices hold copies of, the slice that each one writes."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from shardadam.checkpoint.logical import Slot, is_key, is_offloaded
from shardadam.checkpoint.programs import copied_over, in_programs, num_copies, over_mesh
from shardadam.layout import entries


def sliced(slots: Iterable[Slot]) -> list[Slot]:
    """The same leaves with as few copies as may be: of each that has some, every device that holds one keeps a slice.

    Orbax makes the same slices, by a program for each leaf and device, which takes the loop most of a save: of a
    replicated leaf every device writes some. Here one program makes those of many leaves. They are arrays of their own,
    which a train step does not wait for; a device holds 1/copies of its leaf in them until it is written.

    Leaves where no dim of a shard can be divided by the number of copies stay as they are, as do typed PRNG keys, what
    lies in host memory, and what only this process knows.
    """
    slots = list(slots)
    kinds: dict[Any, list[tuple[int, jax.Array, _Cut]]] = {}
    for place, slot in enumerate(slots):
        if slot.packed is None and (cut := _cut_of(slot.like)) is not None:
            x = slot.like
            kinds.setdefault((cut.sharding.mesh, cut, x.shape, x.dtype), []).append((place, x, cut))
    for leaves in in_programs(kinds):
        places, xs, cuts = zip(*leaves, strict=True)
        for place, x in zip(places, _slicer(cuts)(xs), strict=True):
            slots[place] = dataclasses.replace(slots[place], like=x)
    return slots


class _Cut(NamedTuple):
    """How a leaf lies, and the dim along which its copies are cut."""

    sharding: NamedSharding
    dim: int

    @property
    def spec(self) -> P:
        """Of the slices: a shard's are in the order of its copies."""
        split = entries(P(*self.sharding.spec), max(len(self.sharding.spec), self.dim + 1))
        return P(*(axes + copied_over(self.sharding) if dim == self.dim else axes for dim, axes in enumerate(split)))


def _cut_of(x: Any) -> _Cut | None:
    """How to cut a leaf; None if it stays as it is."""
    if not isinstance(x, jax.Array) or is_key(x.dtype) or x.size == 0 or is_offloaded(x.sharding):
        return None
    if (sharding := over_mesh(x.sharding)) is None or (jax.process_count() > 1 and x.is_fully_addressable):
        return None
    count = num_copies(sharding)
    dims = (dim for dim, size in enumerate(sharding.shard_shape(x.shape)) if size % count == 0)
    return None if count == 1 or (dim := next(dims, None)) is None else _Cut(sharding, dim)


@functools.cache
def _slicer(cuts: tuple[_Cut, ...]) -> Callable[[Sequence[jax.Array]], list[jax.Array]]:
    """Compiled once for leaves that lie so, on one mesh."""
    mesh = cuts[0].sharding.mesh

    def own(blocks: Sequence[jax.Array]) -> list[jax.Array]:
        return [_own_slice(block, cut) for block, cut in zip(blocks, cuts, strict=True)]

    specs = tuple(cut.sharding.spec for cut in cuts)
    # Manual, so that Auto and Explicit axes go one way, and nothing is communicated.
    return jax.jit(
        jax.shard_map(own, mesh=mesh, in_specs=(specs,), out_specs=[cut.spec for cut in cuts], check_vma=False)
    )


def _own_slice(block: jax.Array, cut: _Cut) -> jax.Array:
    copies = copied_over(cut.sharding)
    size = block.shape[cut.dim] // num_copies(cut.sharding)
    return jax.lax.dynamic_slice_in_dim(block, jax.lax.axis_index(copies) * size, size, cut.dim)
