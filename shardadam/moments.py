"""Adam's maths on arrays: the same code for a whole array and for one device's shard of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Hyperparams(NamedTuple):
    """Adam's four scalars: Python numbers, or arrays of shape () that a transformation or a schedule supplies."""

    b1: Any = 0.9
    b2: Any = 0.999
    eps: Any = 1e-8
    eps_root: Any = 0.0


class Step(NamedTuple):
    """What one step of `update_leaf` gives: the update before the learning rate, and the new moments."""

    update: jax.Array
    mu: jax.Array
    nu: jax.Array


def abs_squared(g: jax.Array) -> jax.Array:
    """|g|^2, element by element: real also where g is complex."""
    return (g.conj() * g).real if jnp.iscomplexobj(g) else g**2


def safe_increment(count: jax.Array) -> jax.Array:
    """count + 1, staying at the dtype's largest value instead of wrapping to its smallest."""
    largest = jnp.array(jnp.iinfo(count.dtype).max, count.dtype)
    return jnp.where(count < largest, count + jnp.array(1, count.dtype), largest)


class BiasCorrections(NamedTuple):
    """What the moments of step t are divided by: float32 scalars, the same for every leaf."""

    mu: jax.Array  # 1 - b1^t
    nu: jax.Array  # 1 - b2^t
    next_mu: jax.Array  # 1 - b1^(t+1), for Nesterov momentum


def bias_corrections(count: jax.Array, hyperparams: Hyperparams) -> BiasCorrections:
    """1 - b^t, for t = `count` >= 1, once for all leaves.

    The powers are taken in float32: in bfloat16, 0.999^1 would already round to 1.
    """
    b1, b2, _, _ = hyperparams
    with jax.numpy_dtype_promotion("standard"):
        return BiasCorrections(1 - b1**count, 1 - b2**count, 1 - b1 ** safe_increment(count))


def update_leaf(
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    hyperparams: Hyperparams,
    corrections: BiasCorrections,
    *,
    nesterov: bool = False,
) -> Step:
    r"""One step of Adam on one leaf, before the learning rate.

    With t the number of this step, 1 for the first::

        mu_t     = b1 mu + (1 - b1) g
        nu_t     = b2 nu + (1 - b2) |g|^2
        mu_hat   = mu_t / (1 - b1^t)                                          (nesterov=False)
        mu_hat   = b1 mu_t / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t)         (nesterov=True)
        nu_hat   = nu_t / (1 - b2^t)
        update   = mu_hat / (sqrt(nu_hat + eps_root) + eps)

    Args:
      g: the gradient, of any shape, real or complex.
      mu: the first moment, of the same shape, in any dtype of the same kind.
      nu: the second moment; its values are real, also where its dtype is complex (as optax keeps it).
      hyperparams: b1, b2, eps and eps_root; each a scalar or an array that broadcasts with `g`.
      corrections: `bias_corrections(t, hyperparams)`.
      nesterov: use Nesterov momentum.

    Returns:
      `Step(update, mu, nu)`. mu and nu keep the dtypes they came in; the update has the dtype that type promotion gives
      g, mu and nu, as in optax.

    References:
      Kingma & Ba, Adam: A Method for Stochastic Optimization, 2014, Algorithm 1 (arXiv 1412.6980): not the
      "epsilon hat" form of the paragraph before its section 2.1, which TensorFlow took.
      Dozat, Incorporating Nesterov Momentum into Adam, 2016, without the extra b2 factor of its Algorithm 2.
    """
    b1, b2, eps, eps_root = hyperparams
    # A bfloat16 gradient meets a float32 moment by design: promotion is part of the maths, also where users forbid it.
    with jax.numpy_dtype_promotion("standard"):
        mu_t = (1 - b1) * g + b1 * mu
        nu_t = (1 - b2) * abs_squared(g) + b2 * nu
        if nesterov:
            ahead = mu_t / corrections.next_mu.astype(mu_t.dtype)
            mu_hat = b1 * ahead + (1 - b1) * (g / corrections.mu.astype(g.dtype))
        else:
            mu_hat = mu_t / corrections.mu.astype(mu_t.dtype)
        nu_hat = nu_t / corrections.nu.astype(nu_t.dtype)
        update: jax.Array = mu_hat / (jnp.sqrt(nu_hat + eps_root) + eps)
    return Step(update, mu_t.astype(mu.dtype), nu_t.astype(nu.dtype))
