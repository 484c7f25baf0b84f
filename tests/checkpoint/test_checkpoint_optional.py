"""Masters, loss scale and skip count switched on and off over a checkpoint, at any stage, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh
from jax.sharding import PartitionSpec as P
from trees import assert_same_bits, logical, random_tree

import shardadam

pytestmark = pytest.mark.usefixtures("standard_promotion")

SHAPES = {"kernel": (64, 48), "odd": (17, 257), "norm": (1040,)}
F32, BF16 = jnp.float32, jnp.bfloat16


def loss_fn(params, batch):
    h = jnp.tanh(batch @ params["kernel"].astype(F32)) * params["norm"][:48]
    return jnp.mean(h**2) + 1e-3 * jnp.mean(params["odd"].astype(F32) ** 2)


def create(dtype, sizes, seed=0, layout="auto", specs=None, **options):
    """Kernels in a dtype, a norm's scale in float32."""
    params = random_tree(seed, shapes=SHAPES)
    narrow = {name: np.asarray(jnp.asarray(x, F32 if name == "norm" else dtype)) for name, x in params.items()}
    plan = shardadam.make_plan(narrow, make_mesh(sizes), layout=layout, min_size=0, param_specs=specs)
    tx = shardadam.adamw(1e-2, plan=plan)
    return shardadam.TrainState.create(apply_fn=None, params=narrow, tx=tx, **options)


def trained(state, steps=2):
    step = shardadam.make_train_step(loss_fn, state)
    batch = np.random.default_rng(5).standard_normal((8, 64)).astype(np.float32)
    for _ in range(steps):
        state, _ = step(state, batch)
    assert step._cache_size() == 1
    return state


def moved(state, like, directory):
    with shardadam.Checkpointer(directory) as checkpointer:
        checkpointer.save(1, state)
        restored = checkpointer.restore(like, verify="full")
    assert jax.tree.structure(restored) == jax.tree.structure(like)
    assert [x.dtype for x in jax.tree.leaves(restored)] == [x.dtype for x in jax.tree.leaves(like)]
    shardadam.audit(restored, restored.plan)
    return restored


def plain(tree, plan):
    return jax.tree.map(lambda x: np.asarray(x, np.float32), logical(tree, plan))


def whole(state):
    return logical(state.params, state.plan) if state.stage == 3 else jax.tree.map(np.asarray, state.params)


@pytest.fixture(scope="module")
def without():
    with jax.numpy_dtype_promotion("standard"):
        return trained(
            create(BF16, {"data": 4, "model": 2}, specs={"kernel": P(None, "model"), "odd": P(), "norm": P()})
        )


@pytest.mark.parametrize("stage", [2, 3])
def test_switched_on_and_off_again(without, stage, tmp_path):
    extras = {"stage": stage, "master_dtype": F32, "loss_scale": 256.0}
    like = create(BF16, {"data": 8}, seed=1, layout="packed", **extras)
    on = moved(without, like, tmp_path / "on")
    assert (int(on.num_skipped), float(on.loss_scale.scale), int(on.step)) == (0, 256.0, 2)
    assert_same_bits(whole(on), jax.tree.map(np.asarray, without.params))
    assert on.master["norm"] is None
    masters = {name: x for name, x in on.master.items() if x is not None}
    assert_same_bits(
        logical(masters, on.plan), {name: np.asarray(without.params[name], np.float32) for name in masters}
    )
    for field in ("mu", "nu"):
        got, wanted = (getattr(state.opt_state[0], field) for state in (on, without))
        assert_same_bits(plain(got, on.plan), plain(wanted, without.plan))
    on = trained(on, 1)
    off = moved(on, without.replace(params=jax.tree.map(jnp.zeros_like, without.params)), tmp_path / "off")
    assert (off.master, off.loss_scale, off.num_skipped) == (None, None, None)
    assert_same_bits(jax.tree.map(np.asarray, off.params), whole(on))
    trained(off, 1)


def test_from_float32_parameters_to_masters_and_back(tmp_path):
    wide = trained(create(F32, {"data": 8}))
    on = moved(wide, create(BF16, {"data": 7}, seed=1, master_dtype=F32), tmp_path / "on")
    kernels = {name: x for name, x in on.master.items() if x is not None}
    assert_same_bits(logical(kernels, on.plan), {name: np.asarray(wide.params[name]) for name in kernels})
    np.testing.assert_array_equal(on.params["kernel"], np.asarray(wide.params["kernel"]).astype(BF16))
    off = moved(on, create(F32, {"data": 8}, seed=2), tmp_path / "off")
    assert_same_bits(jax.tree.map(np.asarray, off.params), jax.tree.map(np.asarray, wide.params))
    assert_same_bits(plain(off.opt_state[0].nu, off.plan), plain(wide.opt_state[0].nu, wide.plan))


def test_a_state_within_a_tree_and_abstract_ones(without, tmp_path):
    like = create(BF16, {"data": 8}, seed=1, master_dtype=F32, skip_nonfinite=True, loss_scale="dynamic")
    shardings = like.shardings
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, shardings)
    with shardadam.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"net": without, "seed": 3})
        restored = checkpointer.restore({"net": abstract, "seed": 0})
    assert restored["seed"] == 3
    assert float(restored["net"].loss_scale.scale) == 2.0**15
    assert_same_bits(jax.tree.map(np.asarray, restored["net"].params), jax.tree.map(np.asarray, without.params))
    shardadam.audit(restored["net"], like.plan)


def test_without_a_switch_a_dtype_is_still_refused(without, tmp_path):
    with shardadam.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, without)
        with pytest.raises(ValueError, match=r"`params/kernel`: got dtype bfloat16, wanted float32"):
            checkpointer.restore(create(F32, {"data": 8}))
