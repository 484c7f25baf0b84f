"""The maths of one leaf, against its definition in float64 and against optax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import assert_same_bits, random_tree

from shardadam.moments import Hyperparams, bias_corrections, safe_increment, update_leaf


def step(g, mu, nu, count, hyperparams, nesterov):
    return update_leaf(g, mu, nu, hyperparams, bias_corrections(count, hyperparams), nesterov=nesterov)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_definition(nesterov):
    b1, b2, eps, eps_root = hyperparams = Hyperparams(0.8, 0.95, 1e-3, 1e-4)
    rng = np.random.default_rng(0)
    m, v = np.zeros(5), np.zeros(5)
    mu, nu = jnp.zeros(5), jnp.zeros(5)
    for t in range(1, 6):
        g = rng.standard_normal(5)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t) if nesterov else m / (1 - b1**t)
        wanted = m_hat / (np.sqrt(v / (1 - b2**t) + eps_root) + eps)
        got, mu, nu = step(jnp.asarray(g, jnp.float32), mu, nu, jnp.int32(t), hyperparams, nesterov)
        np.testing.assert_allclose(got, wanted, rtol=2e-6)
        np.testing.assert_allclose(mu, m, rtol=2e-6, atol=1e-7)
        np.testing.assert_allclose(nu, v, rtol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
@pytest.mark.parametrize("nesterov", [False, True])
def test_bit_identical_to_jitted_optax(dtype, nesterov):
    tx = optax.scale_by_adam(nesterov=nesterov, eps=1e-3)
    state = tx.init(jnp.zeros(40, dtype))
    mu, nu = state.mu, state.nu
    with jax.numpy_dtype_promotion("standard"):
        reference = jax.jit(tx.update)
        mine = jax.jit(lambda g, m, v, t: step(g, m, v, t, Hyperparams(eps=1e-3), nesterov))
        for t in range(1, 11):
            g = random_tree(t, dtype, {"g": (40,)})["g"]
            update, state = reference(g, state)
            got, mu, nu = mine(g, mu, nu, jnp.int32(t))
            assert_same_bits((got, mu, nu), (update, state.mu, state.nu))


def test_the_counter_stays_at_its_largest_value():
    assert safe_increment(jnp.int32(3)) == 4
    assert safe_increment(jnp.int32(2**31 - 1)) == 2**31 - 1
