"""Reduce-scatter and all-gather over one axis after the other and over all at once: sums, blocks, and back."""

import functools

import jax
import numpy as np
import pytest
from conftest import make_mesh
from jax.sharding import PartitionSpec as P

from shardadam.communication import all_gather, reduce_scatter

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("collective", ["per_axis", "joint"])
@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"x": 2, "y": 4}, (64, 256)),  # Whole tiles to the last.
        ({"x": 2, "y": 4}, (16, 16, 128)),
        ({"x": 2, "y": 4}, (24, 96, 100)),  # No whole tiles, but large enough to be padded to them.
        ({"x": 2, "y": 4}, (16, 3)),  # Too small.
        ({"x": 2, "y": 4}, (4096,)),
        ({"x": 2, "y": 3}, (48, 128)),
        ({"x": 3, "y": 1}, (48, 128)),
    ],
    ids=str,
)
def test_each_device_has_its_block_of_the_sum(sizes, shape, collective):
    mesh, axes = make_mesh(sizes), tuple(sizes)
    each = RNG.integers(-8, 8, (mesh.size, *shape)).astype(np.float32)  # Sums are exact in any order.

    @jax.jit
    def there_and_back(each):
        def own(x):
            block = reduce_scatter(x[0], axes, dim=0, summed=axes, collective=collective)
            return block, all_gather(block, axes, dim=0, collective=collective)

        return jax.shard_map(own, mesh=mesh, in_specs=P(axes), out_specs=(P(axes), P()), check_vma=False)(each)

    blocks, whole = there_and_back(each)
    np.testing.assert_array_equal(blocks, each.sum(0))
    np.testing.assert_array_equal(whole, each.sum(0))


@pytest.mark.parametrize(
    ("platform", "found"), [("tpu", "all_reduce"), ("cuda", "reduce_scatter"), ("cpu", "reduce_scatter")]
)
def test_over_an_odd_number_of_devices_it_is_an_all_reduce_on_tpus_alone(platform, found):
    mesh = make_mesh({"x": 3})
    own = functools.partial(reduce_scatter, axes=("x",), dim=0, summed=("x",), collective="per_axis")
    f = jax.jit(jax.shard_map(own, mesh=mesh, in_specs=P(), out_specs=P("x"), check_vma=False))
    text = f.trace(np.ones((48, 128), np.float32)).lower(lowering_platforms=(platform,)).as_text()
    assert [op for op in ("all_reduce", "reduce_scatter") if f"stablehlo.{op}" in text] == [found]
