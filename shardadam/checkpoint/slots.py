"""The `Slot` of every leaf of a state: which leaves lie by a plan, by which, and what they are called."""

import dataclasses
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from shardadam.checkpoint.logical import Packing, Slot, looks_packed
from shardadam.layout import LeafPlan
from shardadam.plan import Plan, path_name
from shardadam.planned import is_adam, map_planned, planned_leaf

# Of optax's states (NamedTuples), the fields that hold trees like the parameters.
_FIELDS = frozenset(("acc_grads", "ema", "g", "m", "n", "nu_max", "sum_of_squares", "trace", "v", "z"))


def slots(state: Any, plan: Plan | None) -> Iterator[Slot]:
    """One `Slot` for each leaf of a state, in tree order.

    Args:
      state: a tree of arrays, numbers and, to restore into, ShapeDtypeStructs.
      plan: how mu, nu and what else is in shards lie; None if all have their parameters' shapes.

    Raises:
      ValueError: a moment is not laid out as the plan says, or packed on a mesh that is not known.
    """
    if plan is None:
        yield from _unplanned(state)
        return
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    plans = jax.tree.leaves(_plan_tree(state, plan))
    for (keypath, x), leaf in zip(leaves, plans, strict=True):
        names = ocp.tree.str_keypath(keypath)
        if isinstance(leaf, LeafPlan):
            if tuple(np.shape(x)) != leaf.state_shape:
                raise ValueError(
                    f"`{'/'.join(names)}`: got shape {np.shape(x)}, the plan says {leaf.state_shape} ({leaf.layout}); "
                    "pass the plan that the optimizer was made with"
                )
            if leaf.layout == "packed":
                yield Slot(names=names, like=x, packed=Packing(leaf, _mesh(x, leaf, plan, names)))
                continue
        yield Slot(names=names, like=x)


def _unplanned(state: Any) -> Iterator[Slot]:
    """The slots of a state without a plan: below each part that has its own, by that; all others as they are.

    Raises:
      ValueError: a moment that looks packed, which without a plan would be saved so.
    """

    def has_plan(x: Any) -> bool:
        return isinstance(getattr(x, "plan", None), Plan)

    for keypath, x in jax.tree_util.tree_flatten_with_path(state, is_leaf=has_plan)[0]:
        names = ocp.tree.str_keypath(keypath)
        if has_plan(x):
            for slot in slots(x, x.plan):
                yield dataclasses.replace(slot, names=(*names, *slot.names))
            continue
        if _is_state(keypath, names) and looks_packed(x) and not _has_param(state, keypath, np.shape(x)):
            raise ValueError(
                f"`{'/'.join(names)}`: may be packed, and there is no plan to unpack it by; pass the optimizer's own: "
                "Checkpointer(directory, plan=plan)"
            )
        yield Slot(names=names, like=x)


def _is_state(keypath: tuple[Any, ...], names: tuple[str, ...]) -> bool:
    """Whether a leaf is below a field in which optax keeps a tree like the parameters, or below keys mu or nu."""
    fields = {k.name for k in keypath if isinstance(k, jax.tree_util.GetAttrKey)}
    return bool({"mu", "nu"} & set(names) or _FIELDS & fields)


def _has_param(state: Any, keypath: tuple[Any, ...], shape: tuple[int, ...]) -> bool:
    """Whether the state has a parameter of this shape whose name a moment's keypath ends with: so it is not packed."""
    path = path_name(keypath)
    params = _params(state)
    named = jax.tree_util.tree_flatten_with_path(params)[0] if params is not None else []
    return any(path.endswith("/" + path_name(k)) and np.shape(x) == shape for k, x in named)


def _params(state: Any) -> Any:
    """The parameters in a TrainState or in a dict such as {"params": ..., "opt_state": ...}; None without any."""
    return state.get("params") if isinstance(state, Mapping) else getattr(state, "params", None)


def plan_of(state: Any, fallback: Plan | None) -> Plan | None:
    """The plan of a state: its own (`state.plan`), else `fallback`, else its optimizer's; None if it needs none.

    Raises:
      ValueError: there is no plan, and a moment does not have its parameter's shape.
    """
    own = getattr(state, "plan", None)
    if isinstance(own, Plan):
        return own
    params = _params(state)
    if fallback is not None or params is None:
        return fallback
    shapes = {path_name(k): np.shape(x) for k, x in jax.tree_util.tree_flatten_with_path(params)[0]}
    for path, x in _state_leaves(state, shapes):
        if np.shape(x) != shapes[path]:
            # Flax's TrainState holds its optimizer, and ours, unless within a chain, tells its plan.
            plan = getattr(getattr(state, "tx", None), "plan_of", lambda params: None)(params)
            if plan is not None:
                return plan
            raise ValueError(
                f"`{path}`: its moment has shape {np.shape(x)}, the parameter {shapes[path]}: it is packed, and "
                "there is no plan to unpack it by; pass the optimizer's own: Checkpointer(directory, plan=plan)"
            )
    return None


def check_names(names: Iterable[tuple[str, ...]]) -> None:
    """Refuses two leaves that would go to one place: in Orbax's files names are joined with dots, in a seal with "/".

    Raises:
      ValueError: naming both.
    """
    seen: dict[tuple[str, str], tuple[str, ...]] = {}
    for own in names:
        for between, where in ((".", "Orbax would write both to"), ("/", "a seal would have both as")):
            place = between.join(own)
            other = seen.setdefault((between, place), own)
            if other is not own:
                both = " and ".join(" > ".join(map(repr, keys)) for keys in (other, own))
                raise ValueError(f"{both}: {where} '{place}'; rename a key that has '{between}' in it")


def _plan_tree(state: Any, plan: Plan) -> Any:
    """The state with each leaf that lies by the plan replaced by its `LeafPlan`."""
    if any(is_adam(x) for x in jax.tree.leaves(state, is_leaf=is_adam)):
        return map_planned(lambda leaf, _, path: leaf, state, plan)

    # `nnx.state(optimizer)` keeps no ScaleByAdamState, only its keys: .../mu/<the parameter's keypath>.
    def by_name(keypath: tuple[Any, ...], x: Any) -> Any:
        names = ocp.tree.str_keypath(keypath)
        ends = (path_name(keypath[i + 1 :]) for i, name in enumerate(names) if name in ("mu", "nu"))
        found = next((end for end in ends if end in plan.leaves), None) or planned_leaf(keypath, x, plan)
        return x if found is None else plan.leaves[found]

    return jax.tree_util.tree_map_with_path(by_name, state)


def _state_leaves(state: Any, params: Container[str]) -> Iterator[tuple[str, Any]]:
    """The leaves of mu and nu in a tree, and those elsewhere that may be packed, with their parameters' keypaths."""
    for keypath, x in jax.tree_util.tree_flatten_with_path(state, is_leaf=is_adam)[0]:
        if is_adam(x):
            for tree in (x.mu, x.nu):
                named = ((path_name(k), leaf) for k, leaf in jax.tree_util.tree_flatten_with_path(tree)[0])
                yield from ((path, leaf) for path, leaf in named if path in params)
        elif looks_packed(x):
            ends = (path_name(keypath[start:]) for start in range(len(keypath)))
            yield from ((path, x) for path in [next((end for end in ends if end in params), None)] if path is not None)


def _mesh(x: Any, leaf: LeafPlan, plan: Plan | None, names: tuple[str, ...]) -> Mesh:
    """The mesh that a leaf is packed on: its own where it has one (a plan may be made without devices)."""
    own = getattr(getattr(x, "sharding", None), "mesh", None)
    for mesh in (own, getattr(plan, "mesh", None)):
        if isinstance(mesh, Mesh) and all(axis in mesh.shape for axis in leaf.part_axes + leaf.shard_axes):
            return mesh
    raise ValueError(
        f"`{'/'.join(names)}`: packed, and neither its sharding nor the plan has devices; "
        "give the leaf a NamedSharding on a Mesh"
    )
