"""Stage 3: parameters at rest in shards, gathered on use; equal to one device, and no more on the wire than planned."""

import jax
import numpy as np
import optax
import pytest
from conftest import make_mesh
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_gradients import STACKED, batch_of, host_tree, mean_loss, planned
from test_step import STEPS, assert_close, one_device
from trees import assert_same_bits, logical

import shardadam
from shardadam.sharding import map_leaves, named_sharding

pytestmark = pytest.mark.usefixtures("standard_promotion")

CASES = {
    "natural": ("data", "natural", {}),
    "packed in seven": ("seven", "packed", {}),
    "an axis at a time": ("two axes", "packed", {"collective": "per_axis"}),
    "tensor, microbatches": ("tensor", "natural", {"num_microbatches": 7}),
    "tensor, packed, local": ("tensor", "packed", {"num_microbatches": 7, "accumulate": "local"}),
}


def at_rest(name, layout, tx=None):
    plan, params = planned(name, layout)
    return shardadam.TrainState.create(
        apply_fn=None, params=params, tx=tx or shardadam.adam(1e-2, plan=plan), plan=plan, stage=3
    )


@pytest.mark.parametrize("case", CASES)
def test_equal_to_optax_on_one_device(case):
    name, layout, options = CASES[case]
    wanted, theirs, losses = one_device(optax.adam(1e-2))
    state = at_rest(name, layout)
    step, seen = shardadam.make_train_step(mean_loss, state, **options), []
    for _ in range(STEPS):
        state, metrics = step(state, batch_of(state.plan.mesh))
        seen.append(metrics["loss"])
        shardadam.audit(state, state.plan)  # of the parameters, too
    assert step._cache_size() == 1
    np.testing.assert_allclose(seen, losses, rtol=1e-4)
    assert_close(logical(state.params, state.plan), wanted)
    assert_close(shardadam.unpack_params(state.params, state.plan), wanted)
    assert_close(logical(state.opt_state[0].mu, state.plan), theirs[0].mu)


def test_explicit_axes_and_an_optimizer_within_a_combinator():
    mesh = make_mesh({"data": 8}, AxisType.Explicit)
    plan = shardadam.make_plan(host_tree(), mesh, layout="packed", min_size=32, stacked_dims=STACKED)
    chain = optax.chain(optax.clip_by_global_norm(0.1), shardadam.adam(1e-2, plan=plan))
    state = shardadam.TrainState.create(apply_fn=None, params=host_tree(), tx=chain, plan=plan, stage=3)
    step = shardadam.make_train_step(mean_loss, state)
    x = jax.device_put(batch_of(None), named_sharding(mesh, P("data"), 2))
    for _ in range(STEPS):
        state, _ = step(state, x)
    assert step._cache_size() == 1
    wanted, _, _ = one_device(optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)))
    assert_close(logical(state.params, plan), wanted)
    shardadam.audit(state, plan)


def test_the_collectives_and_the_memory_of_a_step():
    state = at_rest("data", "natural")
    x = jax.device_put(batch_of(None), named_sharding(state.plan.mesh, P("data"), 2))
    compiled = shardadam.make_train_step(mean_loss, state).lower(state, x).compile()
    shardadam.assert_collectives(compiled, state.plan, stage=3)
    found = shardadam.collectives(compiled)
    # The scan's body is rematerialised: its layers are gathered in the forward loop, and once more in the backward one.
    layers = [op.op for op in found if op.times == 3]
    assert layers.count("all-gather") == 4
    assert layers.count("reduce-scatter") == 2
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.params))
    assert held == shardadam.estimate_bytes(state.plan, stage=3).param_bytes
    assert shardadam.memory(compiled).donation_complete


def test_apply_gradients_takes_shards():
    state = at_rest("data", "packed")
    plan = state.plan
    differentiate = shardadam.value_and_grad(mean_loss, plan, stage=3)

    @jax.jit
    def step(state, batch):
        return state.apply_gradients(grads=differentiate(state.params, batch)[1])

    state = step(state, batch_of(plan.mesh))
    wanted, _, _ = one_device(optax.adam(1e-2), steps=1)
    assert_close(logical(state.params, plan), wanted)
    whole = planned("data", "packed")[1]
    with pytest.raises(
        ValueError, match=r"`bias`: got shape \(16,\).*|`embed`: got shape \(64, 16\), wanted the shards"
    ):
        differentiate(whole, batch_of(plan.mesh))


@pytest.mark.parametrize("layout", ["natural", "packed"])
def test_saved_at_one_stage_and_restored_at_the_other(layout, tmp_path):
    three = at_rest("tensor", layout)
    plan, params = planned("data", "natural" if layout == "packed" else "packed")
    two = shardadam.TrainState.create(apply_fn=None, params=params, tx=shardadam.adam(1e-2, plan=plan))
    empty = three.replace(params=jax.tree.map(lambda x: x * 0, three.params))
    with shardadam.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, three)
        restored = checkpointer.restore(two.replace(params=jax.tree.map(lambda x: x * 0, params)))
        assert_same_bits(jax.tree.map(np.asarray, restored.params), host_tree())
        checkpointer.save(4, restored)
        back = checkpointer.restore(empty)
    assert_same_bits(back.params, three.params)
    shardadam.audit(back, back.plan)


def test_created_under_jit_with_its_own_shardings():
    plan, params = planned("data", "packed")
    tx = shardadam.adam(1e-2, plan=plan)

    def init(params):
        return shardadam.TrainState.create(apply_fn=None, params=params, tx=tx, plan=plan, stage=3)

    shardings = jax.eval_shape(init, params).shardings
    state = jax.jit(init, out_shardings=shardings)(params)
    shardadam.audit(state, plan)
    assert_same_bits(state.params, init(params).params)
    map_leaves(lambda leaf, x, path: x.addressable_shards[0].data.size == leaf.elements_per_device, state.params, plan)
