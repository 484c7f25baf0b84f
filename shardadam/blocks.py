"""Blocks: what one device has of a leaf, as an array with dims for the shard and the part; gathering and scattering."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from shardadam.communication import Collective, all_gather, reduce_scatter
from shardadam.layout import LeafPlan, canonical_spec, entries, pack, shard_shape, unpack
from shardadam.pieces import cuts_of, in_pieces, row_major
from shardadam.sharding import constrain, only_axes


class Region(NamedTuple):
    """The part of a mesh that a loss is computed in, device by device, and how gradients are reduced there."""

    mesh: Mesh | AbstractMesh
    manual: tuple[str, ...]  # The axes each device has its own part of the batch on.
    collective: Collective
    reduce_dtype: Any

    @property
    def auto(self) -> tuple[str, ...]:
        """The other axes: JAX splits the loss over them by the parameters' own specs."""
        return tuple(axis for axis in self.mesh.axis_names if axis not in self.manual)

    @property
    def num_devices(self) -> int:
        """Into how many parts the batch is split."""
        return math.prod(self.mesh.shape[axis] for axis in self.manual)


def scatter_leaf(g: jax.Array, *, leaf: LeafPlan, region: Region) -> jax.Array:
    """One device's gradient, summed over the region's devices onto their blocks; whole where the leaf is not split.

    Args:
      g: of `leaf.shape`, or of one layer of it.
      leaf: the leaf's plan.
      region: where this is called.

    Returns:
      The block, after the stacked dims that `g` has and two dims of size 1 for the shard and the part: see
      `block_spec`.
    """
    g = g if region.reduce_dtype is None else g.astype(region.reduce_dtype)
    num_stacked = g.ndim - _layer_ndim(leaf)  # Within a scan, a layer has none.
    if leaf.num_shards == 1:
        # On parts, as XLA:CPU aborts at a sum in 16 bits over some axes of a mesh while others are Auto.
        whole = functools.partial(jax.lax.psum, axis_name=region.manual)
        return _on_parts(whole, leaf, region, num_stacked, leaf.param_spec, leaf.param_spec)(g)

    def block(piece: jax.Array, stacked: int) -> jax.Array:
        x = pack(piece, leaf.num_shards, stacked) if leaf.layout == "packed" else piece
        dim = split_dim(leaf, stacked)
        over = functools.partial(
            reduce_scatter, axes=leaf.shard_axes, summed=region.manual, collective=region.collective
        )
        if dim == 0 or (region.collective == "joint" and stacked):
            return over(x, dim=dim)
        return _as_major(over, x, dim)

    def own_block(part: jax.Array) -> jax.Array:
        # One reduce-scatter of dim 0 over all axes needs no room but its result's. A loop over its pieces does not pay:
        # a train step of 8B parameters on 64 H100 then takes 1.1 GiB more, a second large gradient.
        in_place = region.collective == "joint" and split_dim(leaf, 0) == 0
        sizes = region.mesh.shape
        cuts = leaf_cuts(part.shape, leaf, num_stacked, region.collective, sizes, within_layer=not in_place)
        x = in_pieces(block, part, cuts, num_stacked)
        return jnp.expand_dims(x, (num_stacked, num_stacked + 1))

    return _on_parts(own_block, leaf, region, num_stacked, leaf.param_spec, block_spec(leaf))(g)


def _as_major(scatter_or_gather: Any, x: jax.Array, dim: int) -> jax.Array:
    """A scatter or a gather of a minor dim as one of dim 0: XLA:GPU else transposes whole stacks, TPUs all-reduce."""
    return jnp.moveaxis(scatter_or_gather(jnp.moveaxis(x, dim, 0), dim=0), 0, dim)


def gather_leaf(block: jax.Array, *, leaf: LeafPlan, region: Region) -> jax.Array:
    """The whole leaf, or one layer of it, of which each device has a block: inverse of `scatter_leaf` but for the sum.

    Args:
      block: as `scatter_leaf` returns it, of any dtype; the leaf itself where it is not split.
      leaf: the leaf's plan.
      region: where this is called.
    """
    if leaf.num_shards == 1:
        return block
    num_stacked = block.ndim - 2 - (2 if leaf.layout == "packed" else _layer_ndim(leaf))

    own = shard_shape(leaf.shape, leaf.param_spec, region.mesh.shape)
    shape = (*block.shape[:num_stacked], *own[leaf.stacked_dims :])

    def own_part(x: jax.Array) -> jax.Array:
        x = jnp.squeeze(x, (num_stacked, num_stacked + 1))
        return gather_block(x, leaf, shape, region.collective)

    return _on_parts(own_part, leaf, region, num_stacked, block_spec(leaf), leaf.param_spec)(block)


def gather_block(
    x: jax.Array, leaf: LeafPlan, shape: tuple[int, ...], collective: Collective, into: jax.Array | None = None
) -> jax.Array:
    """One device's part of a leaf, or of one layer of it, from the blocks of all: where all axes are manual.

    Args:
      x: the block, without the dims for the shard and the part.
      leaf: the leaf's plan.
      shape: of the part.
      collective: see `all_gather`.
      into: an array of that shape that is no longer needed, see `in_pieces`.
    """
    num_stacked = len(shape) - _layer_ndim(leaf)

    def gathered(piece: jax.Array, stacked: int) -> jax.Array:
        over, dim = functools.partial(all_gather, axes=leaf.shard_axes, collective=collective), split_dim(leaf, stacked)
        whole = _as_major(over, piece, dim) if dim > 0 and not stacked else over(piece, dim=dim)
        return unpack(whole, shape[num_stacked - stacked :], stacked) if leaf.layout == "packed" else whole

    sizes = {axis: jax.lax.axis_size(axis) for axis in leaf.shard_axes}
    cuts = leaf_cuts(shape, leaf, num_stacked, collective, sizes)
    return in_pieces(gathered, x, cuts, num_stacked, into=into)


def leaf_cuts(
    shape: tuple[int, ...],
    leaf: LeafPlan,
    num_stacked: int,
    collective: Collective,
    axis_sizes: Mapping[str, int],
    *,
    within_layer: bool = True,
) -> dict[int, int]:
    """How one device's part of a leaf is cut to pieces that are scattered or gathered one after the other.

    The dim that is dealt out stays as it is. Of a packed leaf that is all of a layer, which is folded as a whole.
    """
    sizes = [axis_sizes[axis] for axis in leaf.shard_axes]
    num_blocks = math.prod(sizes) if collective == "joint" else max(sizes)
    free: set[int] = set()
    if leaf.layout != "packed" and within_layer:
        free = set(range(num_stacked, len(shape))) - {split_dim(leaf, num_stacked)}
    return cuts_of(shape, num_stacked, free, num_blocks)


def row_major_leaf(x: jax.Array, *, leaf: LeafPlan, region: Region) -> jax.Array:
    """A whole leaf, or one layer of it, with the dims of each device's part in their order in memory: see `row_major`.

    What a matrix product wants in another order XLA:TPU then copies layer by layer in a scan, not the stack before it:
    1.5 GiB of a train step of 8B parameters.
    """
    num_stacked = x.ndim - _layer_ndim(leaf)
    return _on_parts(row_major, leaf, region, num_stacked, leaf.param_spec, leaf.param_spec)(x)


def block_spec(leaf: LeafPlan) -> P:
    """How a leaf's blocks are sharded as one array: (stacked dims, num_shards, num_parts, a device's block)."""
    if leaf.num_shards == 1:
        return leaf.param_spec
    stack = entries(leaf.param_spec, len(leaf.shape))[: leaf.stacked_dims]
    return canonical_spec((*stack, leaf.shard_axes, leaf.part_axes))


def block_to_state(x: jax.Array, leaf: LeafPlan, mesh: Mesh | AbstractMesh) -> jax.Array:
    """Blocks, as one array, as the array that the state has: moves nothing. Inverse of `state_to_block`."""
    if leaf.num_shards == 1:
        return constrain(x, mesh, leaf.param_spec)
    spec, k = block_spec(leaf), leaf.stacked_dims
    own = jax.shard_map(lambda b: jnp.squeeze(b, (k, k + 1)), mesh=mesh, in_specs=spec, out_specs=leaf.state_spec)
    return constrain(own(constrain(x, mesh, spec)), mesh, leaf.state_spec)


def state_to_block(x: jax.Array, leaf: LeafPlan, mesh: Mesh | AbstractMesh) -> jax.Array:
    """An array in the state's layout as blocks: moves nothing. Inverse of `block_to_state`."""
    if leaf.num_shards == 1:
        return constrain(x, mesh, leaf.param_spec)
    spec, k = block_spec(leaf), leaf.stacked_dims
    own = jax.shard_map(lambda s: jnp.expand_dims(s, (k, k + 1)), mesh=mesh, in_specs=leaf.state_spec, out_specs=spec)
    return constrain(own(constrain(x, mesh, leaf.state_spec)), mesh, spec)


def part_of_spec(spec: P, axes: tuple[str, ...], skipped: int = 0) -> P:
    """What a spec says of some axes, without the leading dims that a scan has taken off."""
    rest = P(*tuple(spec)[skipped:])
    return only_axes(rest, axes, len(rest))


def _on_parts(f: Any, leaf: LeafPlan, region: Region, num_stacked: int, given: P, made: P) -> Any:
    """`f` on each device's own part of a leaf, or of one layer of it; the specs are those of whole leaves."""
    if not region.auto:
        return f
    # Manual over the other axes as well: each device handles its own part, and nothing moves over those axes.
    of = functools.partial(part_of_spec, axes=region.auto, skipped=leaf.stacked_dims - num_stacked)
    return jax.shard_map(f, in_specs=of(given), out_specs=of(made), axis_names=set(region.auto), check_vma=False)


def _layer_ndim(leaf: LeafPlan) -> int:
    return len(leaf.shape) - leaf.stacked_dims


def split_dim(leaf: LeafPlan, num_stacked: int) -> int:
    """The dim that holds the shards, of a leaf's own array with so many stacked dims."""
    if leaf.layout == "packed":
        return num_stacked
    parts = entries(leaf.state_spec, len(leaf.shape))
    dim = next(dim for dim, axes in enumerate(parts) if set(leaf.shard_axes) <= set(axes))
    return dim - leaf.stacked_dims + num_stacked
