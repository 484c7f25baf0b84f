"""`LossScale`: what a float16 loss is multiplied with, growing while gradients are finite and backing off when not."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

# Below 1, too: the loss may be a sum over millions of tokens.
FIRST, LEAST, GREATEST = 2.0**15, 2.0**-24, 2.0**24
GROWTH_INTERVAL = 2000  # Steps with finite gradients before the scale is doubled.


class LossScale(NamedTuple):
    """A dynamic loss scale: a part of a `TrainState`, saved with it.

    Attributes:
      scale: float32, of shape ().
      num_finite: int32, of shape (): steps with finite gradients since the scale last changed.
    """

    scale: jax.Array
    num_finite: jax.Array

    def adjusted(self, finite: jax.Array) -> "LossScale":
        """The scale for the next step: half after one that was not finite, twice after GROWTH_INTERVAL that were.

        Args:
          finite: a bool of shape ().

        References:
          Micikevicius et al., Mixed Precision Training, 2017 (arXiv 1710.03740), section 3.2.
        """
        grown = finite & (self.num_finite + 1 >= GROWTH_INTERVAL)
        factor = jnp.where(finite, jnp.where(grown, 2.0, 1.0), 0.5).astype(jnp.float32)
        scale = jnp.clip(self.scale * factor, LEAST, GREATEST)
        return LossScale(scale, jnp.where(finite & ~grown, self.num_finite + 1, 0).astype(jnp.int32))


def first_loss_scale(loss_scale: Literal["dynamic"] | float) -> LossScale:
    """The scale of step 0: 2^15, or a number to begin with."""
    first = FIRST if loss_scale == "dynamic" else float(loss_scale)
    return LossScale(jnp.asarray(first, jnp.float32), jnp.zeros([], jnp.int32))
