"""Master weights: updates that bfloat16 would lose add up; loss scaling: float16 gradients that would vanish do not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_mesh
from test_gradients import MESHES, STACKED, batch_of, forward, host_tree, mean_loss
from trees import assert_same_bits, logical

import shardadam
from shardadam.loss_scale import GROWTH_INTERVAL, LEAST, LossScale, first_loss_scale
from shardadam.params import pack_params

pytestmark = pytest.mark.usefixtures("standard_promotion")
RATE, STEPS = 1e-4, 4  # Under half an ulp of most bfloat16 parameters here.


def narrow(dtype=jnp.bfloat16):
    return jax.tree.map(lambda x: np.asarray(jnp.asarray(x, dtype)), host_tree())


def create(name="two axes", layout="auto", dtype=jnp.bfloat16, stage=2, **options):
    sizes, _, axis_name = MESHES[name]
    plan = shardadam.make_plan(
        narrow(dtype), make_mesh(sizes), axis_name=axis_name, layout=layout, min_size=32, stacked_dims=STACKED
    )
    tx = shardadam.adamw(RATE, weight_decay=0.1, plan=plan)
    return shardadam.TrainState.create(
        apply_fn=None, params=narrow(dtype), tx=tx, stage=stage, **{"master_dtype": jnp.float32, **options}
    )


@functools.cache
def reference():
    """One device: float32 parameters, of which the loss sees a bfloat16 copy."""
    tx = optax.adamw(RATE, weight_decay=0.1)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), narrow())
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state):
        grads = jax.grad(mean_loss)(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), batch_of(None))
        updates, opt_state = tx.update(jax.tree.map(lambda g: g.astype(jnp.float32), grads), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(STEPS):
        params, opt_state = step(params, opt_state)
    return params


@pytest.mark.parametrize("layout", ["natural", "packed"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_equal_to_float32_weights_on_one_device(stage, layout):
    state = create(layout=layout, stage=stage)
    step = shardadam.make_train_step(mean_loss, state, reduce_dtype=jnp.float32)
    for _ in range(STEPS):
        state, _ = step(state, batch_of(state.plan.mesh))
    assert step._cache_size() == 1
    shardadam.audit(state, state.plan)
    assert {x.dtype.name for x in jax.tree.leaves((state.master, state.opt_state[0].nu))} == {"float32"}
    held = sum(x.addressable_data(0).nbytes for x in jax.tree.leaves((state.master, state.opt_state[0])))
    assert held == state.plan.state_bytes_per_device(master_dtype=jnp.float32)
    assert held == shardadam.estimate_bytes(state.plan, stage=stage, master_dtype=jnp.float32).state_bytes
    assert f"state per device: {held:,} bytes" in state.plan.report(master_dtype=jnp.float32)
    got = logical(state.master, state.plan)
    # Adam's first updates are about RATE in size, whatever that of the gradient, which bfloat16 rounds per device.
    for a, b, start in zip(*map(jax.tree.leaves, (got, reference(), narrow())), strict=True):
        assert np.mean(np.abs(a - b)) < 0.02 * np.mean(np.abs(a - start.astype(np.float32)))
    whole = shardadam.unpack_params(state.params, state.plan) if stage == 3 else state.params
    assert_same_bits(whole, jax.tree.map(lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16)), got))


def test_masters_only_where_a_parameter_is_narrower():
    params = {"w": np.ones((16, 64), jnp.bfloat16), "scale": np.ones((1024,), np.float32)}
    plan = shardadam.make_plan(params, make_mesh({"data": 8}))
    state = shardadam.TrainState.create(
        apply_fn=None, params=params, tx=shardadam.adam(RATE, plan=plan), master_dtype=jnp.float32
    )
    assert state.master["scale"] is None
    grads = jax.tree.map(lambda x: x.astype(np.float32), params)
    with jax.numpy_dtype_promotion("strict"):
        state = jax.jit(lambda s: s.apply_gradients(grads=grads))(state)
        narrow = shardadam.TrainState.create(apply_fn=None, params=params, tx=shardadam.adamw(RATE, plan=plan))
        jax.jit(lambda s: s.apply_gradients(grads=grads))(narrow)
    shardadam.audit(state, plan)
    np.testing.assert_allclose(state.master["w"], 1 - RATE, rtol=1e-6)
    np.testing.assert_allclose(state.params["scale"], 1 - RATE, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(state.params["w"], np.float32), 1)


def test_masters_given_in_float32_are_not_rounded():
    host = {"w": np.linspace(0, 1, 1024, dtype=np.float32).reshape(16, 64)}
    plan = shardadam.make_plan(jax.tree.map(lambda x: x.astype(jnp.bfloat16), host), make_mesh({"data": 8}))
    state = shardadam.TrainState.create(
        apply_fn=None, params=host, tx=shardadam.adam(RATE, plan=plan), master_dtype=jnp.float32
    )
    np.testing.assert_array_equal(state.master["w"], host["w"])
    assert state.params["w"].dtype == jnp.bfloat16


def test_whole_leaves_in_bfloat16_are_reduced_beside_an_axis_of_the_models():
    # XLA:CPU aborts at a sum in 16 bits over some of a mesh's axes, while others are Auto.
    got = {}
    for name in ("data", "tensor"):
        state = create(name, master_dtype=None)
        assert any(leaf.num_shards == 1 for leaf in state.plan.leaves.values())
        state, metrics = shardadam.make_train_step(mean_loss, state)(state, batch_of(state.plan.mesh))
        got[name] = jax.tree.map(np.float32, (metrics["loss"], metrics["grad_norm"], logical(state.params, state.plan)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02, atol=2 * RATE), got["data"], got["tensor"])


def test_two_bytes_a_parameter_are_gathered():
    state = create("two axes", "packed")
    step = shardadam.make_train_step(mean_loss, state, collective="per_axis", reduce_dtype=jnp.bfloat16)
    text = step.lower(state, batch_of(state.plan.mesh)).as_text()
    gathers = [line.rsplit("->", 1)[1] for line in text.splitlines() if "stablehlo.all_gather" in line]
    assert len(gathers) == 2 * sum(leaf.num_shards > 1 for leaf in state.plan.leaves.values())
    assert all("bf16" in line for line in gathers)


def small_loss(params, batch):
    return jnp.mean(forward(params, batch.astype(jnp.float16)).astype(jnp.float32) ** 2) * 1e-7


def test_float16_gradients_that_would_vanish_are_scaled():
    state = create("data", dtype=jnp.float16, loss_scale=2.0**14)
    batch = batch_of(state.plan.mesh)
    wanted = optax.tree.norm(
        jax.grad(lambda p: mean_loss(p, batch_of(None)) * 1e-7)(
            jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), narrow(jnp.float16))
        )
    )
    plain = shardadam.value_and_grad(small_loss, state.plan)
    assert abs(optax.tree.norm(jax.jit(plain)(state.params, batch)[1]) / wanted - 1) > 0.2
    step, scales = shardadam.make_train_step(small_loss, state), []
    for t in range(3):
        state, metrics = step(state, batch if t != 1 else batch * 1e4)
        scales.append(float(metrics["loss_scale"]))
        if t == 0:
            np.testing.assert_allclose(metrics["grad_norm"], wanted, rtol=0.02)
    assert scales == [2.0**14, 2.0**14, 2.0**13]
    assert int(state.num_skipped) == 1
    assert int(state.opt_state[0].count) == 2
    assert step._cache_size() == 1
    # A number needs no state.
    fixed = jax.jit(functools.partial(plain, loss_scale=2.0**14))
    np.testing.assert_allclose(optax.tree.norm(fixed(state.params, batch)[1]), wanted, rtol=0.02)


def test_the_scale_grows_and_backs_off():
    scale = first_loss_scale("dynamic")._replace(num_finite=jnp.asarray(GROWTH_INTERVAL - 2, jnp.int32))
    seen = []
    for finite in (True, True, False, True, False):
        scale = scale.adjusted(jnp.asarray(finite))
        seen.append((float(scale.scale), int(scale.num_finite)))
    first = 2.0**15
    assert seen == [(first, GROWTH_INTERVAL - 1), (2 * first, 0), (first, 0), (first, 1), (first / 2, 0)]
    least = LossScale(jnp.asarray(LEAST), jnp.asarray(0))
    assert float(least.adjusted(jnp.asarray(False)).scale) == LEAST


def test_a_sum_over_many_tokens_finds_its_scale_in_float16():
    """Its gradient is too large for float16 where a mean's is not: the scale has to fall below 1."""
    host = {"w": np.full((16, 64), 0.5, np.float16)}
    plan = shardadam.make_plan(host, make_mesh({"data": 8}))
    tx, batch = shardadam.adam(RATE, plan=plan), np.ones((1024, 16), np.float16)
    state = shardadam.TrainState.create(apply_fn=None, params=host, tx=tx, loss_scale=8.0)

    def summed(params, x):
        h = (x @ params["w"]).astype(jnp.float32)
        return 64 * jnp.sum(h**2), jnp.float32(h.size)

    step = shardadam.make_train_step(summed, state)
    for _ in range(12):
        state, metrics = step(state, batch)
    assert metrics["skipped"] == 0
    assert metrics["loss_scale"] < 1
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(16 * 64) * 64 * 2 * 8 / 64, rtol=0.01)


def test_packing_parameters_is_undone_by_unpacking():
    state = create("seven", "packed", stage=2)
    shards = pack_params(state.params, state.plan)
    assert_same_bits(shardadam.unpack_params(shards, state.plan), state.params)
