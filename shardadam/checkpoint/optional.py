"""Fields that a train state may have or not (masters, loss scale, skip count), over checkpoints that have the other.

`as_saved` makes what is to be restored match what was saved; `as_wanted`, its inverse, drops what is not wanted and
fills what was not there: masters from the parameters, and counts from zero.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import PartitionSpec as P

from shardadam.layout import LeafPlan
from shardadam.loss_scale import LossScale, first_loss_scale
from shardadam.params import gather_shards, pack_params
from shardadam.plan import Plan, is_none
from shardadam.sharding import constrain, map_leaves, named_sharding

Names = tuple[str, ...]
Saved = Mapping[Names, Any]


def as_saved(like: Any, saved: Saved) -> Any:
    """`like` with each train state's optional fields as a checkpoint has them. Inverse of `as_wanted`.

    Where only one of the two has masters, parameters and their state are to be read in the dtypes they were saved in.

    Args:
      like: a tree with any number of train states in it.
      saved: what is on disk, by the names of each leaf's keypath: anything with a dtype.
    """

    def one(keypath: tuple[Any, ...], x: Any) -> Any:
        return _state_as_saved(x, _Below(ocp.tree.str_keypath(keypath), saved)) if _is_train_state(x) else x

    return jax.tree_util.tree_map_with_path(one, like, is_leaf=_is_train_state)


def as_wanted(restored: Any, like: Any) -> Any:
    """What was restored into `as_saved(like, ...)`, with the optional fields that `like` has. Inverse of `as_saved`."""
    return jax.tree.map(
        lambda wanted, x: _state_as_wanted(x, wanted) if _is_train_state(wanted) else x,
        like,
        restored,
        is_leaf=_is_train_state,
    )


class _Below:
    """What was saved below one name."""

    def __init__(self, names: Names, saved: Saved) -> None:
        self.leaves = {name[len(names) :]: x for name, x in saved.items() if name[: len(names)] == names}

    def has(self, field: str) -> bool:
        return any(name[:1] == (field,) for name in self.leaves)

    def dtype(self, names: Iterable[str]) -> Any:
        found = self.leaves.get(tuple(names))
        return None if found is None else found.dtype


def _is_train_state(x: Any) -> bool:
    return isinstance(getattr(x, "plan", None), Plan) and hasattr(x, "master") and hasattr(x, "loss_scale")


def _state_as_saved(like: Any, saved: _Below) -> Any:
    def scalar(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((), dtype, sharding=named_sharding(like.plan.mesh, P(), 0))

    changed: dict[str, Any] = {}
    for field, abstract in (
        ("num_skipped", scalar(jnp.int32)),
        ("loss_scale", LossScale(scalar(jnp.float32), scalar(jnp.int32))),
    ):
        if saved.has(field) != (getattr(like, field) is not None):
            changed[field] = abstract if saved.has(field) else None
    if saved.has("master") != (like.master is not None):
        changed["master"] = _abstract_masters(like, saved) if saved.has("master") else None
        changed["params"] = _in_saved_dtypes(like.params, "params", saved)
        changed["opt_state"] = _in_saved_dtypes(like.opt_state, "opt_state", saved)
    return like.replace(**changed) if changed else like


def _abstract_masters(like: Any, saved: _Below) -> Any:
    def one(keypath: tuple[Any, ...], leaf: LeafPlan) -> Any:
        dtype = saved.dtype(("master", *ocp.tree.str_keypath(keypath)))
        return None if dtype is None else _abstract(leaf.state_shape, dtype, leaf, like.plan)

    plans = map_leaves(lambda leaf, x, path: leaf, like.params, like.plan)
    return jax.tree_util.tree_map_with_path(one, plans, is_leaf=_is_leaf_plan)


def _abstract(shape: tuple[int, ...], dtype: Any, leaf: LeafPlan, plan: Plan) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(plan.mesh, leaf.state_spec, len(shape)))


def _in_saved_dtypes(tree: Any, field: str, saved: _Below) -> Any:
    """Its floating leaves abstract, in the dtypes on disk."""

    def one(keypath: tuple[Any, ...], x: Any) -> Any:
        dtype = saved.dtype((field, *ocp.tree.str_keypath(keypath)))
        if dtype is None or not _floating(x) or not jnp.issubdtype(dtype, jnp.floating) or dtype == x.dtype:
            return x
        return jax.ShapeDtypeStruct(np.shape(x), dtype, sharding=x.sharding)

    return jax.tree_util.tree_map_with_path(one, tree)


def _state_as_wanted(restored: Any, like: Any) -> Any:
    plan, changed = like.plan, {}
    if (like.num_skipped is None) != (restored.num_skipped is None):
        changed["num_skipped"] = None if like.num_skipped is None else _scalar(jnp.int32(0), plan)
    if (like.loss_scale is None) != (restored.loss_scale is None):
        changed["loss_scale"] = None if like.loss_scale is None else _first_scale(like.loss_scale, plan)
    if (like.master is None) != (restored.master is None):
        params = restored.params if restored.master is None else _from_masters(restored, like)
        changed["master"] = None if like.master is None else _masters_of(params, like)
        changed["params"] = jax.tree.map(_as_dtype_of, params, like.params)
        changed["opt_state"] = jax.tree.map(_as_dtype_of, restored.opt_state, like.opt_state)
    return restored.replace(**changed) if changed else restored


def _masters_of(params: Any, like: Any) -> Any:
    """Masters of parameters, in shards."""
    shards = params if like.stage == 3 else pack_params(params, like.plan)
    return jax.tree.map(
        lambda wanted, x: None if wanted is None else _cast(x, wanted.dtype), like.master, shards, is_leaf=is_none
    )


def _from_masters(restored: Any, like: Any) -> Any:
    """The parameters, those from their masters that are to be wider than they were saved."""

    def one(leaf: LeafPlan, wanted: Any, held: Any, master: Any) -> Any:
        if master is None or held.dtype == wanted.dtype:
            return held
        if like.stage == 3:
            return master
        return jax.jit(lambda x: gather_shards(x, leaf, like.plan.mesh, "joint"))(master)

    plans = map_leaves(lambda leaf, x, path: leaf, like.params, like.plan)
    return jax.tree.map(one, plans, like.params, restored.params, restored.master, is_leaf=_is_leaf_plan)


def _as_dtype_of(x: Any, wanted: Any) -> Any:
    return _cast(x, wanted.dtype) if _floating(x) and x.dtype != wanted.dtype else x


def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    return jax.device_put(x.astype(dtype), x.sharding)


def _floating(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def _is_leaf_plan(x: Any) -> bool:
    return isinstance(x, LeafPlan)


def _scalar(value: Any, plan: Plan) -> jax.Array:
    return constrain(jnp.asarray(value), plan.mesh, P())


def _first_scale(like: LossScale, plan: Plan) -> LossScale:
    """The scale that `like` begins with, where it says one."""
    first = first_loss_scale("dynamic") if isinstance(like.scale, jax.ShapeDtypeStruct) else like
    return LossScale(*(_scalar(x, plan) for x in first))
