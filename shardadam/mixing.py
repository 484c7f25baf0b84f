"""Arrays' bits as two sums modulo 2^32, whatever the order they are added in: the arithmetic of every digest here."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Odd constants of known integer hashes (Weyl's step, murmur3, xxhash32). They are part of the format of a seal.
_WEYL_LOW, _WEYL_HIGH, _WORD = 0x9E3779B1, 0x85EBCA77, 0x165667B1
_MIX_1, _MIX_2, _SECOND_LOW, _SECOND_MIX = 0x85EBCA6B, 0xC2B2AE35, 0xC2B2AE3D, 0x27D4EB2F
WORD_COUNTS = 2**32  # Positions that one word tells apart.


def leaf_seed(path: str, shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Two uint32 that key a leaf's digest: with another name, shape or dtype, the same bits have another one."""
    text = f"{path}\0{','.join(map(str, shape))}\0{np.dtype(dtype).name}"
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], "<u4").astype(np.uint32)


# A coordinate: the values along one or several merged dims, and the first dim after these.
Coordinate = tuple[Any, int]


def natural(block: tuple[int, ...], offsets: Sequence[Any], shape: tuple[int, ...]) -> list[Coordinate]:
    """The coordinates of a block's elements in the logical array."""
    return [
        (jax.lax.broadcasted_iota(jnp.uint32, block, dim) + jnp.uint32(offset), dim + 1)
        for dim, offset in enumerate(offsets)
        if shape[dim] > 1
    ]


def block_sums(
    x: jax.Array, seed: Any, coordinates: list[Coordinate], shape: tuple[int, ...], valid: Any = None
) -> jax.Array:
    """The sums over one block, from the coordinates of its elements."""
    cut = first_low_dim(shape)
    low, high = jnp.zeros(x.shape, jnp.uint32), jnp.zeros(x.shape, jnp.uint32) if cut else None
    for values, end in coordinates:  # Merged dims count in steps of what comes after them.
        if end > cut:
            low = low + values * np.uint32(math.prod(shape[end:]))
        else:
            high = high + values * np.uint32(math.prod(shape[end:cut]))
    inexact = jnp.issubdtype(x.dtype, jnp.inexact)
    terms = terms_of(_device_words(x), low, high, seed, jnp.isfinite(x) if inexact else None, jnp)
    if valid is not None:
        terms = tuple(jnp.where(valid, term, jnp.uint32(0)) for term in terms)
    # One reduction of three operands: as three of one, XLA:CPU computes the terms three times, and a tenth as fast.
    zeros = (np.uint32(0),) * 3
    return jnp.stack(jax.lax.reduce(terms, zeros, lambda x, y: jax.tree.map(jnp.add, x, y), range(x.ndim)))


def terms_of(words: list[Any], low: Any, high: Any, seed: Any, finite: Any, xp: Any) -> tuple[Any, Any, Any]:
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


def host_words(x: np.ndarray) -> list[np.ndarray]:
    """As `_device_words`, of a flat host array."""
    bits = jax.dtypes.itemsize_bits(x.dtype)
    if bits < 8:  # One to a byte, whose other bits say nothing.
        return [(x.view(np.uint8) & np.uint8(2**bits - 1)).astype(np.uint32)]
    if bits <= 32:
        return [x.view(f"<u{bits // 8}").astype(np.uint32)]
    words = x.view("<u4").reshape(x.size, bits // 32)
    return list(words.T)


def host_finite(x: np.ndarray) -> np.ndarray | None:
    """Which elements are finite; None where all are, by their dtype."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return None
    return np.isfinite(x if x.dtype.kind in "fc" else x.astype(np.float32))


def first_low_dim(shape: Sequence[int]) -> int:
    """The dims from this one on are counted by the low word of a position, those before it by the high one."""
    return next(dim for dim in range(len(shape) + 1) if math.prod(shape[dim:]) <= WORD_COUNTS)
