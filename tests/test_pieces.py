"""Large arrays in pieces: the same bits as at once, as many collectives as pieces, and widths that fit the tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import shardadam
from shardadam import pieces
from shardadam.pieces import cuts_of, in_pieces
from shardadam.sharding import named_sharding

RNG = np.random.default_rng(0)
HOST = {
    "even": RNG.standard_normal((64, 512), np.float32),
    "ragged": RNG.standard_normal((64, 600), np.float32),
    "stack": RNG.standard_normal((3, 64, 256), np.float32),
    "narrow": RNG.standard_normal((257, 24), np.float32),  # Only its last dim divides; a block is 3 wide.
}
STACKED = {"even": 0, "ragged": 0, "stack": 1, "narrow": 0}
BATCH = RNG.standard_normal((16, 64), np.float32)


def loss_fn(params, batch):
    def body(h, layer):
        w = shardadam.gather(layer)
        return h + jnp.tanh(h @ w) @ w.T, None

    h, _ = jax.lax.scan(body, batch, params["stack"])
    narrow = jnp.mean(jnp.sin(h[:, :24] @ params["narrow"].T))
    return jnp.mean((h @ params["even"]) ** 2) + jnp.mean(jnp.tanh(h @ params["ragged"])) + narrow


def run(sizes, stage, collective, **options):
    mesh = make_mesh(sizes)
    plan = shardadam.make_plan(HOST, mesh, axis_name=tuple(sizes), layout="natural", stacked_dims=STACKED)
    tx = shardadam.adam(1e-2, plan=plan)
    state = shardadam.TrainState.create(apply_fn=None, params=HOST, tx=tx, **({"stage": 3} if stage == 3 else {}))
    step = shardadam.make_train_step(loss_fn, state, stage=stage, collective=collective, **options)
    batch = jax.device_put(BATCH, named_sharding(mesh, P(tuple(sizes)), 2))
    compiled = step.lower(state, batch).compile()
    for _ in range(2):
        state, _ = compiled(state, batch)
    return jax.device_get((state.params, state.opt_state)), shardadam.collectives(compiled)


def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "LARGE_LAYER", 1)
    monkeypatch.setattr(pieces, "LARGE_PIECE", 64 * 128)
    monkeypatch.setattr(pieces, "LARGE_BLOCK", 1)
    monkeypatch.setattr(pieces, "MAX_OVERLAP", 1)


@pytest.mark.parametrize(
    ("sizes", "stage", "collective", "options"),
    [
        ({"data": 8}, 2, "joint", {"num_microbatches": 2, "accumulate": "local"}),
        ({"x": 2, "y": 4}, 2, "per_axis", {}),
        ({"data": 8}, 3, "joint", {}),
    ],
    ids=str,
)
def test_a_step_in_pieces_has_the_same_bits(sizes, stage, collective, options, monkeypatch):
    wanted, at_once = run(sizes, stage, collective, **options)
    small_pieces(monkeypatch)
    got, found = run(sizes, stage, collective, **options)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    # "even" in 4 pieces of 128 columns, "ragged" in 5 that overlap, the stack's 3 layers in 2 each.
    cut = sorted([1, 4, 5, 6] * len(sizes))
    wanted_times = {"all-gather": cut, "reduce-scatter": [1, 1, 1, 3] if collective == "joint" else cut}
    for name, wanted_of in wanted_times.items():
        times = sorted(op.times for op in found if op.op == name)
        assert times == wanted_of, name
        assert len(times) == sum(op.op == name for op in at_once), name


def test_one_axis_at_a_time_deals_out_the_same_blocks():
    sizes = {"x": 2, "y": 4}
    (got, _), (wanted, _) = run(sizes, 2, "per_axis"), run(sizes, 2, "joint")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), got[0], wanted[0])  # Steps are of 1e-2.


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_element_is_taken(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    stacked = data.draw(st.integers(0, len(shape) - 1))
    more = data.draw(st.sets(st.integers(stacked, len(shape) - 1)))
    cuts = dict.fromkeys(range(stacked), 1) | {dim: data.draw(st.integers(1, shape[dim])) for dim in more}
    x = RNG.standard_normal(shape).astype(np.float32)
    into = data.draw(st.sampled_from([None, jnp.full(shape, jnp.nan, jnp.float32)]))
    got = in_pieces(lambda piece, _: piece + 1, jnp.asarray(x), cuts, stacked, into=into)
    np.testing.assert_array_equal(got, x + 1)


@given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 300_000), st.integers(1, 300_000)),
    free=st.sampled_from([(), (1,), (2,), (1, 2)]),
)
def test_widths_are_tiles_and_overlap_little(shape, free):
    cuts = cuts_of(shape, 1, free)
    size = shape[1] * shape[2]
    assert (0 in cuts) == (size >= pieces.LARGE_LAYER)
    assert set(cuts) <= {0, *free}
    for dim in set(cuts) - {0}:
        assert cuts[dim] % {1: 16, 2: 128}[dim] == 0
        assert -shape[dim] % cuts[dim] <= shape[dim] / 100
        assert size // shape[dim] * cuts[dim] <= pieces.LARGE_PIECE + size // shape[dim] * {1: 16, 2: 128}[dim]
    if 0 in cuts and size <= pieces.LARGE_PIECE:
        assert cuts == {0: 1}


@pytest.mark.parametrize(
    ("shape", "free", "wanted"),
    [
        ((128256, 4096), {1}, {1: 128}),
        ((4096, 128256), {1}, {1: 2048}),
        ((8192, 50257), {1}, {1: 768}),
        ((2**28,), (), {}),
        ((2**20, 257), {1}, {}),  # In tiles of 128 lanes a third would be sent twice.
    ],
)
def test_embeddings_and_heads(shape, free, wanted):
    assert cuts_of(shape, 0, free) == wanted
