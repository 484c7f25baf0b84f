"""Which plan: the one given, or one made from what can be seen of the parameters and of the mesh."""

import functools
import warnings
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from shardadam.layout import entries
from shardadam.plan import Plan, make_plan, spec_of
from shardadam.sharding import axes_of_type, only_axes


def ambient_mesh() -> Mesh | AbstractMesh | None:
    """The mesh that `jax.set_mesh` made current: concrete outside of a trace, abstract within; None without one."""
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:  # Inside a trace only the abstract mesh can be asked for.
        mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def resolve_plan(
    params: Any,
    *,
    mesh: Mesh | AbstractMesh | None,
    axis_name: str | tuple[str, ...],
    plan: Plan | None,
    quiet: bool = False,
) -> Plan | None:
    """The plan for these parameters, on a mesh of devices wherever one is known; None where there is no mesh.

    Args:
      params: a tree of arrays, tracers or ShapeDtypeStructs.
      mesh: the mesh; default: the ambient one, if it has the axes.
      axis_name: the axis or axes to split the state over.
      plan: a plan that needs only a mesh of devices, if it has none.
      quiet: do not warn that specs on Auto axes cannot be seen.
    """
    if plan is not None:
        if not isinstance(plan, Plan):
            raise ValueError(f"plan: got {type(plan).__name__}, wanted what shardadam.make_plan returns")
        return bind(plan, mesh) if mesh is not None else bind(plan, _same_axes(plan, ambient_mesh()))
    if mesh is None:
        mesh = ambient_mesh()
        names = (axis_name,) if isinstance(axis_name, str) else axis_name
        if mesh is None or not set(names) <= set(mesh.axis_names):
            return None
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise ValueError(
            f"mesh: got {mesh!r}, wanted a jax.sharding.Mesh; optax.inject_hyperparams takes a mesh for a schedule, "
            "since it can be called: give it static_args=('mesh',), or pass plan= instead"
        )
    auto = axes_of_type(mesh, AxisType.Auto)
    specs = jax.tree.map(lambda x: only_axes(spec_of(x), axes_of_type(mesh, AxisType.Explicit), np.ndim(x)), params)
    plan = make_plan(params, mesh, axis_name=axis_name, param_specs=specs)
    if auto and mesh.size > 1 and not quiet:
        _warn_unseen(params, auto, plan)
    return plan


def _same_axes(plan: Plan, mesh: Mesh | AbstractMesh | None) -> Mesh | AbstractMesh | None:
    """The ambient mesh where it may be the plan's; it may also be there for something else."""
    return mesh if mesh is not None and mesh.axis_names == plan.mesh.axis_names else None


@functools.lru_cache(maxsize=16)
def bind(plan: Plan, mesh: Mesh | AbstractMesh | None) -> Plan:
    """The plan on a mesh of devices, where it was made without."""
    if mesh is None:
        return plan
    if mesh.axis_names != plan.mesh.axis_names or mesh.axis_sizes != plan.mesh.axis_sizes:
        raise ValueError(f"plan: made for the mesh {dict(plan.mesh.shape)}, used on {dict(mesh.shape)}; plan again")
    if isinstance(plan.mesh, Mesh):
        return plan
    return Plan(mesh=mesh, axis_names=plan.axis_names, items=plan.items)


def _warn_unseen(params: Any, auto: tuple[str, ...], plan: Plan) -> None:
    """Says what it costs that the parameters' specs cannot be seen on Auto axes: only where it may cost something."""
    leaves = jax.tree.leaves(params)
    traced = any(isinstance(x, jax.core.Tracer) for x in leaves)
    others = set(auto) - set(plan.axis_names)
    sharded = any(axis in others for x in leaves for axes in entries(spec_of(x), np.ndim(x)) for axis in axes)
    if not traced and not sharded:
        return
    warnings.warn(
        f"shardadam: under jit the parameters' shardings over the Auto mesh axes {auto} cannot be seen, and no plan "
        f"was given: they are taken to be replicated. Where they are not, the result is right, but each update gathers "
        f"gradients and updates over those axes, and mu and nu are split into {plan.num_shards} shards, over "
        f"{plan.axis_names} only. Pass a plan: shardadam.adam(..., plan=shardadam.make_plan(params, mesh)), made from "
        "the placed parameters outside of jit; or use Explicit axes (jax.make_mesh).",
        stacklevel=2,
    )
