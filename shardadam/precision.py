"""Which of two dtypes is wider, also where users forbid JAX to promote one to the other."""

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
