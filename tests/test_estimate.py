"""`estimate_bytes` against bytes counted by hand, and against what compiled steps really move and hold."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import shardadam
from shardadam.estimate import num_copies


def sds(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def plan_of(params, sizes, **options):
    return shardadam.make_plan(params, sizes, **options)


def test_by_hand():
    # 8 devices; 4 KiB split in 8, a scalar that stays whole.
    plan = plan_of({"w": sds(64, 16), "s": sds()}, {"data": 8})
    one, two, three = (shardadam.estimate_bytes(plan, stage=stage) for stage in (1, 2, 3))
    whole, ring = 4096, 4096 * 7 // 8
    scalar = 2 * 7 * 4 // 8
    assert (one.param_bytes, two.param_bytes, three.param_bytes) == (whole + 4, whole + 4, whole // 8 + 4)
    assert (one.grad_bytes, two.grad_bytes, three.grad_bytes) == (whole + 4, whole // 8 + 4, whole // 8 + 4)
    assert one.state_bytes == two.state_bytes == three.state_bytes == plan.state_bytes_per_device()
    assert (one.reduce_bytes, two.reduce_bytes, three.reduce_bytes) == (2 * ring + scalar, ring + scalar, ring + scalar)
    assert (one.gather_bytes, two.gather_bytes, three.gather_bytes) == (ring, ring, 2 * ring)
    assert two.wire_bytes == 2 * ring + scalar
    with pytest.raises(ValueError, match="stage: got 4"):
        shardadam.estimate_bytes(plan, stage=4)


def test_dtypes():
    plan = plan_of({"w": sds(64, 16, dtype=jnp.bfloat16)}, {"data": 8})
    plain, wide = shardadam.estimate_bytes(plan), shardadam.estimate_bytes(plan, reduce_dtype=jnp.float32)
    assert (wide.reduce_bytes, wide.gather_bytes) == (2 * plain.reduce_bytes, plain.gather_bytes)
    assert plain.grad_bytes == 64 * 16 * 4 // 8


def test_padding_is_counted_or_not():
    plan = plan_of({"odd": sds(9, 1100)}, {"data": 7})
    assert plan.leaves["odd"].layout == "packed"
    padded, least = shardadam.estimate_bytes(plan), shardadam.estimate_bytes(plan, padding=False)
    assert padded.gather_bytes == 6 * 4 * plan.leaves["odd"].elements_per_device
    assert least.gather_bytes == 6 * 4 * 9900 // 7


def test_a_parameter_that_is_sharded_already_is_summed_over_the_rest():
    specs = {"tp": P("model"), "fsdp": P("data")}
    params = {"tp": sds(64, 16), "fsdp": sds(64, 16)}
    plan = plan_of(params, {"data": 4, "model": 2}, param_specs=specs)
    assert [num_copies(leaf, plan) for leaf in plan.leaves.values()] == [1, 4]
    found = shardadam.estimate_bytes(plan)
    assert found.reduce_bytes == found.gather_bytes == 3 * 2048 // 4


@pytest.mark.parametrize(("layout", "stage"), [("natural", 2), ("packed", 2), ("natural", 1)])
def test_a_compiled_step_moves_and_holds_what_is_estimated(data_mesh, layout, stage):
    params = {"w": jnp.ones((64, 48)), "o": jnp.ones((8, 1100)), "s": jnp.ones(())}
    plan = shardadam.make_plan(params, data_mesh, layout=layout, min_size=64)
    tx = shardadam.adam(1e-3, plan=plan)
    state = shardadam.TrainState.create(apply_fn=None, params=params, tx=tx)

    def loss_fn(params, x):
        return jnp.mean((x @ params["w"]) ** 2) + jnp.sum(params["o"] ** 2) * params["s"]

    compiled = shardadam.make_train_step(loss_fn, state, stage=stage).lower(state, jnp.ones((8, 64))).compile()
    shardadam.assert_collectives(compiled, plan, stage=stage, max_ratio=1.001)
    ops = [op for op in shardadam.collectives(compiled) if any(x.size > 1 for x in op.operands)]
    found = shardadam.estimate_bytes(plan, stage=stage)
    sent = sum(op.total_wire_bytes for op in ops if not (op.op == "all-reduce" and stage == 2))
    scalars = 2 * 7 * 4 // 8
    # Stage 1 on XLA:CPU: every leaf is all-reduced; the sums of all-reduced scalars ride along as they like.
    assert found.wire_bytes - scalars <= sent <= found.wire_bytes + 64
    memory = shardadam.memory(compiled)
    assert memory.donation_complete
    assert memory.alias_bytes == found.param_bytes + found.state_bytes + 4
