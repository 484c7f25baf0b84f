"""What a train state begins with: parameters where they are to lie, their masters, and the optimizer's state."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from shardadam.layout import LeafPlan
from shardadam.params import pack_params, widened
from shardadam.plan import Plan
from shardadam.precision import is_narrower
from shardadam.sharding import constrain, map_leaves, named_sharding, unpack_leaf
from shardadam.transformation import ShardedTransformation


class Beginning(NamedTuple):
    """Trees like the parameters at step 0.

    Attributes:
      params: as the state holds them.
      master: in shards; None where a parameter needs none, and for the tree if there are none.
      optimized: what the optimizer's updates are added to, in shards; None: just `params`, which are whole.
    """

    params: Any
    master: Any
    optimized: Any


def begin_params(params: Any, plan: Plan, *, stage: int, master_dtype: Any, mesh: Mesh | None) -> Beginning:
    """The parameters and masters of step 0.

    Args:
      params: whole, of the plan's shapes: arrays, tracers or ShapeDtypeStructs.
      plan: of the parameters.
      stage: 3 puts them in shards.
      master_dtype: of the masters; None for none.
      mesh: to place arrays on; None where they are traced or abstract.

    Raises:
      ValueError: a parameter that is on the mesh already, but not where the plan says.
    """
    if mesh is not None and stage != 3:
        params = map_leaves(functools.partial(_place_param, mesh), params, plan)
    if stage != 3 and master_dtype is None:
        return Beginning(params, None, None)
    shards = map_leaves(_abstract_shard, params, plan) if _is_abstract(params) else pack_params(params, plan)
    if master_dtype is None:
        return Beginning(shards, None, shards)
    dtype = jnp.dtype(master_dtype)

    def master_of(leaf: LeafPlan, x: Any, path: str) -> Any:
        return _cast(x, dtype) if is_narrower(leaf.dtype, dtype) else None

    master = map_leaves(master_of, shards, plan)
    held = map_leaves(lambda leaf, x, path: _cast(x, leaf.dtype), shards if stage == 3 else params, plan)
    return Beginning(held, master, widened(shards, master))


def begin_opt_state(tx: Any, beginning: Beginning, plan: Plan, *, mesh: Mesh | None) -> Any:
    """The optimizer's state of step 0: nothing of it is whole on a device.

    Args:
      tx: a `ShardedTransformation`, or one within optax's combinators.
      beginning: the parameters.
      plan: of the parameters.
      mesh: as for `begin_params`.
    """
    ours = isinstance(tx, ShardedTransformation)
    if beginning.optimized is None:
        # A combinator's own accumulators start as the parameters it is shown: in shards, where their shape allows.
        hidden = mesh is not None and not ours
        return tx.init(
            map_leaves(functools.partial(_natural_shard, mesh), beginning.params, plan) if hidden else beginning.params
        )

    def init(shards: Any) -> Any:
        return tx.init(map_leaves(functools.partial(_shown, plan), shards, plan))

    # Compiled, so that packed leaves that init only takes the shapes of are not gathered.
    return jax.jit(init)(beginning.optimized) if ours and mesh is not None else init(beginning.optimized)


def untied(params: Any) -> Any:
    """Parameters with a copy of each array that is there once more: a step could not donate its memory twice.

    XLA refuses that on one device of several, the others wait for it in vain, and the process is aborted after 40 s.
    """
    seen: set[int] = set()

    def own(x: Any) -> Any:
        if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array):
            return x
        again = id(x) in seen
        seen.add(id(x))
        return jnp.copy(x) if again else x

    return jax.tree.map(own, params)


def placed(mesh: Mesh, x: Any) -> bool:
    """Whether a leaf has its place on the mesh, or is abstract and needs none."""
    sharding = getattr(x, "sharding", None)
    return isinstance(x, jax.ShapeDtypeStruct) or (isinstance(sharding, NamedSharding) and sharding.mesh == mesh)


def _is_abstract(tree: Any) -> bool:
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def _cast(x: Any, dtype: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
    return x if x.dtype == dtype else x.astype(dtype)


def _abstract_shard(leaf: LeafPlan, x: Any, path: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.state_shape, x.dtype)


def _shown(plan: Plan, leaf: LeafPlan, x: Any, path: str) -> Any:
    """What an optimizer's init is shown of a parameter in shards: one of the parameter's own shape."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, x.dtype)
    return unpack_leaf(x, leaf, plan.mesh) if leaf.layout == "packed" else x


def _place_param(mesh: Mesh, leaf: LeafPlan, x: Any, path: str) -> Any:
    """A parameter where the plan says; one that has another place on the mesh is not moved but refused."""
    wanted = named_sharding(mesh, leaf.param_spec, len(leaf.shape))
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    if placed(mesh, x) and not x.sharding.is_equivalent_to(wanted, len(leaf.shape)):
        raise ValueError(
            f"`{path}`: the parameter is sharded by {x.sharding.spec}, the plan has {leaf.param_spec}; make the plan "
            "from the placed parameters, or with their param_specs"
        )
    return constrain(jnp.asarray(x), mesh, leaf.param_spec)


def _natural_shard(mesh: Mesh, leaf: LeafPlan, x: Any, path: str) -> Any:
    return x if leaf.layout == "packed" or isinstance(x, jax.ShapeDtypeStruct) else constrain(x, mesh, leaf.state_spec)
