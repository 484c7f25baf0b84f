"""Copies that should be equal: a bit flipped in one of them is found, and the device and the leaf are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from trees import flip_a_bit, random_tree

import shardadam
from shardadam import DivergenceError, check_replicas, replicas
from shardadam.hlo import collectives

SHAPES = {"kernel": (16, 24), "bias": (9,), "half": (8, 8)}


@pytest.fixture(scope="module", params=[AxisType.Auto, AxisType.Explicit], ids=str)
def state(request):
    """Parameters: one split over `model`, the others whole; and on a mesh whose devices are not in order."""
    mesh = make_mesh({"data": 4, "model": 2}, request.param)
    mesh = jax.sharding.Mesh(mesh.devices[::-1], mesh.axis_names, axis_types=mesh.axis_types)
    specs = {"kernel": P(None, "model"), "bias": P(), "half": P()}
    params = random_tree(0, shapes=SHAPES)
    params["half"] = params["half"].astype(jnp.bfloat16)
    params = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in params.items()}
    plan = shardadam.make_plan(params, mesh, axis_name="data", min_size=32)
    state = shardadam.TrainState.create(apply_fn=None, params=params, tx=shardadam.adam(1e-3, plan=plan), plan=plan)
    check_replicas(state)
    return state


def flipped(state, name, device_id):
    return state.replace(params=state.params | {name: flip_a_bit(state.params[name], device_id)})


@pytest.mark.parametrize(("name", "num_copies"), [("kernel", 4), ("bias", 8), ("half", 8)])
def test_one_flipped_bit_names_the_leaf_and_the_device(state, name, num_copies):
    for device_id in (0, 5):
        wrong = flipped(state, name, device_id)
        with pytest.raises(DivergenceError) as caught:
            check_replicas(wrong)
        told = f"  `params/{name}`: device {device_id} (process 0) of {num_copies} copies not as most\n"
        assert told in str(caught.value)
        assert str(caught.value).count("`params/") == 1


def test_the_count_and_several_leaves_at_once(state):
    wrong = flipped(flipped(state, "bias", 3), "kernel", 6)
    count = flip_a_bit(wrong.opt_state[0].count, 1)
    wrong = wrong.replace(opt_state=(wrong.opt_state[0]._replace(count=count), *wrong.opt_state[1:]))
    with pytest.raises(DivergenceError) as caught:
        check_replicas(wrong)
    assert [line.split("(")[0].strip() for line in str(caught.value).splitlines() if "`" in line] == [
        "`params/bias`: device 3", "`params/kernel`: device 6", "`opt_state/0/count`: device 1",
    ]  # fmt: skip


def test_where_there_is_no_majority_all_are_named(state):
    mesh = make_mesh({"data": 2})
    x = flip_a_bit(jax.device_put(jnp.ones(5), NamedSharding(mesh, P())), 1)
    with pytest.raises(DivergenceError, match=r"`x`: device 0 .*, device 1 .* of 2 copies differ from one another"):
        check_replicas({"x": x, "other": state.params["bias"], "number": 3})


def test_nan_equals_nan_and_zero_is_not_minus_zero(data_mesh):
    everywhere = NamedSharding(data_mesh, P())
    check_replicas([jax.device_put(jnp.array([jnp.nan, -0.0]), everywhere)])
    shards = [jnp.array([0.0 if i != 4 else -0.0], device=d) for i, d in enumerate(data_mesh.devices)]
    with pytest.raises(DivergenceError, match="device 4 "):
        check_replicas([jax.make_array_from_single_device_arrays((1,), everywhere, shards)])


def test_what_is_not_replicated_is_not_read(state, data_mesh):
    split = jax.device_put(np.arange(16.0, dtype=np.float32), NamedSharding(data_mesh, P("data")))
    before = replicas._summer.cache_info().misses
    check_replicas({"split": split, "one": jnp.ones(3), "number": 1.5, "host": np.ones(2)})
    assert replicas._summer.cache_info().misses == before


def test_keys_and_arrays_in_other_memory(data_mesh):
    everywhere = NamedSharding(data_mesh, P())
    key = jax.device_put(jax.random.key(3), everywhere)
    offloaded = jax.device_put(jnp.ones(4), everywhere.with_memory_kind("unpinned_host"))
    check_replicas([key, offloaded])


def test_what_travels_is_twelve_bytes_per_leaf_and_device(state):
    leaf = state.params["kernel"]
    mesh = leaf.sharding.mesh
    assert collectives(replicas._summer(leaf.sharding).lower(leaf).compile()) == ()
    sums = replicas._summer(leaf.sharding)(leaf)
    (gather,) = collectives(replicas._gatherer(mesh).lower([sums] * 3).compile())
    assert (gather.op, gather.operand_bytes) == ("all-gather", 3 * 12)
