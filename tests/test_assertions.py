"""`assert_collectives`: passes what the plan says, and names the instruction for each way to go wrong."""

import functools
import gzip
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import make_mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shardadam
from shardadam.assertions import axes_of

sys.path.insert(0, str(Path(__file__).parent / "topology"))
from programs import DIM, loss_fn, params_and_plan

TEXTS = Path(__file__).parent / "hlo" / "texts"


def text(name):
    return gzip.decompress((TEXTS / f"{name}.txt.gz").read_bytes()).decode()


def plan_on(sizes):
    return params_and_plan(sizes, tuple(sizes))[1]


def test_real_tpu_and_gpu_steps_are_held_to_their_plans():
    shardadam.assert_collectives(text("v5e_step_per_axis"), plan_on({"x": 4, "y": 4}))
    shardadam.assert_collectives(text("h100_step_joint"), plan_on({"data": 8}))
    with pytest.raises(AssertionError) as failure:
        shardadam.assert_collectives(text("v5e_step_joint"), plan_on({"data": 16}))
    message = str(failure.value)
    assert "all-reduced, and should be reduce-scattered" in message
    assert "all-reduce of bf16[1024,256] bf16[256,1024]" in message
    assert "bytes on the wire, the plan has" in message
    # At stage 1 the very same program is as it should be.
    shardadam.assert_collectives(text("v5e_step_joint"), plan_on({"data": 16}), stage=1)


def test_a_wider_dtype_an_unexpected_op_and_a_foreign_axis(data_mesh):
    plan = shardadam.make_plan({"w": jax.ShapeDtypeStruct((1024, 64), jnp.bfloat16)}, data_mesh)

    def compiled(local, x, out=P()):
        f = jax.shard_map(local, mesh=data_mesh, in_specs=P("data"), out_specs=out, check_vma=False)
        return jax.jit(f).lower(x).compile()

    wide = compiled(lambda x: jax.lax.all_gather(x, "data", tiled=True), jnp.ones((1024, 64), jnp.float32))
    in_f32 = r"229,376 bytes on the wire in more than 2 bytes an element, the plan has 0 .* all-gather of f32"
    with pytest.raises(AssertionError, match=in_f32):
        shardadam.assert_collectives(wide, plan)
    # A wide leaf beside it does not make room for this one.
    norm = {"w": jax.ShapeDtypeStruct((1024, 64), jnp.bfloat16), "norm": jax.ShapeDtypeStruct((1024,), jnp.float32)}
    with pytest.raises(AssertionError, match=r"in more than 2 bytes an element, the plan has 3,584 "):
        shardadam.assert_collectives(wide, shardadam.make_plan(norm, data_mesh), max_ratio=9)
    shardadam.assert_collectives(wide, plan, allow_widening=True)
    moved = compiled(lambda x: jax.lax.ppermute(x, "data", [(0, 1)]), jnp.ones((8, 4), jnp.int8), P("data"))
    with pytest.raises(AssertionError, match="an unexpected collective-permute"):
        shardadam.assert_collectives(moved, plan)
    shardadam.assert_collectives(moved, plan, allow_ops=["collective-permute"])
    mesh = make_mesh({"data": 4, "model": 2})
    over = shardadam.make_plan({"w": jnp.ones((1024, 64))}, mesh)
    summed = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum(x, "model"), mesh=mesh, in_specs=P("model"), out_specs=P(), check_vma=False
        )
    ).lower(jnp.ones((1024, 64)))
    with pytest.raises(AssertionError, match=r"all-reduce over \['model'\], which is not among the plan's axes"):
        shardadam.assert_collectives(summed.compile(), over)
    shardadam.assert_collectives(summed.compile(), over, model_axes=["model"])


def test_bytes_beyond_the_plans_and_loops_of_unknown_length(data_mesh):
    plan = shardadam.make_plan({"w": jnp.ones((1024, 64))}, data_mesh)

    def lowered(local):
        f = jax.shard_map(local, mesh=data_mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
        x = jax.ShapeDtypeStruct((1024, 64), jnp.float32, sharding=NamedSharding(data_mesh, P("data")))
        return jax.jit(f).lower(x).compile()

    def twice(x):
        whole = jax.lax.all_gather(x, "data", tiled=True)
        return jax.lax.psum_scatter(whole, "data", tiled=True)

    once = lowered(twice)
    shardadam.assert_collectives(once, plan)
    with pytest.raises(AssertionError, match=r"458,752 bytes on the wire, the plan has 229,376 \(1.05 x is allowed\)"):
        shardadam.assert_collectives(once, plan, num_reductions=0)
    shardadam.assert_collectives(once, plan, num_reductions=0, max_ratio=2)
    endless = lowered(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, twice, x))
    with pytest.raises(AssertionError, match="in a loop whose trip count is not in the program"):
        shardadam.assert_collectives(endless, plan)


def test_a_gradient_that_is_all_reduced_row_by_row_is_no_scalar(data_mesh):
    plan = shardadam.make_plan({"w": jnp.ones((1024, 64))}, data_mesh)

    def compiled(num_rows):
        def rows(x):
            return jax.lax.map(lambda row: jax.lax.psum(row, "data"), x[:num_rows])

        f = jax.shard_map(rows, mesh=data_mesh, in_specs=P(), out_specs=P(), check_vma=False)
        return jax.jit(f).lower(jnp.ones((1024, 64))).compile()

    shardadam.assert_collectives(compiled(128), plan, num_reductions=0)
    with pytest.raises(AssertionError, match=r"458,752 bytes on the wire, the plan has 229,376 .*1,?024 x all-reduce"):
        shardadam.assert_collectives(compiled(1024), plan, num_reductions=0)


def test_layers_are_gathered_for_each_microbatch_at_stage_3(data_mesh):
    params, plan = params_and_plan(data_mesh, ("data",))
    tx = shardadam.adam(1e-3, plan=plan)
    create = functools.partial(shardadam.TrainState.create, apply_fn=None, tx=tx, stage=3)
    state = jax.eval_shape(lambda params: create(params=params), params)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, state.shardings)
    batch = jax.ShapeDtypeStruct((32, DIM), jnp.bfloat16, sharding=NamedSharding(data_mesh, P("data")))

    def compiled(**options):
        return shardadam.make_train_step(loss_fn, state, num_microbatches=4, **options).lower(state, batch).compile()

    each, once = compiled(), compiled(accumulate="local")
    shardadam.assert_collectives(each, plan, stage=3, num_reductions=4, allow_widening=True)
    shardadam.assert_collectives(once, plan, stage=3, allow_widening=True)
    with pytest.raises(AssertionError, match="bytes on the wire, the plan has"):
        shardadam.assert_collectives(each, plan, stage=3, allow_widening=True)


def test_a_program_of_more_devices_than_the_mesh_has():
    plan = shardadam.make_plan({"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)}, {"data": 4})
    op = shardadam.collectives(text("h100_step_joint"))[0]
    with pytest.raises(ValueError, match=r"a program for more devices than the plan's \{'data': 4\}"):
        axes_of(op, plan)
