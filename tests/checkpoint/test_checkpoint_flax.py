"""Flax's own states, TrainState and nnx.Optimizer, resume from a checkpoint as optax's would."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_mesh
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shardadam
from shardadam.checkpoint import Checkpointer

MESH = {"data": 8}


def make_params():
    params = {"dense": {"kernel": jnp.arange(17.0 * 13).reshape(17, 13), "bias": jnp.ones(13)}}
    return jax.device_put(params, NamedSharding(make_mesh(MESH), P()))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("chained", [False, True])
def test_flax_train_state_in_packed_layout(chained, tmp_path):
    params = make_params()
    plan = shardadam.make_plan(params, make_mesh(MESH), layout="packed", min_size=0)
    tx = shardadam.adam(1e-2, plan=plan)
    tx = optax.chain(optax.clip(1.0), tx) if chained else tx
    fresh = TrainState.create(apply_fn=None, params=params, tx=tx)
    step = jax.jit(lambda s: s.apply_gradients(grads=s.params))
    state = step(step(fresh))
    if chained:  # A chain does not tell its adam's plan.
        with pytest.raises(
            ValueError, match=r"`dense/bias`: its moment has shape .*pass the optimizer's own: Checkpointer"
        ):
            Checkpointer(tmp_path).save(2, state)
    checkpointer = Checkpointer(tmp_path, plan=plan if chained else None)
    checkpointer.save(2, state, wait=True)
    restored = checkpointer.restore(fresh)  # Whose step is a Python int.
    assert restored.step == 2
    assert isinstance(restored.step, int)
    assert_equal(restored, state.replace(step=2))
    shardadam.audit(restored.opt_state, plan)
    assert restored.tx is tx
    assert_equal(step(restored), step(state))


def test_flax_train_state_in_natural_layout_needs_no_plan(tmp_path):
    params = jax.device_put({"w": jnp.ones((16, 1024)), "b": jnp.ones(3)}, NamedSharding(make_mesh(MESH), P()))
    state = TrainState.create(apply_fn=None, params=params, tx=optax.chain(shardadam.adam(1e-3, mesh=make_mesh(MESH))))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state)
        assert_equal(checkpointer.restore(state), state)


@pytest.mark.parametrize("packed", [False, True])
def test_nnx_optimizer(packed, tmp_path):
    def make(seed, mesh, layout):
        model = nnx.Linear(17, 13, rngs=nnx.Rngs(seed))
        nnx.update(model, jax.device_put(nnx.state(model), NamedSharding(mesh, P())))
        plan = shardadam.make_plan(nnx.state(model, nnx.Param), mesh, layout=layout, min_size=0)
        return model, nnx.Optimizer(model, shardadam.adam(1e-2, plan=plan), wrt=nnx.Param), plan

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: (m(jnp.ones((2, 17))) ** 2).sum())(model)
        optimizer.update(model, grads)

    model, optimizer, plan = make(0, make_mesh(MESH), "packed" if packed else "natural")
    step(model, optimizer)
    with Checkpointer(tmp_path, plan=plan) as checkpointer:
        checkpointer.save(1, {"model": nnx.state(model), "optimizer": nnx.state(optimizer)})

    for sizes, layout in ((MESH, "packed"), ({"data": 4}, "auto")):
        other_model, other, other_plan = make(1, make_mesh(sizes), layout)
        like = {"model": nnx.state(other_model), "optimizer": nnx.state(other)}
        restored = Checkpointer(tmp_path, plan=other_plan).restore(like)
        nnx.update(other_model, restored["model"])
        nnx.update(other, restored["optimizer"])
        shardadam.audit(jax.tree.map(lambda x: x, other.opt_state), other_plan)
        # On disk, and so on any mesh, the moments have their parameters' shapes.
        params = {k: v.shape for k, v in nnx.to_flat_state(nnx.state(other_model))}
        assert {k: leaf.shape for k, leaf in other_plan.leaves.items()} == {"/".join(k): v for k, v in params.items()}
        if sizes == MESH and packed:
            assert_equal(nnx.state(other), nnx.state(optimizer))
        step(other_model, other)
    step(model, optimizer)
    np.testing.assert_allclose(other_model.kernel[...], model.kernel[...], rtol=1e-6)


def test_nnx_state_of_packed_moments_has_logical_shapes_on_disk(tmp_path):
    mesh = make_mesh(MESH)
    model = nnx.Linear(17, 13, rngs=nnx.Rngs(0))
    nnx.update(model, jax.device_put(nnx.state(model), NamedSharding(mesh, P())))
    plan = shardadam.make_plan(nnx.state(model, nnx.Param), mesh, layout="packed", min_size=0)
    optimizer = nnx.Optimizer(model, shardadam.adam(1e-2, plan=plan), wrt=nnx.Param)
    Checkpointer(tmp_path, plan=plan).save(0, nnx.state(optimizer), wait=True)
    plain = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    assert_equal(
        jax.tree.map(jnp.shape, nnx.to_pure_dict(Checkpointer(tmp_path).restore(nnx.state(plain)))),
        jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(plain))),
    )
