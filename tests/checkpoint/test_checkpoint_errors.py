"""What a checkpoint does not hold is said before anything is loaded, leaf by leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import make_mesh
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shardadam
from shardadam.checkpoint import Checkpointer, CheckpointError
from shardadam.sharding import map_moments


@pytest.fixture
def checkpointer(tmp_path):
    return Checkpointer(tmp_path)


def test_nothing_there(checkpointer, tmp_path):
    for call in (lambda: checkpointer.restore({"x": jnp.ones(3)}), checkpointer.extra):
        with pytest.raises(FileNotFoundError, match=f"no checkpoint in {tmp_path}"):
            call()
    checkpointer.save(3, {"x": jnp.ones(3)})
    checkpointer.save(4, {"x": jnp.ones(3)}, wait=True)
    for call in (lambda: checkpointer.restore({"x": jnp.ones(3)}, step=5), lambda: checkpointer.extra(5)):
        with pytest.raises(FileNotFoundError, match=f"step 5: not in {tmp_path}, which holds steps 3, 4"):
            call()


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": jnp.ones((4, 2)), "b": {"c": jnp.ones(3, jnp.float16)}}, "`b/c`: got dtype float32, wanted float16"),
        ({"a": jnp.ones((4, 2)), "b": {"c": jnp.ones(3, jnp.int32)}}, "`b/c`: got dtype float32, wanted int32"),
        ({"a": jnp.ones((4, 3)), "b": {"c": jnp.ones(3)}}, r"`a`: got shape \(4, 2\), wanted \(4, 3\)"),
        ({"a": jnp.ones(8), "b": {"c": jnp.ones(3)}}, r"`a`: got shape \(4, 2\), wanted \(8,\)"),
        (
            {"a": jnp.ones((4, 2)), "b": {"d": jnp.ones(3)}},
            r"(?s)`b/d`: not in the checkpoint.*`b/c`: in the checkpoint, not",
        ),
        ({"a": jnp.ones((4, 2))}, "`b/c`: in the checkpoint, not wanted"),
        ({"a": jnp.ones((4, 2)), "b": jnp.ones(3)}, "`b`: not in the checkpoint"),
        ({"a": 1.0, "b": {"c": jnp.ones(3)}}, r"`a`: got shape \(4, 2\), wanted \(\)"),
    ],
)
def test_another_tree_shape_or_dtype(checkpointer, like, message):
    state = {"a": jnp.full((4, 2), 1e30), "b": {"c": jnp.ones(3)}}
    checkpointer.save(0, state, wait=True)
    with pytest.raises(CheckpointError, match=message):
        checkpointer.restore(like)
    np.testing.assert_array_equal(checkpointer.restore(state)["a"], state["a"])  # And it is still good to use.


def test_every_fault_is_listed_and_many_are_counted(checkpointer):
    checkpointer.save(0, {"a": jnp.ones(2), "b": jnp.ones(3), "old": jnp.ones(1)}, wait=True)
    like = {"a": jnp.ones(3), "b": jnp.ones(3, jnp.bfloat16), **{f"new{i}": jnp.ones(1) for i in range(20)}}
    with pytest.raises(CheckpointError) as caught:
        checkpointer.restore(like)
    for part in ("`a`: got shape", "`b`: got dtype", "`new0`: not in", "... and 12 more", "`old`: in the checkpoint"):
        assert part in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("saved", "like", "wanted"),
    [
        (7, jnp.int32(0), np.int32(7)),
        (jnp.int32(7), 0, 7),
        (7, 0, 7),
        (jnp.uint32(7), 0, 7),
        (0.5, 0.0, 0.5),
        (jnp.float32(0.5), 0.0, 0.5),
        (0.5, jnp.bfloat16(0), jnp.bfloat16(0.5)),
        (True, False, True),
    ],
)
def test_numbers_that_python_or_jax_holds(checkpointer, saved, like, wanted):
    checkpointer.save(0, {"step": saved}, wait=True)
    restored = checkpointer.restore({"step": like})["step"]
    assert restored == wanted
    assert isinstance(restored, type(like))
    assert getattr(restored, "dtype", None) == getattr(like, "dtype", None)


@pytest.mark.parametrize(
    ("saved", "like", "message"),
    [
        (2**40, jnp.int32(0), "got 1099511627776, which int32 cannot hold"),
        (0.1, jnp.float32(0), "got 0.1, which float32 cannot hold"),
        (7, jnp.float32(0), "got dtype int64, wanted float32"),
        (7, 0.0, "got dtype int64, wanted float64"),
        (True, 0, "got dtype bool, wanted int64"),
        (jnp.int32(7), jnp.int16(0), "got dtype int32, wanted int16"),
    ],
)
def test_numbers_that_do_not_fit(checkpointer, saved, like, message):
    checkpointer.save(0, {"step": saved}, wait=True)
    with pytest.raises(CheckpointError, match=f"`step`: {message}"):
        checkpointer.restore({"step": like})


def test_an_abstract_leaf_that_says_not_where(checkpointer):
    checkpointer.save(0, {"x": jnp.ones(3)}, wait=True)
    with pytest.raises(ValueError, match="`x`: a ShapeDtypeStruct without devices"):
        checkpointer.restore({"x": jax.ShapeDtypeStruct((3,), jnp.float32)})
    abstract = NamedSharding(make_mesh({"data": 8}).abstract_mesh, P())
    with pytest.raises(ValueError, match="`x`: a ShapeDtypeStruct without devices"):
        checkpointer.restore({"x": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=abstract)})


def test_a_packed_leaf_without_its_plan_is_told_what_to_pass(checkpointer, data_mesh):
    checkpointer.save(0, {"b": jnp.ones(3)}, wait=True)
    rows = NamedSharding(data_mesh, P("data"))
    with pytest.raises(CheckpointError, match=r"wanted \(8, 547\); if the leaf wanted is packed, pass its plan"):
        checkpointer.restore({"b": jax.device_put(jnp.ones((8, 547)), rows)})
    with pytest.raises(CheckpointError, match=r"wanted \(64, 547\)\n"):  # 8 rows a shard would have more lanes.
        checkpointer.restore({"b": jax.device_put(jnp.ones((64, 547)), rows)})


def packed_state():
    mesh = make_mesh({"data": 8})
    params = {"w": jax.device_put(jnp.ones((17, 13)), NamedSharding(mesh, P()))}
    plan = shardadam.make_plan(params, mesh, layout="packed", min_size=0)
    return shardadam.adam(1e-3, plan=plan).init(params), params, plan


def test_a_plan_that_is_not_the_states(checkpointer, tmp_path):
    state, params, plan = packed_state()
    natural = optax.adam(1e-3).init(params)
    for wrong, plan_ in ((natural, plan), (state, shardadam.make_plan(params, plan.mesh, layout="natural"))):
        with pytest.raises(ValueError, match=r"`0/mu/w`: got shape .*, the plan says .*; pass the plan that"):
            Checkpointer(tmp_path, plan=plan_).save(0, wrong)
    assert checkpointer.all_steps() == []


def test_packed_moments_without_a_plan(checkpointer):
    opt_state, params, _ = packed_state()
    state = TrainState(step=0, apply_fn=None, params=params, tx=optax.identity(), opt_state={"a": opt_state})
    with pytest.raises(
        ValueError, match=r"`w`: its moment has shape \(8, 28\), the parameter \(17, 13\): it is packed"
    ):
        checkpointer.save(0, state)
    assert checkpointer.all_steps() == []


def test_a_plan_without_devices_and_a_leaf_without_either(tmp_path):
    state, params, _ = packed_state()
    plan = shardadam.make_plan(params, {"data": 8}, layout="packed", min_size=0)
    host = map_moments(lambda leaf, x, path: np.asarray(x), state, plan)
    with pytest.raises(ValueError, match="`0/mu/w`: packed, and neither its sharding nor the plan has devices"):
        Checkpointer(tmp_path, plan=plan).save(0, host)


def test_a_step_that_was_not_saved_by_a_checkpointer(checkpointer, tmp_path):
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.StandardSave({"x": jnp.ones(3)}))
    like = {"x": jnp.ones(3)}
    with pytest.raises(CheckpointError, match=r"steps 3 there have no seal: of plain Orbax, .*, 3, verify=False\)"):
        checkpointer.restore(like)
    with pytest.raises(
        CheckpointError, match=r"got items \['default'\], wanted 'state'; it was not saved by shardadam"
    ):
        checkpointer.restore(like, verify=False)
