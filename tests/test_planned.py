"""Leaves of a state that lie by the plan, in whatever field: found, placed, audited, unpacked on their way to disk."""

import jax
import numpy as np
import optax
import pytest
from conftest import make_mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from trees import assert_same_bits, put, random_tree

import shardadam
from shardadam.planned import map_leaves, map_planned
from shardadam.sharding import pack_leaf, state_shardings


def in_shards(tree, plan):
    """As a transformation of ours holds a tree like the parameters."""
    return map_leaves(lambda leaf, x, path: jax.jit(lambda x: pack_leaf(x, leaf, plan.mesh))(x), tree, plan)


def lion(trace, mu, mesh):
    """A state with two trees like the parameters, neither of them Adam's."""
    count = jax.device_put(np.int32(3), NamedSharding(mesh, P()))
    return (optax.TraceState(trace=trace), optax.ScaleByLionState(count=count, mu=mu), optax.EmptyState())


@pytest.fixture(scope="module")
def plan(data_mesh):
    return shardadam.make_plan(random_tree(0), data_mesh, min_size=0)


def paths(state, plan, **options):
    found = []
    map_planned(lambda leaf, x, path: found.append(path), state, plan, **options)
    return found


def test_leaves_are_found_by_name_shape_and_place(plan, data_mesh):
    host, split = put(random_tree(1), data_mesh), {name for name, leaf in plan.items if leaf.num_shards > 1}
    shards = in_shards(host, plan)
    whole = sorted(set(plan.leaves) - split)
    # Accumulators that follow their parameters are not taken for shards; what is whole lies by either.
    assert sorted(paths(lion(host, shards, data_mesh), plan)) == sorted([*plan.leaves, *whole])
    abstract = jax.eval_shape(lambda x: x, lion(host, shards, data_mesh))
    packed = [path for path, leaf in plan.items if leaf.layout == "packed"]
    assert paths(abstract, plan) == packed
    assert sorted(paths(abstract, plan, accumulators=True)) == sorted(
        [*plan.leaves, *(path for path in plan.leaves if path not in packed)]
    )


def test_packed_shapes_that_are_the_parameters_own_are_told_by_their_place():
    mesh = make_mesh({"data": 4, "model": 2})
    host = {"w": np.arange(8 * 1024, dtype=np.float32).reshape(8, 1024)}
    params = put(host, mesh, {"w": P(None, "model")})
    plan = shardadam.make_plan(params, mesh, layout="packed")
    assert plan.leaves["w"].state_shape == (8, 1024)
    shards = in_shards(params, plan)
    assert not np.array_equal(shards["w"], host["w"])  # Each device's columns are packed for themselves.
    assert paths({"master": shards}, plan) == ["w"]
    assert paths({"master": params}, plan) == []


def test_state_shardings_and_audit(plan, data_mesh):
    host = put(random_tree(1), data_mesh)
    shards = in_shards(host, plan)
    good, bad = lion(shards, shards, data_mesh), lion(shards, host, data_mesh)
    assert state_shardings(good, plan) == jax.tree.map(lambda x: x.sharding, good)
    shapes = jax.eval_shape(lambda x: x, good)
    assert state_shardings(shapes, plan, accumulators=True) == jax.tree.map(lambda x: x.sharding, good)
    shardadam.audit(good, plan)
    shardadam.audit(good, plan, accumulators=True)
    shardadam.audit(bad, plan)  # As a combinator's accumulator may, beside state in shards.
    with pytest.raises(shardadam.ShardingError, match=r"(?s)`1/mu/kernel`: got a replicated.*shardadam\.shard\(tx"):
        shardadam.audit(bad, plan, accumulators=True)
    with pytest.raises(shardadam.ShardingError, match=r"`1/mu/odd`: got shape \(17, 257\), wanted \(8, 547\)"):
        shardadam.audit(bad, plan, accumulators=True)
    with pytest.raises(shardadam.ShardingError, match="`0/trace/head`: got a replicated"):
        shardadam.audit(lion(host, host, data_mesh), plan)
    one = jax.device_put(shards["odd"], jax.devices()[0])
    with pytest.raises(shardadam.ShardingError, match=r"`0/trace/odd`: got 1 device\(s\)"):
        shardadam.audit(lion(shards | {"odd": one}, host, data_mesh), plan)
    with pytest.raises(shardadam.ShardingError, match="nor other state of the parameters"):
        shardadam.audit({"params": host, "opt_state": ()}, plan)


def test_checkpoints_hold_logical_shapes_of_all_of_them(plan, data_mesh, tmp_path):
    host = random_tree(1)
    state = lion(in_shards(put(host, data_mesh), plan), in_shards(put(random_tree(2), data_mesh), plan), data_mesh)
    four = make_mesh({"data": 4})
    other = shardadam.make_plan(host, four, layout="packed", min_size=0)
    zeros = in_shards(put(jax.tree.map(np.zeros_like, host), four), other)
    with shardadam.Checkpointer(tmp_path, plan=plan) as checkpointer:
        checkpointer.save(0, state, wait=True)
    with shardadam.Checkpointer(tmp_path, plan=other) as checkpointer:
        back = checkpointer.restore(lion(zeros, zeros, four))
    shardadam.audit(back, other, accumulators=True)
    wanted = lion(in_shards(put(host, four), other), in_shards(put(random_tree(2), four), other), four)
    assert_same_bits(back, wanted)
    with shardadam.Checkpointer(tmp_path) as checkpointer:
        assert_same_bits(checkpointer.restore(lion(host, host, data_mesh))[0].trace, host)


def test_packed_leaves_of_any_field_without_a_plan_are_refused(plan, data_mesh, tmp_path):
    host = put(random_tree(1), data_mesh)
    state = (optax.TraceState(trace={"odd": in_shards(host, plan)["odd"]}),)
    with shardadam.Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match=r"`0/trace/odd`: may be packed.*plan=plan"):
            checkpointer.save(0, state)
        with pytest.raises(ValueError, match=r"`odd`: its moment has shape \(8, 547\), the parameter \(17, 257\)"):
            checkpointer.save(0, {"params": host, "opt_state": state})
