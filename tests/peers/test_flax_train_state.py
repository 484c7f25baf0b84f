"""What Flax documents of TrainState (Linen), done with shardadam on eight devices and with optax on one, side by side.

Flax's wheel ships no tests. Each test names the page of Flax's documentation whose behaviour it repeats.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization, struct, traverse_util
from flax.core import freeze
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shardadam

pytestmark = pytest.mark.usefixtures("standard_promotion")

X = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
Y = np.random.default_rng(1).standard_normal((8, 5)).astype(np.float32)
STEPS = 3


class MLP(nn.Module):
    """Layers whose dims divide by eight, and one of five features whose dims do not."""

    @nn.compact
    def __call__(self, x, train=False):
        # Without a bias: BatchNorm takes it off again, its gradient is rounding alone, and Adam makes steps of it.
        x = nn.Dense(32, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.Dropout(rate=0.25, deterministic=not train)(jnp.tanh(x))
        return nn.Dense(5)(x)


APPLY = MLP().apply


@functools.cache
def variables():
    return jax.device_get(jax.jit(MLP().init)(jax.random.key(0), X))


def squared(predictions):
    return optax.l2_loss(predictions, Y).mean()


class Side:
    """One of the two sides: what makes the optimizer, the TrainState and the arrays' places."""

    def __init__(self, mesh=None, layout=None, base=train_state.TrainState):
        self.mesh, self.layout, self.base = mesh, layout, base
        self.module = optax if mesh is None else shardadam

    def place(self, tree):
        return (
            jax.tree.map(jnp.asarray, tree)
            if self.mesh is None
            else jax.device_put(tree, NamedSharding(self.mesh, P()))
        )

    def plan(self, params):
        return shardadam.make_plan(params, self.mesh, layout=self.layout, min_size=0)

    def tx(self, name, params, *args, **options):
        """`tx("adam", params, 1e-3)`: optax's, or shardadam's with a plan of these parameters."""
        options |= {} if self.mesh is None else {"plan": self.plan(params)}
        return getattr(self.module, name)(*args, **options)

    def create(self, cls, params, tx, **fields):
        own = self.base is shardadam.TrainState
        return cls.create(
            apply_fn=APPLY, params=params, tx=tx, **fields, **({"plan": self.plan(params)} if own else {})
        )


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, want)


def shapes(tree):
    return [(jax.tree_util.keystr(k), jnp.shape(x)) for k, x in jax.tree_util.tree_leaves_with_path(tree)]


def assert_in_shards(state, side):
    """mu and nu lie as planned; the parameters are whole on all eight devices."""
    params = state.params["params"] if OVERWRITE_WITH_GRADIENT in state.params else state.params
    plan = side.plan(params)
    shardadam.audit(state.opt_state, plan)
    assert any(leaf.num_shards == 8 for leaf in plan.leaves.values())
    for x in jax.tree.leaves(params):
        assert len(x.sharding.device_set) == 8
        assert x.sharding.is_fully_replicated


@pytest.fixture(params=["drop-in", "TrainState"], scope="module")
def ours(request, data_mesh):
    """Flax's own TrainState with the drop-in, packed; and shardadam.TrainState in its place, in natural layout."""
    if request.param == "TrainState":
        return Side(data_mesh, "auto", shardadam.TrainState)
    return Side(data_mesh, "packed")


def side_by_side(run, ours):
    """`run(side)` returns (state, anything to compare) on both sides."""
    (got, got_rest), (want, want_rest) = run(ours), run(Side())
    assert int(got.step) == int(want.step) > 0
    assert_close(got.params, want.params)
    assert_close(got_rest, want_rest)
    assert_in_shards(got, ours)
    return got, want


def test_create_apply_and_replace(ours):
    """Flax, "flax.training package": create, apply_gradients with a step that counts up, fields replaced at will."""

    def run(side):
        params = side.place(variables()["params"])
        state = side.create(side.base, params, side.tx("adam", params, 1e-2))
        assert int(state.step) == 0

        @jax.jit
        def loss(params, x):
            return squared(state.apply_fn({**variables(), "params": params}, x))

        before = loss(state.params, side.place(X))
        for _ in range(STEPS):
            state = state.apply_gradients(grads=jax.grad(loss)(state.params, side.place(X)))
        other = state.replace(step=0)
        assert (other.step, other.tx, int(state.step)) == (0, state.tx, STEPS)
        return state, (before, loss(state.params, side.place(X)))

    side_by_side(run, ours)


def test_batch_statistics_a_dropout_key_and_metrics_in_a_subclass(ours):
    """Flax, "Batch normalization", "Dropout" and "Quick start": more fields, changed by one jitted step."""

    @struct.dataclass
    class Mean:
        total: jax.Array
        count: jax.Array

    def run(side):
        class State(side.base):
            batch_stats: Any
            key: Any
            metrics: Mean

        params = side.place(variables()["params"])
        fields = {"batch_stats": variables()["batch_stats"], "metrics": Mean(np.float32(0), np.int32(0))}
        fields = side.place(fields) | {"key": side.place(jax.random.key(7))}
        state = side.create(State, params, side.tx("adamw", params, 1e-2), **fields)

        @jax.jit
        def step(state, x):
            key = jax.random.fold_in(state.key, state.step)  # The key stays, each step's is made from it.

            def loss(params):
                seen = {"params": params, "batch_stats": state.batch_stats}
                out, new = state.apply_fn(seen, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
                return squared(out), new

            (value, new), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
            state = state.apply_gradients(grads=grads, batch_stats=new["batch_stats"])
            return state.replace(metrics=Mean(state.metrics.total + value, state.metrics.count + 1))

        for _ in range(STEPS):
            state = step(state, side.place(X))
        assert int(state.metrics.count) == STEPS
        return state, (state.batch_stats, state.metrics.total)

    side_by_side(run, ours)


@jax.jit
def step(state, x):
    def loss(params):
        return squared(state.apply_fn({**variables(), "params": params}, x))

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


def train(side, tx_of, params=None, steps=STEPS):
    """(state, losses) of a jitted training on the constant data; the running averages of BatchNorm stay fixed."""
    params = side.place(variables()["params"] if params is None else params)
    state = side.create(side.base, params, tx_of(side, params))
    state, losses = continued(state, side, steps)
    return state, losses


def continued(state, side, steps=STEPS):
    losses = []
    for _ in range(steps):
        state, value = step(state, side.place(X))
        losses.append(value)
    return state, losses


@functools.cache
def _adam(side):  # One object, or every state would compile the step anew.
    return side.tx("adam", variables()["params"], 1e-2)


def adam(side, params):
    return _adam(side)


@functools.cache
def optax_after_four():
    with jax.numpy_dtype_promotion("standard"):
        return train(Side(), adam, steps=4)[0]


def test_a_schedule_and_clipping(ours):
    """Flax, "Learning rate scheduling" and "Upgrading my codebase to Optax": a schedule, and clipping in front."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 6)
    side_by_side(lambda side: train(side, lambda s, p: optax.chain(optax.clip(1.0), s.tx("adam", p, schedule))), ours)


def test_injected_hyperparameters(data_mesh):
    """Flax, "Learning rate scheduling": a rate that is part of the state, and set between two steps."""

    def run(side):
        params = side.place(variables()["params"])
        plan = {} if side.mesh is None else {"plan": side.plan(params)}
        tx = optax.inject_hyperparams(side.module.adam)(learning_rate=1e-2, **plan)
        state, _ = continued(side.create(side.base, params, tx), side, 2)
        state.opt_state.hyperparams["learning_rate"] = side.place(np.float32(1e-3))
        return continued(state, side, 2)

    side_by_side(run, Side(data_mesh, "natural"))


def test_frozen_layers_by_a_partition_of_the_parameters(ours):
    """Flax, "Transfer learning": labels by path, Adam for the head and `set_to_zero` for the rest."""

    def tx(side, params):
        labels = traverse_util.path_aware_map(lambda path, _: "head" if path[0] == "Dense_1" else "rest", params)
        return optax.partition({"head": side.tx("adam", params, 1e-2), "rest": optax.set_to_zero()}, labels)

    got, losses = train(ours, tx)
    want, wanted = train(Side(), tx)
    assert_close((got.params, losses), (want.params, wanted))
    np.testing.assert_array_equal(got.params["Dense_0"]["kernel"], variables()["params"]["Dense_0"]["kernel"])
    mu = optax.tree.get(got.opt_state, "mu")["Dense_1"]["kernel"]
    assert {shard.data.size for shard in mu.addressable_shards} == {mu.size // 8}


def test_frozen_dicts_and_an_abstract_state(ours):
    """Flax, "flax.core.frozen_dict package" and "Save and load checkpoints": FrozenDict params; shapes alone."""
    got, _ = side_by_side(lambda side: train(side, adam, freeze(variables()["params"])), ours)
    abstract = jax.eval_shape(lambda: ours.create(ours.base, got.params, got.tx))
    assert shapes(abstract) == shapes(got)


def test_state_dicts_and_bytes(ours):
    """Flax, "flax.serialization package": a state to a dict or to bytes, read into a fresh state, and resumed."""
    state, _ = train(ours, adam, steps=2)
    want = optax_after_four()
    fresh, _ = train(ours, adam, steps=0)
    restored = serialization.from_state_dict(fresh, serialization.to_state_dict(state))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(restored), jax.tree.leaves(state))
    read = serialization.from_bytes(fresh, serialization.to_bytes(state))
    resumed, _ = continued(read, ours, 2)  # What was read is NumPy's and on the host: the step puts it back in shards.
    assert_close(resumed.params, want.params)
    assert_in_shards(resumed, ours)


def test_bytes_go_to_optax_and_come_from_it(data_mesh):
    """Flax, "flax.serialization package": in the natural layout the bytes are those of optax's state, both ways."""
    ours, optaxes = Side(data_mesh, "natural"), Side()
    for a, b in ((ours, optaxes), (optaxes, ours)):
        saved, _ = train(a, adam, steps=2)
        fresh, _ = train(b, adam, steps=0)
        resumed, _ = continued(serialization.from_bytes(fresh, serialization.to_bytes(saved)), b, 2)
        assert_close(resumed.params, optax_after_four().params)


def test_orbax_itself_saves_and_restores_the_state(ours, tmp_path):
    """Flax, "Save and load checkpoints": Orbax's StandardCheckpointer on the state, restored by target."""
    state, _ = train(ours, adam, steps=2)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        restored = checkpointer.restore(tmp_path / "state", target)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    resumed, _ = continued(restored, ours, 2)
    assert_close(resumed.params, optax_after_four().params)
    assert_in_shards(resumed, ours)


def test_fp8_scales_are_replaced_by_their_gradients(ours):
    """Flax, "User Guide on Using FP8": scales and histories beside the parameters, not for the optimizer."""
    layer = nn.Dense(32, dot_general_cls=nn.Fp8DotGeneral)
    seen = jax.device_get(jax.jit(layer.init)(jax.random.key(0), X))

    def run(side):
        seen_here = side.place(seen)
        tx = side.tx("adam", seen_here["params"], 1e-2)
        plan = {"plan": side.plan(seen_here["params"])} if side.base is shardadam.TrainState else {}
        state = side.base.create(apply_fn=layer.apply, params=seen_here, tx=tx, **plan)

        @jax.jit
        def step(state, x):
            grads = jax.grad(lambda params: (state.apply_fn(params, x) ** 2).mean())(state.params)
            return state.apply_gradients(grads=grads)

        for _ in range(STEPS):
            state = step(state, side.place(X))
        return state, state.params[OVERWRITE_WITH_GRADIENT]

    got, _ = side_by_side(run, ours)
    history = jax.tree.leaves(got.params[OVERWRITE_WITH_GRADIENT])
    assert any(
        float(jnp.abs(x).max()) > 1.5 for x in history
    )  # They did change: scales begin at one, histories at zero.


def test_boxed_parameters_keep_their_boxes(data_mesh):
    """Flax, "Scale up Flax Modules on multiple devices": `nn.with_partitioning` boxes a parameter with axis names."""
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    layer = nn.Dense(64, kernel_init=init, use_bias=False)
    boxed = jax.jit(layer.init)(jax.random.key(0), X)["params"]
    grads = jax.tree.map(jnp.ones_like, boxed)

    def run(side):
        params = side.place(boxed)
        state = side.create(side.base, params, side.tx("adam", params, 1e-2))
        return jax.jit(lambda s, g: s.apply_gradients(grads=g))(state, side.place(grads)), 0

    for base in (train_state.TrainState, shardadam.TrainState):
        got, _ = side_by_side(run, Side(data_mesh, "natural", base))
        mu = optax.tree.get(got.opt_state, "mu")["kernel"]
        assert isinstance(mu, nn.Partitioned)
        assert mu.names == got.params["kernel"].names == (None, "model")
