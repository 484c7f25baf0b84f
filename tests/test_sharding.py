"""Bringing leaves to the state's layout and back, and the audit that names what is not where it belongs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_mesh
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from trees import put, random_tree

import shardadam
from shardadam.sharding import map_moments, named_sharding, pack_leaf, state_shardings, unpack_leaf

MESH_SPECS = [
    ({"data": 8}, P()),
    ({"data": 7}, P()),
    ({"data": 4, "model": 2}, P("model")),
    ({"data": 2, "model": 2, "fsdp": 2}, P("fsdp", "model")),
    ({"data": 2, "model": 4}, P(None, "model")),
]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(("sizes", "spec"), MESH_SPECS)
@pytest.mark.parametrize(("layout", "stacked"), [("natural", 0), ("packed", 0), ("natural", 1), ("packed", 1)])
def test_unpack_leaf_is_the_inverse_of_pack_leaf(sizes, spec, layout, stacked, axis_type):
    mesh = make_mesh(sizes, axis_type)
    stack = (3,) * stacked
    x = np.arange(math.prod((*stack, 36, 68)), dtype=np.float32).reshape(*stack, 36, 68) % 1009
    placed = jax.device_put(x, named_sharding(mesh, P(*[None] * (stacked if spec else 0), *spec), x.ndim))
    plan = shardadam.make_plan({"x": placed}, mesh, layout=layout, min_size=0, stacked_dims=stacked)
    leaf = plan.leaves["x"]
    packed = jax.jit(lambda x: pack_leaf(x, leaf, mesh))(placed)
    assert packed.shape == leaf.state_shape
    assert packed.sharding.is_equivalent_to(NamedSharding(mesh, leaf.state_spec), packed.ndim)
    assert {s.data.size for s in packed.addressable_shards} == {leaf.elements_per_device}
    assert float(np.asarray(packed).sum()) == float(x.sum())
    back = jax.jit(lambda x: unpack_leaf(x, leaf, mesh))(packed)
    assert back.sharding == placed.sharding
    np.testing.assert_array_equal(back, x)


def test_eager_and_traced_placement_agree(data_mesh):
    leaf = shardadam.make_plan({"x": np.zeros((17, 257), np.float32)}, data_mesh, min_size=0).leaves["x"]
    x = np.arange(17 * 257, dtype=np.float32).reshape(17, 257)
    eager = pack_leaf(jnp.asarray(x), leaf, data_mesh)
    traced = jax.jit(lambda x: pack_leaf(x, leaf, data_mesh))(x)
    assert eager.sharding == traced.sharding
    np.testing.assert_array_equal(eager, traced)


def test_state_shardings_rebuild_the_state(data_mesh):
    params = random_tree(0)
    plan = shardadam.make_plan(params, data_mesh, min_size=0)
    tx = optax.chain(optax.trace(0.9), shardadam.adam(1e-2, plan=plan))
    shardings = state_shardings(jax.eval_shape(tx.init, params), plan)
    state = jax.jit(tx.init, out_shardings=shardings)(put(params, data_mesh))
    shardadam.audit(state, plan)
    assert state[0].trace["kernel"].sharding.is_fully_replicated


def test_map_moments_reaches_every_adam_state_and_nothing_else(data_mesh):
    params = random_tree(0)
    plan = shardadam.make_plan(params, data_mesh, min_size=0)
    one = shardadam.adam(1e-2, plan=plan)
    tx = optax.chain(optax.masked(one, {k: k != "tiny" for k in params}), optax.MultiSteps(one, 2))
    state = tx.init(params)
    seen = []
    same = map_moments(lambda leaf, x, path: (seen.append((path, x.shape == leaf.state_shape)), x)[1], state, plan)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    leaves = len(plan.leaves)
    assert len(seen) == 2 * (leaves - 1) + 2 * leaves
    assert all(fits for _, fits in seen)


def faulty(params, plan, mesh):
    """A state that is wrong in one way, by the word that the error must have."""
    state = shardadam.scale_by_adam(plan=plan).init(params)

    def with_kernel(x):
        return state._replace(mu=state.mu | {"kernel": x})

    kernel = state.mu["kernel"]
    host = jax.tree.leaves(jax.devices()[0].addressable_memories())
    kinds = [m.kind for m in host if m.kind != jax.devices()[0].default_memory().kind]
    return {
        r"got a replicated array, wanted .*'data'": with_kernel(jax.device_put(kernel, NamedSharding(mesh, P()))),
        r"got 1 device\(s\)": with_kernel(jax.device_put(kernel, SingleDeviceSharding(jax.devices()[0]))),
        r"got .*None, 'data'": with_kernel(jax.device_put(kernel, NamedSharding(mesh, P(None, "data")))),
        f"got memory '{kinds[0]}'": with_kernel(
            jax.device_put(kernel, NamedSharding(mesh, P("data"), memory_kind=kinds[0]))
        ),
        r"got shape \(48, 64\), wanted \(64, 48\)": with_kernel(kernel.T),
        r"got dtype int32": with_kernel(kernel.astype(jnp.int32)),
        r"got dtype float16, wanted float32": state._replace(nu=state.nu | {"kernel": kernel.astype(jnp.float16)}),
        r"got dtype complex64": with_kernel(kernel.astype(jnp.complex64)),
    }


def test_audit_names_each_fault(data_mesh):
    params = random_tree(0)
    plan = shardadam.make_plan(params, data_mesh, min_size=0)
    good = shardadam.scale_by_adam(plan=plan).init(params)
    shardadam.audit(good, plan)
    shardadam.audit({"nested": (good,)}, plan)
    shardadam.audit(good, plan, mu_dtype=jnp.float32)
    with pytest.raises(shardadam.ShardingError, match="mu of `kernel`: got dtype float32, wanted bfloat16"):
        shardadam.audit(good, plan, mu_dtype=jnp.bfloat16)
    for message, state in faulty(params, plan, data_mesh).items():
        with pytest.raises(shardadam.ShardingError, match=rf"(?s)1 of .*`kernel`: {message}.*Make the state with"):
            shardadam.audit(state, plan)


def test_audit_names_a_parameter_that_adam_cannot_train(data_mesh):
    params = {"w": np.ones((16, 64), np.float32), "table": np.zeros((2048,), np.int32)}
    plan = shardadam.make_plan(params, data_mesh)
    with pytest.raises(shardadam.ShardingError, match=r"`table`: got a parameter of dtype int32, .*optax\.masked$"):
        shardadam.audit(shardadam.scale_by_adam(plan=plan).init(params), plan)


def test_audit_of_optax_names_all_and_of_nothing_says_so(data_mesh):
    params = put(random_tree(0), data_mesh)
    plan = shardadam.make_plan(params, data_mesh, min_size=0)
    with pytest.raises(shardadam.ShardingError) as error:
        shardadam.audit(optax.adam(1e-2).init(params), plan)
    for path, leaf in plan.leaves.items():
        assert (f"`{path}`" in str(error.value)) == (leaf.num_shards > 1)
    with pytest.raises(shardadam.ShardingError, match=r"no optax\.ScaleByAdamState in dict"):
        shardadam.audit({"a": 1}, plan)
    with pytest.raises(ValueError, match="`other`: the plan has no such leaf"):
        shardadam.audit(optax.scale_by_adam().init({"other": jnp.zeros(3)}), plan)


def test_audit_against_an_abstract_plan(data_mesh):
    params = random_tree(0)
    plan = shardadam.make_plan(params, {"data": 8}, min_size=0)
    state = shardadam.scale_by_adam(plan=plan, mesh=data_mesh).init(params)
    shardadam.audit(state, plan)
    with pytest.raises(shardadam.ShardingError, match="got a replicated array"):
        shardadam.audit(jax.device_put(state, NamedSharding(data_mesh, P())), plan)
