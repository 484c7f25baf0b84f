"""`shardadam.TrainState`, and Flax's own TrainState and nnx.Optimizer with the drop-in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_mesh
from flax import nnx, struct
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from trees import adam_state, assert_same_bits, collectives, logical, put, random_tree

import shardadam
from shardadam.sharding import named_sharding

pytestmark = pytest.mark.usefixtures("standard_promotion")

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
TENSOR = {"kernel": P(None, "model"), "head": P("model")}


class Subclass(shardadam.TrainState):
    """As users extend it."""

    ema: jax.Array
    note: str = struct.field(pytree_node=False, default="none")


@functools.partial(jax.jit, donate_argnums=0)
def apply(state, grads):
    return state.apply_gradients(grads=grads)


def decay_matrices(tree):
    return jax.tree.map(lambda x: x.ndim > 1, tree)


REFERENCES = {
    "adam": optax.adam(1e-2),
    "adam with f32 mu": optax.adam(1e-2, mu_dtype=jnp.float32),
    "masked adamw": optax.adamw(1e-2, weight_decay=0.1, mask=decay_matrices),
}


@functools.cache
def reference_run(tx, dtype=jnp.float32, steps=6):
    """Flax's TrainState with optax on one device; once for each `tx` of REFERENCES."""
    tx = REFERENCES.get(tx, tx)
    state = train_state.TrainState.create(apply_fn=None, params=random_tree(0, dtype), tx=tx)
    step = jax.jit(lambda s, g: s.apply_gradients(grads=g))
    for t in range(steps):
        state = step(state, random_tree(1 + t, dtype))
    return state


def sharded_run(create, mesh, specs=None, dtype=jnp.float32, steps=6):
    state = create(put(random_tree(0, dtype), mesh, specs))
    for t in range(steps):
        state = apply(state, put(random_tree(1 + t, dtype), mesh, specs))
    return state


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("layout", ["natural", "packed"])
@pytest.mark.parametrize(("sizes", "specs"), [({"data": 8}, {}), ({"data": 4, "model": 2}, TENSOR)])
@pytest.mark.parametrize("cls", [shardadam.TrainState, train_state.TrainState])
def test_bit_identical_to_flax_with_optax(cls, sizes, specs, layout, axis_type):
    mesh = make_mesh(sizes, axis_type)
    placed = put(random_tree(0), mesh, specs)
    plan = shardadam.make_plan(placed, mesh, layout=layout, min_size=0)
    options = {"weight_decay": 0.1, "mask": decay_matrices}
    tx = shardadam.adamw(1e-2, plan=plan, **options)
    before = apply._cache_size()
    state = sharded_run(lambda params: cls.create(apply_fn=None, params=params, tx=tx), mesh, specs)
    wanted = reference_run("masked adamw")
    assert_same_bits(state.params, wanted.params)
    assert_same_bits(logical(adam_state(state.opt_state).mu, plan), adam_state(wanted.opt_state).mu)
    assert_same_bits(logical(adam_state(state.opt_state).nu, plan), adam_state(wanted.opt_state).nu)
    shardadam.audit(state, plan)
    assert jax.tree.map(lambda x: x.sharding, state.params) == jax.tree.map(lambda x: x.sharding, placed)
    # Flax's step starts as a Python int and becomes an array: that is its second program.
    assert apply._cache_size() - before == (1 if cls is shardadam.TrainState else 2)


@pytest.mark.parametrize("mu_dtype", [None, jnp.float32])
def test_bfloat16_parameters(mu_dtype, data_mesh):
    plan = shardadam.make_plan(random_tree(0, jnp.bfloat16), data_mesh, min_size=0)
    tx = shardadam.adam(1e-2, mu_dtype=mu_dtype, plan=plan)
    create = functools.partial(shardadam.TrainState.create, apply_fn=None, tx=tx)
    state = sharded_run(lambda params: create(params=params), data_mesh, dtype=jnp.bfloat16)
    assert_same_bits(state.params, reference_run("adam with f32 mu" if mu_dtype else "adam", jnp.bfloat16).params)


def test_within_a_chain_packed_leaves_keep_their_shape_for_the_others(data_mesh):
    """A mask on ndim above the optimizer must see the parameters' shapes: a packed bias is no matrix."""
    plan = shardadam.make_plan(random_tree(0), data_mesh, min_size=0)

    def chain(adam):
        return optax.chain(
            optax.masked(optax.scale(0.5), decay_matrices), adam, optax.add_decayed_weights(1e-3, decay_matrices)
        )

    tx = chain(shardadam.adam(1e-2, plan=plan))
    state = sharded_run(lambda p: shardadam.TrainState.create(apply_fn=None, params=p, tx=tx, plan=plan), data_mesh)
    wanted = reference_run(chain(optax.adam(1e-2)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), state.params, wanted.params)
    shardadam.audit(state, plan)


def test_clipping_by_global_norm_counts_no_padding(data_mesh):
    plan = shardadam.make_plan(random_tree(0), data_mesh, layout="packed", min_size=0)

    def chain(adam):
        return optax.chain(optax.clip_by_global_norm(0.1), adam)

    tx = chain(shardadam.adam(1e-2, eps=0.0, plan=plan))
    state = sharded_run(lambda p: shardadam.TrainState.create(apply_fn=None, params=p, tx=tx, plan=plan), data_mesh)
    wanted = reference_run(chain(optax.adam(1e-2, eps=0.0)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state.params, wanted.params)


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_one_all_gather_of_parameters_per_leaf_and_donation_complete(axis_type):
    mesh = make_mesh({"data": 8}, axis_type)
    params = put(random_tree(0), mesh)
    plan = shardadam.make_plan(params, mesh, min_size=0)
    state = shardadam.TrainState.create(apply_fn=None, params=params, tx=shardadam.adam(1e-2, plan=plan))
    compiled = apply.lower(state, params).compile()
    found = [op for _, op in collectives(compiled.as_text())]
    assert found == ["all-gather"] * sum(leaf.num_shards > 1 for leaf in plan.leaves.values())
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes == held
    # No tree of full-size updates: beside the gathered parameters, which alias, only shards of gradients.
    full = sum(leaf.size * 4 for leaf in plan.leaves.values() if leaf.num_shards > 1)
    largest = max(leaf.size * 4 for leaf in plan.leaves.values())
    assert compiled.memory_analysis().temp_size_in_bytes < full + 4 * largest


def test_created_from_whatever_params_and_by_whatever_plan(data_mesh):
    host = random_tree(0)
    plan = shardadam.make_plan(host, data_mesh)
    by_mesh, by_plan = shardadam.adam(1e-2, mesh=data_mesh), shardadam.adam(1e-2, plan=plan)
    hidden = optax.chain(optax.clip(1.0), by_plan)
    create = functools.partial(shardadam.TrainState.create, apply_fn=None)
    for state in (
        create(params=host, tx=by_mesh),
        create(params=jax.tree.map(jnp.asarray, host), tx=by_plan),
        create(params=put(host, data_mesh), tx=hidden),
        create(params=host, tx=hidden, plan=plan),
    ):
        assert state.plan == plan
        shardadam.audit(state, plan)
        assert all(x.sharding.mesh == data_mesh for x in jax.tree.leaves(state))
        assert state.step.dtype == jnp.int32
    with pytest.raises(ValueError, match=r"no plan: .*wanted plan=shardadam\.make_plan"):
        create(params=host, tx=hidden)
    with pytest.raises(shardadam.ShardingError, match=r"shardadam\.adam"):
        create(params=put(host, data_mesh), tx=optax.adam(1e-2), plan=plan)


def test_shardings_make_the_state_under_jit(data_mesh):
    host = random_tree(0)
    plan = shardadam.make_plan(host, data_mesh, min_size=0)
    tx = shardadam.adam(optax.constant_schedule(1e-2), plan=plan)

    def init(params):
        return shardadam.TrainState.create(apply_fn=None, params=params, tx=tx, plan=plan)

    shardings = jax.eval_shape(init, host).shardings
    state = jax.jit(init, out_shardings=shardings)(put(host, data_mesh))
    shardadam.audit(state, plan)
    eager = init(put(host, data_mesh))
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, eager)
    assert jax.tree.leaves(state.shardings) == jax.tree.leaves(shardings)
    assert isinstance(shardings, shardadam.TrainState)


def test_subclasses_and_extra_fields(data_mesh):
    params = put(random_tree(0), data_mesh)
    tx = shardadam.adam(1e-2, mesh=data_mesh)
    plan = shardadam.make_plan(params, data_mesh)
    ema = jax.device_put(jnp.zeros(()), NamedSharding(data_mesh, P()))
    state = Subclass.create(apply_fn=len, params=params, tx=tx, plan=plan, ema=ema, note="mine")
    state = jax.jit(lambda s, g: s.apply_gradients(grads=g, ema=s.ema + 1))(state, params)
    assert (float(state.ema), state.note, state.apply_fn, int(state.step)) == (1.0, "mine", len, 1)


def test_fp8_statistics_are_overwritten_by_their_gradients(data_mesh):
    host = {"w": np.ones((16, 8), np.float32)}
    plan = shardadam.make_plan(host, data_mesh, min_size=0)
    params = {"params": host, OVERWRITE_WITH_GRADIENT: {"scale": np.zeros(3, np.float32)}}
    state = shardadam.TrainState.create(apply_fn=None, params=params, tx=shardadam.adam(1e-2, plan=plan))
    grads = {"params": host, OVERWRITE_WITH_GRADIENT: {"scale": np.full(3, 7.0, np.float32)}}
    state = jax.jit(lambda s, g: s.apply_gradients(grads=g))(state, grads)
    np.testing.assert_array_equal(state.params[OVERWRITE_WITH_GRADIENT]["scale"], 7.0)
    np.testing.assert_allclose(state.params["params"]["w"], 0.99, rtol=1e-6)


def test_eager_apply_gradients(data_mesh):
    plan = shardadam.make_plan(random_tree(0), data_mesh, min_size=0)
    tx = shardadam.adam(1e-2, plan=plan)
    state = shardadam.TrainState.create(apply_fn=None, params=random_tree(0), tx=tx)
    state = state.apply_gradients(grads=random_tree(1))
    assert_same_bits(state.params, reference_run("adam", steps=1).params)
    shardadam.audit(state, plan)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(16, 64, rngs=rngs)
        self.rest = nnx.List([nnx.Linear(17, 257, rngs=rngs)])

    def __call__(self, x):
        return jnp.tanh(self.first(x)).sum() + (self.rest[0].kernel[...] ** 2).sum()


def nnx_run(tx, place, jitted):
    model = Model(nnx.Rngs(0))
    nnx.update(model, jax.tree.map(place, nnx.state(model)))
    optimizer = nnx.Optimizer(model, tx(model), wrt=nnx.Param)
    x = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)

    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(lambda m: m(x))(model))

    step = nnx.jit(step, donate_argnums=(0, 1)) if jitted else step
    for _ in range(3):
        step(model, optimizer, place(x))
    return model, optimizer


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("jitted", [True, False], ids=["jit", "eager"])
def test_nnx_optimizer(axis_type, jitted):
    mesh = make_mesh({"data": 8}, axis_type)

    def replicated(x):
        return jax.device_put(x, named_sharding(mesh, P(), x.ndim))

    plans = []

    def tx(model):
        plans.append(shardadam.make_plan(nnx.state(model, nnx.Param), mesh, min_size=0))
        return shardadam.adam(1e-2, plan=plans[0])

    with jax.set_mesh(mesh):  # JAX asks for it where an eager operation on Explicit axes has no sharded input.
        model, optimizer = nnx_run(tx, replicated, jitted)
    wanted, _ = nnx_run(lambda _: optax.adam(1e-2), jnp.asarray, jitted)
    for got, want in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(wanted)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
        assert got.sharding.is_fully_replicated
    assert set(plans[0].leaves) == {"first/bias", "first/kernel", "rest/0/bias", "rest/0/kernel"}
    shardadam.audit(nnx.as_pure(optimizer.opt_state), plans[0])


def test_what_does_not_fit_is_refused_before_it_is_packed(data_mesh):
    params = {"odd": np.ones((17, 257), np.float32)}
    state = shardadam.TrainState.create(apply_fn=None, params=params, tx=shardadam.adam(1e-2, mesh=data_mesh))
    good = np.ones((17, 257), np.float32)
    for grad in (good[:5], good.T, good.reshape(-1), np.float32(3)):
        with pytest.raises(ValueError, match=r"`odd`: got shape .*, the plan has \(17, 257\)"):
            state.apply_gradients(grads={"odd": grad})
    with pytest.raises(ValueError, match="`odd`: got shape"):
        state.replace(params={"odd": jnp.ones((5, 257))}).apply_gradients(grads={"odd": good})


def test_params_are_placed_by_the_plan_and_never_moved():
    mesh = make_mesh({"data": 4, "model": 2})
    host = random_tree(0)
    specs = {name: TENSOR.get(name) for name in host}
    plan = shardadam.make_plan(host, mesh, param_specs=specs, min_size=0)
    tx = shardadam.adam(1e-2, plan=plan)
    state = shardadam.TrainState.create(apply_fn=None, params=host, tx=tx)
    assert jax.tree.map(lambda x: x.sharding, state.params) == state.shardings.params
    before = apply._cache_size()
    for t in range(3):
        state = apply(state, put(random_tree(t), mesh, TENSOR))
    assert apply._cache_size() - before == 1
    with pytest.raises(ValueError, match=r"`head`: the parameter is sharded by .*, the plan has .*'model'"):
        shardadam.TrainState.create(apply_fn=None, params=put(host, mesh), tx=tx)


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("kind", ["MultiSteps", "ema"])
def test_accumulators_of_combinators_are_in_shards_and_compile_once(kind, axis_type):
    mesh = make_mesh({"data": 8}, axis_type)
    host = random_tree(0)
    plan = shardadam.make_plan(host, mesh, min_size=0)
    wrap = {"MultiSteps": lambda tx: optax.MultiSteps(tx, 2), "ema": lambda tx: optax.chain(tx, optax.ema(0.9))}[kind]
    tx = wrap(shardadam.adam(1e-2, plan=plan))
    before = apply._cache_size()
    create = functools.partial(shardadam.TrainState.create, apply_fn=None, tx=tx, plan=plan)
    state = sharded_run(lambda params: create(params=params), mesh, steps=4)
    assert apply._cache_size() - before == 1
    accumulated = optax.tree.get(state.opt_state, "acc_grads" if kind == "MultiSteps" else "ema")["kernel"]
    assert accumulated.addressable_shards[0].data.size == accumulated.size // 8
    wanted = reference_run(wrap(optax.adam(1e-2)), steps=4).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, wanted)
