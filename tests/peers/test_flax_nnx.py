"""What Flax documents of nnx.Optimizer, done with shardadam's Adam on eight devices and with optax's on one.

Flax's wheel ships no tests. Each test names the page of Flax's documentation whose behaviour it repeats.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import make_mesh
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import shardadam
from shardadam.plan import path_name
from shardadam.sharding import named_sharding

pytestmark = pytest.mark.usefixtures("standard_promotion")

X = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
Y = np.random.default_rng(1).standard_normal((8, 5)).astype(np.float32)
STEPS = 3


class Model(nnx.Module):
    """A layer whose dims divide by eight, one whose dims do not, and a counter that is no parameter."""

    def __init__(self, rngs, **options):
        self.first = nnx.Linear(16, 32, rngs=rngs, **options)
        self.last = nnx.Linear(32, 5, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x):
        self.calls[...] += 1
        return self.last(jnp.tanh(self.first(x)))


def loss_of(model, x):
    return jnp.mean((model(x) - Y) ** 2)


class Side:
    """One of the two sides: where a model's arrays are placed, and whose Adam optimizes them."""

    def __init__(self, mesh=None, layout=None):
        self.mesh, self.layout = mesh, layout

    def place(self, tree):
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return jax.tree.map(lambda x: jax.device_put(x, named_sharding(self.mesh, P(), jnp.ndim(x))), tree)

    def placed(self, model):
        nnx.update(model, self.place(nnx.state(model)))
        return model

    def plan(self, model, wrt=nnx.Param):
        return shardadam.make_plan(nnx.state(model, wrt), self.mesh, layout=self.layout, min_size=0)

    def adam(self, model, rate=1e-2, wrt=nnx.Param):
        return optax.adam(rate) if self.mesh is None else shardadam.adam(rate, plan=self.plan(model, wrt))


def side_on(axis_type, layout):
    mesh = make_mesh({"data": 8}, axis_type)
    with jax.set_mesh(mesh):
        yield Side(mesh, layout)


@pytest.fixture
def ours():
    yield from side_on(AxisType.Explicit, "packed")


@pytest.fixture
def natural():
    yield from side_on(AxisType.Auto, "natural")


def side_by_side(run, ours, in_shards=True):
    """`run(side)` returns (model, optimizer) on both sides."""
    (model, optimizer), (wanted, wanted_optimizer) = run(ours), on_one_device(run)
    assert int(optimizer.step[...]) == int(wanted_optimizer.step[...]) > 0
    assert_close(nnx.state(model), nnx.state(wanted))
    for x in jax.tree.leaves(nnx.state(model, nnx.Param)):
        assert len(x.sharding.device_set) == 8
        assert x.sharding.is_fully_replicated
    if in_shards:
        shardadam.audit(nnx.as_pure(optimizer.opt_state), ours.plan(model, optimizer.wrt))
    return model, optimizer


def on_one_device(run):
    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices()[:1]), ("one",))):
        return run(Side())


def assert_close(got, want):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def plain_step(model, optimizer, x):
    optimizer.update(model, nnx.grad(loss_of)(model, x))


nnx_step = nnx.jit(plain_step)


@jax.jit
def pure_step(graphdef, state, x):
    model, optimizer = nnx.merge(graphdef, state)
    plain_step(model, optimizer, x)
    return nnx.split((model, optimizer))


@pytest.mark.parametrize("where", ["ours", "natural"])
@pytest.mark.parametrize("how", ["eager", "nnx.jit", "jax.jit"])
def test_update_under_each_way_of_compiling(how, where, request):
    """Flax, "Optimizer" and "Flax NNX vs JAX Transformations": eager, nnx.jit, and jax.jit between split and merge."""

    def run(side):
        model = side.placed(Model(nnx.Rngs(0)))
        optimizer = nnx.Optimizer(model, side.adam(model), wrt=nnx.Param)
        x = side.place(X)
        if how == "jax.jit":
            graphdef, state = nnx.split((model, optimizer))
            for _ in range(STEPS):
                graphdef, state = pure_step(graphdef, state, x)
            return nnx.merge(graphdef, state)
        for _ in range(1 if how == "eager" else STEPS):
            (plain_step if how == "eager" else nnx_step)(model, optimizer, x)
        return model, optimizer

    model, _ = side_by_side(run, request.getfixturevalue(where))
    assert int(model.calls[...]) == (1 if how == "eager" else STEPS)


def test_what_update_returns_and_refuses(data_mesh):
    """Flax, "NNX 0.10 to NNX 0.11": `wrt` and the model are asked for; the old class is there."""
    side = Side(data_mesh, "packed")
    model = side.placed(Model(nnx.Rngs(0)))
    with pytest.raises(TypeError, match="wrt"):
        nnx.Optimizer(model, side.adam(model))
    optimizer = nnx.Optimizer(model, side.adam(model), wrt=nnx.Param)
    grads = nnx.grad(loss_of)(model, side.place(X))
    with pytest.raises(TypeError, match="grads"):
        optimizer.update(grads)
    with pytest.raises(AttributeError, match="ModelAndOptimizer"):
        _ = optimizer.model
    before = jax.device_get(nnx.as_pure(nnx.state(model, nnx.Param)))
    updates = optimizer.update(model, grads)
    after = nnx.as_pure(nnx.state(model, nnx.Param))
    assert_close(jax.tree.map(jnp.add, side.place(before), updates), after)

    old = side.placed(Model(nnx.Rngs(0)))
    both = nnx.ModelAndOptimizer(old, side.adam(old))
    both.update(grads)
    assert both.model is old
    assert_close(nnx.state(old, nnx.Param), nnx.state(model, nnx.Param))
    shardadam.audit(nnx.as_pure(both.opt_state), side.plan(old))


def test_split_merge_state_and_clone(ours):
    """Flax, "graph" and "Filters": an optimizer is a module like any other; its parts put together go on as it did."""

    def run(side):
        model = side.placed(Model(nnx.Rngs(0)))
        optimizer = nnx.Optimizer(model, side.adam(model), wrt=nnx.Param)
        nnx_step(model, optimizer, side.place(X))
        graphdef, opt_state, rest = nnx.split(optimizer, nnx.optimizer.OptState, ...)
        assert not jax.tree.leaves(rest)
        merged = nnx.clone(nnx.merge(graphdef, opt_state, rest))
        nnx.update(merged, nnx.state(optimizer))
        nnx_step(model, merged, side.place(X))
        assert int(optimizer.step[...]) == 1  # A clone's arrays are its own.
        return model, merged

    side_by_side(run, ours)


def only_kernels(path, _):
    return path[-1] == "kernel"


@pytest.mark.parametrize("wrt", [nnx.All(nnx.Param, only_kernels), nnx.LoRAParam, (nnx.Param, nnx.LoRAParam)])
def test_a_subset_of_the_variables(wrt, ours):
    """Flax, "Filters" and "A Flax Optimization Cookbook, Low Rank Adaptation": what `wrt` leaves out is not changed."""

    def run(side):
        model = Model(nnx.Rngs(0))
        model.first = nnx.LoRA(16, 2, 32, base_module=model.first, rngs=nnx.Rngs(1))
        side.placed(model)
        _, others = nnx.state(model, wrt, nnx.Param, ...)[:2]
        before = jax.device_get(others)
        optimizer = nnx.Optimizer(model, side.adam(model, wrt=wrt), wrt=wrt)

        @nnx.jit
        def step(model, optimizer, x):
            optimizer.update(model, nnx.grad(loss_of, argnums=nnx.DiffState(0, wrt))(model, x))

        for _ in range(2):
            step(model, optimizer, side.place(X))
        jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model, wrt, nnx.Param, ...)[1])
        return model, optimizer

    side_by_side(run, ours)


def test_an_average_of_the_weights_and_rates_by_the_kind_of_parameter(ours):
    """Flax, "A Flax Optimization Cookbook": an average of the weights; kernels and biases with their own Adam."""

    def run(side):
        model = side.placed(Model(nnx.Rngs(0)))
        params = nnx.state(model, nnx.Param)
        kinds = nnx.map_state(lambda path, _: path[-1], params)
        rates = {"kernel": side.adam(model, 1e-3), "bias": side.adam(model, 1e-2)}
        optimizer = nnx.Optimizer(model, optax.partition(rates, kinds), wrt=nnx.Param)
        average = jax.tree.map(jnp.copy, params)

        @nnx.jit
        def step(model, optimizer, average, x):
            plain_step(model, optimizer, x)
            return jax.tree.map(lambda a, new: 0.9 * a + 0.1 * new, average, nnx.state(model, nnx.Param))

        for _ in range(STEPS):
            average = step(model, optimizer, average, side.place(X))
        model.average = nnx.data(nnx.to_pure_dict(average)["first"]["kernel"])
        return model, optimizer

    model, optimizer = side_by_side(run, ours, in_shards=False)
    assert_moments_are_split(optimizer, ours.plan(model))


def assert_moments_are_split(optimizer, plan, names=("mu", "nu")):
    """Each array of the moments is an eighth on each device, where the plan says so; for states within combinators."""
    seen = 0
    for name in names:
        for _, moments in optax.tree.get_all_with_path(nnx.as_pure(optimizer.opt_state), name):
            for keypath, x in jax.tree_util.tree_leaves_with_path(moments):
                leaf = plan.leaf(path_name(keypath))
                assert {shard.data.size for shard in x.addressable_shards} == {leaf.elements_per_device}, keypath
                seen += leaf.num_shards == 8
    assert seen


def test_accumulated_gradients(ours):
    """Flax, "A Flax Optimization Cookbook, Gradient Accumulation": `optax.MultiSteps` around Adam."""

    def run(side):
        model = side.placed(Model(nnx.Rngs(0)))
        optimizer = nnx.Optimizer(model, optax.MultiSteps(side.adam(model), every_k_schedule=2), wrt=nnx.Param)
        for _ in range(4):
            nnx_step(model, optimizer, side.place(X))
        return model, optimizer

    model, optimizer = side_by_side(run, ours, in_shards=False)
    assert_moments_are_split(optimizer, ours.plan(model))


def test_the_state_is_sharded_other_than_the_parameters_without_a_ghost_model(ours):
    """Flax, "A Flax Optimization Cookbook, Sharding Optimization State Differently ...".

    There an abstract model with a sharding is made for the optimizer, and parameters, which drift to it, are brought
    back after every step. Here the state is in shards of its own accord, and the parameters stay (`side_by_side`).
    """
    model = ours.placed(Model(nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, ours.adam(model), wrt=nnx.Param)
    for _ in range(2):
        nnx_step(model, optimizer, ours.place(X))
        assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    mu = optimizer.opt_state[0].mu["first"]["kernel"][...]
    assert {shard.data.size for shard in mu.addressable_shards} == {
        ours.plan(model).leaves["first/kernel"].elements_per_device
    }
    assert mu.sharding.spec[0] == "data"


def test_sharding_metadata_of_parameters_on_a_model_axis():
    """Flax, "Scale up on multiple devices": a kernel's sharding metadata reaches the optimizer's state."""
    mesh = make_mesh({"data": 4, "model": 2})
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), sharding=(None, "model"))
    with jax.set_mesh(mesh):
        model = nnx.jit(lambda: Model(nnx.Rngs(0), kernel_init=init))()
        plan = shardadam.make_plan(nnx.state(model, nnx.Param), mesh, min_size=0)
        optimizer = nnx.Optimizer(model, shardadam.adam(1e-2, plan=plan), wrt=nnx.Param)
        for _ in range(STEPS):
            nnx_step(model, optimizer, X)
    specs = nnx.get_partition_spec(nnx.state(optimizer))
    assert specs["opt_state"][0]["mu"]["first"]["kernel"].get_value() == P(None, "model")  # What Flax knows of it.
    mu = optimizer.opt_state[0].mu["first"]["kernel"][...]
    assert mu.sharding.spec == P("data", "model")  # Where it is: over both axes.
    assert model.first.kernel[...].sharding.spec == P(None, "model")
    shardadam.audit(nnx.as_pure(optimizer.opt_state), plan)

    def reference(side):
        wanted = Model(nnx.Rngs(0))
        wanted_optimizer = nnx.Optimizer(wanted, side.adam(wanted), wrt=nnx.Param)
        for _ in range(STEPS):
            nnx_step(wanted, wanted_optimizer, X)
        return wanted

    assert_close(nnx.state(model), nnx.state(on_one_device(reference)))


def test_metrics_in_a_subclass(ours):
    """Flax, "MNIST tutorial" and "Metrics": a loss averaged beside the step, here by a subclass that is both."""

    class Measured(nnx.Optimizer):
        def __init__(self, model, tx, **options):
            self.loss = nnx.metrics.Average("loss")
            super().__init__(model, tx, **options)

        def update(self, model, grads, **values):
            self.loss.update(**values)
            return super().update(model, grads)

    def run(side):
        model = side.placed(Model(nnx.Rngs(0)))
        optimizer = Measured(model, side.adam(model), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x):
            value, grads = nnx.value_and_grad(loss_of)(model, x)
            optimizer.update(model, grads, loss=value)

        for _ in range(STEPS):
            step(model, optimizer, side.place(X))
        model.measured = nnx.Variable(optimizer.loss.compute())
        return model, optimizer

    side_by_side(run, ours)


def test_orbax_saves_and_restores_split_states(natural, tmp_path):
    """Flax, "Save and load checkpoints": the state of a split optimizer through Orbax, back into an abstract one."""

    def started():
        model = natural.placed(Model(nnx.Rngs(0)))
        return model, nnx.Optimizer(model, natural.adam(model), wrt=nnx.Param)

    model, optimizer = started()
    nnx_step(model, optimizer, natural.place(X))
    saved = nnx.state((model, optimizer))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.to_pure_dict(saved))
        checkpointer.wait_until_finished()
        fresh = started()
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), nnx.to_pure_dict(nnx.state(fresh))
        )
        restored = checkpointer.restore(tmp_path / "state", target)
    state = nnx.state(fresh)
    nnx.replace_by_pure_dict(state, restored)
    nnx.update(fresh, state)
    for pair in (fresh, (model, optimizer)):
        nnx_step(*pair, natural.place(X))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(fresh), nnx.state((model, optimizer)))
    shardadam.audit(nnx.as_pure(fresh[1].opt_state), natural.plan(fresh[0]))
