"""Checks of what a caller gives, options and batches, each refused by its name before anything is traced or written."""

import contextlib
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
    if not isinstance(got, Integral) or isinstance(got, bool) or got < 1:
        raise ValueError(f"{name}: got {got!r}, wanted a number, 1 or more")


def check_scale(name: str, got: Any) -> None:
    """Refuses what is neither "dynamic" nor a number that a loss can be multiplied with and divided by."""
    limits = jnp.finfo(jnp.float32)
    if got != "dynamic" and not (isinstance(got, Real) and float(limits.tiny) <= float(got) <= float(limits.max)):
        raise ValueError(f"{name}: got {got!r}, wanted a number above 0 that is finite in float32, 'dynamic' or None")


def check_max_norm(name: str, got: Any) -> None:
    """Refuses a norm that is no bound: of an infinite one, clipped gradients would be NaN."""
    limits = jnp.finfo(jnp.float32)
    if got is not None and not float(limits.tiny) <= float(got) <= float(limits.max):
        raise ValueError(f"{name}: got {got!r}, wanted a number above 0 that is finite in float32, or None")


def check_floating(name: str, dtype: Any) -> None:
    """Refuses a dtype that rounds to integers, and what is none."""
    if dtype is None:
        return
    with contextlib.suppress(TypeError):
        if jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
            return
    raise ValueError(f"{name}: got {dtype!r}, wanted a floating dtype such as jnp.bfloat16 or 'bfloat16', or None")


def check_loss(loss: Any) -> None:
    """Refuses what is neither a scalar nor a pair of them: a weight for each row would be broadcast over gradients."""
    parts = loss if isinstance(loss, tuple) else (loss, 1.0)
    if len(parts) != 2 or not all(map(_is_scalar, parts)):
        got = ", ".join(map(_described, parts if isinstance(loss, tuple) else [loss]))
        raise ValueError(
            f"loss_fn: got a loss of {got}; wanted a scalar, the mean over the batch it is given, or (sum, weight) of "
            "two scalars; what else it returns is aux: (loss, aux), with has_aux=True"
        )


def check_pair(out: Any) -> None:
    """Refuses what is not (loss, aux)."""
    if not isinstance(out, tuple | list) or len(out) != 2:
        got = ", ".join(map(_described, out if isinstance(out, tuple | list) else [out]))
        raise ValueError(f"loss_fn: got {got}, wanted (loss, aux), as has_aux=True says")


def _is_scalar(x: Any) -> bool:
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        return x.shape == () and not jnp.issubdtype(x.dtype, jnp.complexfloating)
    return isinstance(x, Real)


def _described(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if isinstance(x, jax.Array | np.ndarray | np.generic) else repr(x)[:60]


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
        if not jnp.ndim(x) or not jnp.shape(x)[0] or jnp.shape(x)[0] % (num_devices * num_microbatches):
            name = f"batch{jax.tree_util.keystr(keypath)}"
            raise ValueError(
                f"{name}: got shape {jnp.shape(x)}, wanted a leading dim that divides by {num_devices} devices x "
                f"{num_microbatches} microbatches"
            )
