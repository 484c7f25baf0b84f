"""Parameters whole, as a model computes with them, and at rest: in shards, in the layout of the optimizer's state."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from shardadam.blocks import gather_block, leaf_cuts
from shardadam.communication import Collective
from shardadam.layout import LeafPlan, shard_shape
from shardadam.plan import Plan, is_none
from shardadam.sharding import constrain, map_leaves, named_sharding, pack_leaf, unpack_leaf


def pack_params(params: Any, plan: Plan) -> Any:
    """Whole parameters as shards in the layout of the state: what stage 3 holds. Inverse of `unpack_params`.

    Args:
      params: a tree of arrays of the plan's shapes, traced or not; or of gradients, or anything else shaped so.
      plan: of the parameters.

    Returns:
      A tree of arrays of `LeafPlan.state_shape`, sharded by `LeafPlan.state_spec`. Outside of a trace, leaf by leaf:
      no more than one is whole on a device at a time.

    Raises:
      ValueError: a leaf that does not have the plan's shape.

    Example:
      >>> plan = make_plan({"w": jnp.ones((8, 128))}, jax.make_mesh((1,), ("data",)))
      >>> unpack_params(pack_params({"w": jnp.ones((8, 128))}, plan), plan)["w"].shape
      (8, 128)
    """

    def one(leaf: LeafPlan, x: Any, path: str) -> jax.Array:
        check_shape(leaf, x, path)
        if isinstance(x, jax.core.Tracer):
            return pack_leaf(x, leaf, plan.mesh)
        if leaf.layout != "packed":  # Straight to its shards, and never whole on a device.
            return constrain(jnp.asarray(x) if jnp.ndim(x) == 0 else x, plan.mesh, leaf.state_spec)
        return jax.block_until_ready(_packer(leaf, plan.mesh)(constrain(x, plan.mesh, leaf.param_spec)))

    return map_leaves(one, params, plan)


def unpack_params(params: Any, plan: Plan, *, collective: Collective = "joint") -> Any:
    """Shards as whole parameters: an all-gather of each leaf. Inverse of `pack_params`.

    Args:
      params: a tree of arrays of `LeafPlan.state_shape`, traced or not.
      plan: of the parameters.
      collective: see `gather_shards`.

    Returns:
      A tree of arrays of `LeafPlan.shape`, sharded by `LeafPlan.param_spec`.
    """

    def one(leaf: LeafPlan, x: Any, path: str) -> jax.Array:
        return gather_shards(x, leaf, plan.mesh, collective)

    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(params))
    return map_leaves(one, params, plan) if traced else jax.jit(functools.partial(map_leaves, one, plan=plan))(params)


def check_shape(leaf: LeafPlan, x: Any, path: str) -> None:
    """Refuses what does not have a parameter's shape, by its name."""
    if jnp.shape(x) != leaf.shape:
        raise ValueError(f"`{path}`: got shape {jnp.shape(x)}, the plan has {leaf.shape}; make a state for this tree")


def widened(shards: Any, master: Any) -> Any:
    """Parameters in shards with each master in the place of its parameter: what updates are added to.

    Args:
      shards: a tree like the parameters.
      master: a tree like it, with None where a parameter has no master.
    """
    return jax.tree.map(lambda wide, own: own if wide is None else wide, master, shards, is_leaf=is_none)


def gather_shards(
    x: jax.Array, leaf: LeafPlan, mesh: Mesh | AbstractMesh, collective: Collective, *, into: jax.Array | None = None
) -> jax.Array:
    """One leaf from the layout of the state to its parameter's, as `unpack_leaf` with a say in how.

    Args:
      x: an array of `leaf.state_shape`.
      leaf: the leaf's plan.
      mesh: the mesh to place it on.
      collective: "joint" is one all-gather; "per_axis" one along each mesh axis, minor first. Large layers of a stack,
        and pieces of other large leaves, are gathered one after the other.
      into: the leaf's old value, whole, which is no longer needed: such pieces are written over its own.
    """
    if leaf.num_shards == 1:
        return unpack_leaf(x, leaf, mesh)
    part = shard_shape(leaf.shape, leaf.param_spec, mesh.shape)
    at_once = not leaf_cuts(part, leaf, leaf.stacked_dims, collective, mesh.shape)
    if at_once and (collective == "joint" or len(leaf.shard_axes) < 2):
        return unpack_leaf(x, leaf, mesh)

    def own_part(shard: jax.Array, old: jax.Array | None) -> jax.Array:
        return gather_block(shard, leaf, part, collective, into=old)

    over = None if into is None or at_once else constrain(into, mesh, leaf.param_spec)
    gathered = jax.shard_map(
        own_part,
        mesh=mesh,
        in_specs=(leaf.state_spec, None if over is None else leaf.param_spec),
        out_specs=leaf.param_spec,
        check_vma=False,
    )(constrain(x, mesh, leaf.state_spec), over)
    return constrain(gathered, mesh, leaf.param_spec)


@functools.cache
def _packer(leaf: LeafPlan, mesh: Mesh) -> Any:
    sharding = named_sharding(mesh, leaf.state_spec, len(leaf.state_shape))
    return jax.jit(lambda x: pack_leaf(x, leaf, mesh), out_shardings=sharding)
