"""Which leaves of a state lie by a plan: Adam's moments, and all else that is a parameter's shards."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from shardadam.layout import LeafPlan, entries
from shardadam.plan import Plan, path_name

KeyPath = tuple[Any, ...]


def is_adam(x: Any) -> bool:
    """For `is_leaf`: the state whose mu and nu lie by the plan whatever their shape (adamax and radam use it, too)."""
    return isinstance(x, optax.ScaleByAdamState)


def map_leaves(f: Callable[[LeafPlan, Any, str], Any], tree: Any, plan: Plan) -> Any:
    """`f(leaf_plan, leaf, path)` for every leaf of a tree like the parameters: params, grads, mu or nu."""
    return jax.tree_util.tree_map_with_path(lambda k, x: f(plan.leaf(path_name(k)), x, path_name(k)), tree)


def map_moments(f: Callable[[LeafPlan, Any, str], Any], state: Any, plan: Plan) -> Any:
    """`f(leaf_plan, leaf, path)` for every leaf of mu and nu in each `optax.ScaleByAdamState` of a tree.

    Args:
      f: gets the plan of the leaf, the leaf (whatever it is: an array, a ShapeDtypeStruct, a sharding) and its keypath.
      state: any tree, such as a TrainState or an optax chain's state. All its other leaves are kept as they are.
      plan: the plan that has a leaf for every keypath below mu and nu.

    Returns:
      A tree of the same structure.

    Raises:
      ValueError: a moment that the plan does not know.
    """

    def node(x: Any) -> Any:
        return x._replace(mu=map_leaves(f, x.mu, plan), nu=map_leaves(f, x.nu, plan)) if is_adam(x) else x

    return jax.tree.map(node, state, is_leaf=is_adam)


def map_planned(f: Callable[[LeafPlan, Any, str], Any], state: Any, plan: Plan, *, accumulators: bool = False) -> Any:
    """`f(leaf_plan, leaf, path)` for every leaf of a state that lies by the plan; all others are kept as they are.

    These are mu and nu of each `optax.ScaleByAdamState`, and the leaves that `planned_leaf` finds elsewhere: the trace
    of SGD, Lion's mu, an accumulator, master weights, parameters at rest in shards.

    Args:
      f: as for `map_moments`.
      state: any tree of arrays or ShapeDtypeStructs.
      plan: the plan.
      accumulators: see `planned_leaf`.
    """

    def other(keypath: KeyPath, x: Any) -> Any:
        if is_adam(x):
            return x
        found = planned_leaf(keypath, x, plan, accumulators=accumulators)
        return x if found is None else f(plan.leaves[found], x, found)

    return map_moments(f, jax.tree_util.tree_map_with_path(other, state, is_leaf=is_adam), plan)


def planned_leaf(keypath: KeyPath, x: Any, plan: Plan, *, accumulators: bool = False) -> str | None:
    """The parameter by whose plan a leaf of a state lies; None if it lies by none.

    Its keypath ends with the parameter's and its shape is that of the parameter's state. Where this is the parameter's
    own shape as well, the leaf's sharding decides: it may be an accumulator of optax's that follows its parameter.

    Args:
      keypath: of the leaf, in the state.
      x: an array, a ShapeDtypeStruct, or anything with a shape.
      plan: the plan.
      accumulators: take a leaf that says no place, being abstract, for one that lies by the plan.
    """
    fits = [path for path in owners(keypath, plan) if np.shape(x) == plan.leaves[path].state_shape]
    for path in fits:
        if is_placed(x, plan.leaves[path]):
            return path
    for path in fits:
        if plan.leaves[path].state_shape != plan.leaves[path].shape or (accumulators and not isinstance(x, jax.Array)):
            return path
    return None


def owners(keypath: KeyPath, plan: Plan) -> Iterator[str]:
    """The parameters whose keypaths this one ends with, the longest first."""
    for start in range(len(keypath) + 1):
        path = path_name(keypath[start:])
        if path in plan.leaves:
            yield path


def is_placed(x: Any, leaf: LeafPlan) -> bool:
    """Whether an array's own sharding is by the state's spec."""
    sharding = getattr(x, "sharding", None)
    ndim = len(leaf.state_shape)
    if not isinstance(sharding, NamedSharding) or len(sharding.spec) > ndim:
        return False
    return entries(P(*sharding.spec), ndim) == entries(leaf.state_spec, ndim)
