"""`collectives` on real text of TPU, GPU and CPU compilers: programs whose collectives are known by construction."""

import gzip
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import shardadam
from shardadam.hlo.program import parse

TEXTS = Path(__file__).parent / "texts"
LAYER = 256 * 1024 * 2  # Bytes of one of the two matrices of a layer.


def text(name):
    return gzip.decompress((TEXTS / f"{name}.txt.gz").read_bytes()).decode()


def by_op(found):
    return {op.op: op for op in found}


@pytest.mark.parametrize(("name", "n"), [("v5e_plain_collectives", 16), ("h100_plain_collectives", 8)])
def test_one_of_each_kind(name, n):
    found = shardadam.collectives(text(name))
    ops = by_op(found)
    assert sorted(ops) == ["all-gather", "all-reduce", "all-to-all", "collective-permute"]
    assert len(found) == 4
    assert all(op.group_size == n for op in found)
    reduce, gather, exchange, permute = (
        ops[op] for op in ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    )
    # (8, 128) f32 thrice in a loop; (16, 128) bf16; (n, 128) f32 twice.
    assert (reduce.times, reduce.operand_bytes, reduce.dtypes) == (3, 4096, ("f32",))
    assert reduce.loop is not None
    assert reduce.wire_bytes == 2 * (n - 1) * 4096 // n
    assert reduce.total_wire_bytes == 3 * reduce.wire_bytes
    assert (gather.times, gather.operand_bytes, gather.dtypes, gather.loop) == (1, 4096, ("bf16",), None)
    assert gather.wire_bytes == (n - 1) * 4096
    assert (exchange.operand_bytes, exchange.wire_bytes) == (n * 512, (n - 1) * 512)
    assert (permute.operand_bytes, permute.wire_bytes) == (n * 512, n * 512)
    assert len(gather.groups) == 1
    assert sorted(gather.groups[0]) == list(range(n))
    assert "psum" in reduce.source


def test_a_tpu_fusion_that_is_a_reduce_scatter_is_named_so():
    found = shardadam.collectives(text("v5e_step_per_axis"))
    scattered = [op for op in found if op.op == "reduce-scatter"]
    # Two matrices, two torus axes of 4 one after the other, in the backward scan over 3 layers.
    assert sorted(op.operand_bytes for op in scattered) == [LAYER // 4, LAYER // 4, LAYER, LAYER]
    assert {(op.times, op.group_size, len(op.groups)) for op in scattered} == {(3, 4, 4)}
    assert all(op.loop for op in scattered)
    assert {op.wire_bytes * 4 // 3 for op in scattered} == {LAYER, LAYER // 4}
    # Neighbours along y, then along x: groups of consecutive devices, and of every fourth one.
    strides = {op.operand_bytes: {group[1] - group[0] for group in op.groups} for op in scattered}
    assert strides in ({LAYER: {4}, LAYER // 4: {1}}, {LAYER: {1}, LAYER // 4: {4}})
    whole = [op for op in found if op.op == "all-reduce"]
    assert all(x.size in (1, 256) for op in whole for x in op.operands)


def test_an_all_reduce_that_stays_one_is_not_taken_for_a_reduce_scatter():
    found = shardadam.collectives(text("v5e_step_joint"))
    assert not [op for op in found if op.op == "reduce-scatter"]
    (gradients,) = [op for op in found if op.op == "all-reduce" and op.operand_bytes > LAYER]
    assert (gradients.times, gradients.operand_bytes, len(gradients.operands)) == (3, 2 * LAYER, 2)
    assert "all-reduce of bf16[1024,256] bf16[256,1024] over 16 devices" in str(gradients)


def test_async_and_peeled_loops_on_gpu():
    found = shardadam.collectives(text("h100_step_joint"))
    scattered = [op for op in found if op.op == "reduce-scatter"]
    # The compiler takes the last of the 3 layers out of the loop.
    assert [(op.times, op.is_async, bool(op.loop)) for op in scattered] == [(2, True, True), (1, True, False)]
    assert all(op.operand_bytes == 2 * LAYER for op in scattered)
    (gather,) = [op for op in found if op.op == "all-gather"]
    assert gather.is_async
    assert gather.operand_bytes == 3 * 2 * LAYER // 8
    scalars = [op for op in found if op.op == "all-reduce" and op.operand_bytes <= 16]
    assert scalars
    assert not any(op.is_async for op in scalars)


def test_trip_counts_multiply_on_cpu(data_mesh):
    def local(x):
        def inner(_, x):
            return jax.lax.psum(x, "data") / 8

        def outer(_, x):
            return jax.lax.fori_loop(0, 5, inner, x)

        return jax.lax.fori_loop(0, 3, outer, x)

    f = jax.shard_map(local, mesh=data_mesh, in_specs=P(), out_specs=P(), check_vma=False)
    (op,) = shardadam.collectives(jax.jit(f).lower(jnp.ones((4, 4))).compile())
    assert (op.op, op.times, op.group_size) == ("all-reduce", 15, 8)


def test_an_unknown_trip_count_is_none(data_mesh):
    def local(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: jax.lax.psum(x, "data"), x)

    f = jax.shard_map(local, mesh=data_mesh, in_specs=P(), out_specs=P(), check_vma=False)
    (op,) = shardadam.collectives(jax.jit(f).lower(jnp.ones(4)).compile())
    assert (op.times, op.total_wire_bytes) == (None, None)
    assert "an unknown number of times" in str(op)


def test_what_a_loops_condition_sums_is_found(data_mesh):
    def local(x):
        return jax.lax.while_loop(lambda x: jnp.sum(jax.lax.psum(x, "data")) < 100, lambda x: x * 2, x)

    f = jax.shard_map(local, mesh=data_mesh, in_specs=P(), out_specs=P(), check_vma=False)
    (op,) = shardadam.collectives(jax.jit(f).lower(jnp.ones(96)).compile())
    assert (op.op, op.operand_bytes, op.times) == ("all-reduce", 4 * 96, None)
    assert op.loop is not None


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        shardadam.collectives("HloModule nothing")
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse("a line\nanother")


def test_what_a_sparse_core_does_is_found_and_async():
    # `call-start` of a computation that is one collective, as tpu7x has them for everything large.
    found = shardadam.collectives(text("tpu7x_step_per_axis"))
    scattered = [op for op in found if op.op == "reduce-scatter"]
    assert [op.group_size for op in scattered] == [2] * 8
    assert {(op.times, op.is_async) for op in scattered} == {(3, True)}
    assert sum(op.operand_bytes for op in scattered) == 2 * LAYER * (1 + 1 / 2 + 1 / 4 + 1 / 8)
    gathers = [op for op in found if op.op == "all-gather"]
    assert sum(op.operand_bytes for op in gathers) == 3 * 2 * LAYER // 16 * (1 + 2 + 4 + 8)
