"""A digest of every leaf by its bits, name and global positions: the same for every sharding, layout and mesh."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from shardadam.checkpoint.logical import Packing, Slot, default_memory_kind, is_key, is_offloaded
from shardadam.checkpoint.programs import in_programs
from shardadam.checkpoint.together import on_every_process
from shardadam.copies import copied_over, only_here, over_mesh
from shardadam.layout import entries, shard_shape
from shardadam.mixing import (
    WORD_COUNTS,
    Coordinate,
    block_sums,
    first_low_dim,
    host_finite,
    host_words,
    leaf_seed,
    natural,
    terms_of,
)

_CHUNK = 2**18  # Elements that `host_digest` takes at a time: what numpy makes of them stays in the cache.


class Digest(NamedTuple):
    """What is known of a leaf's content.

    Attributes:
      text: 16 hexadecimal digits.
      num_nonfinite: how many elements are NaN or infinite (of a complex one, in either part).
    """

    text: str
    num_nonfinite: int


def digests(slots: Iterable[Slot], key: str = "digests") -> list[Digest]:
    """The digests of leaves where they are: device arrays on their devices, shard by shard, all others on the host.

    Of a leaf x with positions i and 32-bit words x_iw, it is two sums modulo 2^32,

      sum_iw a(x_iw, i, w)  and  sum_iw b(a(x_iw, i, w), i, w),

    of mixing functions keyed by the leaf's name, dtype and logical shape. As sums they do not depend on the order in
    which elements are added; as the positions are those in the logical array, not on where elements lie either. a is a
    bijection in the word: one changed element always changes the first sum; other faults go unseen at 2^-64.

    All processes make the same call, in the same order.

    Args:
      slots: the leaves.
      key: a name for what the processes say to each other, see `together`.

    Returns:
      A digest for each; of a leaf on the host, which every process has for itself, the process's own.

    Example:
      >>> digests(slots({"x": jnp.arange(3.0)}, None))
      [Digest(text='...', num_nonfinite=0)]
    """
    return finish(start(slots), key)


class _Layout(NamedTuple):
    """How a leaf lies: its sharding, None where that is not over a mesh; and how it is packed, if it is."""

    sharding: NamedSharding | None
    packed: Packing | None


class _Leaf(NamedTuple):
    """A leaf to be summed on its devices, its place among all, and its seed, on the devices as well."""

    place: int
    x: jax.Array
    seed: Any
    layout: _Layout


class Started(NamedTuple):
    """Digests under way.

    Attributes:
      num_leaves: how many.
      on_host: the sums of leaves on the host, by the leaf's place among all.
      on_devices: the places of some leaves, and their sums, uint32[num_devices, leaves, 3].
    """

    num_leaves: int
    on_host: dict[int, np.ndarray]
    on_devices: list[tuple[list[int], jax.Array]]


def start(slots: Iterable[Slot]) -> Started:
    """Begins `digests`, and waits for nothing that is on devices: the leaves may be donated once this returns.

    There is no collective in it, so that it can be under way beside a train step.
    """
    slots = list(slots)
    on_host: dict[int, np.ndarray] = {}
    kinds: dict[Any, list[_Leaf]] = {}
    for place, slot in enumerate(slots):
        x, packed, shape = _on_devices(slot)
        if isinstance(x, np.ndarray):
            on_host[place] = _unfinished(host_digest(x, slot.path))
            continue
        sharding = over_mesh(x.sharding)
        seed = _seed(sharding, slot.path, shape, np.dtype(x.dtype))
        layout = _Layout(sharding, packed)
        devices = x.sharding if sharding is None else sharding.mesh
        kinds.setdefault((devices, layout, x.shape, x.dtype), []).append(_Leaf(place, x, seed, layout))
    on_devices = []
    for leaves in in_programs(kinds):
        places, xs, seeds, layouts = zip(*leaves, strict=True)
        with contextlib.nullcontext() if layouts[0].sharding is None else jax.set_mesh(layouts[0].sharding.mesh):
            on_devices.append((list(places), _summer(layouts)(xs, seeds)))
    return Started(len(slots), on_host, on_devices)


def finish(started: Started, key: str) -> list[Digest]:
    """Waits for what `start` began. All processes call it; what travels is three numbers a leaf and process."""
    sums = np.zeros((started.num_leaves, 3), np.uint32)
    for places, x in started.on_devices:
        sums[places] = np.concatenate([np.asarray(shard.data) for shard in x.addressable_shards]).sum(0, np.uint32)
    if jax.process_count() > 1:
        sums = np.array(on_every_process(key, sums.tolist), np.uint32).sum(0, np.uint32)
    for place, own in started.on_host.items():
        sums[place] = own
    return [_finished(row) for row in sums]


def host_digest(x: np.ndarray | Any, path: str) -> Digest:
    """The digest of a host array, equal to that of the same leaf on devices.

    Args:
      x: an array of any dtype and byte order, in the logical shape; a memory map is read chunk by chunk.
      path: the leaf's keypath, names joined with "/".
    """
    x = np.asarray(x)
    seed = leaf_seed(path, x.shape, x.dtype)
    # A new axis first: scalars are viewed by their bytes, too.
    flat = x.reshape(-1) if x.flags.c_contiguous else np.ascontiguousarray(x).reshape(-1)
    low_size = math.prod(x.shape[first_low_dim(x.shape) :])
    total = np.zeros(3, np.uint32)
    with np.errstate(over="ignore"):
        for start in range(0, flat.size, _CHUNK):
            part = flat[start : start + _CHUNK]
            part = part.astype(part.dtype.newbyteorder("="), copy=False)
            position = np.arange(start, start + part.size, dtype=np.uint64)
            high, low = np.divmod(position, np.uint64(low_size)) if x.size > low_size else (None, position)
            low, high = low.astype(np.uint32), None if high is None else high.astype(np.uint32)
            terms = terms_of(host_words(part), low, high, seed, host_finite(part), np)
            total += np.array([term.sum(dtype=np.uint32) for term in terms], np.uint32)
    return _finished(total)


def _on_devices(slot: Slot) -> tuple[jax.Array | np.ndarray, Packing | None, tuple[int, ...]]:
    """A leaf as its devices sum it, how it is packed, and its logical shape; a host array where it is on the host."""
    x, packed, shape = slot.like, slot.packed, slot.shape
    # Of an array that only this process knows, every process has its own, which in a sum would count several times.
    if not isinstance(x, jax.Array) or only_here(x):
        return np.asarray(jax.random.key_data(x) if is_key(slot.dtype) else x), None, shape
    if is_key(slot.dtype):
        x = jax.random.key_data(x)
        shape = x.shape
    elif packed is not None:
        x = jax.device_put(x, packed.sharding)
        if math.prod(packed.leaf.state_shape[-2:]) // packed.leaf.num_parts > WORD_COUNTS:
            x, packed = slot.to_disk(), None
    if is_offloaded(x.sharding):
        x = jax.device_put(x, x.sharding.with_memory_kind(default_memory_kind(x.sharding)))
    return x, packed, shape


@functools.cache
def _seed(sharding: NamedSharding | None, path: str, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array | np.ndarray:
    """A leaf's seed where the leaf is, put there once."""
    seed = leaf_seed(path, shape, dtype)
    if sharding is None:
        return seed
    # `device_put` would have the processes compare what each has, leaf by leaf.
    return jax.make_array_from_callback(seed.shape, NamedSharding(sharding.mesh, P()), lambda _: seed)


@functools.cache
def _summer(layouts: tuple[_Layout, ...]) -> Callable[[Any, Any], jax.Array]:
    """Compiled once for leaves that lie so, on one mesh: (leaves, seeds) -> uint32[num_devices, leaves, 3]."""
    sharding = layouts[0].sharding
    if sharding is None:

        def whole(x: jax.Array, seed: Any) -> jax.Array:
            return block_sums(x, seed, natural(x.shape, [0] * x.ndim, x.shape), x.shape)

        return jax.jit(lambda xs, seeds: jnp.stack([whole(x, seed) for x, seed in zip(xs, seeds, strict=True)])[None])

    mesh = sharding.mesh

    def total(xs: Sequence[jax.Array], seeds: Sequence[jax.Array]) -> jax.Array:
        def own(blocks: Sequence[jax.Array], seeds: Sequence[jax.Array]) -> jax.Array:
            rows = zip(blocks, xs, seeds, layouts, strict=True)
            return jnp.stack([_own_sums(block, x.shape, seed, layout) for block, x, seed, layout in rows])[None]

        specs = tuple(layout.sharding.spec for layout in layouts if layout.sharding)
        # Manual, so that Auto and Explicit axes go one way.
        over = {"mesh": mesh, "in_specs": (specs, P()), "out_specs": P(mesh.axis_names)}
        return jax.shard_map(own, **over, check_vma=False)(xs, seeds)

    # Said once more: with axes of both types JAX 0.12 has lost one that is Auto, and gathered the sums over it.
    return jax.jit(total, out_shardings=NamedSharding(mesh, P(mesh.axis_names)))


def _own_sums(block: jax.Array, shape: tuple[int, ...], seed: jax.Array, layout: _Layout) -> jax.Array:
    """What a device adds for its block of a leaf: the block's sums, or nothing for any copy but the first."""
    sharding, packed = layout
    assert sharding is not None
    if packed is None:
        split = entries(P(*sharding.spec), len(shape))
        offsets = [_index(axes) * np.uint32(size) for axes, size in zip(split, block.shape, strict=True)]
        coordinates, valid, logical = natural(block.shape, offsets, shape), None, shape
    else:
        (coordinates, valid), logical = _packed(block.shape, packed), packed.leaf.shape

    def sums() -> jax.Array:
        return block_sums(block, seed, coordinates, logical, valid)

    if not (copies := copied_over(sharding)):
        return sums()
    return jax.lax.cond(_index(copies) == 0, sums, lambda: jnp.zeros(3, jnp.uint32))


def _packed(block: tuple[int, ...], packed: Packing) -> tuple[list[Coordinate], Any]:
    """The coordinates of the elements of a device's packed rows in the logical array, and which are no padding."""
    leaf, mesh = packed
    split, stack = entries(leaf.param_spec, len(leaf.shape)), leaf.stacked_dims
    counts = [math.prod(mesh.shape[axis] for axis in axes) for axes in split]
    local = shard_shape(leaf.shape, leaf.param_spec, mesh.shape)
    offsets = [_index(axes) * np.uint32(size) for axes, size in zip(split, local, strict=True)]
    coordinates = natural(block, offsets[:stack], leaf.shape)
    rows = jax.lax.broadcasted_iota(jnp.uint32, block, stack) + _index(leaf.shard_axes) * np.uint32(block[-2])
    within = rows * np.uint32(leaf.lanes) + jax.lax.broadcasted_iota(jnp.uint32, block, stack + 1)
    valid = within < np.uint32(math.prod(local[stack:]))
    # Row-major in the device's own part: dims are peeled off from the last, as many at once as lie together in both.
    end, cut = len(leaf.shape), first_low_dim(leaf.shape)
    for dim in reversed(range(stack, end)):
        if counts[dim] == 1 and dim not in (stack, cut):
            continue
        size, inner = math.prod(local[dim:end]), math.prod(local[dim + 1 : end])
        along = within % np.uint32(size) if dim > stack else within
        coordinates.append((along + offsets[dim] * np.uint32(inner), end))
        within, end = within // np.uint32(size), dim
    return coordinates, valid


def _index(axes: tuple[str, ...]) -> Any:
    """This device's place along mesh axes, the first being the major one."""
    return jax.lax.axis_index(axes).astype(jnp.uint32) if axes else np.uint32(0)


def _finished(sums: np.ndarray) -> Digest:
    """Inverse of `_unfinished`."""
    return Digest(f"{int(sums[0]):08x}{int(sums[1]):08x}", int(sums[2]))


def _unfinished(digest: Digest) -> np.ndarray:
    return np.array([int(digest.text[:8], 16), int(digest.text[8:], 16), digest.num_nonfinite], np.uint32)
