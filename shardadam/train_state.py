"""Flax's TrainState with its optimizer state in shards from the start, and the update added on the shards."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardadam.layout import LeafPlan
from shardadam.placement import ambient_mesh, bind
from shardadam.plan import Plan, make_plan
from shardadam.sharding import audit, constrain, map_leaves, named_sharding, state_shardings
from shardadam.step import apply_on_shards
from shardadam.transformation import ShardedTransformation


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState`, created sharded and updated in shards.

    What is different from Flax's: `opt_state` is never whole on a device; `step` starts as an int32 array, so that a
    jitted step compiles once; `apply_gradients` adds the updates on each device's shard and gathers the new parameters
    in their own dtype: one all-gather per leaf, and no tree of full-size updates. Parameters keep their own shardings.

    Attributes:
      plan: where mu and nu of every parameter live. Static: it is no leaf of the tree.
    """

    plan: Plan = struct.field(pytree_node=False)

    @classmethod
    def create(cls, *, apply_fn: Any, params: Any, tx: Any, plan: Plan | None = None, **kwargs: Any) -> "TrainState":
        """A state at step 0.

        Args:
          apply_fn: usually `model.apply`.
          params: a tree of arrays, or of tracers under `jit` and `eval_shape`. Those that are not on the plan's mesh
            yet are placed there.
          tx: `shardadam.adam(...)` or one of its family, alone or within optax's combinators.
          plan: default: the plan that `tx` has or makes; within an optax combinator, which hides it, one made from the
            mesh and the specs of `params`.
          **kwargs: the further fields of a subclass.

        Returns:
          A `TrainState`.

        Raises:
          ValueError: no plan was given and none can be made.
          ShardingError: `tx` made a state that is not where the plan says.

        Example:
          >>> mesh = jax.make_mesh((1,), ("data",))
          >>> plan = make_plan({"w": jnp.ones((8, 128))}, mesh)
          >>> tx = shardadam.adam(1e-3, plan=plan)
          >>> state = TrainState.create(apply_fn=None, params={"w": jnp.ones((8, 128))}, tx=tx)
          >>> int(state.apply_gradients(grads=state.params).step)
          1
        """
        trained = _trained(params)
        if plan is None:
            plan = tx.plan_of(trained) if isinstance(tx, ShardedTransformation) else None
        plan = _plan_from(trained) if plan is None else bind(plan, ambient_mesh())
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(params))
        mesh = None if traced or not isinstance(plan.mesh, Mesh) else plan.mesh
        if mesh is None:
            step, opt_state = jnp.zeros([], jnp.int32), tx.init(trained)
        else:
            trained = map_leaves(functools.partial(_place_param, mesh), trained, plan)
            params = _on(mesh, _with_trained(params, trained))
            # A combinator's own accumulators start as the parameters it is shown: in shards, where their shape allows.
            hidden = not isinstance(tx, ShardedTransformation)
            shown = map_leaves(functools.partial(_natural_shard, mesh), trained, plan) if hidden else trained
            step, opt_state = _on(mesh, (jnp.zeros([], jnp.int32), tx.init(shown)))
            audit(opt_state, plan, accumulators=not hidden)
        return cls(step=step, apply_fn=apply_fn, params=params, tx=tx, opt_state=opt_state, plan=plan, **kwargs)

    @property
    def shardings(self) -> "TrainState":
        """A TrainState of NamedShardings: of parameters and their state by the plan, of all else by their own."""
        placed = state_shardings(self, self.plan, accumulators=True)
        params = map_leaves(
            lambda leaf, x, path: named_sharding(self.plan.mesh, leaf.param_spec, len(leaf.shape)),
            _trained(self.params),
            self.plan,
        )
        return placed.replace(params=_with_trained(placed.params, params))

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "TrainState":
        """One step: the updates are added on each device's shards, then the new parameters are gathered.

        Args:
          grads: a tree like `params`.
          **kwargs: fields to replace in addition.

        Returns:
          The state after the step, `step` greater by one; nothing in it waits for the host.
        """
        params, opt_state = _apply(_trained(grads), self.opt_state, _trained(self.params), tx=self.tx, plan=self.plan)
        return self.replace(step=self.step + 1, params=_with_trained(grads, params), opt_state=opt_state, **kwargs)


@functools.partial(jax.jit, static_argnames=("tx", "plan"), inline=True)
def _apply(grads: Any, opt_state: Any, params: Any, *, tx: Any, plan: Plan) -> tuple[Any, Any]:
    return apply_on_shards(grads, opt_state, params, tx=tx, plan=plan, scattered=False)[:2]


def _trained(tree: Any) -> Any:
    """The part of params or grads that the optimizer sees: Flax keeps fp8 statistics beside it."""
    return tree["params"] if _overwrites(tree) else tree


def _with_trained(tree: Any, trained: Any) -> Any:
    """`tree` with the trained part new; gradients of fp8 statistics are their new values. Inverse of `_trained`."""
    if not _overwrites(tree):
        return trained
    return {"params": trained, OVERWRITE_WITH_GRADIENT: tree[OVERWRITE_WITH_GRADIENT]}


def _overwrites(tree: Any) -> bool:
    return isinstance(tree, Mapping) and OVERWRITE_WITH_GRADIENT in tree


def _on(mesh: Mesh, tree: Any) -> Any:
    """Arrays on the mesh: those that have their place there as they are, all others replicated."""
    return jax.tree.map(lambda x: x if _placed(mesh, x) else constrain(jnp.asarray(x), mesh, P()), tree)


def _placed(mesh: Mesh, x: Any) -> bool:
    sharding = getattr(x, "sharding", None)
    return isinstance(x, jax.ShapeDtypeStruct) or (isinstance(sharding, NamedSharding) and sharding.mesh == mesh)


def _place_param(mesh: Mesh, leaf: LeafPlan, x: Any, path: str) -> Any:
    """A parameter where the plan says; one that has another place on the mesh is not moved but refused."""
    wanted = named_sharding(mesh, leaf.param_spec, len(leaf.shape))
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    if _placed(mesh, x) and not x.sharding.is_equivalent_to(wanted, len(leaf.shape)):
        raise ValueError(
            f"`{path}`: the parameter is sharded by {x.sharding.spec}, the plan has {leaf.param_spec}; make the plan "
            "from the placed parameters, or with their param_specs"
        )
    return constrain(jnp.asarray(x), mesh, leaf.param_spec)


def _natural_shard(mesh: Mesh, leaf: LeafPlan, x: Any, path: str) -> Any:
    return x if leaf.layout == "packed" or isinstance(x, jax.ShapeDtypeStruct) else constrain(x, mesh, leaf.state_spec)


def _plan_from(params: Any) -> Plan:
    """A plan on the mesh that the parameters are on; on the only device there is, where they are on none."""
    for x in jax.tree.leaves(params):
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding) and "data" in sharding.mesh.axis_names:
            return make_plan(params, sharding.mesh)
    if jax.device_count() == 1:
        return make_plan(params, Mesh(np.array(jax.devices()), ("data",)))
    raise ValueError(
        "TrainState.create: no plan: got an optimizer that does not say its own, and parameters that are on no mesh "
        f"with an axis 'data', while there are {jax.device_count()} devices; wanted "
        "plan=shardadam.make_plan(params, mesh)"
    )
