"""`memory`: bytes of arguments, results and aliases, and the names of donated arguments that no result reuses."""

import jax
import jax.numpy as jnp
import pytest

import shardadam


def compiled(f, *args, **options):
    return jax.jit(f, **options).lower(*args).compile()


def test_complete_donation():
    def f(state, x):
        return {k: v + jnp.sum(x) for k, v in state.items()}

    state = {"a": jnp.ones((256, 4)), "b": jnp.ones(1000)}
    found = shardadam.memory(compiled(f, state, jnp.ones(8), donate_argnums=0))
    assert (found.argument_bytes, found.alias_bytes) == (4096 + 4000 + 32, 4096 + 4000)
    assert found.donation_complete
    assert found.peak_bytes >= found.argument_bytes + found.output_bytes - found.alias_bytes


def test_what_is_donated_in_vain_is_named():
    def f(state):
        return {"a": state["a"] + 1, "b": jnp.sum(state["b"])}

    with pytest.warns(UserWarning, match="donated buffers were not usable"):
        lowered = jax.jit(f, donate_argnums=0).lower({"a": jnp.ones(64), "b": jnp.ones(1000)})
    found = shardadam.memory(lowered.compile())
    assert found.not_donated == ("[0][0]['b']",)
    assert not found.donation_complete


def test_arguments_that_are_not_read_shift_no_numbers():
    def f(unused, state, also_unused, other):
        return state * 2, other[:3]

    args = (jnp.ones(5), jnp.ones(8), jnp.ones(7), jnp.ones(6))
    with pytest.warns(UserWarning, match="donated buffers were not usable"):
        lowered = jax.jit(f, donate_argnums=(1, 3)).lower(*args)
    found = shardadam.memory(lowered.compile())
    assert found.not_donated == ("[0][3]",)


def test_nothing_donated():
    found = shardadam.memory(compiled(lambda x: x + 1, jnp.ones(8)))
    assert (found.alias_bytes, found.not_donated, found.donation_complete) == (0, (), True)
