"""On every mesh: optax's bits, the plan's bytes, parameters that stay, and no collective but the plan's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import AUTO, EXPLICIT, KINDS, VARIANTS, compile_update, held_per_device, lay, one_device, row, traffic
from meshes_table import INTRO, OUTRO
from tables import DOCS
from trees import adam_state, assert_same_bits, logical, random_tree

import shardadam

pytestmark = pytest.mark.usefixtures("standard_promotion")
STEPS = 3
PAGE = (DOCS / "meshes.md").read_text()
# jax 0.12 contracts the sum of a parameter and its update in another way here, once `w_in` is (8, 32) on each device:
# 21 of 2048 elements are an ulp off. mu and nu are not.
AN_ULP_OFF = {("data x fsdp (HSDP)", "TrainState")}
REMATERIALIZED = "Involuntary full rematerialization"


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.case.name}, {v.types_name}")
def test_an_update_on_a_mesh(variant, capfd):
    laid = lay(variant)
    plan, mesh = laid.plan, laid.plan.mesh
    places = jax.tree.map(lambda x: x.sharding, laid.params)
    wanted, moments = one_device(variant.case.name, STEPS)
    compiled = {}
    for kind in KINDS:
        update = compile_update(laid, kind)
        compiled[kind] = update.compiled
        assert REMATERIALIZED not in capfd.readouterr().err
        assert_only_gathers_of_the_plan(update.compiled, plan)
        state = update.state
        for t in range(STEPS):
            state = update.advance(state, laid.place(random_tree(1 + t, shapes=variant.case.shapes)))
            params, opt_state = update.params_and_state(state)
            assert jax.tree.map(lambda x: x.sharding, params) == places
            assert held_per_device(adam_state(opt_state), mesh) == {plan.state_bytes_per_device()}
        shardadam.audit(opt_state, plan)
        if (variant.case.name, kind) in AN_ULP_OFF and jax.__version_info__ >= (0, 11):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2.5e-7, atol=1e-7), params, wanted)
        else:
            assert_same_bits(params, wanted)
        mine = adam_state(opt_state)
        assert_same_bits((logical(mine.mu, plan), logical(mine.nu, plan)), (moments.mu, moments.nu))
    assert row(variant, plan, compiled) in PAGE, "run ./scripts/tables"


def loss_of(params, x):
    """A loss in which every parameter takes part."""
    h = jnp.tanh(x @ params["embed"] @ params["w_in"]) @ params["w_out"]
    rest = sum(jnp.sum(w**2) for name, w in params.items() if name not in ("embed", "w_in", "w_out"))
    return jnp.mean(h**2) + rest / 1000


@pytest.mark.parametrize("name", ["data x fsdp (HSDP)", "data x fsdp x model", "data x expert"])
def test_gradients_that_are_reduced_there_train_as_on_one_device(name):
    """Within the order of sums; the plain meshes are in test_step.py."""
    laid = lay(next(variant for variant in VARIANTS if variant.case.name == name))
    batch = np.random.default_rng(5).standard_normal((16, 96)).astype(np.float32)
    tx = shardadam.adamw(1e-2, plan=laid.plan)
    state = shardadam.TrainState.create(apply_fn=None, params=laid.place(smaller(laid.params)), tx=tx)
    step = shardadam.make_train_step(loss_of, state)
    reference = optax.adamw(1e-2)
    params = jax.tree.map(jnp.asarray, smaller(laid.params))
    opt_state = reference.init(params)
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        loss, grads = jax.jit(jax.value_and_grad(loss_of))(params, batch)
        updates, opt_state = jax.jit(reference.update)(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state.params, params)
    assert jax.tree.map(lambda x: x.sharding, state.params) == jax.tree.map(lambda x: x.sharding, laid.params)


def smaller(params):
    return jax.tree.map(lambda x: np.asarray(x) / 4, params)


def assert_only_gathers_of_the_plan(compiled, plan):
    """One all-gather for each leaf that is split, over the axes it is split over, of just its shards' bytes."""
    found = traffic(compiled, plan)
    split = [leaf for leaf in plan.leaves.values() if leaf.num_shards > 1]
    assert {g.op for g in found} <= {"all-gather"}
    assert {axis for g in found for axis in g.axes} == {axis for leaf in split for axis in leaf.shard_axes}
    assert not {"model"} & {axis for g in found for axis in g.axes}
    assert sum(g.count for g in found) == len(split)
    sent = sum((leaf.num_shards - 1) * leaf.elements_per_device * leaf.dtype.itemsize for leaf in split)
    assert sum(g.num_bytes for g in found) == sent == shardadam.estimate_bytes(plan).gather_bytes
    # `assert_collectives` says the same, in its own way.
    shardadam.assert_collectives(compiled, plan, num_reductions=0, max_ratio=1.0)


def test_the_page_has_just_these_rows():
    assert PAGE.startswith(INTRO)
    assert PAGE.endswith(OUTRO)
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")][1:]
    assert [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in lines] == [
        (variant.case.name, variant.types_name) for variant in VARIANTS
    ]


def test_what_each_mesh_splits():
    """The layouts that the cases stand for are there: or the table would show something else than it says."""
    plans = {variant.case.name: lay(variant).plan for variant in VARIANTS if set(variant.types) == {AUTO}}
    for name, plan in plans.items():
        layouts = {leaf.layout for leaf in plan.leaves.values()}
        assert layouts == ({"natural"} if name == "fsdp alone" else {"natural", "packed", "whole"}), name
    fsdp = plans["fsdp alone"].leaves
    assert all(leaf.state_spec == leaf.param_spec and leaf.num_shards == 1 for leaf in fsdp.values())
    hsdp = plans["data x fsdp (HSDP)"].leaves
    assert hsdp["w_in"].param_spec == P("fsdp")
    assert hsdp["w_in"].shard_axes == ("data",)
    assert hsdp["bias"].shard_axes == ("data", "fsdp")
    assert plans["data x model"].leaves["odd"].state_spec == P(("model", "data"))
    assert plans["data x expert"].leaves["experts_out"].layout == "packed"
    assert plans["data x expert"].leaves["experts_out"].num_shards == 4


def test_axes_of_the_state_that_are_of_two_types_are_refused():
    mesh = make_mesh({"slice": 2, "data": 4}, (AUTO, EXPLICIT))
    with pytest.raises(ValueError, match="are of different axis types"):
        shardadam.make_plan({"w": np.zeros((64, 8), np.float32)}, mesh, axis_name=("slice", "data"))


def test_the_capture_sees_a_rematerialization(capfd):
    """Else its absence above would say nothing."""
    mesh = make_mesh({"data": 4, "model": 2})
    before, after = NamedSharding(mesh, P("data")), NamedSharding(mesh, P(None, "model"))
    moved = jax.jit(lambda x: jax.lax.with_sharding_constraint(jnp.sin(x), after) * 2, in_shardings=before)
    moved.lower(jnp.ones((16, 16))).compile()
    assert REMATERIALIZED in capfd.readouterr().err
