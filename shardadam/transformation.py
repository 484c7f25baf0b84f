"""`ShardedTransformation`: an optax transformation whose state lives in shards, and what it tells of itself."""

from collections.abc import Callable
from typing import Any

import optax

from shardadam.plan import Plan


class ShardedTransformation(optax.GradientTransformationExtraArgs):
    """An optax transformation whose state lives in shards.

    `update` takes two keywords more than optax's, with which `shardadam.TrainState` adds the updates on the shards.
    `shards_of` is the Plan in whose layout grads and params already are, and the updates shall stay. With
    `packed=False` that holds for its natural and whole leaves only, and packed ones have their parameter's shape.
    """

    plan_of: Callable[..., Plan | None] = staticmethod(lambda *_, **__: None)
    """params -> the plan of their state; None where there is no mesh, or (after `_replace`) where it is not known."""


def transformation(init: Any, update: Any, plan_of: Callable[..., Plan | None]) -> ShardedTransformation:
    """A `ShardedTransformation` of two functions and of what says its plan."""
    tx = ShardedTransformation(init, update)
    tx.plan_of = plan_of
    return tx
