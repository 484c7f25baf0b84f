"""The learning rate of a step, which optimizers say while they are traced, also from within optax's combinators."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

_SAID: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("said", default=None)


def say_rate(learning_rate: optax.ScalarOrSchedule) -> None:
    """Said by an optimizer's `update`: what its updates are multiplied with."""
    said = _SAID.get()
    if said is not None:
        said.append(learning_rate)


@contextlib.contextmanager
def said_rates() -> Iterator[list[Any]]:
    """All that is said within."""
    said: list[Any] = []
    token = _SAID.set(said)
    try:
        yield said
    finally:
        _SAID.reset(token)


def rate_of_step(said: list[Any], before: Any, after: Any) -> dict[str, jax.Array]:
    """{"learning_rate": a float32}, where there is one rate and not several; else nothing.

    Args:
      said: what was said in the update from `before` to `after`.
      before: the optimizer's state; a schedule is a function of the count of its one Adam.
      after: the state that the update has made. `optax.inject_hyperparams` leaves the rate it has taken there.
    """
    rates = list({id(rate): rate for rate in said}.values())  # A branch may be traced twice.
    found = optax.tree.get_all_with_path(after, "learning_rate")
    injected = [x for path, x in found if getattr(path[-2], "name", None) == "hyperparams"]
    if len(rates) > 1 or len(injected) > 1 or not (rates or injected):
        return {}
    rate = injected[0] if injected else rates[0]
    if isinstance(rate, jax.core.Tracer) and not injected:  # It may be of a branch, and not live out here.
        return {}
    if callable(rate):
        counts = [adam.count for _, adam in optax.tree.get_all_with_path(before, "ScaleByAdamState")]
        if len(counts) != 1:
            return {}
        rate = rate(counts[0])
    return {"learning_rate": jnp.asarray(rate, jnp.float32)}
