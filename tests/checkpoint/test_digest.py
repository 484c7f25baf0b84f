"""One digest for a leaf, wherever and however it lies; another one after any fault."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import make_mesh
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import shardadam
from shardadam import collectives, mixing
from shardadam.checkpoint import digest
from shardadam.checkpoint.digest import digests, host_digest
from shardadam.checkpoint.logical import Packing, Slot
from shardadam.sharding import pack_leaf

DTYPES = [
    *("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float4_e2m1fn"),
    *("int8", "uint8", "int16", "uint16", "int32", "uint32", "int4", "uint4", "int2", "bool", "complex64"),
]


def bits_of(shape, dtype, seed=0):
    """Random bits as a host array: NaN payloads, infinities and denormals among them."""
    rng, dtype = np.random.default_rng(seed), jnp.dtype(dtype)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(np.bool_)
    raw = rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    if jax.dtypes.itemsize_bits(dtype) < 8:
        raw &= 2 ** jax.dtypes.itemsize_bits(dtype) - 1
        if dtype.name.startswith("int"):  # Sign-extended in its byte.
            return (raw[..., 0].astype(np.int8) - 2 ** (jax.dtypes.itemsize_bits(dtype) - 1)).astype(dtype)
    return raw.view(dtype)[..., 0] if shape else raw.view(dtype).reshape(())


def one(x, path="x", packed=None):
    return digests([Slot(names=tuple(path.split("/")), like=x, packed=packed)])[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_devices_as_on_the_host(dtype, data_mesh):
    for shape, spec in (((16, 3), P("data")), ((), P())):
        host = bits_of(shape, dtype)
        placed = jax.device_put(host, NamedSharding(data_mesh, spec))
        assert np.asarray(placed).tobytes() == host.tobytes()
        wanted = host_digest(host, "x")
        assert one(placed) == one(host) == wanted == one(jnp.array(host))
        assert host_digest(host, "y").text != wanted.text
        if jnp.issubdtype(dtype, jnp.inexact):
            assert wanted.num_nonfinite == np.sum(~np.isfinite(host if dtype == "complex64" else host.astype("f4")))


def test_the_format_does_not_change():
    """Seals hold these: a change of the digest needs a new FORMAT and a reader of the old one."""
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert host_digest(x, "params/w").text == "fab0ca020160ad6d"
    assert host_digest(x.astype(ml_dtypes.bfloat16), "params/w").text == "39ff0c025c766e16"
    assert host_digest(np.arange(3, dtype=np.complex128), "z").text == "8987e57011461842"
    assert host_digest(np.int64(2**40 + 7), "step").text == "4763fd9d15fc4480"


def test_numbers_and_keys(data_mesh):
    assert one(7, "step") == host_digest(np.int64(7), "step")
    assert one(0.5) == host_digest(np.float64(0.5), "x")
    assert one(float("nan")).num_nonfinite == 1
    assert one(True) == host_digest(np.bool_(True), "x")
    keys = jax.random.split(jax.random.key(3), 8)
    wanted = host_digest(np.asarray(jax.random.key_data(keys)), "x")
    assert one(keys) == one(jax.device_put(keys, NamedSharding(data_mesh, P("data")))) == wanted


MESHES = [{"data": 8}, {"data": 5}, {"data": 1}, {"data": 4, "model": 2}, {"data": 2, "model": 3}]


@st.composite
def layouts(draw):
    """A shape and all that a leaf's layout depends on."""
    sizes = draw(st.sampled_from(MESHES))
    shape = tuple(draw(st.lists(st.sampled_from((1, 2, 5, 6, 12, 48)), min_size=1, max_size=3)))
    dims = [d for d, size in enumerate(shape) if size % sizes.get("model", 7) == 0]
    split = draw(st.sampled_from([None, *dims]))
    spec = P(*("model" if d == split else None for d in range(len(shape))))
    stacked = draw(st.integers(0, len(shape) - 1))
    return (
        sizes,
        shape,
        spec,
        stacked,
        draw(st.sampled_from(("packed", "auto"))),
        draw(st.sampled_from(list(AxisType)[:2])),
    )


@settings(max_examples=25)
@given(layout=layouts(), seed=st.integers(0, 99), words=st.sampled_from((2**32, 2**32, 50)))
def test_any_mesh_and_layout(layout, seed, words):
    sizes, shape, spec, stacked, kind, axis_type = layout
    before = mixing.WORD_COUNTS
    mixing.WORD_COUNTS = digest.WORD_COUNTS = words  # As if a word were short: dims are counted by two.
    digest._summer.cache_clear()
    try:
        mesh, host = make_mesh(sizes, axis_type), bits_of(shape, "float32", seed)
        param = jax.device_put(host, NamedSharding(mesh, spec))
        leaf = shardadam.make_plan({"w": param}, mesh, layout=kind, min_size=0, stacked_dims=stacked).leaves["w"]
        wanted = host_digest(host, "w")
        assert one(param, "w") == wanted
        if leaf.layout == "packed":
            pack = jax.jit(lambda x: pack_leaf(x, leaf, mesh))
            # In the padding NaN, which is not to count.
            x = jnp.where(pack(jnp.ones_like(param)) == 1, pack(param), jnp.float32(np.nan))
            assert one(jax.device_put(x, Packing(leaf, mesh).sharding), "w", Packing(leaf, mesh)) == wanted
    finally:
        mixing.WORD_COUNTS = digest.WORD_COUNTS = before
        digest._summer.cache_clear()


arrays = st.builds(
    bits_of, st.sampled_from([(1,), (7,), (3, 5), (2, 3, 4)]), st.sampled_from(DTYPES), st.integers(0, 2**32 - 1)
)


@settings(max_examples=300)
@given(x=arrays, data=st.data())
def test_one_flipped_bit_changes_it(x, data):
    bits = jax.dtypes.itemsize_bits(x.dtype) if x.dtype != np.bool_ else 1
    if bits < 8 and x.dtype.name.startswith("int"):
        return  # Their sign fills the byte: flipping one bit of it is no value.
    flipped = x.copy()
    raw = flipped.reshape(-1).view(np.uint8)
    where = data.draw(st.integers(0, x.size - 1)) * x.dtype.itemsize
    bit = data.draw(st.integers(0, bits - 1))
    raw[where + bit // 8] ^= 1 << bit % 8
    assert host_digest(flipped, "x").text != host_digest(x, "x").text


@settings(max_examples=200)
@given(x=arrays, data=st.data())
def test_two_elements_swapped_change_it(x, data):
    flat = x.reshape(-1)
    i, j = (data.draw(st.integers(0, x.size - 1)) for _ in range(2))
    swapped = flat.copy()
    swapped[[i, j]] = flat[[j, i]]
    same = swapped.tobytes() == flat.tobytes()
    assert (host_digest(swapped.reshape(x.shape), "x").text == host_digest(x, "x").text) == same


def test_chunks_of_two_leaves_swapped_change_both(data_mesh):
    mu, nu = (bits_of((64, 8), "float32", seed) for seed in (1, 2))
    swapped = [np.concatenate([a[:32], b[32:]]) for a, b in ((mu, nu), (nu, mu))]
    placed = [jax.device_put(x, NamedSharding(data_mesh, P("data"))) for x in (mu, nu, *swapped)]
    good, bad = (
        [one(x, name) for x, name in zip(pair, ("mu", "nu"), strict=True)] for pair in (placed[:2], placed[2:])
    )
    assert not {d.text for d in good} & {d.text for d in bad}
    assert good == [host_digest(mu, "mu"), host_digest(nu, "nu")]


def test_host_arrays_in_chunks_and_not_contiguous(monkeypatch):
    x = bits_of((37, 11), "float32")
    whole = host_digest(x, "x")
    monkeypatch.setattr(digest, "_CHUNK", 10)
    assert host_digest(x, "x") == whole == host_digest(np.asfortranarray(x), "x") == host_digest(x.T.copy().T, "x")


@pytest.mark.parametrize("dtype", ["f4", "i8", "u2", "c16"])
def test_bytes_in_the_other_order_are_the_same_numbers(dtype):
    x = np.arange(7).astype(dtype)
    other = x.astype(x.dtype.newbyteorder())
    assert one(other) == host_digest(other, "x") == host_digest(x, "x")


def test_nothing_is_gathered(data_mesh):
    """Nor is anything reduced: a collective could wait for one of the train step's, and that for it."""
    param = jax.device_put(np.ones((17, 257), np.float32), NamedSharding(data_mesh, P()))
    leaf = shardadam.make_plan({"w": param}, data_mesh, layout="packed").leaves["w"]
    packed = Packing(leaf, data_mesh)
    x = jax.device_put(jnp.zeros(leaf.state_shape), packed.sharding)
    for packing in (None, packed):
        summer = digest._summer((digest._Layout(packed.sharding, packing),))
        assert not collectives(summer.lower((x,), (np.zeros(2, np.uint32),)).compile())


def test_arrays_in_host_memory(data_mesh):
    sharding = NamedSharding(data_mesh, P("data"))
    x = bits_of((16, 4), "float32")
    assert one(jax.device_put(x, sharding.with_memory_kind("pinned_host"))) == host_digest(x, "x")
