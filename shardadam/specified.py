"""A transformation that does not work element by element, with its state placed by specs that are given."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from shardadam.layout import entries
from shardadam.plan import Plan, path_name
from shardadam.sharding import axes_of_type, check_context, constrain, map_leaves, pack_leaf, split, unpack_leaf
from shardadam.transformation import ShardedTransformation, transformation


def specify(
    tx: optax.GradientTransformation, state_specs: Any, plan_of: Callable[..., Plan | None]
) -> ShardedTransformation:
    """`tx` on whole gradients, as XLA splits it, with every leaf of its state pinned to its spec.

    Args:
      tx: any optax transformation.
      state_specs: a tree of `PartitionSpec`s like its state, or a prefix of it (None: replicated); or a function that
        makes one from its abstract state.
      plan_of: params -> their plan.

    Raises:
      ValueError: on `init` or `update`: a spec that does not fit its leaf, or a mesh with Explicit axes.
    """
    rule = optax.with_extra_args_support(tx)

    def pinned(state: Any, plan: Plan) -> Any:
        specs = state_specs(state) if callable(state_specs) else state_specs
        each = jax.tree.map(lambda spec, sub: jax.tree.map(lambda _: spec or P(), sub), specs, state, is_leaf=_is_spec)
        return jax.tree_util.tree_map_with_path(lambda k, x, spec: _pin(path_name(k), x, spec, plan), state, each)

    def whole(tree: Any, plan: Plan, lies: bool, packed: bool) -> Any:
        def one(leaf: Any, x: Any, path: str) -> Any:
            if lies and (packed or leaf.layout != "packed"):
                return unpack_leaf(x, leaf, plan.mesh)
            return constrain(jnp.asarray(x), plan.mesh, leaf.param_spec)

        return map_leaves(one, tree, plan)

    def init_fn(params: Any) -> Any:
        plan = _on_auto_axes(plan_of(params))
        if plan is None:
            return rule.init(params)
        check_context(plan.mesh)
        abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
        if abstract:
            params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
        return jax.jit(lambda params: pinned(rule.init(params), plan))(whole(params, plan, False, False))

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        shards_of: Plan | None = None,
        packed: bool = True,
        **extra: Any,
    ) -> tuple[Any, Any]:
        plan = _on_auto_axes(shards_of or plan_of(updates if params is None else params))
        if plan is None:
            return rule.update(updates, state, params, **extra)
        check_context(plan.mesh)
        lies = shards_of is not None
        grads, params = (whole(tree, plan, lies, packed) for tree in (updates, params))
        updates, new_state = rule.update(grads, pinned(state, plan), params, **extra)

        def back(leaf: Any, x: Any, path: str) -> Any:
            x = constrain(x, plan.mesh, leaf.param_spec)
            return pack_leaf(x, leaf, plan.mesh) if lies and (packed or leaf.layout != "packed") else x

        return map_leaves(back, updates, plan), pinned(new_state, plan)

    return transformation(init_fn, update_fn, plan_of, by_plan=False)


def _on_auto_axes(plan: Plan | None) -> Plan | None:
    """The plan where there is something to split, on a mesh that XLA can split by specs."""
    plan = split(plan)
    if plan is None:
        return None
    if not isinstance(plan.mesh, Mesh):
        raise ValueError(
            f"state_specs: got a plan without devices, for {dict(plan.mesh.shape)}; wanted mesh= beside it"
        )
    if explicit := axes_of_type(plan.mesh, AxisType.Explicit):
        raise ValueError(f"state_specs: got the Explicit mesh axes {explicit}, wanted Auto ones: XLA splits the work")
    return plan


def _pin(path: str, x: Any, spec: P, plan: Plan) -> Any:
    """One leaf of the state by its spec, which must divide it: XLA would replicate it in silence."""
    shape = jnp.shape(x)
    if len(spec) > len(shape):
        raise ValueError(f"state_specs: `{path}` has shape {shape}, got {spec} of {len(spec)} dims")
    for dim, axes in zip(shape, entries(spec, len(shape)), strict=True):
        if unknown := [axis for axis in axes if axis not in plan.mesh.shape]:
            raise ValueError(f"state_specs: `{path}`: {spec} names {unknown}, the mesh has {plan.mesh.axis_names}")
        if dim % math.prod(plan.mesh.shape[axis] for axis in axes):
            raise ValueError(f"state_specs: `{path}` has shape {shape}, of which {spec} does not divide a dim evenly")
    return constrain(jnp.asarray(x), plan.mesh, spec)


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, P)
