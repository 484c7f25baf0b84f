"""A digest of every leaf by its bits, name and global positions: the same for every sharding, layout and mesh."""

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardadam.checkpoint.logical import Packing, Slot, default_memory_kind, is_key, is_offloaded
from shardadam.layout import LANES, entries

# Odd constants of known integer hashes (Weyl's step, murmur3, xxhash32). They are part of the format of a seal.
_WEYL_LOW, _WEYL_HIGH, _WORD = 0x9E3779B1, 0x85EBCA77, 0x165667B1
_MIX_1, _MIX_2, _SECOND_LOW, _SECOND_MIX = 0x85EBCA6B, 0xC2B2AE35, 0xC2B2AE3D, 0x27D4EB2F
_WORD_COUNTS = 2**32  # Positions that one word tells apart.
_CHUNK = 2**18  # Elements that `host_digest` takes at a time: what numpy makes of them stays in the cache.


class Digest(NamedTuple):
    """What is known of a leaf's content.

    Attributes:
      text: 16 hexadecimal digits.
      num_nonfinite: how many elements are NaN or infinite (of a complex one, in either part).
    """

    text: str
    num_nonfinite: int


def digests(slots: Iterable[Slot]) -> list[Digest]:
    """The digests of leaves where they are: device arrays on their devices, shard by shard, all others on the host.

    Of a leaf x with positions i and 32-bit words x_iw, it is two sums modulo 2^32,

      sum_iw a(x_iw, i, w)  and  sum_iw b(a(x_iw, i, w), i, w),

    of mixing functions keyed by the leaf's name, dtype and logical shape. As sums they do not depend on the order in
    which elements are added; as the positions are those in the logical array, not on where elements lie either. a is a
    bijection in the word: one changed element always changes the first sum; other faults go unseen at 2^-64.

    All processes make the same call, in the same order. Nothing is gathered but two numbers a leaf.

    Args:
      slots: the leaves.

    Returns:
      A digest for each.

    Example:
      >>> digests(slots({"x": jnp.arange(3.0)}, None))
      [Digest(text='...', num_nonfinite=0)]
    """
    slots = list(slots)
    started = [_started(slot) for slot in slots]  # All of them, before the first one is waited for.
    return [_finished(np.asarray(sums)) for sums in started]


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
    low_size = math.prod(x.shape[_first_low_dim(x.shape) :])
    total = np.zeros(3, np.uint32)
    with np.errstate(over="ignore"):
        for start in range(0, flat.size, _CHUNK):
            part = flat[start : start + _CHUNK]
            position = np.arange(start, start + part.size, dtype=np.uint64)
            high, low = np.divmod(position, np.uint64(low_size)) if x.size > low_size else (None, position)
            low, high = low.astype(np.uint32), None if high is None else high.astype(np.uint32)
            terms = _terms(_host_words(part), low, high, seed, _host_finite(part), np)
            total += np.array([term.sum(dtype=np.uint32) for term in terms], np.uint32)
    return _finished(total)


def leaf_seed(path: str, shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Two uint32 that key a leaf's digest: with another name, shape or dtype, the same bits have another one."""
    text = f"{path}\0{','.join(map(str, shape))}\0{np.dtype(dtype).name}"
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], "<u4").astype(np.uint32)


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
        if math.prod(packed.leaf.state_shape[-2:]) // packed.leaf.num_parts > _WORD_COUNTS:
            x, packed = slot.to_disk(), None
    if is_offloaded(x.sharding):
        x = jax.device_put(x, x.sharding.with_memory_kind(default_memory_kind(x.sharding)))
    sharding = x.sharding if isinstance(x.sharding, NamedSharding) else None
    return _summer(sharding, packed)(x, leaf_seed(slot.path, shape, x.dtype))


@functools.cache
def _summer(sharding: NamedSharding | None, packed: Packing | None) -> Callable[[jax.Array, np.ndarray], jax.Array]:
    """Compiled once for a sharding and layout: (x, seed) -> uint32[3], the two sums and the count."""
    if sharding is None or isinstance(sharding.mesh, AbstractMesh):
        return jax.jit(lambda x, seed: _block_sums(x, seed, _natural(x.shape, [0] * x.ndim, x.shape), x.shape))
    mesh, spec = sharding.mesh, sharding.spec

    def total(x: jax.Array, seed: jax.Array) -> jax.Array:
        split = entries(P(*spec), x.ndim)
        axes = tuple(axis for dim in split for axis in dim)
        shape = x.shape if packed is None else packed.leaf.shape

        def own(block: jax.Array, seed: jax.Array) -> jax.Array:
            if packed is None:
                offsets = [_index(dim) * np.uint32(size) for dim, size in zip(split, block.shape, strict=True)]
                coordinates = _natural(block.shape, offsets, shape)
                sums = _block_sums(block, seed, coordinates, shape)
            else:
                coordinates, valid = _packed(block.shape, packed)
                sums = _block_sums(block, seed, coordinates, shape, valid)
            return jax.lax.psum(sums, axes) if axes else sums

        # Manual, so that Auto and Explicit axes go one way; what is replicated is counted once.
        return jax.shard_map(own, mesh=mesh, in_specs=(spec, P()), out_specs=P())(x, seed)

    return jax.jit(total, out_shardings=NamedSharding(mesh, P()))


# A coordinate: the values along one or several merged dims, and the first dim after these.
_Coordinate = tuple[Any, int]


def _natural(block: tuple[int, ...], offsets: Sequence[Any], shape: tuple[int, ...]) -> list[_Coordinate]:
    """The coordinates of a block's elements in the logical array."""
    return [
        (jax.lax.broadcasted_iota(jnp.uint32, block, dim) + jnp.uint32(offset), dim + 1)
        for dim, offset in enumerate(offsets)
        if shape[dim] > 1
    ]


def _packed(block: tuple[int, ...], packed: Packing) -> tuple[list[_Coordinate], Any]:
    """The coordinates of the elements of a device's packed rows in the logical array, and which are no padding."""
    leaf, mesh = packed
    split, stack = entries(leaf.param_spec, len(leaf.shape)), leaf.stacked_dims
    counts = [math.prod(mesh.shape[axis] for axis in axes) for axes in split]
    local = [size // count for size, count in zip(leaf.shape, counts, strict=True)]
    offsets = [_index(axes) * np.uint32(size) for axes, size in zip(split, local, strict=True)]
    coordinates = _natural(block, offsets[:stack], leaf.shape)
    rows = jax.lax.broadcasted_iota(jnp.uint32, block, stack) + _index(leaf.shard_axes) * np.uint32(block[-2])
    within = rows * np.uint32(LANES) + jax.lax.broadcasted_iota(jnp.uint32, block, stack + 1)
    valid = within < np.uint32(math.prod(local[stack:]))
    # Row-major in the device's own part: dims are peeled off from the last, as many at once as lie together in both.
    end, cut = len(leaf.shape), _first_low_dim(leaf.shape)
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


def _block_sums(
    x: jax.Array, seed: Any, coordinates: list[_Coordinate], shape: tuple[int, ...], valid: Any = None
) -> jax.Array:
    """The sums over one block, from the coordinates of its elements."""
    cut = _first_low_dim(shape)
    low, high = jnp.zeros(x.shape, jnp.uint32), jnp.zeros(x.shape, jnp.uint32) if cut else None
    for values, end in coordinates:  # Merged dims count in steps of what comes after them.
        if end > cut:
            low = low + values * np.uint32(math.prod(shape[end:]))
        else:
            high = high + values * np.uint32(math.prod(shape[end:cut]))
    inexact = jnp.issubdtype(x.dtype, jnp.inexact)
    terms = _terms(_device_words(x), low, high, seed, jnp.isfinite(x) if inexact else None, jnp)
    if valid is not None:
        terms = tuple(jnp.where(valid, term, jnp.uint32(0)) for term in terms)
    # One reduction of three operands: as three of one, XLA:CPU computes the terms three times, and a tenth as fast.
    zeros = (np.uint32(0),) * 3
    return jnp.stack(jax.lax.reduce(terms, zeros, lambda x, y: jax.tree.map(jnp.add, x, y), range(x.ndim)))


def _terms(words: list[Any], low: Any, high: Any, seed: Any, finite: Any, xp: Any) -> tuple[Any, Any, Any]:
    """What each element adds to the two sums and to the count of those not finite: one text for numpy and for JAX.

    Args:
      words: uint32 arrays, so many for each element.
      low, high: the element's position, uint32; `high` is None where `low` counts them all.
      seed: uint32[2].
      finite: which elements are; None where all are.
      xp: numpy or jax.numpy.
    """
    position = low * np.uint32(_WEYL_LOW) + seed[0]
    second = low * np.uint32(_SECOND_LOW) + seed[1]
    if high is not None:
        position = position + high * np.uint32(_WEYL_HIGH)
        second = second + (high ^ (high >> np.uint32(15))) * np.uint32(_SECOND_MIX)
    first = other = words[0]
    for number, word in enumerate(words):
        a = word ^ (position + np.uint32(number * _WORD & 0xFFFFFFFF))
        a = (a ^ (a >> np.uint32(16))) * np.uint32(_MIX_1)
        a = (a ^ (a >> np.uint32(13))) * np.uint32(_MIX_2)
        a = a ^ (a >> np.uint32(16))
        b = (a + second) ^ ((a + second) >> np.uint32(15))
        b = b * np.uint32(_SECOND_MIX)
        b = b ^ (b >> np.uint32(13))
        first, other = (a, b) if number == 0 else (first + a, other + b)
    bad = (~finite).astype(np.uint32) if finite is not None else xp.zeros_like(words[0])
    return first, other, bad


def _device_words(x: jax.Array) -> list[jax.Array]:
    """The bits of each element as uint32 words, the least significant first."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return _device_words(jnp.real(x)) + _device_words(jnp.imag(x))
    if x.dtype == jnp.bool_:
        return [x.astype(jnp.uint32)]
    bits = jax.dtypes.itemsize_bits(x.dtype)
    if bits == 64:
        pairs = jax.lax.bitcast_convert_type(x, jnp.uint32)
        return [pairs[..., 0], pairs[..., 1]]
    return [jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)]


def _host_words(x: np.ndarray) -> list[np.ndarray]:
    """As `_device_words`, of a flat host array."""
    bits = jax.dtypes.itemsize_bits(x.dtype)
    if bits < 8:  # One to a byte, whose other bits say nothing.
        return [(x.view(np.uint8) & np.uint8(2**bits - 1)).astype(np.uint32)]
    if bits <= 32:
        return [x.view(f"<u{bits // 8}").astype(np.uint32)]
    words = x.view("<u4").reshape(x.size, bits // 32)
    return list(words.T)


def _host_finite(x: np.ndarray) -> np.ndarray | None:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return None
    return np.isfinite(x if x.dtype.kind in "fc" else x.astype(np.float32))


def _first_low_dim(shape: Sequence[int]) -> int:
    """The dims from this one on are counted by the low word of a position, those before it by the high one."""
    return next(dim for dim in range(len(shape) + 1) if math.prod(shape[dim:]) <= _WORD_COUNTS)


def _finished(sums: np.ndarray) -> Digest:
    """Inverse of `_unfinished`."""
    return Digest(f"{int(sums[0]):08x}{int(sums[1]):08x}", int(sums[2]))


def _unfinished(digest: Digest) -> np.ndarray:
    return np.array([int(digest.text[:8], 16), int(digest.text[8:], 16), digest.num_nonfinite], np.uint32)
