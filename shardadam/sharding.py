"""A plan on a mesh: NamedShardings, bringing leaves to the state's layout and back, and `audit`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardadam.layout import Entries, LeafPlan, canonical_spec, entries, pack_block, shard_shape, unpack
from shardadam.plan import Plan, path_name
from shardadam.planned import KeyPath, is_adam, map_planned, owners, planned_leaf
from shardadam.planned import map_leaves as map_leaves
from shardadam.planned import map_moments as map_moments
from shardadam.precision import widest


class ShardingError(ValueError):
    """A leaf of the state is not where its plan says."""


def axes_of_type(mesh: Mesh | AbstractMesh, axis_type: AxisType) -> tuple[str, ...]:
    """The names of the mesh's axes of one type."""
    return tuple(name for name, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == axis_type)


def named_sharding(mesh: Mesh | AbstractMesh, spec: P, ndim: int) -> NamedSharding:
    """The sharding that jit's outputs carry for `spec`, so that eager arrays hit the same compiled program.

    A mesh with Explicit axes gives a spec an entry per dim, unless it names an Auto axis: then, as on a mesh of only
    Auto axes, none that is trailing and empty.
    """
    auto = axes_of_type(mesh, AxisType.Auto)
    if len(auto) < len(mesh.axis_names) and not any(axis in auto for axes in entries(spec, ndim) for axis in axes):
        spec = P(*spec, *[None] * (ndim - len(spec)))
    return NamedSharding(mesh, spec)


def constrain(x: jax.Array, mesh: Mesh | AbstractMesh, spec: P) -> jax.Array:
    """`x` with the sharding `spec`, on Auto, Explicit and mixed meshes, traced or not.

    `jax.reshard` says nothing to Auto axes and `with_sharding_constraint` nothing to Explicit ones, each in silence:
    every axis is asked for in its own way.
    """
    if not isinstance(x, jax.core.Tracer):
        return jax.device_put(x, named_sharding(mesh, spec, jnp.ndim(x)))
    explicit, auto = axes_of_type(mesh, AxisType.Explicit), axes_of_type(mesh, AxisType.Auto)
    if explicit:
        x = jax.reshard(x, NamedSharding(mesh, only_axes(spec, explicit, x.ndim)))
    if auto:
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, only_axes(spec, auto, x.ndim)))
    return x


def split(plan: Plan | None) -> Plan | None:
    """The plan where there is something to split; on no mesh, and on one device, plain optax does."""
    return None if plan is None or plan.mesh.size == 1 else plan


def pack_leaf(x: jax.Array, leaf: LeafPlan, mesh: Mesh | AbstractMesh) -> jax.Array:
    """Brings a parameter-shaped array to the layout and the sharding of the state. Inverse of `unpack_leaf`.

    Args:
      x: an array of `leaf.shape`, of any dtype: a gradient, a parameter, a moment.
      leaf: the leaf's plan.
      mesh: the mesh to place it on.

    Returns:
      An array of `leaf.state_shape`, sharded by `leaf.state_spec`; zeros where the padding is.
    """
    assert jnp.shape(x) == leaf.shape, (jnp.shape(x), leaf)
    # The parameter's own spec first: asked for the state's at once, sharding propagation would reach into the loss.
    x = constrain(x, mesh, leaf.param_spec)
    if leaf.layout == "packed":

        def own_rows(part: jax.Array) -> jax.Array:
            return pack_block(part, leaf.num_shards, jax.lax.axis_index(leaf.shard_axes), leaf.stacked_dims)

        # Manual axes: on Auto ones the state's sharding would propagate through the reshape, and cost permutes.
        x = jax.shard_map(own_rows, mesh=mesh, in_specs=leaf.param_spec, out_specs=leaf.state_spec)(x)
    return constrain(x, mesh, leaf.state_spec)


def unpack_leaf(x: jax.Array, leaf: LeafPlan, mesh: Mesh | AbstractMesh) -> jax.Array:
    """Brings an array in the state's layout back to the parameter's shape and spec: an all-gather.

    Inverse of `pack_leaf`.

    Args:
      x: an array of `leaf.state_shape`.
      leaf: the leaf's plan.
      mesh: the mesh to place it on.

    Returns:
      An array of `leaf.shape`, sharded by `leaf.param_spec`.
    """
    assert jnp.shape(x) == leaf.state_shape, (jnp.shape(x), leaf)
    x = constrain(x, mesh, leaf.state_spec)
    if leaf.layout == "packed":
        # Gathered over the shard axes: the parameter's parts, one below the other.
        own = entries(leaf.param_spec, len(leaf.shape))
        parts = canonical_spec((*own[: leaf.stacked_dims], leaf.part_axes))
        shape = shard_shape(leaf.shape, leaf.param_spec, mesh.shape)

        def own_part(rows: jax.Array) -> jax.Array:
            return unpack(rows, shape, leaf.stacked_dims)

        x = constrain(x, mesh, parts)
        x = jax.shard_map(own_part, mesh=mesh, in_specs=parts, out_specs=leaf.param_spec)(x)
    return constrain(x, mesh, leaf.param_spec)


def only_axes(spec: P, axes: tuple[str, ...], ndim: int) -> P:
    """The part of a spec that speaks of some axes."""
    kept: Entries = tuple(tuple(axis for axis in e if axis in axes) for e in entries(spec, ndim))
    return canonical_spec(kept)


def state_shardings(state: Any, plan: Plan, *, accumulators: bool = False) -> Any:
    """The shardings of a state's leaves: by the plan where they lie by it, others by their own, else replicated.

    Args:
      state: a tree of arrays or ShapeDtypeStructs.
      plan: where the leaves live that `map_planned` finds: mu and nu, and whatever else is in shards.
      accumulators: place all else of a parameter's shape that is abstract, such as `optax.trace`'s, by the plan too.

    Returns:
      A tree of NamedShardings of the same structure.
    """
    mesh = plan.mesh

    def own(x: Any) -> NamedSharding:
        sharding = getattr(x, "sharding", None)
        if isinstance(x, NamedSharding):
            return x
        if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == mesh.axis_names:
            return named_sharding(mesh, P(*sharding.spec), jnp.ndim(x))
        return named_sharding(mesh, P(), jnp.ndim(x))

    def planned(leaf: LeafPlan, x: Any, path: str) -> NamedSharding:
        return named_sharding(mesh, leaf.state_spec, len(leaf.state_shape))

    return jax.tree.map(own, map_planned(planned, state, plan, accumulators=accumulators))


def check_context(mesh: Mesh | AbstractMesh) -> None:
    """Refuses to work on `mesh` inside a `jax.set_mesh` of another one, or inside a `shard_map`.

    Raises:
      ValueError: with both meshes, before JAX does so from deep within.
    """
    current = jax.sharding.get_abstract_mesh()
    if current.empty:
        return
    if current.manual_axes:
        raise ValueError(
            f"update: called inside a shard_map that is manual over {sorted(current.manual_axes)}: wanted whole "
            "arrays; return the gradients from the shard_map (psum them) and update outside of it"
        )
    mine = dict(mesh.shape), tuple(mesh.axis_types)
    if mine != (dict(current.shape), tuple(current.axis_types)):
        raise ValueError(
            f"update: the state is on the mesh {mesh}, the current one (jax.set_mesh) is {current}; enter the state's "
            "own mesh, with the same axis types, or none"
        )


def audit(
    state: Any, plan: Plan, *, mu_dtype: Any = None, nu_dtype: Any = None, accumulators: bool | None = None
) -> None:
    """Checks that every mu and nu in a state, and all else that is in shards, is where its plan says.

    Leaves that are not in the state are not missed: `optax.masked` gives Adam a part of the parameters. Accumulators of
    optax's own combinators may follow the parameters, as long as each parameter has state that lies by the plan.

    Args:
      state: a tree of arrays (or of ShapeDtypeStructs with shardings) with at least one tree of moments: those of an
        `optax.ScaleByAdamState`, or of any transformation that `shardadam.shard` has placed.
      plan: the plan.
      mu_dtype: what Adam's mu must be in; default: any one dtype of the parameters' kind (real or complex).
      nu_dtype: what Adam's nu must be in, where the parameter is not wider; default: the dtype of the state's masters
        (`state.master`), else the parameter's.
      accumulators: whether every leaf that is shaped as its parameter must lie by the plan. Default: where the state
        is a TrainState whose `tx` is shardadam's own, not one within a combinator.

    Raises:
      ShardingError: names each leaf that is replicated, on one device, split in another way, in another memory, or of
        another shape or dtype, with what was got, what was wanted and what to do; or says that there is no such state,
        or which parameter is of a dtype that Adam cannot train.
    """
    strict = hasattr(getattr(state, "tx", None), "plan_of") if accumulators is None else accumulators
    at_rest = getattr(state, "stage", None) == 3  # Then the parameters are in shards themselves.
    for x in jax.tree.leaves(getattr(state, "master", None))[:1]:
        nu_dtype = x.dtype if nu_dtype is None else nu_dtype
    found, faults = 0, []
    followers: dict[str, list[str | None]] = {}  # By parameter, the faults of its leaves that are not Adam's.

    def check(field: str, leaf: LeafPlan, x: Any, path: str) -> None:
        nonlocal found
        found += 1
        _check_trained(leaf, path)
        fault = _dtype_fault(field, leaf, x, mu_dtype, nu_dtype) or _place_fault(leaf, x, plan)
        if fault is not None:
            faults.append(f"{field} of `{path}`: {fault}")

    planned: set[str] = set()
    for keypath, x in jax.tree_util.tree_flatten_with_path(state, is_leaf=is_adam)[0]:
        if is_adam(x):
            for field in ("mu", "nu"):
                map_leaves(lambda leaf, x, path, field=field: check(field, leaf, x, path), getattr(x, field), plan)
                planned.update(path_name(k) for k, _ in jax.tree_util.tree_flatten_with_path(getattr(x, field))[0])
        elif (path := _owner(keypath, x, plan, at_rest)) is not None:
            found += 1
            fault = _place_fault(plan.leaves[path], x, plan)
            name = jax.tree_util.keystr(keypath, simple=True, separator="/")
            followers.setdefault(path, []).append(None if fault is None else f"`{name}`: {fault}")
    for path, each in followers.items():
        if strict or (path not in planned and None not in each):
            faults += [fault for fault in each if fault is not None]
    if not found and plan.items:
        raise ShardingError(
            f"no optax.ScaleByAdamState in {type(state).__name__}, nor other state of the parameters: got none, wanted "
            "one with mu and nu (of an nnx.Optimizer, pass optimizer.opt_state)"
        )
    if faults:
        raise ShardingError(
            f"{len(faults)} of {found} leaves are not where the plan says:\n  "
            + "\n  ".join(faults)
            + "\nMake the state with this plan's own init, shardadam.adam(..., plan=plan).init(params), or that of "
            "shardadam.shard(tx, plan=plan), and keep jit's out_shardings off it."
        )


def _owner(keypath: KeyPath, x: Any, plan: Plan, at_rest: bool) -> str | None:
    """The parameter whose state a leaf is, in the plan's layout or as optax would hold it; None for whole params."""
    if not at_rest and keypath and jax.tree_util.keystr(keypath[:1], simple=True) == "params":
        return None
    placed = planned_leaf(keypath, x, plan)
    shaped = (path for path in owners(keypath, plan) if jnp.shape(x) == plan.leaves[path].shape)
    return placed if placed is not None else next(shaped, None)


def _check_trained(leaf: LeafPlan, path: str) -> None:
    """Refuses a parameter that Adam cannot train: no other place, and no other state, would be right for it."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        raise ShardingError(
            f"`{path}`: got a parameter of dtype {leaf.dtype}, wanted a floating or complex one; keep it out of "
            "params, as a field of the state, or out of the optimizer, with optax.masked"
        )


def _dtype_fault(field: str, leaf: LeafPlan, x: Any, mu_dtype: Any, nu_dtype: Any) -> str | None:
    """What is wrong with the dtype of one leaf of mu or nu; None if nothing is."""
    got = jnp.result_type(x)
    if field == "nu" or mu_dtype is not None:
        nu = leaf.dtype if nu_dtype is None else widest(leaf.dtype, nu_dtype)
        wanted = nu if field == "nu" else jnp.dtype(mu_dtype)
        return None if got == wanted else f"got dtype {got}, wanted {wanted}"
    kind = jnp.complexfloating if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else jnp.floating
    return None if jnp.issubdtype(got, kind) else f"got dtype {got}, wanted one of the kind of {leaf.dtype}"


def _place_fault(leaf: LeafPlan, x: Any, plan: Plan) -> str | None:
    """What is wrong with the shape or the place of one leaf of mu or nu; None if nothing is."""
    if jnp.shape(x) != leaf.state_shape:
        return f"got shape {jnp.shape(x)}, wanted {leaf.state_shape} ({leaf.layout})"
    ndim = len(leaf.state_shape)
    wanted = named_sharding(plan.mesh, leaf.state_spec, ndim)
    got = getattr(x, "sharding", None)
    if got is None:
        return f"got an array without a sharding, wanted {leaf.state_spec}"
    if got.memory_kind not in (None, _default_memory(got)):
        return f"got memory {got.memory_kind!r}, wanted the devices' own"
    if got.num_devices != plan.mesh.size:
        return f"got {got.num_devices} device(s), wanted {leaf.state_spec} over {plan.mesh.size}"
    if isinstance(plan.mesh, AbstractMesh):
        same = isinstance(got, NamedSharding) and entries(P(*got.spec), ndim) == entries(leaf.state_spec, ndim)
    else:
        same = got.is_equivalent_to(wanted, ndim)
    if not same:
        what = "a replicated array" if got.is_fully_replicated else f"{getattr(got, 'spec', got)}"
        return f"got {what}, wanted {leaf.state_spec} ({leaf.layout})"
    return None


def _default_memory(sharding: Any) -> str | None:
    """The memory kind that arrays on the sharding's devices live in unless told otherwise."""
    mesh = getattr(sharding, "mesh", None)
    if isinstance(mesh, AbstractMesh):
        return sharding.memory_kind
    return next(iter(sharding.device_set)).default_memory().kind
