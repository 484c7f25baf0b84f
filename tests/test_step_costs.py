"""What a step costs: memory of skipping, bytes and memory of microbatches, one collective per axis, no host sync."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh
from jax.sharding import PartitionSpec as P

import shardadam
from shardadam import communication
from shardadam.sharding import named_sharding

pytestmark = pytest.mark.usefixtures("standard_promotion")
WIDTH = 512
HOST = {"w": np.full((WIDTH, WIDTH), 1 / WIDTH, np.float32), "v": np.full((WIDTH + 1, WIDTH + 1), 1e-3, np.float32)}
WHOLE = sum(x.nbytes for x in HOST.values())


def loss_fn(params, batch):
    return jnp.mean((batch @ params["w"]) ** 2) + jnp.mean((batch[:, :1] * params["v"][0, :1]) ** 2)


def begin(sizes=None, **options):
    mesh = make_mesh(sizes or {"data": 8})
    plan = shardadam.make_plan(HOST, mesh, axis_name=tuple(mesh.axis_names))
    assert [leaf.layout for leaf in plan.leaves.values()] == ["packed", "natural"]
    state = shardadam.TrainState.create(apply_fn=None, params=HOST, tx=shardadam.adam(1e-3, plan=plan), **options)
    spec = P(mesh.axis_names)
    return state, jax.device_put(np.ones((32, WIDTH), np.float32), named_sharding(mesh, spec, 2))


@functools.cache
def compiled(sizes=None, create=(), **options):
    state, batch = begin(None if sizes is None else dict(sizes), **dict(create))
    return shardadam.make_train_step(loss_fn, state, **options).lower(state, batch).compile(), state.plan


def sent(program, name):
    return sum(op.total_wire_bytes for op in shardadam.collectives(program) if op.op == name)


def test_skipping_takes_no_more_memory():
    plain, skipping = compiled()[0], compiled(create=(("skip_nonfinite", True),))[0]
    more = shardadam.memory(skipping).temp_bytes - shardadam.memory(plain).temp_bytes
    assert more <= 4096, more  # Scalars; a shard of one leaf has 128 KiB.
    assert shardadam.memory(skipping).donation_complete


def test_microbatches_are_reduced_each_or_once():
    once, _ = compiled()
    each, plan = compiled(num_microbatches=4)
    local, _ = compiled(num_microbatches=4, accumulate="local")
    assert sent(each, "reduce-scatter") == 4 * sent(once, "reduce-scatter")
    assert sent(local, "reduce-scatter") == sent(once, "reduce-scatter")
    assert sent(once, "reduce-scatter") == shardadam.estimate_bytes(plan).reduce_bytes
    shardadam.assert_collectives(each, plan, num_reductions=4)
    # Between microbatches "local" holds a float32 gradient of the whole model, "shards" one of a leaf at a time.
    assert shardadam.memory(local).temp_bytes - shardadam.memory(each).temp_bytes > WHOLE / 3


@pytest.mark.parametrize("stage", [2, 3])
def test_one_collective_for_each_axis(stage):
    cube = (("x", 2), ("y", 2), ("z", 2))
    program, plan = compiled(cube, (("stage", stage),), collective="per_axis")
    found = [op for op in shardadam.collectives(program) if op.op != "all-reduce"]
    for name, times in (("reduce-scatter", 6), ("all-gather", 6)):
        axes = [shardadam.assertions.axes_of(op, plan) for op in found if op.op == name]
        assert len(axes) == times
        assert sorted(axis for each in axes for axis in each) == sorted("xyz" * 2)
    shardadam.assert_collectives(program, plan, stage=stage)


def test_auto_goes_by_the_devices(monkeypatch):
    cube, line = make_mesh({"x": 2, "y": 2, "z": 2}), make_mesh({"data": 8})
    resolve = functools.partial(communication.resolve_collective, "auto")
    assert resolve(cube, ("x", "y", "z")) == "joint"
    monkeypatch.setitem(communication._BEST, "cpu", "per_axis")
    assert resolve(cube, ("x", "y", "z")) == "per_axis"
    assert resolve(cube, ("x",)) == resolve(line, ("data",)) == "joint"
    assert resolve(cube.abstract_mesh, ("x", "y")) == "joint"
    assert communication.resolve_collective("joint", cube, ("x", "y", "z")) == "joint"
    assert communication._BEST["tpu"] == "per_axis"


def test_a_step_never_waits_for_the_host():
    state, batch = begin(loss_scale="dynamic")
    step = shardadam.make_train_step(loss_fn, state, max_grad_norm=1.0)
    state, _ = step(state, batch)
    with jax.transfer_guard("disallow"):
        state, metrics = step(state, batch)
    names = {"loss", "grad_norm", "param_norm", "update_norm", "skipped", "learning_rate", "loss_scale"}
    assert set(metrics) == names
    assert {x.dtype.name for x in metrics.values()} == {"float32"}
    assert {x.shape for x in metrics.values()} == {()}
    assert metrics["learning_rate"] == np.float32(1e-3)
    assert step._cache_size() == 1
