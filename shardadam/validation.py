"""Checks of what a train step is given: options and batches, each refused by its name before anything is traced."""

from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh


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


def check_scale(name: str, got: Any) -> None:
    """Refuses what is neither "dynamic" nor a number that a loss can be multiplied with and divided by."""
    limits = jnp.finfo(jnp.float32)
    if got != "dynamic" and not (isinstance(got, Real) and float(limits.tiny) <= float(got) <= float(limits.max)):
        raise ValueError(f"{name}: got {got!r}, wanted a number above 0 that is finite in float32, 'dynamic' or None")


def check_reduce_dtype(reduce_dtype: Any) -> None:
    """Refuses a dtype that rounds gradients to integers."""
    if reduce_dtype is not None and not jnp.issubdtype(reduce_dtype, jnp.floating):
        raise ValueError(f"reduce_dtype: got {reduce_dtype!r}, wanted a floating dtype such as jnp.bfloat16, or None")


def check_devices(mesh: Mesh | AbstractMesh) -> None:
    """Refuses a plan's mesh without devices where the current one has them."""
    current = jax.sharding.get_abstract_mesh()
    if isinstance(mesh, AbstractMesh) and not current.empty and current != mesh:
        raise ValueError(
            f"plan: made without devices, for {dict(mesh.shape)}, under jax.set_mesh of a mesh with devices, "
            f"{dict(current.shape)}; give make_plan that mesh, or take the plan of the TrainState"
        )


def check_batch(batch: Any, num_devices: int, num_microbatches: int) -> None:
    """Refuses a batch whose leading dims cannot be dealt out over devices and microbatches."""
    for keypath, x in jax.tree_util.tree_leaves_with_path(batch):
        if not jnp.ndim(x) or jnp.shape(x)[0] % (num_devices * num_microbatches):
            name = f"batch{jax.tree_util.keystr(keypath)}"
            raise ValueError(
                f"{name}: got shape {jnp.shape(x)}, wanted a leading dim that divides by {num_devices} devices x "
                f"{num_microbatches} microbatches"
            )
