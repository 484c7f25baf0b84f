"""`make_plan`: shapes in, a frozen plan out, on any mesh, real or only named."""

import copy
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from trees import SHAPES, random_tree

import shardadam
from shardadam.layout import LANES


def abstract(shapes, dtype=jnp.float32):
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), shapes, is_leaf=lambda x: isinstance(x, tuple))


def test_a_mesh_by_its_sizes_plans_512_shards_without_devices():
    plan = shardadam.make_plan(abstract(SHAPES), {"data": 512})
    assert plan.num_shards == 512
    assert plan.leaves["layers/w"].shape == (3, 16, 32)
    assert len(plan.leaves) == len(jax.tree.leaves(abstract(SHAPES)))


@pytest.mark.parametrize("num_shards", [7, 8, 192])
@pytest.mark.parametrize("layout", ["auto", "packed"])
def test_the_largest_device_is_within_a_row_per_leaf_of_its_part(num_shards, layout):
    params = abstract(SHAPES | {"big": (1152, 4304)})
    plan = shardadam.make_plan(params, {"data": num_shards}, layout=layout, min_size=0)
    total = sum(x.size for x in jax.tree.leaves(params)) * 8
    assert plan.state_bytes_per_device() <= total / num_shards + len(plan.leaves) * LANES * 8 + 4


def test_bytes_are_those_of_the_addressable_shards(data_mesh):
    params = random_tree(0)
    plan = shardadam.make_plan(params, data_mesh, min_size=0)
    for mu_dtype in (None, jnp.bfloat16):
        state = shardadam.scale_by_adam(mu_dtype=mu_dtype, plan=plan).init(params)
        for device in data_mesh.devices.flat:
            held = sum(
                s.data.nbytes for x in jax.tree.leaves(state) for s in x.addressable_shards if s.device == device
            )
            assert held == plan.state_bytes_per_device(mu_dtype)


def test_replicated_bytes_follow_the_parameters():
    plan = shardadam.make_plan(
        {"w": jax.ShapeDtypeStruct((64, 48), jnp.bfloat16)}, {"data": 4, "model": 2}, param_specs=P("model")
    )
    assert plan.replicated_state_bytes() == 4 + 64 * 48 // 2 * 4
    assert plan.replicated_state_bytes(jnp.float32) == 4 + 64 * 48 // 2 * 6


def test_equal_hashable_and_frozen(data_mesh):
    plans = [shardadam.make_plan(params, data_mesh) for params in (random_tree(0), random_tree(1), abstract(SHAPES))]
    assert len({*plans}) == 1
    assert plans[0] != shardadam.make_plan(abstract(SHAPES), data_mesh, layout="packed")
    assert plans[0] != shardadam.make_plan(abstract(SHAPES), {"data": 8})
    with pytest.raises(AttributeError):
        plans[0].mesh = None
    with pytest.raises(TypeError):
        plans[0].leaves["kernel"] = None


@given(st.permutations(list(SHAPES)))
def test_the_order_of_a_dict_changes_nothing(names):
    assert shardadam.make_plan(abstract({n: SHAPES[n] for n in names}), {"data": 8}) == shardadam.make_plan(
        abstract(SHAPES), {"data": 8}
    )


def test_specs_come_from_the_arrays_or_by_name():
    mesh = make_mesh({"data": 4, "model": 2})
    spec = P(None, "model")
    w = jax.device_put(np.zeros((64, 48), np.float32), NamedSharding(mesh, spec))
    by_array = shardadam.make_plan({"w": w}, mesh)
    by_struct = shardadam.make_plan({"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding)}, mesh)
    by_name = shardadam.make_plan({"w": np.zeros((64, 48), np.float32)}, mesh, param_specs={"w": spec})
    by_prefix = shardadam.make_plan({"w": np.zeros((64, 48), np.float32)}, mesh, param_specs=spec)
    assert by_array == by_struct == by_name == by_prefix
    assert by_array.leaves["w"].state_spec == P("data", "model")


def test_abstract_and_concrete_meshes_plan_alike():
    mesh = make_mesh({"data": 4, "model": 2}, AxisType.Explicit)
    plans = [shardadam.make_plan(abstract(SHAPES), m) for m in (mesh, mesh.abstract_mesh, {"data": 4, "model": 2})]
    assert isinstance(plans[1].mesh, AbstractMesh)
    assert plans[0].items == plans[1].items == plans[2].items


def test_the_report_names_every_leaf_and_the_totals():
    plan = shardadam.make_plan(abstract(SHAPES), {"data": 8})
    report = plan.report()
    for path in plan.leaves:
        assert path in report
    assert f"{plan.state_bytes_per_device():,} bytes" in report
    assert "under min_size=1,024" in report
    assert "2 leaves stay whole" in report


def test_a_plan_survives_pickle_and_deepcopy_and_hashes_alike_in_another_process():
    plan = shardadam.make_plan(abstract(SHAPES), {"data": 8})
    assert hash(plan) == hash(copy.deepcopy(plan))
    assert plan.leaves
    assert copy.deepcopy(plan) == plan
    code = (
        "import pickle, sys; plan = pickle.loads(sys.stdin.buffer.read());"
        "same = type(plan)(mesh=plan.mesh, axis_names=plan.axis_names, items=plan.items);"
        "assert plan == same and hash(plan) == hash(same)"
    )
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(plan), check=True, timeout=250)


@pytest.mark.parametrize("mesh", [{"data": 0}, {"data": 2.5}, {"data": "8"}, 8, None])
def test_a_mesh_that_is_none_is_named(mesh):
    with pytest.raises(ValueError, match="mesh: "):
        shardadam.make_plan(abstract(SHAPES), mesh)


W = {"enc": {"w": np.zeros((17, 8), np.float32)}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis_name": "dta"}, "no axis 'dta', only .*'data'"),
        ({"axis_name": ()}, "wanted one mesh axis or a tuple"),
        ({"axis_name": ("data", "data")}, "wanted one mesh axis or a tuple of different ones"),
        ({"layout": "flat"}, "layout: got 'flat', wanted 'auto'"),
        ({"min_size": -1}, "min_size: got -1"),
        ({"param_specs": P("model")}, "`enc/w`: dim 0 is 17, not divisible by 2 devices on model"),
        ({"param_specs": P("tensor")}, "`enc/w`: .*names axis 'tensor', the mesh has"),
        ({"param_specs": P(None, None, "model")}, "`enc/w`: .*names 3 dims, the leaf has 2"),
        ({"param_specs": P(P.UNCONSTRAINED)}, "`enc/w`: got .* among param_specs"),
        ({"param_specs": {"enc": {"w": "model"}}}, "`enc/w`: got 'model' among param_specs"),
        ({"param_specs": {"enc": {"v": P()}}}, "param_specs: got a tree that does not match"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        shardadam.make_plan(W, {"data": 4, "model": 2}, **options)


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(ValueError, match="`a/b`: two leaves have this name"):
        shardadam.make_plan({"a/b": np.zeros(3, np.float32), "a": {"b": np.zeros(3, np.float32)}}, {"data": 4})


def test_a_leaf_the_plan_does_not_have():
    plan = shardadam.make_plan(W, {"data": 4})
    with pytest.raises(ValueError, match="`dec/w`: the plan has no such leaf"):
        plan.leaf("dec/w")
