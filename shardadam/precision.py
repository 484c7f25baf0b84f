"""Dtypes: which of two is wider, also where users forbid JAX to promote; how many bytes the state takes in them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def widest(first: Any, second: Any) -> np.dtype:
    """The dtype that holds all values of two: float32 of bfloat16 and float32, or of bfloat16 and float16.

    Example:
      >>> widest(jnp.bfloat16, jnp.float16)
      dtype('float32')
    """
    with jax.numpy_dtype_promotion("standard"):
        return np.dtype(jnp.promote_types(first, second))


def is_narrower(dtype: Any, other: Any) -> bool:
    """Whether another dtype holds all values of this one, and more: its parameters can have masters of the other."""
    return np.dtype(dtype) != np.dtype(other) and widest(dtype, other) == np.dtype(other)


def state_itemsize(dtype: Any, mu_dtype: Any = None, master_dtype: Any = None) -> int:
    """Bytes of mu, nu and master of one element of a parameter; see `Plan.state_bytes_per_device`."""
    nu, master = np.dtype(dtype), 0
    if master_dtype is not None and is_narrower(dtype, master_dtype):
        nu = np.dtype(master_dtype)
        master = nu.itemsize
    return (nu if mu_dtype is None else np.dtype(mu_dtype)).itemsize + nu.itemsize + master
