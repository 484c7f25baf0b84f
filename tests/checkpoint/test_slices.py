"""Leaves that devices hold copies of are cut as Orbax would cut them, by few programs, and nothing else is."""

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
from shardadam.checkpoint import copies
from shardadam.checkpoint.logical import Slot
from shardadam.checkpoint.programs import in_programs
from shardadam.checkpoint.slices import sliced
from shardadam.checkpoint.writing import to_write


def slot(x, name="x"):
    return Slot(names=(name,), like=x)


def cut(x):
    return sliced([slot(x)])[0].like


MESHES = [{"data": 8}, {"data": 4, "model": 2}, {"data": 2, "seq": 2, "model": 2}, {"data": 3}]


@st.composite
def copied(draw):
    """A mesh, a shape and a spec; of some leaves there are copies."""
    sizes = draw(
        st.sampled_from([{"data": 8}, {"data": 4, "model": 2}, {"data": 2, "seq": 2, "model": 2}, {"data": 3}])
    )
    shape = tuple(draw(st.lists(st.sampled_from((1, 2, 3, 8, 12, 24)), max_size=3)))
    over = [[axis for axis, size in sizes.items() if axis != "data" and dim % size == 0] for dim in shape]
    dim = draw(st.integers(0, max(0, len(shape) - 1)))
    spec = [None] * len(shape)
    if shape and over[dim]:
        spec[dim] = draw(st.sampled_from([None, *over[dim]]))
    return make_mesh(sizes, draw(st.sampled_from((AxisType.Auto, AxisType.Explicit)))), shape, P(*spec)


@given(leaf=copied())
def test_every_element_is_kept_and_no_copy_that_need_not_be(leaf):
    mesh, shape, spec = leaf
    x = jax.device_put(np.arange(np.prod(shape), dtype=np.float32).reshape(shape), NamedSharding(mesh, spec))
    y = cut(x)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(x))
    whole, copies = x.addressable_shards[0].data, {s.replica_id for s in x.addressable_shards}
    can_be = any(size % len(copies) == 0 for size in whole.shape)
    back = slot(x).from_disk(y)
    np.testing.assert_array_equal(np.asarray(back), np.asarray(x))
    assert back.sharding == x.sharding
    if len(copies) == 1 or not can_be:
        assert y is x
        return
    assert {s.replica_id for s in y.addressable_shards} == {0}
    assert y.addressable_shards[0].data.size * len(copies) == whole.size


@pytest.mark.parametrize(
    ("shape", "spec"), [((16, 3), P()), ((3, 16), P()), ((4, 24), P("model")), ((5,), P()), ((), P())]
)
def test_files_hold_the_chunks_that_plain_orbax_writes(shape, spec, tmp_path):
    """So that a checkpoint is read by anyone, on any mesh, as one of plain Orbax is."""
    x = jax.device_put(jnp.ones(shape), NamedSharding(make_mesh({"data": 4, "model": 2}), spec))
    with shardadam.Checkpointer(tmp_path / "ours") as checkpointer, ocp.StandardCheckpointer() as orbax:
        checkpointer.save(1, {"x": x}, wait=True)
        orbax.save(tmp_path / "plain", {"x": x})
    read = ocp.PyTreeCheckpointHandler()
    ours, plain = (read.metadata(path).tree["x"].storage for path in (tmp_path / "ours/1/state", tmp_path / "plain"))
    assert (ours.write_shape, ours.chunk_shape) == (plain.write_shape, plain.chunk_shape)


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "bfloat16", "float16", "float8_e5m2", "float32", "int32", "complex64"]
)
def test_there_and_back_to_the_bit(dtype, data_mesh):
    """Any bits: NaN payloads, too, which a conversion on the way would change."""
    host = np.random.default_rng(0).integers(0, 256, (64, 6, jnp.dtype(dtype).itemsize), np.uint8)
    host = (host % 2 if dtype == "bool" else host).view(jnp.dtype(dtype))[..., 0]
    x = jax.device_put(host, NamedSharding(data_mesh, P()))
    y = cut(x)
    assert y.sharding.is_equivalent_to(NamedSharding(data_mesh, P("data")), y.ndim)
    assert slot(x).target().sharding == y.sharding  # Of which a process reads its own shards.
    back = slot(x).from_disk(y)
    assert back.sharding == x.sharding
    assert {np.asarray(s.data).tobytes() for s in back.addressable_shards} == {host.tobytes()}
    assert len({s.data.unsafe_buffer_pointer() for s in back.addressable_shards}) == 8


def test_what_stays_as_it_is(data_mesh):
    everywhere = NamedSharding(data_mesh, P())
    for x in (
        3,
        np.ones(8),
        jnp.ones(8),
        jax.device_put(jax.random.split(jax.random.key(0), 8), everywhere),
        jax.device_put(jnp.ones(8), everywhere.with_memory_kind("pinned_host")),
        jax.device_put(jnp.ones(8), NamedSharding(data_mesh, P("data"))),
        jax.device_put(jnp.ones((0, 8)), everywhere),
        jax.device_put(jnp.ones(8, "int4"), everywhere),
    ):
        assert cut(x) is x


def test_the_leaf_may_be_donated(data_mesh):
    x = jax.device_put(jnp.arange(64.0), NamedSharding(data_mesh, P()))
    y = cut(x)
    z = jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    assert x.is_deleted()
    np.testing.assert_array_equal(y, np.arange(64.0))
    np.testing.assert_array_equal(z, np.arange(64.0) + 1)


def test_nothing_is_communicated_and_no_more_than_the_slice_is_made(data_mesh):
    x = jax.device_put(jnp.ones((64, 4)), NamedSharding(data_mesh, P()))
    compiled = copies.slicer((slot(x).cut,)).lower((x,)).compile()
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
    monkeypatch.setattr(
        shardadam.checkpoint.checkpointer,
        "to_write",
        lambda state, extra: given_to_orbax.append(state) or to_write(state, extra),
    )
    state = jax.device_put({"w": jnp.ones((16, 4)), "b": jnp.ones(3)}, NamedSharding(data_mesh, P()))
    with shardadam.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, wait=True)
    (written,) = given_to_orbax
    assert [s.data.shape for s in written["w"].addressable_shards] == [(2, 4)] * 8
    assert written["b"] is state["b"]
