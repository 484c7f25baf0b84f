"""`ShardedTransformation`: an optax transformation whose state lives in shards, and what it tells of itself."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shardadam.plan import Plan


class ShardedTransformation(optax.GradientTransformationExtraArgs):
    """An optax transformation whose state lives in shards.

    `update` takes three keywords more than optax's, with which `shardadam.TrainState` adds the updates on the shards.
    `shards_of` is the Plan in whose layout grads and params already are, and the updates shall stay. With
    `packed=False` that holds for its natural and whole leaves only, and packed ones have their parameter's shape.
    `keep` is a bool of shape (), where `takes_keep` says so: where it is False the updates are zeros, and the state,
    counters included, is what it was. The choice is made element by element as the results are written.
    """

    plan_of: Callable[..., Plan | None] = staticmethod(lambda *_, **__: None)
    """params -> the plan of their state; None where there is no mesh, or (after `_replace`) where it is not known."""

    takes_keep: bool = False
    """Whether `update` takes the keyword `keep`."""

    by_plan: bool = True
    """Whether its state lies by the plan, or by specs of the caller's."""


def transformation(
    init: Any,
    update: Any,
    plan_of: Callable[..., Plan | None],
    *,
    takes_keep: bool = False,
    by_plan: bool = True,
) -> ShardedTransformation:
    """A `ShardedTransformation` of two functions and of what it tells of itself."""
    tx = ShardedTransformation(init, update)
    tx.plan_of, tx.takes_keep, tx.by_plan = plan_of, takes_keep, by_plan
    return tx


def select(keep: jax.Array | None, new: Any, old: Any) -> Any:
    """`new` where `keep` is True or None, `old` (a tree like it, or a scalar) where it is False, leaf by leaf."""
    if keep is None:
        return new
    if isinstance(old, int | float):
        return jax.tree.map(lambda a: jnp.where(keep, a, jnp.asarray(old, jnp.result_type(a))), new)
    return jax.tree.map(lambda a, b: jnp.where(keep, a, jnp.asarray(b)), new, old)
