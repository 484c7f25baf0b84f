"""Saved on some devices in some layout, restored on others in another: the same bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import make_mesh
from etils import epath
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint.experimental import v1

import shardadam
from shardadam.checkpoint import Checkpointer, reading
from shardadam.checkpoint.logical import split_sharding
from shardadam.checkpoint.slots import slots
from shardadam.sharding import map_moments, pack_leaf, unpack_leaf

SHAPES = {"emb": (40, 24), "odd": (17, 13), "bias": (7,)}


def make_state(mesh, layout, dtype=jnp.float32, specs=None, fill=True, min_size=0):
    """A shardadam.TrainState, its mu in float32 whatever the parameters' dtype; random everywhere, padding zero."""
    specs = {name: (specs or {}).get(name, P()) for name in SHAPES}
    rng = np.random.default_rng(0)
    params, mu, nu = ({k: rng.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()} for _ in range(3))
    params = {k: jax.device_put(jnp.asarray(x, dtype), NamedSharding(mesh, specs[k])) for k, x in params.items()}
    plan = shardadam.make_plan(params, mesh, layout=layout, min_size=min_size)
    tx = optax.chain(optax.clip(10.0), shardadam.adam(1e-2, mu_dtype=jnp.float32, plan=plan))
    state = shardadam.TrainState.create(apply_fn=None, params=params, tx=tx, plan=plan)

    def filled(state):
        adam = state.opt_state[1][0]
        new_mu, new_nu = (
            {k: jnp.asarray(x, old[k].dtype) for k, x in new.items()} for new, old in ((mu, adam.mu), (nu, adam.nu))
        )
        adam = adam._replace(count=adam.count + 5, mu=new_mu, nu=new_nu)
        return map_moments(
            lambda leaf, x, path: pack_leaf(x, leaf, mesh),
            (state.opt_state[0], (adam, *state.opt_state[1][1:])),
            plan,
        )

    if fill:
        shardings = jax.tree.map(lambda x: x.sharding, state.opt_state)
        state = state.replace(opt_state=jax.jit(filled, out_shardings=shardings)(state))
    return state


def logical(state):
    """Everything in a state as host arrays in logical shapes."""

    def unpack(state):
        return map_moments(lambda leaf, x, path: unpack_leaf(x, leaf, state.plan.mesh), state, state.plan)

    return [np.asarray(x) for x in jax.tree.leaves(jax.jit(unpack)(state.replace(apply_fn=None)))]


def assert_same(a, b):
    for x, y in zip(a if isinstance(a, list) else logical(a), b if isinstance(b, list) else logical(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert x.tobytes() == y.tobytes()


def assert_placed_like(restored, like):
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)


SAVED = [("packed", jnp.float32), ("natural", jnp.bfloat16), ("packed", jnp.bfloat16), ("auto", jnp.float32)]


@pytest.mark.parametrize(("layout", "dtype"), SAVED)
def test_saved_on_8_devices_restored_on_others(layout, dtype, tmp_path):
    saved = make_state(make_mesh({"data": 8}), layout, dtype)
    Checkpointer(tmp_path).save(3, saved, wait=True)
    truth = logical(saved)
    targets = [(1, "packed"), (2, "natural"), (4, "packed"), (5, "auto"), (5, "packed"), (8, "natural"), (8, "packed")]
    for num_devices, other in targets:
        like = make_state(make_mesh({"data": num_devices}), other, dtype, fill=False)
        restored = Checkpointer(tmp_path).restore(like)
        assert_same(restored, truth)
        assert_placed_like(restored, like)
        shardadam.audit(restored, restored.plan)
        assert restored.plan is like.plan


@pytest.mark.parametrize("num_devices", [1, 5])
def test_saved_on_fewer_devices_restored_on_8(num_devices, tmp_path):
    saved = make_state(make_mesh({"data": num_devices}), "packed")
    Checkpointer(tmp_path).save(0, saved, wait=True)
    assert_same(Checkpointer(tmp_path).restore(make_state(make_mesh({"data": 8}), "auto", fill=False)), saved)


def test_whole_leaves(tmp_path):
    saved = make_state(make_mesh({"data": 8}), "packed")
    Checkpointer(tmp_path).save(0, saved, wait=True)
    like = make_state(make_mesh({"data": 4}), "natural", fill=False, min_size=10**6)
    assert {leaf.layout for leaf in like.plan.leaves.values()} == {"whole"}
    assert_same(Checkpointer(tmp_path).restore(like), saved)


TP = {"emb": P("model", None), "odd": P(), "bias": P()}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layout", ["packed", "natural"])
def test_data_and_tensor_parallel_meshes(axis_type, layout, tmp_path):
    saved = make_state(make_mesh({"data": 4, "model": 2}, axis_type), layout, specs=TP)
    Checkpointer(tmp_path).save(0, saved, wait=True)
    truth = logical(saved)
    columns = {"emb": P(None, "model")}
    for sizes, specs, other in (
        ({"data": 2, "model": 4}, TP, "packed"),
        ({"data": 8}, None, "packed"),
        ({"data": 2, "model": 2}, columns, "packed"),
        ({"data": 4, "model": 2}, columns, "auto"),
    ):
        like = make_state(make_mesh(sizes, axis_type), other, specs=specs, fill=False)
        restored = Checkpointer(tmp_path).restore(like)
        assert_same(restored, truth)
        assert_placed_like(restored, like)


def test_restores_into_abstract_state(tmp_path):
    saved = make_state(make_mesh({"data": 8}), "packed")
    Checkpointer(tmp_path).save(0, saved, wait=True)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved)
    restored = Checkpointer(tmp_path).restore(like)
    assert_same(restored, saved)
    assert_placed_like(restored, saved)


@pytest.mark.parametrize("layout", ["packed", "natural"])
def test_plain_orbax_reads_it_into_optax(layout, tmp_path):
    mesh = make_mesh({"data": 8})
    state = make_state(mesh, layout)
    bare = {"params": state.params, "opt_state": state.opt_state}
    Checkpointer(tmp_path, plan=state.plan).save(7, bare, wait=True)

    params = jax.tree.map(jnp.zeros_like, state.params)
    tx = optax.chain(optax.clip(10.0), optax.adam(1e-2, mu_dtype=jnp.float32))
    like = {"params": params, "opt_state": tx.init(params)}
    with ocp.StandardCheckpointer() as orbax:
        restored = orbax.restore(tmp_path / "7" / "state", like)
    assert jax.tree.structure(restored) == jax.tree.structure(like)
    assert_same(
        [np.asarray(x) for x in jax.tree.leaves((restored["params"], restored["opt_state"]))], logical(state)[1:]
    )
    newer = v1.load(tmp_path / "7", like)
    jax.tree.map(np.testing.assert_array_equal, newer, restored)


def test_checkpoint_of_optax_is_the_same_tree_on_disk(tmp_path):
    state = make_state(make_mesh({"data": 8}), "packed")
    plain = optax.chain(optax.clip(10.0), optax.adam(1e-2)).init(state.params)
    Checkpointer(tmp_path / "a", plan=state.plan).save(0, state.opt_state, wait=True)
    Checkpointer(tmp_path / "b").save(0, plain, wait=True)
    trees = []
    for name in "ab":
        with ocp.StandardCheckpointer() as orbax:
            metadata = orbax.metadata(tmp_path / name / "0" / "state").item_metadata.tree
        trees.append({k: (v.shape, v.dtype) for k, v in ocp.tree.to_flat_dict(metadata).items()})
    assert trees[0] == trees[1]
    # And it restores what optax wrote.
    Checkpointer(tmp_path / "b", plan=state.plan).restore(state.opt_state)


def test_unpacked_leaves_are_split_over_the_devices():
    mesh = make_mesh({"data": 4, "model": 2})
    assert split_sharding((40, 24), mesh).shard_shape((40, 24)) == (5, 24)
    assert split_sharding((6, 4), mesh).shard_shape((6, 4)) == (3, 1)
    assert split_sharding((17, 13), mesh).shard_shape((17, 13)) == (17, 13)
    assert split_sharding((), mesh).shard_shape(()) == ()
    assert list(split_sharding((40, 24), mesh).mesh.devices.flat) == list(mesh.devices.flat)


def test_packed_moments_are_never_all_whole_on_a_device():
    state = make_state(make_mesh({"data": 8}), "packed")
    unpacked = {slot.path: slot.to_disk() for slot in slots(state, state.plan) if slot.packed}
    assert len(unpacked) == 2 * len(SHAPES)
    assert unpacked["opt_state/1/0/mu/emb"].shape == (40, 24)
    assert unpacked["opt_state/1/0/mu/emb"].addressable_shards[0].data.shape == (5, 24)


def test_a_plan_made_without_devices(tmp_path):
    """The state says which devices; the plan need not."""
    mesh = make_mesh({"data": 8})
    state = make_state(mesh, "packed")
    plan = shardadam.make_plan(state.params, {"data": 8}, layout="packed", min_size=0)
    checkpointer = Checkpointer(tmp_path, plan=plan)
    checkpointer.save(0, state.opt_state, wait=True)
    restored = checkpointer.restore(state.opt_state)
    jax.tree.map(np.testing.assert_array_equal, restored, state.opt_state)


def test_leaves_off_the_mesh_keep_their_kind(tmp_path):
    device = jax.devices()[3]
    state = {
        "committed": jax.device_put(jnp.arange(4), SingleDeviceSharding(device)),
        "uncommitted": jnp.arange(5),
        "numpy": np.arange(6.0),
        "other_order": np.arange(3, dtype=">f4"),
        "number": np.float32(1.5),
        "python": 3,
        "key": jax.random.key(7),
        "keys": jax.device_put(
            jax.random.split(jax.random.key(1), 8), NamedSharding(make_mesh({"data": 8}), P("data"))
        ),
    }
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(0, state, wait=True)
    restored = checkpointer.restore(state, verify="full")
    assert checkpointer.damaged == []
    assert restored["committed"].devices() == {device}
    assert restored["committed"].committed
    assert not restored["uncommitted"].committed
    assert not restored["key"].committed
    assert {k: type(v) for k, v in restored.items()} == {k: type(v) for k, v in state.items()}
    assert restored["keys"].sharding == state["keys"].sharding
    restored, state = (
        {k: jax.random.key_data(v) if "key" in k else v for k, v in s.items()} for s in (restored, state)
    )
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_restored_state_can_be_donated(tmp_path):
    state = make_state(make_mesh({"data": 8}), "auto")
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(0, state, wait=True)
    restored = checkpointer.restore(state)
    old = jax.tree.leaves(restored)
    pointers = {x.addressable_shards[0].data.unsafe_buffer_pointer() for x in old if x.ndim}
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s), donate_argnums=0)
    new = step(restored)  # A donated buffer that is not used would warn, and warnings are errors.
    assert all(x.is_deleted() for x in old)
    assert {x.addressable_shards[0].data.unsafe_buffer_pointer() for x in jax.tree.leaves(new) if x.ndim} <= pointers
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y * 2), new, state)


def test_metadata_is_orbaxs_own_but_for_the_shardings(tmp_path, data_mesh, caplog):
    state = {
        "split": jax.device_put(jnp.arange(16.0), NamedSharding(data_mesh, P("data"))),
        "host": np.arange(6, dtype=np.int8).reshape(2, 3),
        "number": 3,
        "key": jax.random.key(0),
        "none": None,
        "empty": {},
    }
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    item = epath.Path(tmp_path / "1" / reading.STATE)
    caplog.clear()
    found = reading.metadata(item)
    assert not caplog.records
    wanted = ocp.PyTreeCheckpointHandler().metadata(item).tree

    unsharded = [
        dataclasses.replace(x, sharding=None) if hasattr(x, "sharding") else x for x in jax.tree.leaves(wanted)
    ]
    assert jax.tree.leaves(found) == unsharded
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert wanted["split"].sharding is not None
    assert found["split"].sharding is None
