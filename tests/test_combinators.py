"""optax's combinators around shardadam's Adam and within `shardadam.shard`: what docs/combinators.md says of each."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import adam_state, assert_same_bits, put, random_tree

import shardadam
from shardadam.elementwise import NotElementwise

pytestmark = pytest.mark.usefixtures("standard_promotion")

SHAPES = {"kernel": (64, 48), "odd": (17, 257), "scale": ()}
PAGE = Path(__file__).parent.parent / "docs" / "combinators.md"
STEPS = 4


def matrices(tree):
    return jax.tree.map(lambda x: x.ndim > 1, tree)


def wrapped(adam, sgd):
    """Each combinator of the page around `adam(learning_rate)`."""
    labels = {"kernel": "adam", "odd": "sgd", "scale": "adam"}
    return {
        "chain, before": optax.chain(optax.clip(1.0), adam(1e-2)),
        "chain, after": optax.chain(adam(1e-2), optax.trace(0.9)),
        "masked": optax.masked(adam(1e-2), matrices),
        "partition": optax.partition({"adam": adam(1e-2), "sgd": sgd}, labels),
        "MultiSteps": optax.MultiSteps(adam(1e-2), 2).gradient_transformation(),
        "apply_if_finite": optax.apply_if_finite(adam(1e-2), 3),
        "inject_hyperparams": optax.inject_hyperparams(adam)(learning_rate=optax.linear_schedule(1e-2, 0.0, 10)),
        "freeze": optax.chain(adam(1e-2), optax.freeze(matrices)),
        "schedule_free": optax.contrib.schedule_free(adam(1e-2), 1e-2),
        "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(1.0), adam(1e-2)),
        "reduce_on_plateau": optax.chain(adam(1e-2), optax.contrib.reduce_on_plateau(patience=1)),
    }


SGD = optax.sgd(1e-2, momentum=0.9)
REFERENCES = wrapped(optax.adam, SGD)


def run(tx, params, gradients):
    """A jitted hand-written loop, in which a state must stay where it began."""

    @jax.jit
    def step(params, state, grads):
        updates, state = optax.with_extra_args_support(tx).update(grads, state, params, value=jnp.float32(1.0))
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for grads in gradients:
        params, state = step(params, state, grads)
    return params, state


@pytest.fixture(scope="module")
def plan(data_mesh):
    return shardadam.make_plan(random_tree(0, shapes=SHAPES), data_mesh, min_size=0)


def placed_how(state, plan):
    """As the page says it: which of the leaves that are as large as their parameter are in shards."""
    shardadam.audit(state, plan)
    try:
        shardadam.audit(state, plan, accumulators=True)
    except shardadam.ShardingError:
        return "mu and nu"
    return "all"


def table():
    """name -> (around, within) of the page."""
    rows = re.findall(r"^\| `([^`]+)`[^|]* \| ([^|]+) \| ([^|]+) \|", PAGE.read_text(), re.M)
    return {name: (around.strip(), within.strip()) for name, around, within in rows}


def test_the_page_has_a_row_for_each():
    assert {name.split(", ")[0] for name in REFERENCES} | {"lookahead"} == {name.split(", ")[0] for name in table()}
    assert len(table()) == len(REFERENCES) + 1


@pytest.mark.parametrize("name", REFERENCES)
def test_placed_as_the_page_says_and_equal_to_optax(name, plan, data_mesh):
    host = [random_tree(t, shapes=SHAPES) for t in range(STEPS + 1)]
    placed = [put(x, data_mesh) for x in host]
    wanted, _ = run(REFERENCES[name], jax.tree.map(jnp.array, host[0]), host[1:])
    around, within = table()[name]

    def adam(learning_rate):
        return shardadam.adam(learning_rate, plan=plan)

    params, state = run(wrapped(adam, shardadam.shard(SGD, plan=plan))[name], placed[0], placed[1:])
    assert placed_how(state, plan) == around
    # An ulp or a few: fusions differ where optax's program for one device is one, or a branch of a cond.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, wanted)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(params))
    if within.startswith("refused"):
        with pytest.raises(NotElementwise, match=within.split("`")[1]):
            shardadam.shard(REFERENCES[name], plan=plan).init(placed[0])
        return
    params, state = run(shardadam.shard(REFERENCES[name], plan=plan), placed[0], placed[1:])
    assert placed_how(state, plan) == within
    assert jax.tree.structure(state) == jax.tree.structure(REFERENCES[name].init(host[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, wanted)


@pytest.mark.parametrize("name", ["MultiSteps", "schedule_free"])
def test_within_shard_in_train_state(name, plan, data_mesh):
    host = [random_tree(t, shapes=SHAPES) for t in range(STEPS + 1)]
    wanted, _ = run(REFERENCES[name], jax.tree.map(jnp.array, host[0]), host[1:])
    tx = shardadam.shard(REFERENCES[name], plan=plan)
    state = shardadam.TrainState.create(apply_fn=None, params=put(host[0], data_mesh), tx=tx)
    step = jax.jit(lambda s, g: s.apply_gradients(grads=g), donate_argnums=0)
    for grads in host[1:]:
        state = step(state, put(grads, data_mesh))
    assert step._cache_size() == 1
    shardadam.audit(state, plan)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, wanted)


def test_lookahead(plan, data_mesh):
    """Its parameters are a pair of trees: around the drop-in, with a plan of the fast ones; not within `shard`."""
    host = [random_tree(t, shapes=SHAPES) for t in range(STEPS + 1)]
    assert table()["lookahead"][0] == "mu and nu"

    def pair(tx, place):
        params = optax.LookaheadParams.init_synced(place(host[0]))
        return run(optax.lookahead(tx, 2, 0.5), params, [place(g) for g in host[1:]])

    wanted, _ = pair(optax.adam(1e-2), lambda x: jax.tree.map(jnp.array, x))
    got, state = pair(shardadam.adam(1e-2, plan=plan), lambda x: put(x, data_mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, wanted)
    shardadam.audit(state, plan)
    both = optax.LookaheadParams.init_synced(put(host[0], data_mesh))
    tx = shardadam.shard(
        optax.lookahead(optax.adam(1e-2), 2, 0.5), plan=shardadam.make_plan(both, data_mesh, min_size=0)
    )
    with pytest.raises(NotElementwise, match=table()["lookahead"][1].split("`")[1]):
        tx.init(both)


@pytest.mark.parametrize("within", [False, True], ids=["around", "within"])
def test_tree_get_set_and_map_params(within, plan, data_mesh):
    """On the state of a chain: found by name, set by name, told apart from what is no parameter's."""
    params = put(random_tree(0, shapes=SHAPES), data_mesh)
    chain = [optax.clip(1.0), optax.scale_by_adam(), optax.trace(0.9)]
    around = optax.chain(chain[0], shardadam.scale_by_adam(plan=plan), chain[2])
    tx = shardadam.shard(optax.chain(*chain), plan=plan) if within else around
    state = tx.init(params)
    mu = optax.tree.get(state, "mu")
    assert mu["odd"].shape == plan.leaves["odd"].state_shape
    halves = jax.tree.map(lambda x: x + 0.5, mu)
    changed = optax.tree.set(state, mu=halves, count=jnp.int32(7))
    assert_same_bits(adam_state(changed).mu, halves)
    assert int(adam_state(changed).count) == 7
    marked = optax.tree.map_params(tx, lambda _: "moment", state, transform_non_params=lambda _: "other")
    assert set(jax.tree.leaves((adam_state(marked).mu, adam_state(marked).nu))) == {"moment"}
    assert adam_state(marked).count == "other"
