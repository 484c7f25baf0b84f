"""The states that a step is given: those it was not made for, and those with leaves of a rare kind."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh

import shardadam

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.parametrize("sizes", [{"data": 1}, {"data": 1, "model": 2}])
def test_a_scalar_parameter_on_a_mesh_of_one_shard(sizes):
    params = {"w": np.ones((8, 16), np.float32), "scale": np.ones([], np.float32)}
    plan = shardadam.make_plan(params, make_mesh(sizes))
    state = shardadam.TrainState.create(apply_fn=None, params=params, tx=shardadam.adam(1e-2, plan=plan))
    step = shardadam.make_train_step(lambda p, x: jnp.mean(x @ p["w"] * p["scale"]), state)
    state, _ = step(state, np.ones((4, 8), np.float32))
    np.testing.assert_allclose(state.params["scale"], 0.99, rtol=1e-5)
