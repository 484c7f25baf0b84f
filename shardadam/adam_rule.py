"""Adam as an element-wise optax transformation: its state and its update, leaf by leaf, wherever the leaves are."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shardadam.moments import Hyperparams, Step, bias_corrections, safe_increment, update_leaf


def adam_rule(hyperparams: Hyperparams, mu_dtype: Any, *, nesterov: bool) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with this package's maths; it knows neither meshes nor plans."""

    def zeros(params: Any, dtype: Any) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(np.shape(x), dtype or jnp.result_type(x)), params)

    def init_fn(params: Any) -> optax.ScaleByAdamState:
        return optax.ScaleByAdamState(
            count=jnp.zeros([], jnp.int32), mu=zeros(params, mu_dtype), nu=zeros(params, None)
        )

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        grads, mu, nu, rebuild = _with_gradients(updates, state)
        count = safe_increment(jnp.asarray(state.count))
        corrections = bias_corrections(count, hyperparams)
        rows = zip(grads, mu, nu, strict=True)
        steps = [update_leaf(*row, hyperparams, corrections, nesterov=nesterov) for row in rows]
        return rebuild(0, steps), optax.ScaleByAdamState(count=count, mu=rebuild(1, steps), nu=rebuild(2, steps))

    return optax.GradientTransformation(init_fn, update_fn)


def _with_gradients(
    updates: Any, state: optax.ScaleByAdamState
) -> tuple[list[Any], list[Any], list[Any], Callable[[int, Sequence[Step]], Any]]:
    """(grads, mu, nu) of the leaves that have a gradient, and what makes a tree of one field of their steps.

    A None gradient takes its moments with it, as in optax.
    """
    leaves, treedef = jax.tree.flatten(updates, is_leaf=lambda x: x is None)
    rows = list(zip(leaves, *(treedef.flatten_up_to(tree) for tree in (state.mu, state.nu)), strict=True))
    present = [i for i, (g, _, _) in enumerate(rows) if g is not None]

    def rebuild(field: int, steps: Sequence[Step]) -> Any:
        whole: list[Any] = [None] * len(rows)
        for i, step in zip(present, steps, strict=True):
            whole[i] = step[field]
        return treedef.unflatten(whole)

    grads, mu, nu = ([rows[i][column] for i in present] for column in range(3))
    return grads, mu, nu, rebuild
