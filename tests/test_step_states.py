"""The states that a step is given: those it was not made for, and those with leaves of a rare kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh
from test_gradients import batch_of, host_tree, mean_loss

import shardadam

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_a_state_that_the_step_was_not_made_for_is_refused():
    # Layouts of the same shapes: nothing but the state's own words tells that it would be moved.
    mesh = make_mesh({"data": 4, "model": 2})

    def create(axis_name="data", **options):
        plan = shardadam.make_plan(host_tree(), mesh, axis_name=axis_name, layout="natural")
        tx = shardadam.adam(1e-2, plan=plan)
        return shardadam.TrainState.create(apply_fn=None, params=host_tree(), tx=tx, **options)

    def refused(made_with, given, got):
        step = shardadam.make_train_step(mean_loss, made_with)
        with pytest.raises(ValueError, match=f"state: got one with {got}, wanted one like the state that this step"):
            step(given, batch_of(None))

    refused(create(), create(("data", "model")), "another plan")
    refused(create(), create(stage=3), "stage=3")
    refused(create(stage=3), create(), "stage=2")
    refused(create(loss_scale="dynamic"), create(), "no loss_scale")


@pytest.mark.parametrize("stage", [2, 3])
def test_an_array_that_is_there_twice_is_two_parameters(stage, data_mesh):
    same = jnp.ones((64, 32))
    plan = shardadam.make_plan({"in": same, "out": same}, data_mesh)
    tx = shardadam.adam(1e-2, plan=plan)
    state = shardadam.TrainState.create(apply_fn=None, params={"in": same, "out": same}, tx=tx, stage=stage)
    # XLA aborts where memory is donated twice; so look before.
    first, second = (jax.tree.leaves(state.params)[i].addressable_shards[0].data for i in (0, 1))
    assert first.unsafe_buffer_pointer() != second.unsafe_buffer_pointer()
    step = shardadam.make_train_step(lambda p, x: jnp.mean((x @ p["in"] @ p["out"].T) ** 2), state)
    state, metrics = step(state, np.ones((8, 64), np.float32))
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize("sizes", [{"data": 1}, {"data": 1, "model": 2}])
def test_a_scalar_parameter_on_a_mesh_of_one_shard(sizes):
    params = {"w": np.ones((8, 16), np.float32), "scale": np.ones([], np.float32)}
    plan = shardadam.make_plan(params, make_mesh(sizes))
    state = shardadam.TrainState.create(apply_fn=None, params=params, tx=shardadam.adam(1e-2, plan=plan))
    step = shardadam.make_train_step(lambda p, x: jnp.mean(x @ p["w"] * p["scale"]), state)
    state, _ = step(state, np.ones((4, 8), np.float32))
    np.testing.assert_allclose(state.params["scale"], 0.99, rtol=1e-5)
