"""Reduce-scatter over named mesh axes, and the tap that runs it in a backward pass: inside a `shard_map` over them."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

Collective = Literal["joint", "per_axis"]


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
            x = jax.lax.psum_scatter(x, group, scatter_dimension=dim, tiled=True)
        else:
            size = x.shape[dim] // jax.lax.axis_size(group)
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(group) * size, size, axis=dim)
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
