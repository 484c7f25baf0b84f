"""The train step: equal to one device with optax, collectives counted, clipping, skipping, one compile, donation."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_mesh
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from jax.sharding import PartitionSpec as P
from test_gradients import (
    MESHES,
    batch_of,
    forward,
    host_tree,
    mean_loss,
    planned,
    weighted_loss,
    weighted_mean_loss,
)
from trees import assert_same_bits, collectives, logical

import shardadam
from shardadam.sharding import map_leaves, named_sharding

pytestmark = pytest.mark.usefixtures("standard_promotion")
STEPS = 3


def one_device(tx, loss_fn=mean_loss, steps=STEPS):
    """The oracle: (params, opt_state, losses) of optax on one device, on the whole batch."""
    params = jax.tree.map(jnp.asarray, host_tree())
    opt_state, losses = tx.init(params), []

    @jax.jit
    def step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    for _ in range(steps):
        params, opt_state, loss = step(params, opt_state, batch_of(None))
        losses.append(loss)
    return params, opt_state, losses


def train(name="data", layout="auto", loss_fn=mean_loss, steps=STEPS, poison=(), eps=1e-8, create=None, **options):
    plan, params = planned(name, layout)
    tx = shardadam.adam(1e-2, eps=eps, plan=plan)
    state = shardadam.TrainState.create(apply_fn=None, params=params, tx=tx, **(create or {}))
    step, seen = shardadam.make_train_step(loss_fn, state, **options), []
    for t in range(steps):
        batch = batch_of(plan.mesh)
        state, metrics = step(state, batch * jnp.nan if t in poison else batch)
        seen.append(metrics)
    return state, seen, step


def assert_close(got, wanted, tolerance=1e-4):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, wanted)


@pytest.mark.parametrize("layout", ["natural", "packed"])
@pytest.mark.parametrize("name", MESHES)
def test_equal_to_optax_on_one_device(name, layout):
    wanted, theirs, losses = one_device(optax.adam(1e-2))
    state, metrics, step = train(name, layout)
    assert_close(state.params, wanted)
    assert_close(logical(state.opt_state[0].mu, state.plan), theirs[0].mu)
    np.testing.assert_allclose([m["loss"] for m in metrics], losses, rtol=1e-4)
    shardadam.audit(state, state.plan)
    assert step._cache_size() == 1

    def unmoved(leaf, x, path):
        assert x.sharding.is_equivalent_to(named_sharding(state.plan.mesh, leaf.param_spec, x.ndim), x.ndim), path

    map_leaves(unmoved, state.params, state.plan)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("natural", {"stage": 1}),
        ("packed", {"stage": 1}),
        ("packed", {"num_microbatches": 7}),
        ("packed", {"collective": "per_axis", "num_microbatches": 7, "accumulate": "local"}),
    ],
    ids=str,
)
def test_options_do_not_change_the_result(layout, options):
    wanted, _, _ = one_device(optax.adam(1e-2))
    state, _, _ = train("two axes", layout, **options)
    assert_close(state.params, wanted)


def test_gradients_reduced_in_bfloat16_are_as_exact_as_it_is():
    # eps = 1: Adam's update is then in proportion to the gradient, which loses 2^-9 of itself on each device.
    wanted, _, _ = one_device(optax.adam(1e-2, eps=1.0), steps=1)
    state, _, _ = train("two axes", "packed", steps=1, eps=1.0, reduce_dtype=jnp.bfloat16)
    faults = []
    for got, want, start in zip(*map(jax.tree.leaves, (state.params, wanted, host_tree())), strict=True):
        moved = np.abs(np.asarray(want) - start).max()
        faults.append(np.abs(np.asarray(got) - np.asarray(want)).max() / moved)
    assert 2**-12 < max(faults) < 2**-6


def test_the_collectives_of_a_step():
    state, _, step = train(steps=1)
    x = jax.device_put(batch_of(None), named_sharding(state.plan.mesh, P("data"), 2))
    compiled = step.lower(state, x).compile()
    found = collectives(compiled.as_text())
    ops = [op for _, op in found]
    split = sum(leaf.num_shards > 1 for leaf in state.plan.leaves.values())
    assert (ops.count("reduce-scatter"), ops.count("all-gather")) == (split, split)
    assert len(ops) - 2 * split == ops.count("all-reduce")
    whole = {leaf.shape for leaf in state.plan.leaves.values() if leaf.layout == "whole"}
    for shape, op in found:
        if op == "all-reduce":
            dims = [tuple(int(d) for d in s.split(",") if d) for s in re.findall(r"f32\[([\d,]*)\]", shape)]
            assert all(d == () or d in whole for d in dims), shape
    donated = sum(s.data.nbytes for x in jax.tree.leaves(state) for s in x.addressable_shards[:1])
    assert compiled.memory_analysis().alias_size_in_bytes == donated


@pytest.mark.parametrize(("name", "layout"), [("tensor", "natural"), ("two axes", "packed"), ("data", "natural")])
def test_large_layers_are_gathered_one_after_the_other(name, layout, monkeypatch):
    monkeypatch.setattr("shardadam.pieces.LARGE_LAYER", 256)
    wanted, _, _ = one_device(optax.adam(1e-2))
    options = {"accumulate": "local"} if name == "data" else {}
    state, _, step = train(name, layout, **options)
    assert_close(state.params, wanted)
    x = jax.device_put(batch_of(None), named_sharding(state.plan.mesh, P(state.plan.axis_names), 2))
    found = shardadam.collectives(step.lower(state, x).compile())
    gathers = [op for op in found if op.op == "all-gather" and op.loop]
    assert sum(op.times == 3 for op in gathers) == 2  # The two stacks, three layers each.
    if options:  # What is added up whole is reduced layer by layer, too.
        assert sum(op.times == 3 for op in found if op.op == "reduce-scatter") == 2


@pytest.mark.parametrize("layout", ["natural", "packed"])
def test_clipping_by_the_global_norm_of_the_shards(layout):
    # eps = 1: Adam's update then depends on the size of the gradient.
    wanted, _, _ = one_device(optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2, eps=1.0)))
    state, metrics, _ = train("data", layout, eps=1.0, max_grad_norm=0.1)
    assert_close(state.params, wanted, 1e-6)
    grads = jax.grad(mean_loss)(host_tree(), batch_of(None))
    np.testing.assert_allclose(metrics[0]["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    assert metrics[0]["grad_norm"] > 0.1
    np.testing.assert_allclose(metrics[-1]["param_norm"], optax.tree.norm(wanted), rtol=1e-5)
    first, _, _ = train("data", layout, eps=1.0, max_grad_norm=0.1, steps=1)
    moved = jax.tree.map(lambda a, b: np.asarray(a) - b, first.params, host_tree())
    np.testing.assert_allclose(metrics[0]["update_norm"], optax.tree.norm(moved), rtol=1e-3)


def test_a_nonfinite_step_is_skipped_and_leaves_no_trace():
    poisoned, metrics, step = train(poison=(1,), create={"skip_nonfinite": True})
    clean, _, _ = train(steps=STEPS - 1, skip_nonfinite=True)
    assert int(poisoned.num_skipped) == 1
    assert clean.num_skipped is None
    assert [float(m["skipped"]) for m in metrics] == [0, 1, 0]
    assert int(poisoned.opt_state[0].count) == STEPS - 1
    assert int(poisoned.step) == STEPS
    for a, b in zip(jax.tree.leaves(poisoned.params), jax.tree.leaves(clean.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert step._cache_size() == 1
    broken, _, _ = train(poison=(1,))
    assert not np.isfinite(broken.params["embed"]).all()


def test_one_row_that_is_not_finite_skips_the_step_on_all_devices():
    params = {"w": np.linspace(-1, 1, 4096, dtype=np.float32).reshape(32, 128), "odd": np.ones((17, 67), np.float32)}
    plan = shardadam.make_plan(params, make_mesh({"data": 8}))
    state = shardadam.TrainState.create(
        apply_fn=None, params=params, tx=shardadam.adam(1e-2, plan=plan), skip_nonfinite=True
    )

    def loss_fn(params, x):
        return jnp.mean(jnp.tanh(x @ params["w"]) ** 2) + jnp.mean(x) * jnp.mean(params["odd"] ** 2)

    step = shardadam.make_train_step(loss_fn, state, num_microbatches=4)
    x = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    state, _ = step(state, x)
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    bad = x.copy()
    bad[43, 7] = np.nan  # In the second of the four microbatches of the sixth device.
    state, metrics = step(state, bad)
    assert_same_bits((state.params, state.opt_state), before)
    assert (float(metrics["skipped"]), int(state.num_skipped), int(state.step)) == (1, 1, 2)
    state, metrics = step(state, x)
    assert (float(metrics["skipped"]), int(state.opt_state[0].count)) == (0, 2)
    # Finite gradients, of 1e22, whose squares are not.
    _, metrics = step(state, np.full_like(x, 1e25))
    assert np.isfinite(metrics["loss"])
    assert (float(metrics["skipped"]), float(metrics["grad_norm"])) == (1, np.inf)


def test_weighted_losses_and_aux():
    def loss_fn(params, batch):
        return weighted_loss(params, batch), {"h": jnp.mean(forward(params, batch))}

    _, _, losses = one_device(optax.adam(1e-2), weighted_mean_loss)
    _, metrics, _ = train(loss_fn=loss_fn, has_aux=True, num_microbatches=7)
    np.testing.assert_allclose([m["loss"] for m in metrics], losses, rtol=1e-4)
    np.testing.assert_allclose(
        metrics[0]["aux"]["h"], jnp.mean(forward(host_tree(), batch_of(None))), rtol=1e-3, atol=1e-5
    )


def test_bad_options_are_refused():
    plan, params = planned("data")
    state = shardadam.TrainState.create(apply_fn=None, params=params, tx=shardadam.adam(1e-2, plan=plan))
    with pytest.raises(ValueError, match=r"stage: got 4, wanted 1, 2 or 3"):
        shardadam.make_train_step(mean_loss, state, stage=4)
    for norm in (0, np.nan, np.inf, 1e39):
        with pytest.raises(ValueError, match=r"max_grad_norm: got .*, wanted a number above 0 that is finite"):
            shardadam.make_train_step(mean_loss, state, max_grad_norm=norm)
    with pytest.raises(ValueError, match=r"num_microbatches: got True"):
        shardadam.make_train_step(mean_loss, state, num_microbatches=True)
    with pytest.raises(ValueError, match=r"master_dtype: got .*int32.*, wanted a floating dtype"):
        shardadam.TrainState.create(apply_fn=None, params=params, tx=state.tx, master_dtype=jnp.int32)
    with pytest.raises(ValueError, match=r"master_dtype: got 'bf16', wanted a floating dtype"):
        shardadam.TrainState.create(apply_fn=None, params=params, tx=state.tx, master_dtype="bf16")
    with pytest.raises(ValueError, match=r"got 3, and the state was created for stage 2: its parameters are whole"):
        shardadam.make_train_step(mean_loss, state, stage=3)
    with pytest.raises(ValueError, match=r"loss_scale: got 'dynamic', and the state has none"):
        shardadam.make_train_step(mean_loss, state, loss_scale="dynamic")
    for scale in (0, -1.0, np.nan, np.inf, 1e39):
        with pytest.raises(ValueError, match=r"loss_scale: got .*, wanted a number above 0 that is finite in float32"):
            shardadam.make_train_step(mean_loss, state, loss_scale=scale)
        with pytest.raises(ValueError, match=r"loss_scale: got .*, wanted a number above 0 that is finite in float32"):
            shardadam.TrainState.create(apply_fn=None, params=params, tx=state.tx, loss_scale=scale)
    with pytest.raises(ValueError, match=r"reduce_dtype: got .*int8.*, wanted a floating dtype"):
        shardadam.make_train_step(mean_loss, state, reduce_dtype=jnp.int8)
    with pytest.raises(ValueError, match=r"reduce_dtype: got 'bf16', wanted a floating dtype"):
        shardadam.make_train_step(mean_loss, state, reduce_dtype="bf16")
    fp8 = state.replace(params={"params": params, OVERWRITE_WITH_GRADIENT: {"scale": np.zeros(3, np.float32)}})
    with pytest.raises(ValueError, match=r"got params with Flax's fp8 statistics .* state\.apply_gradients"):
        shardadam.make_train_step(mean_loss, fp8)


def test_the_stage_is_that_of_the_state():
    plan, params = planned("data")
    x = jax.device_put(batch_of(None), named_sharding(plan.mesh, P("data"), 2))
    for stage, scattered in ((1, False), (2, True)):
        tx = shardadam.adam(1e-2, plan=plan)
        state = shardadam.TrainState.create(apply_fn=None, params=params, tx=tx, stage=stage)
        assert state.stage == stage
        text = shardadam.make_train_step(mean_loss, state).lower(state, x).as_text()
        assert ("reduce_scatter" in text) == scattered


def with_rate(kind, plan, rate):
    """An optimizer that takes its steps by a schedule: alone, injected, within a chain, or as one of two."""
    clip, adam = optax.clip(1.0), functools.partial(shardadam.adam, plan=plan)
    injected = optax.inject_hyperparams(lambda learning_rate: adam(learning_rate))
    return {
        "adam": lambda: adam(rate),
        "chain": lambda: optax.chain(clip, adam(rate)),
        "MultiSteps": lambda: optax.MultiSteps(optax.chain(clip, adam(rate)), 1),
        "injected": lambda: optax.chain(clip, injected(learning_rate=rate)),
        "two": lambda: optax.chain(adam(rate), adam(0.5)),
    }[kind]()


@pytest.mark.parametrize("kind", ["adam", "chain", "MultiSteps", "injected", "two"])
def test_the_learning_rate_and_the_norm_of_a_skipped_step(kind):
    plan = shardadam.make_plan({"w": np.ones((8, 128), np.float32)}, make_mesh({"data": 2}))
    tx = with_rate(kind, plan, optax.linear_schedule(1.0, 0.0, 4))
    state = shardadam.TrainState.create(
        apply_fn=None, params={"w": np.ones((8, 128), np.float32)}, tx=tx, plan=plan, skip_nonfinite=True
    )
    step, seen = shardadam.make_train_step(lambda params, x: jnp.mean(x @ params["w"]), state), []
    for batch in (1.0, 1.0, np.nan, 1.0):
        state, metrics = step(state, np.full((2, 8), batch, np.float32))
        seen.append(jax.tree.map(float, metrics))
    assert step._cache_size() == 1
    assert [m.get("learning_rate") for m in seen] == ([None] * 4 if kind == "two" else [1.0, 0.75, 0.5, 0.5])
    assert [m["update_norm"] == 0 for m in seen] == [False, False, True, False]
    assert [m["skipped"] for m in seen] == [0, 0, 1, 0]
