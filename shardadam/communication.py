"""Reduce-scatter and all-gather over named mesh axes, and the tap between them: inside a `shard_map` over the axes."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

Collective = Literal["joint", "per_axis"]

# By platform, what is best where the shards are dealt out over more than one mesh axis. A joint reduce-scatter over
# several torus axes of a TPU compiles to a full all-reduce, one axis at a time does not; everywhere else one collective
# over all is the shortest way.
_BEST: dict[str, Collective] = {"tpu": "per_axis"}
_ROWS, _LANES = 8, 128  # Of a TPU's tile.


def resolve_collective(
    collective: Literal["joint", "per_axis", "auto"], mesh: Any, axes: tuple[str, ...]
) -> Collective:
    """What "auto" stands for on a mesh: "per_axis" on TPUs where there is more than one axis, else "joint".

    Args:
      collective: what was asked for.
      mesh: a Mesh; of an AbstractMesh, which has no devices, "joint" is taken.
      axes: the axes that the shards are dealt out over.
    """
    if collective != "auto":
        return collective
    if not isinstance(mesh, Mesh) or sum(mesh.shape[axis] > 1 for axis in axes) < 2:
        return "joint"
    return _BEST.get(mesh.devices.flat[0].platform, "joint")


def reduce_scatter(
    x: jax.Array, axes: tuple[str, ...], *, dim: int, summed: tuple[str, ...], collective: Collective = "joint"
) -> jax.Array:
    """The sum of `x` over mesh axes, of which each device keeps its own block of `dim`.

    Args:
      x: this device's summand; `dim` divides by the product of the axes' sizes.
      axes: the mesh axes that the blocks are dealt out over, major to minor.
      dim: the dim that is cut into blocks.
      summed: the axes to sum over; over the others of `axes` `x` is the same already, and a block is only taken.
      collective: "joint" is one collective over all axes; "per_axis" one for each, major first: on a TPU torus a
        collective over a single torus axis stays a reduce-scatter, where a joint one becomes an all-reduce.

    Returns:
      The block of this device: `x` with `dim` divided by the product of the axes' sizes.
    """
    joint = collective == "joint" and set(axes) <= set(summed)
    for group in [axes] if joint else [(axis,) for axis in axes]:
        if set(group) <= set(summed):
            tiles = collective == "per_axis" and dim == 0
            x = _scatter_tiles(x, group[0]) if tiles else _psum_scatter(x, group, dim)
        else:
            size = x.shape[dim] // jax.lax.axis_size(group)
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(group) * size, size, axis=dim)
    return x


def _psum_scatter(x: jax.Array, axes: str | tuple[str, ...], dim: int) -> jax.Array:
    return jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)


def _scatter_tiles(x: jax.Array, axis: str) -> jax.Array:
    """`psum_scatter` of dim 0 over one mesh axis, as whole tiles of a TPU: blocks of (any number, 8, 128) elements.

    The TPU compiler all-reduces blocks that are no whole tiles, twice the bytes, and adds to others, up to an eighth,
    so that the steps of its ring come out even; of tiles it adds at most one in a hundred. Where the last two dims are
    whole tiles this is the order they have in memory, and moves nothing; else the blocks are copied. Over an odd number
    of a TPU's devices it is an all-reduce after all.
    """
    num_blocks = jax.lax.axis_size(axis)
    rows, size = x.shape[0] // num_blocks, x.size // num_blocks
    if num_blocks % 2 and num_blocks > 1:
        return jax.lax.platform_dependent(
            x,
            tpu=functools.partial(_reduced_block, axis=axis),
            default=functools.partial(_psum_scatter, axes=axis, dim=0),
        )
    *_, height, width = (rows, *x.shape[1:]) if x.ndim > 1 else (1, 1)
    if height % _ROWS == 0 and width % _LANES == 0:
        own = _psum_scatter(_tiles(x.reshape(-1, height, width)).reshape(num_blocks, -1, _ROWS, _LANES), axis, 0)
        own = own.reshape(-1, height // _ROWS, width // _LANES, _ROWS, _LANES).swapaxes(2, 3)
    elif -size % (_ROWS * _LANES) <= size // 8:
        blocks = jnp.pad(x.reshape(num_blocks, size), [(0, 0), (0, -size % (_ROWS * _LANES))])
        own = _psum_scatter(blocks.reshape(num_blocks, _ROWS, -1), axis, 0).reshape(-1)[:size]
    else:
        own = _psum_scatter(x, axis, 0)
    return own.reshape(rows, *x.shape[1:])


def _reduced_block(x: jax.Array, axis: str) -> jax.Array:
    """`psum_scatter` of dim 0 as an all-reduce, of which each device takes its block.

    The TPU compiler refuses some reduce-scatters over an odd number: "AllReduce fusion with 7 sized replica_groups".
    """
    rows = x.shape[0] // jax.lax.axis_size(axis)
    whole = jax.lax.optimization_barrier(jax.lax.psum(x, axis))
    return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(axis) * rows, rows)


def _tiles(x: jax.Array) -> jax.Array:
    """Of (number, rows, lanes), the tiles in the order that a TPU has them in memory."""
    number, height, width = x.shape
    return x.reshape(number, height // _ROWS, _ROWS, width // _LANES, _LANES).swapaxes(2, 3)


def all_gather(x: jax.Array, axes: tuple[str, ...], *, dim: int, collective: Collective = "joint") -> jax.Array:
    """The blocks of all devices along mesh axes, one after the other: brings back what `reduce_scatter` cut.

    Args:
      x: this device's block.
      axes: the mesh axes that the blocks are dealt out over, major to minor.
      dim: the dim that is made whole.
      collective: "joint" is one collective over all axes; "per_axis" one for each, minor first.

    Returns:
      `x` with `dim` multiplied by the product of the axes' sizes.
    """
    for group in [axes] if collective == "joint" else [(axis,) for axis in reversed(axes)]:
        x = jax.lax.all_gather(x, group, axis=dim, tiled=True)
    return x


def tap(whole: jax.Array, block: jax.Array, scatter: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """An all-gather whose result is at hand already: forward it is `whole`, backward `block` gets its gradient.

    In the backward pass the cotangent of `whole` is reduced by `scatter` as soon as it is complete, and ends in
    `block`; in a scan over layers that is inside the backward scan, so that one layer's whole gradient is alive at a
    time. `whole` itself has no gradient.

    Args:
      whole: the gathered array.
      block: an array of the shape that `scatter` returns; only its gradient matters.
      scatter: from the cotangent of `whole` to this device's block of its sum.
    """

    @jax.custom_vjp
    def gathered(whole: jax.Array, block: jax.Array) -> jax.Array:
        del block
        return whole

    def forward(whole: jax.Array, block: jax.Array) -> tuple[jax.Array, None]:
        del block
        return whole, None

    def backward(_: None, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros_like(cotangent), scatter(cotangent).astype(block.dtype)

    gathered.defvjp(forward, backward)
    return gathered(jax.lax.stop_gradient(whole), block)
