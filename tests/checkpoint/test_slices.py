"""Leaves that devices hold copies of are cut as Orbax would cut them, by few programs, and nothing else is."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import make_mesh
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import shardadam
from shardadam import collectives
from shardadam.checkpoint import CheckpointError, saving, slices
from shardadam.checkpoint.digest import digests, host_digest
from shardadam.checkpoint.logical import Slot
from shardadam.checkpoint.programs import in_programs
from shardadam.checkpoint.slices import sliced
from shardadam.checkpoint.writing import to_write


def slot(x, name="x"):
    return Slot(names=(name,), like=x)


def cut(x):
    return sliced([slot(x)])[0].like


def everywhere(x, mesh):
    return jax.device_put(x, NamedSharding(mesh, P()))


MESHES = [{"data": 8}, {"data": 4, "model": 2}, {"seq": 2, "data": 2, "model": 2}, {"data": 3}, {"data": 1, "model": 4}]
TYPES = (AxisType.Auto, AxisType.Explicit)


@st.composite
def copied(draw):
    """A mesh, a shape and a spec; of most leaves there are copies."""
    sizes = draw(st.sampled_from(MESHES))
    mesh = make_mesh(sizes, tuple(draw(st.sampled_from(TYPES)) for _ in sizes))
    shape = tuple(draw(st.lists(st.sampled_from((1, 2, 3, 8, 12, 24)), max_size=3)))
    free, spec = list(sizes), []
    for size in shape:
        can_be = [axes for n in (0, 1, 2) for axes in itertools.permutations(free, n) if size % count(axes, sizes) == 0]
        spec.append(draw(st.sampled_from(can_be)))
        free = [axis for axis in free if axis not in spec[-1]]
    return mesh, shape, P(*spec)


def count(axes, sizes):
    return int(np.prod([sizes[axis] for axis in axes], initial=1))


@given(leaf=copied())
def test_every_element_is_kept_and_no_copy_that_need_not_be(leaf):
    mesh, shape, spec = leaf
    host = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    x = jax.device_put(host, NamedSharding(mesh, spec))
    y = cut(x)
    np.testing.assert_array_equal(np.asarray(y), host)
    assert digests([slot(y)]) == digests([slot(x)]) == [host_digest(host, "x")]
    whole, copies = x.addressable_shards[0].data, {shard.replica_id for shard in x.addressable_shards}
    if len(copies) == 1 or not any(size % len(copies) == 0 for size in whole.shape):
        assert y is x
        return
    assert {shard.replica_id for shard in y.addressable_shards} == {0}
    assert y.addressable_shards[0].data.size * len(copies) == whole.size


CASES = [((16, 3), P()), ((3, 16), P()), ((4, 24), P("model")), ((24, 4), P(None, "data")), ((5,), P()), ((), P())]


@pytest.mark.parametrize(("shape", "spec"), CASES)
def test_files_hold_the_chunks_that_plain_orbax_writes(shape, spec, tmp_path):
    """So that a checkpoint is read by anyone, on any mesh, as one of plain Orbax is."""
    x = jax.device_put(jnp.ones(shape), NamedSharding(make_mesh({"data": 4, "model": 2}), spec))
    with shardadam.Checkpointer(tmp_path / "ours") as checkpointer, ocp.StandardCheckpointer() as orbax:
        checkpointer.save(1, {"x": x}, wait=True)
        orbax.save(tmp_path / "plain", {"x": x})
    read = ocp.PyTreeCheckpointHandler()
    ours, plain = (read.metadata(path).tree["x"].storage for path in (tmp_path / "ours/1/state", tmp_path / "plain"))
    assert (ours.write_shape, ours.chunk_shape) == (plain.write_shape, plain.chunk_shape)


@pytest.mark.parametrize("dtype", ["bool", "int4", "int8", "bfloat16", "float8_e5m2", "float32", "complex64"])
def test_any_dtype_to_the_bit(dtype, data_mesh):
    raw = np.random.default_rng(0).integers(0, 256, (64, 6, jnp.dtype(dtype).itemsize), np.uint8)
    host = (raw % 2).astype(dtype)[..., 0] if dtype in ("bool", "int4") else raw.view(jnp.dtype(dtype))[..., 0]
    y = cut(everywhere(host, data_mesh))
    assert y.sharding.is_equivalent_to(NamedSharding(data_mesh, P("data")), y.ndim)
    assert np.asarray(y).tobytes() == host.tobytes()


def test_what_stays_as_it_is(data_mesh):
    for x in (
        3,
        np.ones(8),
        jnp.ones(8),
        everywhere(jax.random.split(jax.random.key(0), 8), data_mesh),
        jax.device_put(jnp.ones(8), NamedSharding(data_mesh, P(), memory_kind="pinned_host")),
        jax.device_put(jnp.ones(8), NamedSharding(data_mesh, P("data"))),
        everywhere(jnp.ones((0, 8)), data_mesh),
    ):
        assert cut(x) is x


def test_a_dim_too_long_for_the_start_of_a_slice_is_left_to_orbax(data_mesh, monkeypatch):
    """XLA's would wrap around, and devices write one slice twice."""
    monkeypatch.setattr(slices, "_LARGEST", 63)
    for size, is_cut in ((56, True), (64, False)):
        x = everywhere(jnp.ones(size), data_mesh)
        assert (cut(x) is not x) == is_cut


def test_the_leaf_may_be_donated(data_mesh):
    x = everywhere(jnp.arange(64.0), data_mesh)
    y = cut(x)
    z = jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    assert x.is_deleted()
    np.testing.assert_array_equal(y, np.arange(64.0))
    np.testing.assert_array_equal(z, np.arange(64.0) + 1)


def test_nothing_is_communicated_and_no_more_than_the_slice_is_made(data_mesh):
    x = everywhere(jnp.ones((64, 4)), data_mesh)
    compiled = slices._slicer((slices._cut_of(x),)).lower((x,)).compile()
    assert not collectives(compiled)
    memory = compiled.memory_analysis()
    assert x.nbytes // 8 <= memory.output_size_in_bytes <= x.nbytes // 8 + 16  # What is more is the tuple's own.
    assert memory.temp_size_in_bytes <= 16


def test_leaves_of_a_kind_share_a_program():
    kinds = {("a", 0): list(range(70)), ("a", 1): [70, 71], ("b", 0): [72]}
    assert [len(leaves) for leaves in in_programs(kinds)] == [32, 32, 8, 1]
    assert sorted(leaf for leaves in in_programs(kinds) for leaf in leaves) == list(range(73))


def test_what_orbax_is_given_has_no_copies(data_mesh, tmp_path, monkeypatch):
    """Of those it would make slices, one program for each leaf and device."""
    given_to_orbax = []
    monkeypatch.setattr(saving, "to_write", lambda state, extra: given_to_orbax.append(state) or to_write(state, extra))
    state = everywhere({"w": jnp.ones((16, 4)), "b": jnp.ones(3)}, data_mesh)
    with shardadam.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, wait=True)
    (written,) = given_to_orbax
    assert [shard.data.shape for shard in written["w"].addressable_shards] == [(2, 4)] * 8
    assert written["b"] is state["b"]


def test_a_leaf_that_cannot_be_cut_is_a_failure_like_any_other(data_mesh, tmp_path, caplog):
    x = everywhere(jnp.ones((16, 4)), data_mesh)
    gone = x + 0
    gone.delete()
    with shardadam.Checkpointer(tmp_path / "raise") as checkpointer:
        with pytest.raises(CheckpointError, match=r"step 1: not saved.*deleted"):
            checkpointer.save(1, {"x": gone})
        checkpointer.save(2, {"x": x})
    with shardadam.Checkpointer(tmp_path / "warn", on_error="warn") as checkpointer:
        checkpointer.save(1, {"x": gone})
        assert "step 1: not saved" in caplog.text
        checkpointer.save(2, {"x": x}, wait=True)
        assert checkpointer.all_steps() == [2]


@pytest.mark.parametrize("axis_type", TYPES)
def test_within_another_mesh(axis_type, data_mesh, tmp_path):
    state = {"x": everywhere(jnp.arange(64.0), data_mesh)}
    with jax.set_mesh(make_mesh({"data": 4, "model": 2}, axis_type)), shardadam.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, wait=True)
        restored = checkpointer.restore(state, verify="full")
    np.testing.assert_array_equal(np.asarray(restored["x"]), np.arange(64.0))
