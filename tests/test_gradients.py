"""Gradients end as shards: equal to jax.value_and_grad of one device, with one reduce-scatter per leaf and no more."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from trees import collectives, logical, random_tree

import shardadam
from shardadam.sharding import map_leaves, named_sharding

SHAPES = {"embed": (64, 16), "odd": (17, 67), "bias": (16,), "layers": {"w": (3, 16, 48), "v": (3, 48, 16)}}
STACKED = {"embed": 0, "odd": 0, "bias": 0, "layers": 1}
TENSOR = {"embed": P(), "odd": P(), "bias": P(), "layers": {"w": P(None, None, "model"), "v": P(None, "model")}}
MESHES = {
    "data": ({"data": 8}, None, "data"),
    "seven": ({"data": 7}, None, "data"),
    "two axes": ({"slice": 2, "data": 4}, None, ("slice", "data")),
    "tensor": ({"data": 4, "model": 2}, TENSOR, "data"),
}


def host_tree():
    return jax.tree.map(lambda x: x / 4, random_tree(0, shapes=SHAPES))


def forward(params, x):
    h = x @ params["embed"]
    h = h + jnp.sum(params["odd"] ** 2) / 100 + params["bias"]

    def body(h, layer):
        layer = shardadam.gather(layer)
        return h + jnp.tanh(h @ layer["w"]) @ layer["v"], None

    return jax.lax.scan(jax.checkpoint(body), h, params["layers"])[0]


def mean_loss(params, batch):
    return jnp.mean(forward(params, batch) ** 2)


def weighted_loss(params, batch):
    rows = jnp.sum(forward(params, batch) ** 2, axis=1)
    mask = (batch[:, 0] > 0).astype(rows.dtype)
    return jnp.sum(rows * mask), jnp.sum(mask)


def weighted_mean_loss(params, batch):
    """What `weighted_loss` means where nothing is split."""
    total, weight = weighted_loss(params, batch)
    return total / weight


def batch_of(mesh, rows=56):
    x = np.random.default_rng(9).standard_normal((rows, 64)).astype(np.float32)
    return x if mesh is None else jax.device_put(x, named_sharding(mesh, P(), 2))


def planned(name, layout="auto"):
    sizes, specs, axis_name = MESHES[name]
    mesh = make_mesh(sizes)
    params = host_tree()
    plan = shardadam.make_plan(
        params, mesh, axis_name=axis_name, param_specs=specs, layout=layout, min_size=32, stacked_dims=STACKED
    )

    def place(leaf, x, path):
        return jax.device_put(x, named_sharding(mesh, leaf.param_spec, x.ndim))

    return plan, map_leaves(place, params, plan)


def assert_close(grads, wanted, plan):
    got = logical(grads, plan)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got, wanted)


@pytest.mark.parametrize("layout", ["natural", "packed"])
@pytest.mark.parametrize("name", MESHES)
def test_equal_to_one_device_and_in_the_layout_of_the_state(name, layout):
    plan, params = planned(name, layout)
    loss, wanted = jax.value_and_grad(mean_loss)(host_tree(), batch_of(None))
    got, grads = jax.jit(shardadam.value_and_grad(mean_loss, plan))(params, batch_of(plan.mesh))
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    assert_close(grads, wanted, plan)

    def placed(leaf, g, path):
        assert g.shape == leaf.state_shape
        assert g.sharding.is_equivalent_to(NamedSharding(plan.mesh, leaf.state_spec), g.ndim), path

    map_leaves(placed, grads, plan)


def test_weights_of_uneven_parts_count(data_mesh):
    plan, params = planned("data")
    loss, wanted = jax.value_and_grad(weighted_mean_loss)(host_tree(), batch_of(None))
    for options in ({}, {"num_microbatches": 7}, {"num_microbatches": 7, "accumulate": "local"}):
        got, grads = jax.jit(shardadam.value_and_grad(weighted_loss, plan, **options))(params, batch_of(plan.mesh))
        np.testing.assert_allclose(got, loss, rtol=1e-5)
        assert_close(grads, wanted, plan)


@pytest.mark.parametrize("collective", ["joint", "per_axis"])
def test_collectives_over_two_axes_give_the_same_shards(collective):
    plan, params = planned("two axes", "packed")
    _, wanted = jax.value_and_grad(mean_loss)(host_tree(), batch_of(None))
    f = jax.jit(shardadam.value_and_grad(mean_loss, plan, collective=collective))
    assert_close(f(params, batch_of(plan.mesh))[1], wanted, plan)
    found = [op for _, op in collectives(f.lower(params, batch_of(plan.mesh)).compile().as_text())]
    split = sum(leaf.num_shards > 1 for leaf in plan.leaves.values())
    assert found.count("reduce-scatter") == split * (2 if collective == "per_axis" else 1)


@pytest.mark.parametrize(("name", "layout"), [("data", "natural"), ("data", "packed"), ("tensor", "packed")])
def test_one_reduce_scatter_per_leaf_inside_the_backward_scan(name, layout):
    plan, params = planned(name, layout)
    x = jax.device_put(batch_of(None), named_sharding(plan.mesh, P("data"), 2))
    text = jax.jit(shardadam.value_and_grad(mean_loss, plan)).lower(params, x).compile().as_text()
    lines = collectives(text)
    split = sum(leaf.num_shards > 1 for leaf in plan.leaves.values())
    assert [op for _, op in lines].count("reduce-scatter") == split
    assert not {op for _, op in lines} & {"all-gather", "all-to-all", "collective-permute"}
    layer = plan.leaves["layers/w"]
    # Of one layer, not of the stack: it is reduced inside the scan.
    sizes = [
        np.prod([int(d) for d in re.findall(r"\d+", s.split("[")[1].split("]")[0])]) for s, op in lines if op[0] == "r"
    ]
    assert layer.elements_per_device // 3 in sizes
    assert layer.elements_per_device not in sizes


def test_aux_is_averaged_and_the_batch_is_checked(data_mesh):
    plan, params = planned("data")
    f = jax.jit(shardadam.value_and_grad(lambda p, b: (mean_loss(p, b), {"x": jnp.mean(b)}), plan, has_aux=True))
    (_, aux), _ = f(params, batch_of(plan.mesh))
    np.testing.assert_allclose(aux["x"], batch_of(None).mean(), rtol=1e-4, atol=1e-6)
    narrow = {"true": jnp.array(True), "large": jnp.float16(3e4), "few": jnp.int8(100)}
    g = shardadam.value_and_grad(lambda p, b: (mean_loss(p, b), narrow), plan, has_aux=True, num_microbatches=7)
    (_, aux), _ = jax.jit(g)(params, batch_of(plan.mesh))
    for name, x in narrow.items():
        np.testing.assert_allclose(aux[name], np.float32(x), rtol=1e-6)
    with pytest.raises(ValueError, match=r"batch: got shape \(55, 64\), wanted a leading dim that divides by 8"):
        f(params, batch_of(None, 55))
    with pytest.raises(ValueError, match=r"batch: got shape \(0, 64\)"):
        f(params, batch_of(None)[:0])
    for options in ({"num_microbatches": 0}, {"accumulate": "no"}, {"collective": "no"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            shardadam.value_and_grad(mean_loss, plan, **options)


BAD_LOSSES = {
    "a weight for each row": (lambda h: (jnp.sum(h), jnp.ones(len(h))), False, r"float32\[\], float32\[7\]"),
    "a weight of one row": (lambda h: (jnp.sum(h), jnp.ones(1)), False, r"float32\[\], float32\[1\]"),
    "no sum": (lambda h: jnp.sum(h, axis=1), False, r"float32\[7\]"),
    "three": (lambda h: (jnp.sum(h), 1.0, 2.0), False, r"float32\[\], 1.0, 2.0"),
    "a list": (lambda h: [jnp.sum(h), 1.0], False, r"a loss of \["),
    "aux unsaid": (lambda h: (jnp.mean(h), {"h": 1.0}), False, r"float32\[\], {'h': 1.0}"),
    "nothing": (lambda h: None, False, "a loss of None"),
    "no aux": (jnp.mean, True, r"got float32\[\], wanted \(loss, aux\)"),
}


@pytest.mark.parametrize("kind", BAD_LOSSES)
def test_what_is_no_loss_is_refused(kind, data_mesh):
    bad, has_aux, said = BAD_LOSSES[kind]
    plan, params = planned("data")
    batch = batch_of(None)
    f = shardadam.value_and_grad(lambda p, b: bad(forward(p, b)), plan, has_aux=has_aux)
    with pytest.raises(ValueError, match=f"loss_fn: got .*{said.removeprefix('got ')}"):
        jax.eval_shape(f, params, batch)
    if not has_aux:
        with pytest.raises(ValueError, match="loss_fn: got a loss of"):
            jax.eval_shape(shardadam.total_and_weight(lambda p, b: bad(forward(p, b)), plan), params, batch)


FORGOTTEN = {
    "an operand": lambda h, w: h @ w,
    "on the left": lambda h, w: 2 * (w * h),
    "of a function": jnp.dot,
    "an index": lambda h, w: h * w[0, 0],
    "an attribute": lambda h, w: h @ w.T,
}


@pytest.mark.parametrize("kind", FORGOTTEN)
def test_a_stacked_leaf_that_is_not_gathered_says_so(kind, data_mesh):
    params = {"layers": {"w": jax.ShapeDtypeStruct((3, 64, 64), jnp.float32)}}
    plan = shardadam.make_plan(params, data_mesh, stacked_dims=1)

    def loss(params, x):
        return jnp.mean(jax.lax.scan(lambda h, layer: (FORGOTTEN[kind](h, layer["w"]), None), x, params["layers"])[0])

    with pytest.raises(
        (TypeError, AttributeError), match=r"`layers/w`: got a stacked leaf .*shardadam\.gather\(layer\)"
    ):
        jax.eval_shape(shardadam.value_and_grad(loss, plan), params, jax.ShapeDtypeStruct((8, 64), jnp.float32))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_penalty_of_stacked_leaves_that_are_not_gathered_is_not_finite(stage, data_mesh):
    plan, params = planned("data")

    def penalized(params, batch, gather):
        squares = [jnp.sum(x**2) for x in jax.tree.leaves(gather(params))]
        return mean_loss(params, batch) + sum(squares) / 100

    given = shardadam.pack_params(params, plan) if stage == 3 else params

    def differentiated(gather):
        loss_fn = functools.partial(penalized, gather=gather)
        return jax.jit(shardadam.value_and_grad(loss_fn, plan, stage=stage))(given, batch_of(data_mesh))

    assert not jnp.isfinite(differentiated(lambda params: params)[0])
    loss, grads = differentiated(shardadam.gather)
    wanted, expected = jax.value_and_grad(penalized)(host_tree(), batch_of(None), shardadam.gather)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert_close(grads, expected, plan)


def test_a_plan_without_devices_is_refused_where_there_are_some(data_mesh):
    plan = shardadam.make_plan({"w": jax.ShapeDtypeStruct((16, 64), jnp.float32)}, {"data": 8})
    before = shardadam.value_and_grad(mean_loss, plan), shardadam.total_and_weight(mean_loss, plan)
    params, batch = {"w": np.ones((16, 64), np.float32)}, np.ones((8, 16), np.float32)
    calls = [functools.partial(shardadam.value_and_grad, mean_loss, plan)]
    calls += [functools.partial(f, params, batch) for f in before]
    for call in calls:
        with jax.set_mesh(data_mesh), pytest.raises(ValueError, match=r"plan: made without devices, for \{'data': 8\}"):
            call()
