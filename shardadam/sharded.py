"""`shard`: any element-wise optax transformation, with its state partitioned over the device mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh

from shardadam.layout import LeafPlan
from shardadam.placement import resolve_plan
from shardadam.plan import Plan
from shardadam.precision import widest
from shardadam.sharding import check_context, map_leaves, split
from shardadam.specified import specify
from shardadam.transformation import ShardedTransformation, select, transformation
from shardadam.update import initializer, updater


def shard(
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    axis_name: str | tuple[str, ...] = "data",
    plan: Plan | None = None,
    state_specs: Any = None,
) -> ShardedTransformation:
    """An element-wise optax transformation, with its parameter-shaped state partitioned over the device mesh.

    Its own `update` runs on each device's shards, so its state's types and trees are its own. `adam` is made the same
    way. What is element-wise: lion, adamax, amsgrad, radam, adan, yogi, adabelief, rmsprop, adagrad, adadelta, rprop,
    sgd with momentum, and combinators of them such as `optax.MultiSteps` and `optax.contrib.schedule_free`.

    Args:
      tx: the transformation; not one of shardadam's own.
      mesh: see `adam`.
      axis_name: see `adam`.
      plan: see `adam`.
      state_specs: for a transformation that is not element-wise: a tree of `PartitionSpec`s like its state, a prefix of
        one, or a function of its abstract state that makes one. It then runs on whole gradients, as XLA splits it.

    Returns:
      A transformation with the updates of `tx`. Scalars of its state, such as counters, are replicated.

    Raises:
      NotElementwise: on `init` or `update`: an element of its result depends on other elements than its own, as in a
        norm, a matrix product or a factored state; names the primitive, the leaf and the transformation.
      ValueError: see `adam`.

    Example:
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> tx = shard(optax.lion(1e-4), mesh=mesh)
      >>> params = {"kernel": jnp.ones((8, 128))}
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    if isinstance(tx, ShardedTransformation):
        raise ValueError(
            "shard: got a transformation of shardadam's own, whose state is in shards; wanted one of optax's"
        )
    if state_specs is not None:
        plan_of = functools.partial(resolve_plan, mesh=mesh, axis_name=axis_name, plan=plan)
        return specify(tx, state_specs, plan_of)
    return place(tx, mesh=mesh, axis_name=axis_name, plan=plan)


def place(
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh | AbstractMesh | None,
    axis_name: str | tuple[str, ...],
    plan: Plan | None,
) -> ShardedTransformation:
    """The one mechanism behind `shard` and `adam`."""
    plan_of = functools.partial(resolve_plan, mesh=mesh, axis_name=axis_name, plan=plan)
    rule = optax.with_extra_args_support(tx)
    init_on_mesh, update_on_mesh = initializer(rule), updater(rule)
    made_on: list[Mesh | AbstractMesh] = []  # The ambient mesh of init, if any: update must not come without one.

    def init_fn(params: Any) -> Any:
        on = split(plan_of(params))
        if mesh is None and plan is None:
            made_on[:] = [] if on is None else [on.mesh]
        if on is None:
            return rule.init(params)
        check_context(on.mesh)
        map_leaves(_check_param, params, on)
        return init_on_mesh(params, on)

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        shards_of: Plan | None = None,
        packed: bool = True,
        keep: jax.Array | None = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        on = shards_of or split(plan_of(updates if params is None else params))
        if on is not None:
            check_context(on.mesh)
            in_shards = "none" if shards_of is None else "all" if packed else "shaped"
            return update_on_mesh(updates, state, params, plan=on, in_shards=in_shards, keep=keep, extra=extra)
        if made_on:
            raise ValueError(
                f"update: the state was made under jax.set_mesh({made_on[0]}), and there is no mesh now: the "
                "parameters would be moved; enter the mesh here as well, or give the optimizer mesh= or plan="
            )
        updates, new_state = rule.update(updates, state, params, **extra)
        return select(keep, updates, 0), select(keep, new_state, state)

    return transformation(init_fn, update_fn, plan_of, takes_keep=True)


def _check_param(leaf: LeafPlan, x: Any, path: str) -> None:
    got, dtype = np.shape(x), jax.dtypes.canonicalize_dtype(jnp.result_type(x))
    # Wider ones are masters of the plan's parameters.
    if got != leaf.shape or widest(dtype, leaf.dtype) != dtype:
        raise ValueError(
            f"`{path}`: the parameter is {dtype}{list(got)}, the plan has {leaf.dtype}{list(leaf.shape)}; make the "
            "plan from these parameters"
        )
