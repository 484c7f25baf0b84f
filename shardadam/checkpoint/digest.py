"""A digest of every leaf by its bits, name and global positions: the same for every sharding, layout and mesh."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardadam.checkpoint.logical import Packing, Slot, default_memory_kind, is_key, is_offloaded
from shardadam.checkpoint.together import on_every_process
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


def start(slots: Iterable[Slot]) -> list[Any]:
    """Begins `digests`, and waits for nothing that is on devices: the leaves may be donated once this returns.

    There is no collective in it, so that it can be under way beside a train step.
    """
    return [_started(slot) for slot in slots]


def finish(started: Sequence[Any], key: str) -> list[Digest]:
    """Waits for what `start` began. All processes call it; what travels is 12 bytes a leaf and process."""
    sums = np.array([_own_sums(x) for x in started], np.uint32).reshape(-1, 3)
    if jax.process_count() > 1:
        everyone = np.array(on_every_process(key, sums.tolist), np.uint32)
        on_host = np.array([isinstance(x, np.ndarray) for x in started], np.bool_)[:, None]
        sums = np.where(on_host, sums, everyone.sum(0, dtype=np.uint32))
    return [_finished(row) for row in sums]


def host_digest(x: np.ndarray | Any, path: str) -> Digest:
    """The digest of a host array, equal to that of the same leaf on devices.

    Args:
      x: an array of any dtype, in the logical shape; a memory map is read chunk by chunk.
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
            position = np.arange(start, start + part.size, dtype=np.uint64)
            high, low = np.divmod(position, np.uint64(low_size)) if x.size > low_size else (None, position)
            low, high = low.astype(np.uint32), None if high is None else high.astype(np.uint32)
            terms = terms_of(host_words(part), low, high, seed, host_finite(part), np)
            total += np.array([term.sum(dtype=np.uint32) for term in terms], np.uint32)
    return _finished(total)


def _started(slot: Slot) -> Any:
    """The sums of one leaf, under way on its devices; done already where it is on the host."""
    x = slot.like
    # Of an array that only this process knows, every process has its own, which in a sum would count several times.
    if not isinstance(x, jax.Array) or (jax.process_count() > 1 and x.is_fully_addressable):
        data = np.asarray(jax.random.key_data(x) if is_key(slot.dtype) else x)
        return _unfinished(host_digest(data, slot.path))
    packed, shape = slot.packed, slot.shape
    if is_key(slot.dtype):
        x = jax.random.key_data(x)
        shape = x.shape
    elif packed is not None:
        x = jax.device_put(x, packed.sharding)
        if math.prod(packed.leaf.state_shape[-2:]) // packed.leaf.num_parts > WORD_COUNTS:
            x, packed = slot.to_disk(), None
    if is_offloaded(x.sharding):
        x = jax.device_put(x, x.sharding.with_memory_kind(default_memory_kind(x.sharding)))
    sharding = x.sharding if isinstance(x.sharding, NamedSharding) else None
    return _summer(sharding, packed)(x, _seed(sharding, slot.path, shape, np.dtype(x.dtype)))


def _own_sums(x: Any) -> np.ndarray:
    """The sums of what this process has of a leaf."""
    if isinstance(x, np.ndarray):
        return x
    parts = np.concatenate([np.asarray(shard.data).reshape(-1, 3) for shard in x.addressable_shards])
    return parts.sum(0, dtype=np.uint32)


@functools.cache
def _seed(sharding: NamedSharding | None, path: str, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array | np.ndarray:
    """A leaf's seed where the leaf is: putting it there takes longer than all else that `start` does."""
    seed = leaf_seed(path, shape, dtype)
    if sharding is None or isinstance(sharding.mesh, AbstractMesh):
        return seed
    return jax.device_put(seed, NamedSharding(sharding.mesh, P()))


@functools.cache
def _summer(sharding: NamedSharding | None, packed: Packing | None) -> Callable[[jax.Array, Any], jax.Array]:
    """Compiled once for a sharding and layout: (x, seed) -> uint32[num_devices, 3], the two sums and the count.

    Of what has copies, the first one is read, and the others add nothing.
    """
    if sharding is None or isinstance(sharding.mesh, AbstractMesh):
        return jax.jit(lambda x, seed: block_sums(x, seed, natural(x.shape, [0] * x.ndim, x.shape), x.shape)[None])
    mesh, spec = sharding.mesh, sharding.spec

    def total(x: jax.Array, seed: jax.Array) -> jax.Array:
        split = entries(P(*spec), x.ndim)
        used = {axis for dim in split for axis in dim}
        copies = tuple(axis for axis in mesh.axis_names if axis not in used)
        shape = x.shape if packed is None else packed.leaf.shape

        def sums(block: jax.Array, seed: jax.Array) -> jax.Array:
            if packed is None:
                offsets = [_index(dim) * np.uint32(size) for dim, size in zip(split, block.shape, strict=True)]
                return block_sums(block, seed, natural(block.shape, offsets, shape), shape)
            coordinates, valid = _packed(block.shape, packed)
            return block_sums(block, seed, coordinates, shape, valid)

        def own(block: jax.Array, seed: jax.Array) -> jax.Array:
            if not copies:
                return sums(block, seed)[None]
            first = jax.lax.axis_index(copies) == 0
            return jax.lax.cond(first, sums, lambda *_: jnp.zeros(3, jnp.uint32), block, seed)[None]

        # Manual, so that Auto and Explicit axes go one way.
        return jax.shard_map(own, mesh=mesh, in_specs=(spec, P()), out_specs=P(mesh.axis_names), check_vma=False)(
            x, seed
        )

    return jax.jit(total)


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
