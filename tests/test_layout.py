"""`pack` and `unpack` are inverses, and a leaf's plan says what it costs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from shardadam.layout import (
    LANES,
    MAX_WASTE,
    canonical_spec,
    choose_lanes,
    could_be_packed,
    entries,
    num_rows,
    pack,
    pack_block,
    plan_leaf,
    unpack,
)

shapes = st.lists(st.integers(0, 70), min_size=0, max_size=4).map(tuple).filter(lambda s: math.prod(s) < 200_000)
shard_counts = st.sampled_from([1, 2, 3, 5, 7, 8, 12, 24, 48, 192, 1000])


@settings(max_examples=20)  # Every one compiles a program.
@given(shape=shapes, num_shards=shard_counts, data=st.data())
def test_unpack_is_the_inverse_of_pack_for_each_layer_of_a_stack(shape, num_shards, data):
    stacked = data.draw(st.integers(0, len(shape)))
    size = math.prod(shape[stacked:])
    x = np.arange(1, 1 + math.prod(shape), dtype=np.int32).reshape(shape)
    index = data.draw(st.integers(0, num_shards - 1))

    @jax.jit  # One program; each step for itself would be one of its own.
    def there_and_back(x, index):
        packed = pack(x, num_shards, stacked)
        return packed, unpack(packed, shape, stacked), pack_block(x, num_shards, index, stacked)

    packed, back, block = there_and_back(x, index)
    assert packed.shape == (*shape[:stacked], num_rows(size, num_shards), choose_lanes(size, num_shards))
    assert packed.shape[-2] % num_shards == 0
    np.testing.assert_array_equal(back, x)
    np.testing.assert_array_equal(block, np.split(np.asarray(packed), num_shards, axis=stacked)[index])
    # Row-major, the padding zero and last: written without `pack`, layer by layer.
    layers = np.asarray(packed).reshape(*shape[:stacked], math.prod(packed.shape[stacked:]))
    np.testing.assert_array_equal(layers[..., :size].reshape(shape), x)
    assert not layers[..., size:].any()


@settings(max_examples=500)
@given(size=st.one_of(st.integers(0, 10**5), st.integers(0, 10**12)), num_shards=st.integers(1, 10_000))
@example(size=8192 * 28672, num_shards=8960)
@example(size=1025 * 8, num_shards=8)
def test_a_shard_holds_hardly_more_than_its_part(size, num_shards):
    rows, lanes = num_rows(size, num_shards) // num_shards, choose_lanes(size, num_shards)
    wanted = math.ceil(size / num_shards)
    assert 1 <= lanes <= 2 * LANES
    assert wanted <= rows * lanes
    if lanes == LANES:
        assert rows * lanes <= wanted * (1 + MAX_WASTE)
    else:
        assert rows * lanes < max(wanted, 1) + max(1, math.ceil(wanted / LANES))
        assert rows == 1 or LANES // 3 < lanes <= 3 * LANES // 2
    assert could_be_packed(rows, lanes)


@pytest.mark.parametrize(
    ("rows", "lanes", "could"),
    [
        (1, 1, True),
        (1, 2045, True),
        (7, 1024, True),
        (2, 1093, True),
        (2, 513, False),
        (8, 768, False),
        (96, 768, False),
        (1, 2049, False),
        (0, 5, False),
    ],
)
def test_shapes_that_pack_does_not_give(rows, lanes, could):
    assert could_be_packed(rows, lanes) == could


def test_large_leaves_keep_1024_lanes():
    """What both the TPU and the GPU compiler like best, where it costs nothing to speak of."""
    assert choose_lanes(4096 * 14336, 256) == choose_lanes(8192 * 28672 + 1, 64) == LANES
    assert (num_rows(8192 * 28672, 8960), choose_lanes(8192 * 28672, 8960)) == (27 * 8960, 971)


@given(st.lists(st.sampled_from(["", "a", "bc"]), max_size=4))
def test_a_spec_and_its_entries_are_inverses(names):
    parts = tuple(tuple(name) for name in names)
    if sum(map(len, parts)) == len(set("".join(names))):
        assert entries(canonical_spec(parts), len(parts)) == parts


def leaf(shape, spec=P(), *, layout="auto", min_size=0, axis_names=("data",), stacked_dims=0, **sizes):
    return plan_leaf(
        shape,
        np.dtype("float32"),
        spec,
        axis_sizes=sizes or {"data": 8},
        axis_names=axis_names,
        layout=layout,
        min_size=min_size,
        stacked_dims=stacked_dims,
    )


@pytest.mark.parametrize(
    ("shape", "spec", "sizes", "layout", "state_spec", "state_shape"),
    [
        ((64, 3), P(), {"data": 8}, "natural", P("data"), (64, 3)),
        ((3, 64), P(), {"data": 8}, "natural", P(None, "data"), (3, 64)),
        ((17, 257), P(), {"data": 8}, "packed", P("data"), (8, 547)),
        ((5,), P(), {"data": 8}, "whole", P(), (5,)),
        ((), P(), {"data": 8}, "whole", P(), ()),
        ((0, 8), P(), {"data": 8}, "whole", P(), (0, 8)),
        ((64, 48), P(None, "model"), {"data": 4, "model": 2}, "natural", P("data", "model"), (64, 48)),
        ((7, 64), P(None, "model"), {"data": 4, "model": 2}, "natural", P(None, ("model", "data")), (7, 64)),
        ((34, 257), P("model"), {"data": 4, "model": 2}, "packed", P(("model", "data")), (8, 1093)),
        ((64, 48), P("data"), {"data": 8}, "natural", P("data"), (64, 48)),
        ((64, 48), P(), {"data": 1}, "natural", P(), (64, 48)),
    ],
)
def test_where_a_leaf_goes(shape, spec, sizes, layout, state_spec, state_shape):
    plan = leaf(shape, spec, **sizes)
    assert (plan.layout, plan.state_spec, plan.state_shape) == (layout, state_spec, state_shape)
    assert plan.padding == math.prod(state_shape) - math.prod(shape)
    assert plan.reason


def test_two_axes_split_over_their_product():
    plan = leaf((64, 48), axis_names=("slice", "data"), slice=2, data=4)
    assert plan.state_spec == P(("slice", "data"))
    assert plan.elements_per_device == 64 * 48 // 8


def test_a_parameter_sharded_over_one_of_two_axes_is_split_over_the_other():
    plan = leaf((64, 48), P("data"), axis_names=("slice", "data"), slice=2, data=4)
    assert plan.shard_axes == ("slice",)
    assert plan.elements_per_device == 64 * 48 // 8


def test_layouts_by_name():
    assert leaf((64, 48), layout="packed").state_shape == (8, 384)
    assert leaf((17, 257), layout="natural").layout == "whole"
    assert "no dim divides by 8" in leaf((17, 257), layout="natural").reason
    assert leaf((64, 48), min_size=64 * 48 + 1).reason == "3,072 elements, under min_size=3,073"


@pytest.mark.parametrize(
    ("shape", "spec", "sizes", "layout", "state_spec", "state_shape"),
    [
        ((16, 64, 3), P(), {"data": 8}, "natural", P(None, "data"), (16, 64, 3)),
        ((16, 17, 257), P(), {"data": 8}, "packed", P(None, "data"), (16, 8, 547)),
        ((16, 7), P(), {"data": 8}, "whole", P(), (16, 7)),
        ((16,), P(), {"data": 8}, "whole", P(), (16,)),
        ((4, 34, 257), P("stage"), {"data": 4, "stage": 2}, "packed", P("stage", "data"), (4, 20, 437)),
        ((4, 34, 257), P(None, "model"), {"data": 4, "model": 2}, "packed", P(None, ("model", "data")), (4, 8, 1093)),
    ],
)
def test_stacked_dims_are_never_split_over_shards(shape, spec, sizes, layout, state_spec, state_shape):
    plan = leaf(shape, spec, stacked_dims=1, **sizes)
    assert (plan.layout, plan.state_spec, plan.state_shape) == (layout, state_spec, state_shape)
    devices = math.prod(sizes.values()) if layout != "whole" else 1
    assert plan.elements_per_device == math.prod(state_shape) // devices


def test_pack_is_traced_without_the_host():
    text = str(jax.make_jaxpr(lambda x: unpack(pack(x, 8), (17, 257)))(jnp.zeros((17, 257))))
    assert "callback" not in text
