"""Large arrays taken in pieces, one after the other: layers of a stack, and parts of a leaf that stacks none."""

import math
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

LARGE_LAYER = 2**20  # Elements: below it, a collective for each layer costs more in latency than it saves in memory.
LARGE_PIECE = 2**23  # Elements: a collective of so many is bound by bandwidth,
LARGE_BLOCK = 2**15  # where each device's block has so many, or more.
MAX_OVERLAP = 1 / 100  # Of a leaf: what may be sent twice.


def cuts_of(shape: tuple[int, ...], num_stacked: int, free: Collection[int], num_blocks: int = 1) -> dict[int, int]:
    """How an array is cut: the width of a piece by dim, nothing where it is taken at once.

    Args:
      shape: of the array, whole: the stacked dims first.
      num_stacked: its stacked dims; large layers are pieces of their own.
      free: other dims that may be cut: a layer that is still too large is cut along the one where that wastes least.
      num_blocks: how many devices each collective is over.

    Returns:
      Widths that need not divide: the last piece then overlaps the one before.

    Example:
      >>> cuts_of((32, 4096, 14336), 1, {2}), cuts_of((128256, 4096), 0, {1}), cuts_of((32, 4096), 1, ())
      ({0: 1, 2: 2048}, {1: 128}, {})
    """
    size = math.prod(shape[num_stacked:])
    if size < LARGE_LAYER:
        return {}
    cuts = dict.fromkeys(range(num_stacked), 1)
    pieces = -(-size // max(LARGE_PIECE, LARGE_BLOCK * num_blocks))
    widths = {dim: _width(shape, dim, pieces) for dim in free}
    widths = {dim: width for dim, width in widths.items() if width < shape[dim]}
    if widths:
        dim = min(widths, key=lambda dim: (-shape[dim] % widths[dim] / shape[dim], dim))
        cuts[dim] = widths[dim]
    return cuts


def _width(shape: tuple[int, ...], dim: int, pieces: int) -> int:
    """The width of so many pieces of a dim or a few more, in whole tiles of a TPU: 16 rows of 128 lanes, of two bytes.

    All of the dim, where pieces would overlap by too much.
    """
    tile = {len(shape) - 1: 128, len(shape) - 2: 16}.get(dim, 1)
    widths = (-(-shape[dim] // (count * tile)) * tile for count in range(pieces, 2 * pieces))
    return next((width for width in widths if -shape[dim] % width <= shape[dim] * MAX_OVERLAP), shape[dim])


def in_pieces(
    f: Callable[[jax.Array, int], jax.Array],
    x: jax.Array,
    cuts: Mapping[int, int],
    num_stacked: int,
    *,
    into: jax.Array | None = None,
) -> jax.Array:
    """`f` of an array, of one piece after the other.

    What a collective needs beside its result (a copy for each axis, another order of the dims) is then of one piece: on
    a v5p-256, 0.2 GiB in place of 19.4 for a model of 8B parameters (docs/topologies.md).

    Args:
      f: of a piece, and how many stacked dims it leads with: none, or all of `x` where that is taken at once. To an
        array with the same dims where they are stacked or cut.
      x: the array.
      cuts: see `cuts_of`.
      num_stacked: the stacked dims of `x`.
      into: an array of the result's shape and dtype that is no longer needed, to write over. Where it was donated the
        result needs no room of its own. XLA:GPU would else make a second stack (13.6 GiB of temporaries in place of 0.7
        for 8B parameters on 64 H100).
    """
    if not cuts:
        return f(x, num_stacked)
    counts = [-(-x.shape[dim] // width) for dim, width in cuts.items()]

    def sizes(shape: tuple[int, ...]) -> list[int]:
        return [cuts.get(dim, size) for dim, size in enumerate(shape)]

    def starts(i: jax.Array, shape: tuple[int, ...]) -> list[jax.Array | int]:
        at = dict(zip(cuts, jnp.unravel_index(i, counts), strict=True))
        return [jnp.minimum(at[d] * cuts[d], size - cuts[d]) if d in cuts else 0 for d, size in enumerate(shape)]

    def done(piece: jax.Array) -> jax.Array:
        # Without its stacked dims: compilers make reduce-scatters of dim 0 rather than of others.
        made = f(piece.reshape(piece.shape[num_stacked:]), 0)
        return made.reshape(*piece.shape[:num_stacked], *made.shape)

    def one(i: jax.Array, whole: jax.Array) -> jax.Array:
        piece = row_major(jax.lax.dynamic_slice(x, starts(i, x.shape), sizes(x.shape)))
        return jax.lax.dynamic_update_slice(whole, row_major(done(piece)), starts(i, whole.shape))

    if into is None:
        made = jax.eval_shape(done, jax.ShapeDtypeStruct(sizes(x.shape), x.dtype))
        into = jnp.zeros([x.shape[dim] if dim in cuts else size for dim, size in enumerate(made.shape)], made.dtype)
    return jax.lax.fori_loop(0, math.prod(counts), one, into)


def row_major(x: jax.Array) -> jax.Array:
    """The array, its last dim the minor one in memory: a piece of a larger array that a loop takes pieces of.

    Where the loop wants each in another order, XLA:TPU else copies the whole array before it, not each piece within it.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
