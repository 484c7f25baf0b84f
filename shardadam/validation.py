"""Checks of what a train step is given: options and batches, each refused by its name before anything is traced."""

from typing import Any

import jax
import jax.numpy as jnp


def check_choice(name: str, got: Any, choices: tuple[Any, ...]) -> None:
    """Refuses an option that is not one of some values.

    Raises:
      ValueError: the option's name, what was got and what was wanted.
    """
    if got not in choices:
        *most, last = map(repr, choices)
        raise ValueError(f"{name}: got {got!r}, wanted {', '.join(most)} or {last}")


def check_count(name: str, got: Any) -> None:
    """Refuses a count that is not 1 or more."""
    if not isinstance(got, int) or got < 1:
        raise ValueError(f"{name}: got {got!r}, wanted a number, 1 or more")


def check_batch(batch: Any, num_devices: int, num_microbatches: int) -> None:
    """Refuses a batch whose leading dims cannot be dealt out over devices and microbatches."""
    for keypath, x in jax.tree_util.tree_leaves_with_path(batch):
        if not jnp.ndim(x) or jnp.shape(x)[0] % (num_devices * num_microbatches):
            name = f"batch{jax.tree_util.keystr(keypath)}"
            raise ValueError(
                f"{name}: got shape {jnp.shape(x)}, wanted a leading dim that divides by {num_devices} devices x "
                f"{num_microbatches} microbatches"
            )
