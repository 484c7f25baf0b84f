"""Flax's TrainState with its optimizer state in shards from the start, and the update added on the shards."""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardadam.apply import Applied, apply_on_shards
from shardadam.beginning import begin_opt_state, begin_params, placed, untied
from shardadam.loss_scale import LossScale, first_loss_scale
from shardadam.placement import ambient_mesh, bind
from shardadam.plan import Plan, make_plan
from shardadam.sharding import audit, constrain, map_leaves, named_sharding, state_shardings
from shardadam.transformation import ShardedTransformation
from shardadam.validation import check_choice, check_floating, check_scale


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState`, created sharded and updated in shards.

    What is different from Flax's: `opt_state` is never whole on a device; `step` starts as an int32 array, so that a
    jitted step compiles once; `apply_gradients` adds the updates on each device's shard and gathers the new parameters
    in their own dtype: one all-gather per leaf, and no tree of full-size updates. Parameters keep their own shardings.

    Attributes:
      plan: where mu and nu of every parameter live. Static: it is no leaf of the tree.
      stage: 1, 2 or 3, which `make_train_step` takes unless told otherwise. At 3 `params` are at rest in shards, in the
        layout of the state (`pack_params`). Static.
      master: a tree like `params`, in shards, of wider copies that the updates are added to; None for leaves that are
        as wide already; None where there are no masters.
      loss_scale: the dynamic loss scale, or None.
      num_skipped: int32, how many steps were skipped because their gradients were not finite; None: not counted.
    """

    plan: Plan = struct.field(pytree_node=False)
    # By keyword only, so that a subclass may have fields without defaults.
    stage: int = struct.field(pytree_node=False, default=2, kw_only=True)
    master: Any = struct.field(default=None, kw_only=True)
    loss_scale: LossScale | None = struct.field(default=None, kw_only=True)
    num_skipped: Any = struct.field(default=None, kw_only=True)

    @classmethod
    def create(
        cls,
        *,
        apply_fn: Any,
        params: Any,
        tx: Any,
        plan: Plan | None = None,
        stage: Literal[1, 2, 3] = 2,
        master_dtype: Any = None,
        loss_scale: float | Literal["dynamic"] | None = None,
        skip_nonfinite: bool = False,
        **kwargs: Any,
    ) -> "TrainState":
        """A state at step 0.

        Args:
          apply_fn: usually `model.apply`.
          params: a tree of arrays, or of tracers under `jit` and `eval_shape`. Those that are not on the plan's mesh
            yet are placed there. Of an array that is there twice each leaf is trained by itself.
          tx: `shardadam.adam(...)` or one of its family, alone or within optax's combinators.
          plan: default: the plan that `tx` has or makes; within an optax combinator, which hides it, one made from the
            mesh and the specs of `params`.
          stage: that of `make_train_step`: 3 puts the parameters at rest in shards; 1 and 2 keep them as they are.
          master_dtype: usually float32, with parameters in bfloat16 or float16: keeps copies of them in this dtype, in
            shards, and adds the updates to those. The moments are then of this dtype, too, unless `tx` says otherwise
            of mu. What is gathered stays in the parameters' dtype. Parameters given in `master_dtype` where the plan
            has a narrower one become the masters as they are.
          loss_scale: "dynamic", or a number to begin with: keeps a `LossScale`, for float16.
          skip_nonfinite: keeps a count of the steps that were skipped; so does a loss_scale.
          **kwargs: the further fields of a subclass.

        Returns:
          A `TrainState`.

        Raises:
          ValueError: no plan was given and none can be made; a stage that there is not; a bad loss_scale or
            master_dtype.
          ShardingError: `tx` made a state that is not where the plan says.

        Example:
          >>> mesh = jax.make_mesh((1,), ("data",))
          >>> plan = make_plan({"w": jnp.ones((8, 128))}, mesh)
          >>> tx = shardadam.adam(1e-3, plan=plan)
          >>> state = TrainState.create(apply_fn=None, params={"w": jnp.ones((8, 128))}, tx=tx)
          >>> int(state.apply_gradients(grads=state.params).step)
          1
        """
        check_choice("stage", stage, (1, 2, 3))
        if loss_scale is not None:
            check_scale("loss_scale", loss_scale)
        check_floating("master_dtype", master_dtype)
        params = untied(params)
        trained = _trained(params)
        if plan is None:
            plan = tx.plan_of(trained) if isinstance(tx, ShardedTransformation) else None
        plan = _plan_from(trained) if plan is None else bind(plan, ambient_mesh())
        mesh = None if _traced(params) or not isinstance(plan.mesh, Mesh) else plan.mesh
        beginning = begin_params(trained, plan, stage=stage, master_dtype=master_dtype, mesh=mesh)
        opt_state = begin_opt_state(tx, beginning, plan, mesh=mesh)
        params = _with_trained(params, beginning.params)
        scalars = _first_scalars(loss_scale, skip_nonfinite)
        if mesh is not None:
            params, opt_state, scalars = _on(mesh, (params, opt_state, scalars))
            # They may be traced, while `params` is what a traced function closes over.
            if getattr(tx, "by_plan", True) and not _traced(opt_state):
                audit(opt_state, plan, accumulators=isinstance(tx, ShardedTransformation), nu_dtype=master_dtype)
        fields: dict[str, Any] = {"stage": stage, "master": beginning.master, **scalars, **kwargs}
        return cls(apply_fn=apply_fn, params=params, tx=tx, opt_state=opt_state, plan=plan, **fields)

    @property
    def shardings(self) -> "TrainState":
        """A TrainState of NamedShardings: of parameters and their state by the plan, of all else by their own."""
        placed = state_shardings(self, self.plan, accumulators=True)
        if self.stage == 3:
            return placed
        params = map_leaves(
            lambda leaf, x, path: named_sharding(self.plan.mesh, leaf.param_spec, len(leaf.shape)),
            _trained(self.params),
            self.plan,
        )
        return placed.replace(params=_with_trained(placed.params, params))

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "TrainState":
        """One step: the updates are added on each device's shards, then the new parameters are gathered.

        Args:
          grads: a tree like `params`: whole, or at stage 3, where parameters are in shards, in shards like them, as
            `value_and_grad(..., stage=3)` gives them.
          **kwargs: fields to replace in addition.

        Returns:
          The state after the step, `step` greater by one; nothing in it waits for the host.
        """
        params, opt_state, master, _ = _apply(
            _trained(grads),
            self.opt_state,
            _trained(self.params),
            self.master,
            tx=self.tx,
            plan=self.plan,
            stage=self.stage,
        )
        return self.replace(
            step=self.step + 1,
            params=_with_trained(grads, params),
            opt_state=opt_state,
            **({} if master is None else {"master": master}),
            **kwargs,
        )


@functools.partial(jax.jit, static_argnames=("tx", "plan", "stage"), inline=True)
def _apply(grads: Any, opt_state: Any, params: Any, master: Any, *, tx: Any, plan: Plan, stage: int) -> Applied:
    at_rest = stage == 3
    return apply_on_shards(
        grads, opt_state, params, tx=tx, plan=plan, scattered=at_rest, at_rest=at_rest, master=master
    )


def _first_scalars(loss_scale: Any, skip_nonfinite: bool) -> dict[str, Any]:
    """The fields of step 0 that are no trees of parameters."""
    fields: dict[str, Any] = {"step": jnp.zeros([], jnp.int32)}
    if loss_scale is not None:
        fields["loss_scale"] = first_loss_scale(loss_scale)
    if skip_nonfinite or loss_scale is not None:
        fields["num_skipped"] = jnp.zeros([], jnp.int32)
    return fields


def _traced(tree: Any) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


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
    return jax.tree.map(lambda x: x if placed(mesh, x) else constrain(jnp.asarray(x), mesh, P()), tree)


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
