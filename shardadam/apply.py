"""The optimizer's updates added on each device's shards, and the norms of what lies in shards."""

import dataclasses
import math
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from shardadam.communication import Collective
from shardadam.layout import LeafPlan, entries
from shardadam.params import check_shape, gather_shards, widened
from shardadam.plan import Plan, is_none
from shardadam.rates import rate_of_step, said_rates
from shardadam.sharding import check_context, constrain, map_leaves, pack_leaf, unpack_leaf
from shardadam.transformation import ShardedTransformation, select


class Applied(NamedTuple):
    """What `apply_on_shards` gives: new parameters, optimizer state and masters, and what was asked for in numbers."""

    params: Any
    opt_state: Any
    master: Any
    metrics: dict[str, jax.Array]


def apply_on_shards(
    grads: Any,
    opt_state: Any,
    params: Any,
    *,
    tx: Any,
    plan: Plan,
    scattered: bool,
    at_rest: bool = False,
    master: Any = None,
    keep: jax.Array | None = None,
    measure: bool = False,
    collective: Collective = "joint",
) -> Applied:
    """Adds the optimizer's updates on each device's shards; then gathers the new parameters in their own dtype.

    Args:
      grads: a tree like params: in the layout of the state if `scattered`, in the parameters' own if not.
      opt_state: of `tx`.
      params: the parameters, of the plan's shapes and specs; in the layout of the state if `at_rest`.
      tx: a `ShardedTransformation`, or one within optax's combinators.
      plan: of the parameters.
      scattered: see `grads`.
      at_rest: see `params`; they stay so, and nothing is gathered.
      master: a tree like params, in the layout of the state, of wider copies to add the updates to; None for leaves,
        or for the tree, that have none. The new parameters are these, rounded.
      keep: a bool of shape (); where it is False, params, opt_state and master stay as they were.
      measure: whether to take update_norm (0 where nothing is kept), param_norm, of the new parameters, and the
        learning_rate, where it is known.
      collective: how the parameters are gathered, see `shardadam.params.gather_shards`.

    Raises:
      ValueError: a leaf that does not have the plan's shape.
    """
    # Within a combinator of optax's, something else may go by a parameter's shape (a mask on ndim): packed leaves then
    # keep that shape outside of Adam, and only their updates are gathered instead.
    check_context(plan.mesh)
    mesh, ours = plan.mesh, isinstance(tx, ShardedTransformation)

    def in_shards(leaf: LeafPlan) -> bool:
        return ours or leaf.layout != "packed"

    def from_shards(leaf: LeafPlan, x: Any, path: str) -> Any:
        return x if in_shards(leaf) or x is None else unpack_leaf(x, leaf, mesh)

    def from_whole(leaf: LeafPlan, x: Any, path: str) -> Any:
        if x is None:
            return None
        check_shape(leaf, x, path)
        return pack_leaf(x, leaf, mesh) if in_shards(leaf) else x

    def own_shards(leaf: LeafPlan, x: jax.Array, path: str) -> jax.Array:
        return constrain(x, mesh, leaf.state_spec) if in_shards(leaf) else pack_leaf(x, leaf, mesh)

    def narrowed(leaf: LeafPlan, x: jax.Array, path: str) -> jax.Array:
        x = x.astype(leaf.dtype)
        if at_rest:
            return own_shards(leaf, x, path)
        if not in_shards(leaf):
            return constrain(x, mesh, leaf.param_spec)
        return gather_shards(x, leaf, mesh, collective, into=old.get(path))

    old: dict[str, jax.Array] = {}  # Whole parameters, whose memory the new ones take.
    if not at_rest:
        map_leaves(lambda leaf, x, path: old.update({path: x}), params, plan)
    shards = map_leaves(from_shards if at_rest else from_whole, params, plan)
    if master is not None:
        shards = widened(shards, map_leaves(from_shards, master, plan))
    grads = map_leaves(from_shards if scattered else from_whole, grads, plan)
    given = {} if keep is None or not getattr(tx, "takes_keep", False) else {"keep": keep}
    update = optax.with_extra_args_support(tx).update
    # float32 updates of bfloat16 parameters, also where users forbid it
    with said_rates() as said, jax.numpy_dtype_promotion("standard"):
        updates, made_state = update(grads, opt_state, shards, shards_of=plan, packed=ours, **given)
        new_shards = optax.apply_updates(shards, updates)
    new_shards = select(keep, new_shards, shards)
    new_state = made_state if given else select(keep, made_state, opt_state)
    metrics = {}
    if measure:
        held = plan if ours else unsplit(plan, [path for path, leaf in plan.items if leaf.layout == "packed"])
        metrics = {
            "update_norm": select(keep, global_norm(updates, held), 0),
            "param_norm": global_norm(new_shards, held),
            **rate_of_step(said, opt_state, made_state),
        }
    if master is not None:
        new = map_leaves(own_shards, new_shards, plan)
        master = jax.tree.map(lambda old, x: None if old is None else x, master, new, is_leaf=is_none)
    return Applied(map_leaves(narrowed, new_shards, plan), new_state, master, metrics)


def global_norm(tree: Any, plan: Plan) -> jax.Array:
    """sqrt(sum of |x|^2) over all leaves, of which each device has a shard: one all-reduce of one float32.

    Args:
      tree: like the parameters, in the layout of the state. Padding is zeros and adds nothing.
      plan: of the parameters.
    """
    specs, leaves = [], []

    def collect(leaf: LeafPlan, x: Any, path: str) -> None:
        if x is not None:
            specs.append(leaf.state_spec)
            leaves.append(constrain(x, plan.mesh, leaf.state_spec))

    map_leaves(collect, tree, plan)
    mesh = plan.mesh

    def local(xs: list[jax.Array]) -> jax.Array:
        total = jnp.zeros([], jnp.float32)
        for x, spec in zip(xs, specs, strict=True):
            split = math.prod(mesh.shape[axis] for axes in entries(spec, x.ndim) for axis in axes)
            square = jnp.sum(jnp.square(jnp.abs(x).astype(jnp.float32)))
            total += square * jnp.float32(split / mesh.size)  # Every device that has a copy adds its part of it.
        return jax.lax.psum(total, mesh.axis_names)

    squared = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P(), check_vma=False)(leaves)
    return jnp.sqrt(squared)


def unsplit(plan: Plan, paths: Collection[str]) -> Plan:
    """The plan with some leaves whole: as gradients are that are reduced and not scattered, or as a combinator sees."""

    def whole(leaf: LeafPlan) -> LeafPlan:
        return dataclasses.replace(
            leaf, state_spec=leaf.param_spec, layout="whole", padding=0, shard_axes=(), num_shards=1, reason="unsplit"
        )

    return dataclasses.replace(
        plan, items=tuple((path, whole(leaf) if path in paths else leaf) for path, leaf in plan.items)
    )
