"""Models that scan over layers, in Flax linen and nnx: `gather` in the body reduces a layer's gradient there."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import shardadam
from shardadam.plan import path_name
from shardadam.sharding import named_sharding

pytestmark = pytest.mark.usefixtures("standard_promotion")
WIDTH, LAYERS = 64, 16
X = np.random.default_rng(0).standard_normal((16, WIDTH)).astype(np.float32)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.tanh(nn.Dense(4 * WIDTH, use_bias=False, name="up")(x))
        return x + nn.Dense(WIDTH, use_bias=False, name="down")(h), None


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = nn.map_variables(Block, "params", trans_in_fn=shardadam.gather, init=self.is_initializing())
        layers = nn.scan(
            nn.remat(block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        return layers(name="layers")(nn.Dense(WIDTH, name="first")(x), None)[0]


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.tanh(self.up(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        make = nnx.split_rngs(splits=LAYERS)(nnx.vmap(NnxBlock, in_axes=(0,), out_axes=0))
        self.layers = make(rngs)

    def __call__(self, x):
        graphdef, stacked = nnx.split(self.layers)

        def body(h, layer):
            return nnx.merge(graphdef, shardadam.gather(layer))(h), None

        return jax.lax.scan(jax.checkpoint(body), self.first(x), stacked)[0]


def linen():
    model = Linen()
    params = jax.tree.map(np.asarray, model.init(jax.random.key(0), X)["params"])
    return params, lambda params, x: model.apply({"params": params}, x)


def as_nnx():
    graphdef, params, rest = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param, ...)
    return jax.tree.map(np.asarray, params), lambda params, x: nnx.merge(graphdef, params, rest)(x)


@pytest.mark.parametrize(("make", "stage"), [(linen, 2), (linen, 3), (as_nnx, 2), (as_nnx, 3)])
def test_each_layer_is_reduced_inside_the_backward_scan(make, stage, data_mesh):
    params, apply = make()
    stacked = jax.tree_util.tree_map_with_path(lambda k, _: int(path_name(k).startswith("layers")), params)
    plan = shardadam.make_plan(params, data_mesh, stacked_dims=stacked)

    def loss_fn(params, batch):
        return jnp.mean(apply(params, batch) ** 2)

    batch = jax.device_put(X, named_sharding(data_mesh, P("data"), 2))
    state = shardadam.TrainState.create(apply_fn=None, params=params, tx=shardadam.adam(1e-3, plan=plan), stage=stage)
    step = shardadam.make_train_step(loss_fn, state)
    compiled = step.lower(state, batch).compile()
    shardadam.assert_collectives(compiled, plan, stage=stage)
    in_scans = [op for op in shardadam.collectives(compiled) if op.times == LAYERS]
    assert [op.op for op in in_scans].count("reduce-scatter") == 2
    assert [op.op for op in in_scans].count("all-gather") == (4 if stage == 3 else 0)
    assert all("transpose" in op.source for op in in_scans if op.op == "reduce-scatter")  # JAX's name for backward.

    # No gradient of the whole model: beside its shards a device never needs a quarter of one.
    differentiate = jax.jit(shardadam.value_and_grad(loss_fn, plan, stage=stage))
    whole = sum(x.nbytes for x in jax.tree.leaves(params))
    memory = shardadam.memory(differentiate.lower(state.params, batch).compile())
    assert memory.temp_bytes + memory.output_bytes < whole / 4 + whole / 8

    wanted, grads = jax.value_and_grad(loss_fn)(params, X)
    _, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
