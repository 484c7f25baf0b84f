"""The drop-in against optax: the same bits, the same types, on every kind of mesh, from inside the user's own jit."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_mesh
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from trees import SHAPES, adam_state, assert_same_bits, collectives, logical, make_step, put, random_tree

import shardadam
from shardadam.layout import entries
from shardadam.rates import said_rates

pytestmark = pytest.mark.usefixtures("standard_promotion")

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MESHES = {
    "data": ({"data": 8}, {}),
    "seven": ({"data": 7}, {}),
    "tensor": ({"data": 4, "model": 2}, {"kernel": P(None, "model"), "head": P("model"), "odd": P()}),
    "fsdp": ({"data": 8}, {"kernel": P("data"), "layers": P(None, None, "data")}),
    "hsdp": ({"data": 2, "fsdp": 4}, {"kernel": P("fsdp"), "layers": P(None, "fsdp")}),
}
STEPS = 50


def run(tx, params, opt_state, gradients, step=None):
    step = step or make_step(tx, donate_argnums=(0, 1))
    for grads in gradients:
        params, opt_state = step(params, opt_state, grads)
    return params, opt_state, step


def assert_equals_optax(mesh, specs, reference, tx, plan, *, dtype=jnp.float32, steps=STEPS):
    """Params, mu and nu bit for bit; the state where the plan says; the parameters where they were; one compilation."""
    host = [random_tree(1 + t, dtype) for t in range(5)]
    gradients = [host[t % 5] for t in range(steps)]
    placed = [put(g, mesh, specs) for g in host]
    # Its own copies: the step donates its arguments, and zero-copy would let it write to ours.
    params = jax.tree.map(jnp.array, random_tree(0, dtype))
    wanted, wanted_state, _ = run(reference, params, reference.init(params), gradients)
    params = put(random_tree(0, dtype), mesh, specs)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    opt_state = tx.init(params)
    shardadam.audit(opt_state, plan)
    got, got_state, step = run(tx, params, opt_state, [placed[t % 5] for t in range(steps)])
    assert_same_bits(got, wanted)
    mine, theirs = adam_state(got_state), adam_state(wanted_state)
    assert_same_bits(logical(mine.mu, plan), theirs.mu)
    assert_same_bits(logical(mine.nu, plan), theirs.nu)
    assert int(mine.count) == int(theirs.count) == steps
    shardadam.audit(got_state, plan)
    assert jax.tree.map(lambda x: x.sharding, got) == shardings
    assert step._cache_size() == 1


DTYPES = {
    "f32": (jnp.float32, None),
    "bf16": (jnp.bfloat16, None),
    "f32 with bf16 mu": (jnp.float32, jnp.bfloat16),
    "bf16 with f32 mu": (jnp.bfloat16, jnp.float32),
}


@pytest.mark.parametrize("name", ["adam", "adamw", "nadam", "nadamw"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_bit_identical_to_jitted_optax(name, dtypes, data_mesh):
    dtype, mu_dtype = DTYPES[dtypes]
    plan = shardadam.make_plan(random_tree(0, dtype), data_mesh, min_size=0)
    assert {leaf.layout for leaf in plan.leaves.values()} == {"natural", "packed", "whole"}
    reference = getattr(optax, name)(1e-2, mu_dtype=mu_dtype)
    tx = getattr(shardadam, name)(1e-2, mu_dtype=mu_dtype, plan=plan)
    assert_equals_optax(data_mesh, {}, reference, tx, plan, dtype=dtype)


@pytest.mark.parametrize("layout", ["natural", "packed"])
@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", MESHES)
def test_bit_identical_on_every_mesh(name, axis_type, layout):
    sizes, specs = MESHES[name]
    mesh = make_mesh(sizes, axis_type)
    plan = shardadam.make_plan(put(random_tree(0), mesh, specs), mesh, layout=layout, min_size=0)
    assert_equals_optax(mesh, specs, optax.adamw(1e-2), shardadam.adamw(1e-2, plan=plan), plan, steps=10)


@pytest.mark.parametrize("layout", ["natural", "packed"])
@pytest.mark.parametrize("name", ["data", "tensor"])
def test_bit_identical_where_layers_are_stacked(name, layout):
    sizes, specs = MESHES[name]
    mesh = make_mesh(sizes)
    stacked = dict.fromkeys(SHAPES, 0) | {"layers": 1, "kernel": 1}
    params = put(random_tree(0), mesh, specs)
    plan = shardadam.make_plan(params, mesh, layout=layout, min_size=0, stacked_dims=stacked)
    assert not any(entries(plan.leaves[path].state_spec, 2)[0] for path in ("kernel", "layers/w") if not specs)
    assert_equals_optax(mesh, specs, optax.adamw(1e-2), shardadam.adamw(1e-2, plan=plan), plan, steps=10)


@pytest.mark.parametrize("types", [(AUTO, EXPLICIT), (EXPLICIT, AUTO)], ids=["explicit model", "explicit data"])
def test_bit_identical_on_mixed_meshes(types):
    sizes, specs = MESHES["tensor"]
    mesh = make_mesh(sizes, types)
    # Of a spec on a mixed mesh, types show the Explicit part and shardings the whole: the plan has it by name.
    by_name = {name: specs.get(name) for name in SHAPES}
    plan = shardadam.make_plan(random_tree(0), mesh, param_specs=by_name, min_size=0)
    host = [random_tree(t) for t in range(4)]
    params = jax.tree.map(jnp.array, host[0])
    wanted, _, _ = run(optax.adam(1e-2), params, optax.adam(1e-2).init(params), host[1:])
    placed = [put(x, mesh, specs) for x in host]
    tx = shardadam.adam(1e-2, plan=plan)
    got, state, step = run(tx, placed[0], tx.init(placed[0]), placed[1:])
    assert_same_bits(got, wanted)
    shardadam.audit(state, plan)
    assert step._cache_size() == 1
    for name, spec in specs.items():
        assert got[name].sharding.is_equivalent_to(NamedSharding(mesh, spec), got[name].ndim)


def test_complex_parameters(data_mesh):
    plan = shardadam.make_plan(random_tree(0, jnp.complex64), data_mesh, min_size=0)
    assert_equals_optax(
        data_mesh, {}, optax.adam(1e-2), shardadam.adam(1e-2, plan=plan), plan, dtype=jnp.complex64, steps=5
    )


def test_half_precision_parameters(data_mesh):
    """Not to the bit: on one device XLA keeps float16 intermediates in float32, the gather rounds them to float16."""
    host = [random_tree(t, jnp.float16) for t in range(6)]
    plan = shardadam.make_plan(host[0], data_mesh, min_size=0)
    reference, tx = optax.adam(1e-2, eps=1e-3), shardadam.adam(1e-2, eps=1e-3, plan=plan)
    wanted, theirs, _ = run(reference, jax.tree.map(jnp.array, host[0]), reference.init(host[0]), host[1:])
    got, mine, _ = run(tx, put(host[0], data_mesh), tx.init(host[0]), [put(g, data_mesh) for g in host[1:]])
    assert_same_bits(logical(mine[0].mu, plan), theirs[0].mu)
    assert_same_bits(logical(mine[0].nu, plan), theirs[0].nu)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), got, wanted)


def test_without_a_mesh_it_is_optax():
    params, grads = random_tree(0), random_tree(1)
    tx, reference = shardadam.adamw(1e-2), optax.adamw(1e-2)
    one = shardadam.adamw(1e-2, mesh=make_mesh({"data": 1}))
    assert jax.tree.structure(tx.init(params)) == jax.tree.structure(reference.init(params))
    wanted = make_step(reference)(params, reference.init(params), grads)
    assert_same_bits(make_step(tx)(params, tx.init(params), grads), wanted)
    assert_same_bits(make_step(one)(params, one.init(params), grads), wanted)


def placed_on(mesh):
    """Parameters as users have them, by kind."""
    host = random_tree(0)
    replicated = put(host, mesh)
    return {
        "numpy": host,
        "uncommitted": jax.tree.map(jnp.asarray, host),
        "replicated": replicated,
        "abstract": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), host),
        "abstract, placed": jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), replicated
        ),
    }


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_init_of_whatever_params_gives_the_same_sharded_zeros(axis_type):
    mesh = make_mesh({"data": 8}, axis_type)
    plan = shardadam.make_plan(random_tree(0), mesh)
    tx, ambient, planned = shardadam.adam(1e-3, mesh=mesh), shardadam.adam(1e-3), shardadam.adam(1e-3, plan=plan)
    wanted = jax.tree.structure(optax.adam(1e-3).init(random_tree(0)))
    for kind, params in placed_on(mesh).items():
        with jax.set_mesh(mesh):
            states = [
                tx.init(params),
                planned.init(params),
                ambient.init(params),
                jax.jit(lambda p=params: planned.init(p))(),
            ]
            if not kind.startswith("abstract"):
                states.append(jax.jit(planned.init)(params))
        for state in states:
            assert jax.tree.structure(state) == wanted, kind
            assert isinstance(state[0], optax.ScaleByAdamState)
            shardadam.audit(state, plan)
            assert not any(np.asarray(x).any() for x in jax.tree.leaves(state)), kind
            assert state[0].count.sharding.is_fully_replicated


def test_abstract_and_placeholder_init(data_mesh):
    params = random_tree(0)
    plan = shardadam.make_plan(params, data_mesh)
    tx = shardadam.adam(1e-3, plan=plan)
    abstract = jax.eval_shape(tx.init, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
        lambda x: (x.shape, x.dtype), tx.init(params)
    )
    state = tx.init(params)
    marked = optax.tree.map_params(tx, lambda _: "moment", state, transform_non_params=lambda _: "other")
    assert set(jax.tree.leaves(marked[0].mu)) == set(jax.tree.leaves(marked[0].nu)) == {"moment"}
    assert marked[0].count == "other"
    assert optax.tree.get(state, "mu").keys() == params.keys()


def test_a_plan_made_on_a_laptop_is_used_on_the_mesh(data_mesh):
    params = random_tree(0)
    plan = shardadam.make_plan(params, {"data": 8}, min_size=0)
    bound = shardadam.make_plan(params, data_mesh, min_size=0)
    tx = shardadam.adam(1e-2, plan=plan, mesh=data_mesh)
    shardadam.audit(tx.init(params), bound)
    with jax.set_mesh(data_mesh):
        shardadam.audit(shardadam.adam(1e-2, plan=plan).init(params), bound)
    with pytest.raises(ValueError, match=r"made for the mesh {'data': 8}, used on {'data': 4}; plan again"):
        shardadam.adam(1e-2, plan=plan, mesh=make_mesh({"data": 4})).init(params)


def test_donation_aliases_params_mu_and_nu(data_mesh):
    params = put(random_tree(0), data_mesh)
    plan = shardadam.make_plan(params, data_mesh, min_size=0)
    tx = shardadam.adam(1e-2, plan=plan)
    state = tx.init(params)
    compiled = make_step(tx, donate_argnums=(0, 1)).lower(params, state, params).compile()
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((params, state)))
    assert compiled.memory_analysis().alias_size_in_bytes == held
    before = [x for x in jax.tree.leaves((params, state)) if x.size]
    make_step(tx, donate_argnums=(0, 1))(params, state, put(random_tree(1), data_mesh))
    assert all(x.is_deleted() for x in before)


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_one_all_gather_per_sharded_leaf_and_nothing_else(axis_type):
    mesh = make_mesh({"data": 8}, axis_type)
    params = put(random_tree(0), mesh)
    plan = shardadam.make_plan(params, mesh, min_size=0)
    tx = shardadam.adam(1e-2, plan=plan)
    text = make_step(tx).lower(params, tx.init(params), params).compile().as_text()
    found = [op for _, op in collectives(text)]
    assert found == ["all-gather"] * sum(leaf.num_shards > 1 for leaf in plan.leaves.values())


def test_no_collective_over_the_model_axis_in_the_update():
    sizes, specs = MESHES["tensor"]
    mesh = make_mesh(sizes)
    params = put(random_tree(0), mesh, specs)
    plan = shardadam.make_plan(params, mesh, min_size=0)
    tx = shardadam.adam(1e-2, plan=plan)
    text = make_step(tx).lower(params, tx.init(params), params).compile().as_text()
    groups = [replica_groups(line, mesh.size) for line in text.splitlines() if collectives(line)]
    along_data = {tuple(device.id for device in column) for column in mesh.devices.T}
    assert len(groups) == sum(leaf.num_shards > 1 for leaf in plan.leaves.values())
    assert all(set(group) == along_data for group in groups)


def replica_groups(line, num_devices):
    """The devices that talk to each other, from any of the three forms in which XLA prints them."""
    if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = [int(size) for size in re.findall(r"=(\d+)", named[1])]
        chosen = [i for i, axis in enumerate(re.findall(r"'(\w+)'=", named[1])) if f"'{axis}'" in named[2]]
        ids = np.moveaxis(np.arange(num_devices).reshape(sizes), chosen, range(-len(chosen), 0))
        return [tuple(map(int, row)) for row in ids.reshape(-1, int(np.prod([sizes[i] for i in chosen])))]
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        ids = np.arange(num_devices).reshape([int(d) for d in iota[3].split(",")])
        ids = ids.transpose([int(d) for d in iota[4].split(",")]) if iota[4] else ids
        return [tuple(map(int, row)) for row in ids.reshape(int(iota[1]), int(iota[2]))]
    listed = re.search(r"replica_groups=\{\{(.*?)\}\}", line)
    return [tuple(int(d) for d in group.split(",")) for group in listed[1].split("},{")]


def test_schedules_counters_and_array_hyperparameters(data_mesh):
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 3, 10)
    params, gradients = random_tree(0), [random_tree(1 + t) for t in range(6)]
    plan = shardadam.make_plan(params, data_mesh, min_size=0)
    placed = put(params, data_mesh), [put(g, data_mesh) for g in gradients]
    b1, eps = jnp.float32(0.8), np.float32(1e-6)
    for rate, options in [
        (schedule, {}),
        (jnp.float32(1e-2), {"b1": b1}),
        (schedule, {"b1": b1, "b2": jnp.float32(0.9), "eps": eps, "eps_root": jnp.float32(1e-8)}),
    ]:
        reference, tx = optax.adam(rate, **options), shardadam.adam(rate, plan=plan, **options)
        wanted, _, _ = run(reference, jax.tree.map(jnp.array, params), reference.init(params), gradients)
        got, state, step = run(tx, jax.tree.map(jnp.copy, placed[0]), tx.init(placed[0]), placed[1])
        assert_same_bits(got, wanted)
        shardadam.audit(state, plan)
        assert step._cache_size() == 1


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_a_step_that_is_not_kept_changes_nothing_and_one_that_is_keeps_the_bits(name, data_mesh):
    params, grads = random_tree(0), random_tree(1)
    plan = shardadam.make_plan(params, data_mesh, min_size=0)
    rate = optax.linear_schedule(1e-2, 0.0, 10)
    reference, tx = getattr(optax, name)(rate), getattr(shardadam, name)(rate, plan=plan)
    assert tx.takes_keep

    @jax.jit
    def step(params, state, grads, keep):
        updates, state = tx.update(grads, state, params, keep=keep)
        return optax.apply_updates(params, updates), state

    wanted = make_step(reference)(params, reference.init(params), grads)
    with said_rates() as said:
        got, state = step(put(params, data_mesh), tx.init(params), put(grads, data_mesh), jnp.bool_(True))
    assert said == [rate]
    assert_same_bits(got, wanted[0])
    assert_same_bits(logical(state[0].nu, plan), wanted[1][0].nu)
    broken = jax.tree.map(lambda g: np.full_like(g, np.nan), grads)
    assert_same_bits(step(got, state, put(broken, data_mesh), jnp.bool_(False)), (got, state))
    text = step.lower(got, state, put(grads, data_mesh), jnp.bool_(True)).compile().as_text()
    assert " conditional(" not in text
    one = getattr(shardadam, name)(rate)  # Without a mesh, too.
    kept = jax.jit(one.update)(broken, wanted[1], wanted[0], keep=jnp.bool_(False))
    assert_same_bits(kept, (jax.tree.map(np.zeros_like, params), wanted[1]))


@pytest.mark.parametrize("inner", ["adam", "adamw"])
def test_inject_hyperparams(inner, data_mesh):
    params, grads = random_tree(0), random_tree(1)
    plan = shardadam.make_plan(params, data_mesh, min_size=0)
    options = {"learning_rate": optax.linear_schedule(1e-2, 0.0, 10), "b1": 0.8}
    reference = optax.inject_hyperparams(getattr(optax, inner))(**options)
    wanted, _, _ = run(reference, jax.tree.map(jnp.array, params), reference.init(params), [grads] * 4)
    mine = optax.inject_hyperparams(getattr(shardadam, inner))
    by_mesh = optax.inject_hyperparams(getattr(shardadam, inner), static_args=("mesh",))
    replicated, same = put(params, data_mesh), put(grads, data_mesh)
    got, state, _ = run(
        mine(**options, plan=plan),
        jax.tree.map(jnp.copy, replicated),
        mine(**options, plan=plan).init(replicated),
        [same] * 4,
    )
    assert_same_bits(got, wanted)
    shardadam.audit(state, plan)
    assert by_mesh(**options, mesh=data_mesh).init(replicated).inner_state[0].mu["kernel"].sharding.spec == P("data")
    with pytest.raises(ValueError, match=r"inject_hyperparams takes a mesh for a schedule.*static_args=\('mesh',\)"):
        mine(**options, mesh=data_mesh).init(replicated)


def test_a_mask_and_a_missing_gradient_as_in_optax(data_mesh):
    params, grads = random_tree(0), random_tree(1)
    plan = shardadam.make_plan(params, data_mesh, min_size=0)

    def mask(tree):
        return jax.tree.map(lambda x: x.ndim > 1, tree)

    reference, tx = (
        optax.adamw(1e-2, weight_decay=0.1, mask=mask),
        shardadam.adamw(1e-2, weight_decay=0.1, mask=mask, plan=plan),
    )
    wanted = make_step(reference)(params, reference.init(params), random_tree(1))
    got = make_step(tx)(put(params, data_mesh), tx.init(params), put(random_tree(1), data_mesh))
    assert_same_bits(got[0], wanted[0])
    # A leaf that is not trained is None in the parameters and in the gradients.
    params, grads = params | {"bias": None}, grads | {"bias": None}
    updates, state = jax.jit(optax.scale_by_adam().update)(grads, optax.scale_by_adam().init(params))
    mine = shardadam.scale_by_adam(plan=plan)
    my_updates, my_state = jax.jit(mine.update)(grads, mine.init(params))
    assert_same_bits(my_updates, updates)
    assert jax.tree.structure(my_state) == jax.tree.structure(state)


def test_unseen_specs_are_warned_of_and_the_result_is_right():
    sizes, specs = MESHES["tensor"]
    mesh = make_mesh(sizes)
    params, grads = random_tree(0), random_tree(1)
    tx = shardadam.adam(1e-2, mesh=mesh)
    with pytest.warns(UserWarning, match=r"taken to be replicated.*Pass a plan: .*make_plan\(params, mesh\)"):
        state = tx.init(put(params, mesh, specs))
    with pytest.warns(UserWarning, match="Auto mesh axes .*'data', 'model'"):
        got, _ = make_step(tx)(put(params, mesh, specs), state, put(grads, mesh, specs))
    wanted, _ = make_step(optax.adam(1e-2))(params, optax.adam(1e-2).init(params), grads)
    assert_same_bits(got, wanted)
    for name, spec in specs.items():
        assert got[name].sharding.is_equivalent_to(NamedSharding(mesh, spec), got[name].ndim)


def test_explicit_specs_are_seen_without_a_plan_and_without_a_warning():
    sizes, specs = MESHES["tensor"]
    mesh = make_mesh(sizes, EXPLICIT)
    params = put(random_tree(0), mesh, specs)
    plan = shardadam.make_plan(params, mesh)
    assert_equals_optax(mesh, specs, optax.adam(1e-2), shardadam.adam(1e-2, mesh=mesh), plan, steps=3)


def test_eager_init_and_update(data_mesh):
    params, grads = random_tree(0), random_tree(1)
    tx = shardadam.adam(1e-2, mesh=data_mesh)
    updates, state = tx.update(jax.tree.map(jnp.asarray, grads), tx.init(params), params)
    wanted, _ = jax.jit(optax.adam(1e-2).update)(grads, optax.adam(1e-2).init(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, wanted)
    shardadam.audit(state, shardadam.make_plan(params, data_mesh))
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(updates))


def test_padding_does_not_leak_where_nothing_guards_a_division(data_mesh):
    params = {"odd": np.ones((17, 257), np.float32)}
    plan = shardadam.make_plan(params, data_mesh, layout="packed", min_size=0)
    tx = shardadam.scale_by_adam(eps=0.0, eps_root=0.0, plan=plan)
    updates, state = jax.jit(tx.update)(params, tx.init(params))
    np.testing.assert_allclose(updates["odd"], 1.0, rtol=1e-5)
    packed = shardadam.pack(jnp.ones((17, 257)), 8)
    shards, state = jax.jit(functools.partial(tx.update, shards_of=plan))({"odd": packed}, tx.init(params))
    flat = np.asarray(shards["odd"]).reshape(-1)
    np.testing.assert_allclose(flat[: 17 * 257], 1.0, rtol=1e-5)
    assert not flat[17 * 257 :].any()
    assert not np.asarray(state.mu["odd"]).reshape(-1)[17 * 257 :].any()
    # On a gradient of zeros, outside the padding, optax gives NaN too: that is the maths, and is kept.
    zeros, _ = jax.jit(tx.update)({"odd": np.zeros((17, 257), np.float32)}, tx.init(params))
    assert np.isnan(zeros["odd"]).all()


def five_updates(tx, rate, params):
    state = tx.init(params)
    for t in range(5):
        grads = jax.tree.map(lambda p, t=t: jnp.sin(p * (t + 1)), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: -rate * u, updates))
    return sum(jnp.sum(x * x) for x in jax.tree.leaves(params))


SMALL = {"natural": (16, 8), "packed": (3, 401)}


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_meta_gradients_through_five_updates(axis_type):
    mesh = make_mesh({"data": 8}, axis_type)
    params = random_tree(0, shapes=SMALL)
    plan = shardadam.make_plan(params, mesh, min_size=0)
    assert [leaf.layout for leaf in plan.leaves.values()] == ["natural", "packed"]
    options = {"eps_root": 1e-8}
    reference, tx = optax.scale_by_adam(**options), shardadam.scale_by_adam(**options, plan=plan)
    wanted = jax.jit(jax.grad(lambda *a: five_updates(reference, *a), argnums=(0, 1)))(0.01, params)
    got = jax.jit(jax.grad(lambda *a: five_updates(tx, *a), argnums=(0, 1)))(0.01, put(params, mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, wanted)


def loop(kind, tx, params, opt_state, grads):
    """Four steps under one of JAX's transformations."""

    def step(carry, g):
        params, opt_state = carry
        updates, opt_state = tx.update(g, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    if kind == "scan":
        return jax.lax.scan(step, (params, opt_state), grads)[0][0]
    if kind == "while_loop":

        def body(carry):
            return carry[0] + 1, step(carry[1], jax.tree.map(lambda g: g[carry[0]], grads))[0]

        return jax.lax.while_loop(lambda c: c[0] < 4, body, (0, (params, opt_state)))[1][0]
    if kind == "remat":
        carry = (params, opt_state)
        for t in range(4):
            carry, _ = jax.checkpoint(step)(carry, jax.tree.map(lambda g, t=t: g[t], grads))
        return carry[0]
    batched = jax.vmap(lambda g: step((params, opt_state), g)[0][0])
    return batched(grads)


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("kind", ["scan", "while_loop", "remat", "vmap"])
def test_transformations_equal_optax(kind, axis_type):
    mesh = make_mesh({"data": 8}, axis_type)
    params = random_tree(0, shapes=SMALL)
    grads = random_tree(1, shapes={k: (4, *s) for k, s in SMALL.items()})
    plan = shardadam.make_plan(params, mesh, min_size=0)
    reference, tx = optax.adam(1e-2), shardadam.adam(1e-2, plan=plan)
    wanted = jax.jit(functools.partial(loop, kind, reference))(params, reference.init(params), grads)
    got = jax.jit(functools.partial(loop, kind, tx))(put(params, mesh), tx.init(params), put(grads, mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, wanted)


def test_what_does_not_fit_the_plan_is_named(data_mesh):
    params = random_tree(0)
    plan = shardadam.make_plan(params, data_mesh, min_size=0)
    tx = shardadam.adam(1e-2, plan=plan)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"`head`: the gradient has shape \(24, 50\), the plan has \(50, 24\)"):
        tx.update(params | {"head": params["head"].T}, state, params)
    with pytest.raises(ValueError, match=r"`bias`: mu has shape \(1300,\), the plan has \(8, 163\) \(packed\)"):
        tx.update(params, optax.adam(1e-2).init(params), params)
    with pytest.raises(ValueError, match="`extra`: the plan has no such leaf"):
        tx.init(params | {"extra": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="no axis 'dta'"):
        shardadam.adam(1e-2, mesh=data_mesh, axis_name="dta").init(params)


def test_inside_a_shard_map_over_the_data_axis_it_says_what_to_do(data_mesh):
    params = random_tree(0)
    tx = shardadam.adam(1e-2, plan=shardadam.make_plan(params, data_mesh))
    inside = jax.shard_map(
        lambda g: tx.update(g, tx.init(params))[0], mesh=data_mesh, in_specs=P(), out_specs=P(), check_vma=False
    )
    with pytest.raises(ValueError, match=r"inside a shard_map that is manual over \['data'\].*update outside of it"):
        jax.jit(inside)(params)


def test_init_allocates_shards_only(data_mesh):
    params = {
        "kernel": jax.ShapeDtypeStruct((4096, 64), jnp.float32),
        "odd": jax.ShapeDtypeStruct((1025, 257), jnp.float32),
    }
    plan = shardadam.make_plan(params, data_mesh)
    tx = shardadam.scale_by_adam(plan=plan)
    memory = jax.jit(lambda: tx.init(params)).lower().compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1024
    # Four buffers of 8 bytes for pointers, and alignment.
    assert memory.output_size_in_bytes - plan.state_bytes_per_device() < 256
    state = tx.init(params)
    assert sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state)) == plan.state_bytes_per_device()


def test_eager_updates_move_no_parameter():
    sizes, specs = MESHES["tensor"]
    mesh = make_mesh(sizes)
    params = put(random_tree(0), mesh, specs)
    tx = shardadam.adam(1e-2, plan=shardadam.make_plan(params, mesh, min_size=0))
    state = tx.init(params)
    for t in range(2):
        updates, state = tx.update(put(random_tree(1 + t), mesh, specs), state, params)
        moved = optax.apply_updates(params, updates)
        assert jax.tree.map(lambda x: x.sharding, moved) == jax.tree.map(lambda x: x.sharding, params)
        params = moved


def test_signatures_begin_like_optax():
    import inspect

    for name in ("adam", "adamw", "nadam", "nadamw", "scale_by_adam"):
        theirs = inspect.signature(getattr(optax, name)).parameters
        mine = inspect.signature(getattr(shardadam, name)).parameters
        assert list(mine)[: len(theirs)] == list(theirs), name
        for parameter in theirs.values():
            assert mine[parameter.name].default == parameter.default, (name, parameter.name)
            assert mine[parameter.name].kind == parameter.kind
        assert list(mine)[len(theirs) :] == ["mesh", "axis_name", "plan"]


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_init_under_jit_needs_no_mesh_context(axis_type):
    mesh = make_mesh({"data": 8}, axis_type)
    params = random_tree(0)
    plan = shardadam.make_plan(params, mesh, min_size=0)
    tx = shardadam.adam(1e-2, plan=plan)
    for given in (params, put(params, mesh)):
        shardadam.audit(jax.jit(tx.init)(given), plan)


def test_a_dim_never_holds_auto_and_explicit_axes():
    """JAX would order them its own way, or lose one: such dims are passed over."""
    devices = np.array(jax.devices()).reshape(4, 2)
    mesh = jax.sharding.Mesh(devices, ("data", "model"), axis_types=(EXPLICIT, AUTO))
    host = {"w": np.ones((7, 64), np.float32), "odd": np.ones((34, 257), np.float32)}
    plan = shardadam.make_plan(host, mesh, param_specs={"w": P(None, "model"), "odd": P("model")}, min_size=0)
    assert {leaf.layout for leaf in plan.leaves.values()} == {"whole"}
    assert "model and data are Auto and Explicit axes" in plan.leaves["odd"].reason
    params = put(host, mesh, {"w": P(None, "model"), "odd": P("model")})
    tx = shardadam.adam(1e-2, plan=plan)
    params, state, step = run(
        tx, params, tx.init(params), [put(host, mesh, {"w": P(None, "model"), "odd": P("model")})] * 2
    )
    shardadam.audit(state, plan)
    assert step._cache_size() == 1
    with pytest.raises(ValueError, match="of different axis types"):
        shardadam.make_plan(host, mesh, axis_name=("data", "model"))


def test_update_without_the_mesh_that_init_was_under(data_mesh):
    params = put(random_tree(0), data_mesh)
    tx = shardadam.adam(1e-2)
    with jax.set_mesh(data_mesh):
        state = tx.init(params)
    with pytest.raises(ValueError, match=r"made under jax\.set_mesh\(.*give the optimizer mesh= or plan="):
        make_step(tx)(params, state, params)


def test_another_current_mesh_is_named(data_mesh):
    params = random_tree(0)
    tx = shardadam.adam(1e-2, plan=shardadam.make_plan(params, data_mesh))
    state = tx.init(params)
    explicit, other = make_mesh({"data": 8}, EXPLICIT), make_mesh({"data": 4, "model": 2})
    for mesh in (explicit, other):
        with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"the current one \(jax\.set_mesh\) is"):
            jax.jit(tx.update)(params, state, params)


def test_a_plan_without_devices_asks_for_them():
    params = random_tree(0)
    plan = shardadam.make_plan(params, {"data": 8})
    tx = shardadam.adam(1e-2, plan=plan)
    with pytest.raises(ValueError, match=r"made without devices.*pass mesh="):
        tx.init(params)
    assert jax.eval_shape(tx.init, params)[0].mu["odd"].shape == (8, 547)
    with pytest.raises(ValueError, match=r"made for the mesh \{'data': 8\}, used on \{'data': 4, 'model': 2\}"):
        shardadam.adam(1e-2, plan=plan, mesh=make_mesh({"data": 4, "model": 2})).init(params)
    with pytest.raises(ValueError, match="plan: got dict, wanted what"):
        shardadam.adam(1e-2, plan={"data": 8}).init(params)


def test_init_refuses_parameters_that_are_not_the_plans(data_mesh):
    params = random_tree(0)
    tx = shardadam.adam(1e-2, plan=shardadam.make_plan(params, data_mesh))
    with pytest.raises(ValueError, match=r"`head`: the parameter is float32\[24, 50\], the plan has float32\[50, 24\]"):
        tx.init(params | {"head": params["head"].T})
    with pytest.raises(ValueError, match=r"`head`: the parameter is bfloat16\[50, 24\]"):
        tx.init(params | {"head": jnp.asarray(params["head"], jnp.bfloat16)})


@pytest.mark.parametrize("options", [{"eps": np.float32(1e-3)}, {"eps": 1e-3, "eps_root": np.float32(1e-3)}])
def test_array_eps_takes_part_in_promotion_as_in_optax(options, data_mesh):
    options = {name: jnp.asarray(x) if isinstance(x, np.float32) else x for name, x in options.items()}
    params, grads = random_tree(0, jnp.bfloat16), random_tree(1, jnp.bfloat16)
    plan = shardadam.make_plan(params, data_mesh, layout="packed", min_size=0)
    reference, tx = optax.scale_by_adam(**options), shardadam.scale_by_adam(**options, plan=plan)
    wanted, _ = jax.jit(reference.update)(grads, reference.init(params))
    got, _ = jax.jit(tx.update)(grads, tx.init(params))
    # bfloat16 and float32 mixed in one division: XLA widens one or the other first, an ulp of float32.
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, wanted)


def test_float64_on_the_host_is_float32_in_jax(data_mesh):
    params = {"w": np.ones((64, 48))}
    plan = shardadam.make_plan(params, data_mesh)
    state = shardadam.adam(1e-2, plan=plan).init(params)
    assert plan.leaves["w"].dtype == state[0].nu["w"].dtype == jnp.float32
    assert plan.state_bytes_per_device() == 4 + 64 * 48
