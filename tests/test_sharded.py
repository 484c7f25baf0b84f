"""`shardadam.shard`: any element-wise optax transformation in shards, equal to jitted optax; all others refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_mesh
from jax.sharding import PartitionSpec as P
from trees import SHAPES, assert_same_bits, by_path, collectives, logical, make_step, put, random_tree

import shardadam
from shardadam.elementwise import NotElementwise
from shardadam.planned import map_planned
from shardadam.slots import state_slots

pytestmark = pytest.mark.usefixtures("standard_promotion")

STEPS = 4
BITWISE = {
    "lion": optax.lion(1e-2),
    "adamax": optax.adamax(1e-2),
    "amsgrad": optax.amsgrad(1e-2),
    "radam": optax.radam(1e-2),
    "sgd": optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "adan": optax.adan(1e-2),
    "adabelief": optax.adabelief(1e-2),
    "rprop": optax.rprop(1e-2),
    "adamw": optax.adamw(optax.linear_schedule(1e-2, 0.0, 10)),
}
# An ulp now and then: XLA:CPU takes the other of two products into an FMA than in the program of one device.
CLOSE = {
    "rmsprop": optax.rmsprop(1e-2, centered=True, momentum=0.9),
    "adagrad": optax.adagrad(1e-2),
    "adadelta": optax.adadelta(1e-2),
    "signum": optax.signum(1e-2),
    "yogi": optax.yogi(1e-2),  # With jax 0.12 only.
}


@functools.cache
def reference(name):
    """(params, state) after STEPS steps of jitted optax on one device."""
    tx = {**BITWISE, **CLOSE}[name]
    params = jax.tree.map(jnp.array, random_tree(0))
    state, step = tx.init(params), make_step(tx)
    for t in range(STEPS):
        params, state = step(params, state, random_tree(1 + t))
    return params, state


def whole(state, plan):
    """The state's leaves as optax holds them."""
    leaves, treedef = jax.tree.flatten(state)

    def one(x, slot):
        if slot.leaf is None:
            return np.asarray(x)
        names = slot.path.split("/")
        return next(
            iter(by_path(logical(functools.reduce(lambda sub, key: {key: sub}, names[::-1], x), plan)).values())
        )

    return treedef.unflatten([one(*row) for row in zip(leaves, state_slots(state, plan), strict=True)])


def run(tx, mesh):
    params = put(random_tree(0), mesh)
    state, step = tx.init(params), make_step(tx)
    for t in range(STEPS):
        params, state = step(params, state, put(random_tree(1 + t), mesh))
    assert step._cache_size() == 1
    return params, state


def assert_close(got, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, wanted)


@pytest.mark.parametrize("num_devices", [8, 7])
@pytest.mark.parametrize("name", [*BITWISE, *CLOSE])
def test_equal_to_jitted_optax(name, num_devices):
    """8 devices with every layout, 7 with packed leaves; as a drop-in and in TrainState."""
    mesh = make_mesh({"data": num_devices})
    layout = "auto" if num_devices == 8 else "packed"
    plan = shardadam.make_plan(random_tree(0), mesh, layout=layout, min_size=0)
    tx = shardadam.shard({**BITWISE, **CLOSE}[name], plan=plan)
    wanted, wanted_state = reference(name)
    check = assert_same_bits if name in BITWISE else assert_close
    if num_devices == 8:
        params, state = run(tx, mesh)
    else:
        step = jax.jit(lambda s, g: s.apply_gradients(grads=g))
        train = shardadam.TrainState.create(apply_fn=None, params=put(random_tree(0), mesh), tx=tx)
        for t in range(STEPS):
            train = step(train, put(random_tree(1 + t), mesh))
        shardadam.audit(train, plan)
        params, state = train.params, train.opt_state
    assert jax.tree.structure(state) == jax.tree.structure(wanted_state)
    shardadam.audit(state, plan, accumulators=True)
    check(params, wanted)
    check(whole(state, plan), wanted_state)


def test_bytes_per_device_and_collectives_are_the_plans(data_mesh):
    params = put(random_tree(0), data_mesh)
    plan = shardadam.make_plan(params, data_mesh, min_size=0)
    tx = shardadam.shard(optax.adan(1e-2), plan=plan)
    state = tx.init(params)
    held = []
    map_planned(lambda leaf, x, path: held.append((x.addressable_shards[0].data.nbytes, leaf)), state, plan)
    assert len(held) == 4 * len(plan.leaves)  # Its m, v, n and g.
    assert all(nbytes == leaf.elements_per_device * 4 for nbytes, leaf in held)
    text = make_step(tx).lower(params, state, params).compile().as_text()
    assert [op for _, op in collectives(text)] == ["all-gather"] * sum(leaf.num_shards > 1 for _, leaf in plan.items)


REFUSED = {
    "lamb": (optax.lamb(1e-2), r"reduce_\w+` over `\w+` \(in scale_by_trust_ratio\)"),
    "lars": (optax.lars(1e-2), r"reduce_\w+` over `\w+` \(in scale_by_trust_ratio\)"),
    "clip": (optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-2)), r"`reduce_sum` over .*clip_by_global_norm"),
    "adafactor": (optax.adafactor(1e-2, min_dim_size_to_factor=8), r"`0/v_row` of `\w+` has shape \(.*\)"),
    "lbfgs": (optax.lbfgs(1e-2), r"of `bias` has shape \(10, 1300\), the parameter \(1300,\)"),
    "noise": (optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.sgd(1e-2)), r"meets an array .* \(in add_noise\)"),
    "centralize": (optax.chain(optax.centralize(), optax.sgd(1e-2)), r"`reduce_sum` over .*centralize"),
    "novograd": (optax.novograd(1e-2), r"`reduce_sum` over `\w+`"),
    "one of shardadam's own": (None, r"`\w+`: something within has"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_elementwise_is_refused_by_name(name, data_mesh):
    plan = shardadam.make_plan(random_tree(0), data_mesh, layout="natural", min_size=0)
    tx, message = REFUSED[name]
    tx = shardadam.shard(tx or optax.MultiSteps(shardadam.adam(1e-2, plan=plan), 2), plan=plan)
    with pytest.raises(NotElementwise, match=message):
        tx.init(random_tree(0))


def test_shardadams_own_are_not_sharded_twice():
    with pytest.raises(ValueError, match="in shards; wanted one of optax's"):
        shardadam.shard(shardadam.adam(1e-2))


def test_a_step_that_is_not_kept_changes_nothing(data_mesh):
    params, grads = put(random_tree(0), data_mesh), put(random_tree(1), data_mesh)
    plan = shardadam.make_plan(params, data_mesh, min_size=0)
    tx = shardadam.shard(optax.adagrad(1e-2, initial_accumulator_value=0.1), plan=plan)
    state = tx.init(params)
    broken = jax.tree.map(lambda g: g * np.float32(np.nan), grads)
    update = jax.jit(tx.update)
    assert_same_bits(update(broken, state, params, keep=jnp.bool_(False))[1], state)
    kept, plain = update(grads, state, params, keep=jnp.bool_(True)), update(grads, state, params)
    assert_close(kept[0], plain[0])
    assert_close(kept[1], plain[1])


def test_padding_is_zero_from_the_first_and_makes_no_nan(data_mesh):
    """adagrad starts at 0.1, rmsprop without eps divides 0 by 0: neither is seen in the padding."""
    params = {"odd": np.ones((17, 257), np.float32)}
    plan = shardadam.make_plan(params, data_mesh, layout="packed", min_size=0)
    leaf = plan.leaves["odd"]
    packed = {"odd": shardadam.pack(jnp.ones((17, 257)), 8)}
    for tx in (optax.adagrad(1e-2), optax.rmsprop(1e-2, eps=0.0), optax.scale_by_stddev(eps=0.0), optax.yogi(1e-2)):
        mine = shardadam.shard(tx, plan=plan)
        state = mine.init(params)
        for _ in range(2):
            updates, state = jax.jit(functools.partial(mine.update, shards_of=plan))(packed, state, packed)
            for x in jax.tree.leaves((updates, state)):
                assert x.ndim == 0 or not np.asarray(x).reshape(-1)[leaf.size :].any()


def test_what_it_makes_of_a_shape_is_what_optax_makes_of_it(data_mesh):
    """A mask on ndim, and a factor that counts elements: of the parameter's shape, not of the packed shard's."""

    def by_size(updates, params):
        del params
        return jax.tree.map(lambda g: g / g.size if g.ndim > 1 else g, updates)

    reference = optax.chain(optax.stateless(by_size), optax.trace(0.9))
    plan = shardadam.make_plan(random_tree(0), data_mesh, layout="packed", min_size=0)
    tx = shardadam.shard(reference, plan=plan)
    params, grads = random_tree(0), random_tree(1)
    wanted, _ = jax.jit(reference.update)(grads, reference.init(params))
    got, _ = jax.jit(tx.update)(put(grads, data_mesh), tx.init(params))
    assert_same_bits(got, wanted)


def test_without_a_mesh_it_is_the_transformation_itself():
    tx, params, grads = shardadam.shard(optax.lion(1e-2)), random_tree(0), random_tree(1)
    wanted = make_step(optax.lion(1e-2))(params, optax.lion(1e-2).init(params), grads)
    assert_same_bits(make_step(tx)(params, tx.init(params), grads), wanted)


def test_checkpoints_of_any_transformation(data_mesh, tmp_path):
    plan = shardadam.make_plan(random_tree(0), data_mesh, layout="packed", min_size=0)
    seven = make_mesh({"data": 7})
    other = shardadam.make_plan(random_tree(0), seven, min_size=0)
    params, state = run(shardadam.shard(optax.lion(1e-2), plan=plan), data_mesh)
    with shardadam.Checkpointer(tmp_path, plan=plan) as checkpointer:
        checkpointer.save(0, {"params": params, "opt_state": state}, wait=True)
    target = {
        "params": put(random_tree(0), seven),
        "opt_state": shardadam.shard(optax.lion(1e-2), plan=other).init(random_tree(0)),
    }
    with shardadam.Checkpointer(tmp_path, plan=other) as checkpointer:
        back = checkpointer.restore(target)
    assert_same_bits(whole(back["opt_state"], other), reference("lion")[1])
    assert set(SHAPES) == set(back["params"])


def by_size(state):
    """Specs for a factored state: what divides by eight is split on dim 0."""
    return jax.tree.map(lambda x: P("data") if x.ndim and x.shape[0] % 8 == 0 else P(), state)


def test_state_specs_place_what_is_not_elementwise(data_mesh):
    host = [random_tree(t) for t in range(3)]
    plan = shardadam.make_plan(host[0], data_mesh, min_size=0)
    reference = optax.adafactor(1e-2, min_dim_size_to_factor=8)
    tx = shardadam.shard(reference, plan=plan, state_specs=by_size)
    params = jax.tree.map(jnp.array, host[0])
    wanted, step = (params, reference.init(params)), make_step(reference)
    placed = put(host[0], data_mesh)
    got, my_step = (placed, tx.init(placed)), make_step(tx)
    train = shardadam.TrainState.create(apply_fn=None, params=placed, tx=tx)
    apply = jax.jit(lambda s, g: s.apply_gradients(grads=g))
    for grads in host[1:]:
        wanted, got = step(*wanted, grads), my_step(*got, put(grads, data_mesh))
        train = apply(train, put(grads, data_mesh))
    assert got[1][0].v_row["kernel"].addressable_shards[0].data.shape == (6,)
    assert got[0]["kernel"].sharding.is_fully_replicated
    assert_close(got, wanted)  # Reductions over shards add in another order.
    assert_close(train.params, wanted[0])


def test_state_specs_that_do_not_fit_are_named(data_mesh):
    plan = shardadam.make_plan(random_tree(0), data_mesh, min_size=0)
    uneven = shardadam.shard(optax.lion(1e-2), plan=plan, state_specs=P("data"))
    with pytest.raises(ValueError, match=r"state_specs: `0/count` has shape \(\), got .* of 1 dims"):
        uneven.init(random_tree(0))
    specs = optax.lion(1e-2).init(random_tree(0))[0]._replace(count=None, mu=P("data"))
    with pytest.raises(ValueError, match=r"state_specs: `0/mu/bias` has shape \(1300,\), of which .* does not divide"):
        shardadam.shard(optax.lion(1e-2), plan=plan, state_specs=(specs, None, None)).init(random_tree(0))
