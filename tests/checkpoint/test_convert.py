"""Checkpoints of plain optax, Flax and nnx become shardadam's and go on training; and back, by plain Orbax alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import make_mesh
from etils import epath
from flax import nnx
from flax.training import checkpoints
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P
from orbax.checkpoint.experimental import v1
from trees import assert_same_bits, make_step, put, random_tree

import shardadam
from shardadam.checkpoint import Checkpointer, CheckpointError, export_checkpoint, import_checkpoint, stream
from shardadam.checkpoint.forms import leaves

SHAPES = {"emb": (16, 8), "odd": (17, 257), "layers": [(5,), (3, 8)]}
MASK = {"emb": True, "odd": True, "layers": [False, True]}
OPTIMIZERS = {
    "bare": lambda m, **kw: m.scale_by_adam(**kw),
    "adamw, mu in bfloat16": lambda m, **kw: m.adamw(1e-2, weight_decay=0.1, mu_dtype=jnp.bfloat16, **kw),
    "in a chain, scheduled": lambda m, **kw: optax.chain(optax.identity(), m.adam(lambda step: 1e-2, **kw)),
    "masked": lambda m, **kw: optax.masked(m.adam(1e-2, **kw), MASK),
    "inject_hyperparams": lambda m, **kw: optax.inject_hyperparams(m.adam, static_args=tuple(kw))(1e-2, **kw),
}
ORBAX = ocp.StandardCheckpointer


def plain_save(path, tree):
    with ORBAX() as orbax:
        orbax.save(path, tree)


def plain_restore(path, like):
    with ORBAX() as orbax:
        return orbax.restore(path, like)


def params_on(mesh, seed=0):
    return put(random_tree(seed, shapes=SHAPES), mesh)


def trained(tx, mesh, steps=2, params=None, opt_state=None):
    step, params = make_step(tx), params_on(mesh) if params is None else params
    opt_state = tx.init(params) if opt_state is None else opt_state
    for seed in range(1, steps + 1):
        params, opt_state = step(params, opt_state, params_on(mesh, seed))
    return params, opt_state


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.usefixtures("standard_promotion")
def test_an_optax_state_goes_on_in_shards_and_back(name, data_mesh, tmp_path):
    plain = OPTIMIZERS[name](optax)
    params, before = trained(plain, data_mesh)
    plain_save(tmp_path / "optax", before)
    shown = import_checkpoint(tmp_path / "optax", tmp_path / "ours")
    assert (shown.form, shown.step, shown.source) == ("opt_state", 2, "an Orbax tree")
    assert "ScaleByAdamState" in shown.found

    plan = shardadam.make_plan(params, data_mesh, min_size=0)
    assert {leaf.layout for leaf in plan.leaves.values()} >= {"natural", "packed"}
    tx = OPTIMIZERS[name](shardadam, plan=plan)
    with Checkpointer(tmp_path / "ours", plan=plan) as checkpointer:
        state = checkpointer.restore(tx.init(params))
        shardadam.audit(state, plan)
        ours, state = trained(tx, data_mesh, 1, params, state)
        checkpointer.save(3, state)
    theirs, after = trained(plain, data_mesh, 1, params, before)
    assert_same_bits(ours, theirs)

    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    back = plain_restore(tmp_path / "back", jax.tree.map(jnp.zeros_like, after))
    assert jax.tree.structure(back) == jax.tree.structure(after)
    assert_same_bits(back, after)


def flax_state(tx, mesh):
    return TrainState.create(apply_fn=None, params=params_on(mesh), tx=tx)


@pytest.fixture(scope="module")
def flax_trained(data_mesh):
    with jax.numpy_dtype_promotion("standard"):
        step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
        state = step(flax_state(optax.adam(1e-2), data_mesh), params_on(data_mesh, 1))
        return state, step(state, params_on(data_mesh, 2))


def by_manager(path, state):
    with ocp.CheckpointManager(path) as manager:
        manager.save(5, args=ocp.args.StandardSave(state))
        manager.save(7, args=ocp.args.StandardSave(jax.tree.map(jnp.zeros_like, state)))
    return {"step": 5}, "step 5 (of 2), item 'default'"


def by_items(path, state):
    save = ocp.args.StandardSave
    with ocp.CheckpointManager(path) as manager:
        items = {"params": save(state.params), "opt_state": save(state.opt_state), "data": ocp.args.JsonSave({"at": 1})}
        manager.save(5, args=ocp.args.Composite(**items))
    return {"to": "train_state"}, "step 5 (of 1), items ['opt_state', 'params']"


def by_v1(path, state):
    v1.save(path, state)
    return {}, "item 'state'"


def by_v1_manager(path, state):
    with v1.training.Checkpointer(path) as checkpointer:
        checkpointer.save(5, state)
    return {}, "step 5 (of 1), item 'state'"


def by_flax(path, state):
    checkpoints.save_checkpoint(path, state, step=5)
    return {}, "step 5 (of 1), an Orbax tree"


def as_a_dict(path, state):
    plain_save(path, {"train": {"weights": state.params, "adam": state.opt_state}})
    return {"params": "train/weights", "opt_state": "train/adam"}, "an Orbax tree"


@pytest.mark.parametrize("save", [by_manager, by_items, by_v1, by_v1_manager, by_flax, as_a_dict])
@pytest.mark.usefixtures("standard_promotion")
def test_a_flax_train_state_however_it_was_written(save, flax_trained, data_mesh, tmp_path):
    before, after = flax_trained
    options, source = save(tmp_path / "flax", before)
    shown = import_checkpoint(tmp_path / "flax", tmp_path / "ours", **options)
    assert (shown.form, shown.source) == ("train_state", source)
    assert shown.found == "train_state: 4 parameters, optimizer (ScaleByAdamState, -)"
    tx = shardadam.adam(1e-2, mesh=data_mesh)
    fresh = shardadam.TrainState.create(apply_fn=None, params=params_on(data_mesh, 9), tx=tx)
    with Checkpointer(tmp_path / "ours") as checkpointer:
        state = checkpointer.restore(fresh)
        state = jax.jit(lambda s, g: s.apply_gradients(grads=g))(state, params_on(data_mesh, 2))
        assert_same_bits(state.params, after.params)
        checkpointer.save(99, state)
    export_checkpoint(tmp_path / "ours", tmp_path / "back", step=99)
    back = plain_restore(tmp_path / "back", jax.tree.map(jnp.zeros_like, after))
    assert_same_bits(back, after)


class Net(nnx.Module):
    def __init__(self, seed, mesh):
        self.layers = nnx.List([nnx.Linear(17, 13, rngs=nnx.Rngs(seed)), nnx.Dropout(0.1, rngs=nnx.Rngs(seed))])
        replicated = jax.NamedSharding(mesh, P())
        nnx.update(self, jax.device_put(nnx.state(self), replicated))


def nnx_state(seed, mesh, tx):
    model = Net(seed, mesh)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    return model, optimizer, {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}


@nnx.jit
def nnx_step(model, optimizer):
    grads = nnx.grad(lambda model: (model.layers[0](jnp.ones((2, 17))) ** 2).sum())(model)
    optimizer.update(model, grads)


@pytest.mark.usefixtures("standard_promotion")
def test_nnx_goes_on_in_shards_and_in_a_train_state_and_back(data_mesh, tmp_path):
    model, optimizer, _ = nnx_state(0, data_mesh, optax.adamw(1e-2))
    nnx_step(model, optimizer)
    plain_save(tmp_path / "nnx", {"model": nnx.state(model), "optimizer": nnx.state(optimizer)})
    saved = jax.tree.map(lambda x: x, (nnx.state(model), nnx.state(optimizer)))
    nnx_step(model, optimizer)

    # As nnx, with its PRNG keys.
    import_checkpoint(tmp_path / "nnx", tmp_path / "ours")
    tx = shardadam.adamw(1e-2, plan=shardadam.make_plan(nnx.state(model, nnx.Param), data_mesh, min_size=0))
    plan = tx.plan_of(nnx.state(model, nnx.Param))
    ours, ours_optimizer, like = nnx_state(1, data_mesh, tx)
    restored = Checkpointer(tmp_path / "ours", plan=plan).restore(like)
    nnx.update(ours, restored["model"])
    nnx.update(ours_optimizer, restored["optimizer"])
    nnx_step(ours, ours_optimizer)
    assert_same_bits(nnx.state(ours, nnx.Param), nnx.state(model, nnx.Param))
    keys = [jax.random.key_data(m.layers[1].rngs.key[...]) for m in (ours, model)]
    np.testing.assert_array_equal(*keys)

    # As a TrainState: not without word for what has no place in one.
    with pytest.raises(CheckpointError, match=r"no place for \['layers/1/rngs/count', 'layers/1/rngs/key'\]"):
        import_checkpoint(tmp_path / "nnx", tmp_path / "state", to="train_state", optimizer="adamw")
    options = {"to": "train_state", "optimizer": "adamw", "drop": ["model/layers/1"]}
    import_checkpoint(tmp_path / "nnx", tmp_path / "state", **options)
    params = {"layers": {"0": nnx.to_pure_dict(saved[0])["layers"][0]}}
    like = shardadam.TrainState.create(apply_fn=None, params=params, tx=shardadam.adamw(1e-2, mesh=data_mesh))
    with Checkpointer(tmp_path / "state") as checkpointer:
        state = checkpointer.restore(like)
    assert int(state.step) == 1
    assert_same_bits(state.params["layers"]["0"]["kernel"], saved[0]["layers"][0]["kernel"][...])

    # And back into nnx, by plain Orbax.
    export_checkpoint(tmp_path / "state", tmp_path / "back", to="nnx")
    fresh, fresh_optimizer, like = nnx_state(2, data_mesh, optax.adamw(1e-2))
    like = jax.device_put(like | {"model": nnx.state(fresh, nnx.Param)}, jax.NamedSharding(data_mesh, P()))
    back = plain_restore(tmp_path / "back", like)
    nnx.update(fresh, back["model"])
    nnx.update(fresh_optimizer, back["optimizer"])
    assert_same_bits(nnx.state(fresh_optimizer), saved[1])
    nnx_step(fresh, fresh_optimizer)
    assert_same_bits(nnx.state(fresh, nnx.Param), nnx.state(model, nnx.Param))


class TestParams:
    @pytest.fixture
    def ours(self, data_mesh, tmp_path):
        tx = shardadam.adam(1e-2, mesh=data_mesh)
        params = params_on(data_mesh) | {"table": jnp.arange(7), "edge": jnp.float32([1e30, jnp.inf, 1e-30])}
        moments = tx.init(params_on(data_mesh))
        with Checkpointer(tmp_path / "ours", plan=tx.plan_of(params_on(data_mesh))) as checkpointer:
            checkpointer.save(0, {"params": params, "opt_state": moments}, allow_nonfinite=True)
        return tmp_path, params

    @pytest.mark.parametrize("dtype", [None, "bfloat16"])
    def test_alone_in_another_dtype(self, ours, dtype):
        tmp_path, params = ours
        export_checkpoint(tmp_path / "ours", tmp_path / "serving", to="params", dtype=dtype)
        wanted = jax.tree.map(lambda x: x.astype(dtype) if dtype and x.dtype == jnp.float32 else x, params)
        assert_same_bits(plain_restore(tmp_path / "serving", jax.tree.map(jnp.zeros_like, wanted)), wanted)

    def test_overflow_is_refused_and_leaves_nothing(self, ours):
        tmp_path, _ = ours
        with pytest.raises(CheckpointError, match=r"`params/edge`: 1 finite numbers, the largest 1e\+30, are infinite"):
            export_checkpoint(tmp_path / "ours", tmp_path / "serving", to="params", dtype="float16")
        assert [path.name for path in tmp_path.iterdir()] == ["ours"]

    def test_a_state_is_not_cast(self, ours):
        with pytest.raises(ValueError, match="only to='params' can be cast"):
            export_checkpoint(ours[0] / "ours", ours[0] / "serving", dtype="bfloat16")


class TestRefused:
    def test_forms_that_are_not_known_show_their_tree(self, data_mesh, tmp_path):
        plain_save(tmp_path / "sgd", {"momentum": {"w": jnp.ones((3, 2))}, "other": jnp.int32(1)})
        with pytest.raises(CheckpointError, match=r"--params KEY --opt-state KEY(?s:.*)momentum/w: float32\[3, 2\]"):
            import_checkpoint(tmp_path / "sgd", tmp_path / "ours")
        plain_save(tmp_path / "trace", {"params": {"w": jnp.ones(3)}, "opt_state": optax.trace(0.9).init(jnp.ones(3))})
        with pytest.raises(CheckpointError, match="no state of Adam's"):
            import_checkpoint(tmp_path / "trace", tmp_path / "ours")
        assert not (tmp_path / "ours").exists()

    def test_moments_of_other_shapes_than_the_parameters(self, tmp_path):
        adam = optax.scale_by_adam().init({"w": jnp.ones((8, 1024))})
        plain_save(tmp_path / "packed", {"params": {"w": jnp.ones((17, 257))}, "opt_state": (adam,)})
        with pytest.raises(CheckpointError, match=r"`0/mu/w`: got shapes \(8, 1024\).*, wanted .*\(17, 257\)"):
            import_checkpoint(tmp_path / "packed", tmp_path / "ours")

    def test_places(self, tmp_path):
        adam = optax.scale_by_adam().init({"w": jnp.ones(3)})
        plain_save(tmp_path / "adam", adam)
        with pytest.raises(CheckpointError, match="has no parameters, and the form train_state needs them"):
            import_checkpoint(tmp_path / "adam", tmp_path / "ours", to="train_state")
        with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
            import_checkpoint(tmp_path / "nowhere", tmp_path / "ours")
        (tmp_path / "empty").mkdir()
        with pytest.raises(CheckpointError, match="wanted an Orbax checkpoint"):
            import_checkpoint(tmp_path / "empty", tmp_path / "ours")
        import_checkpoint(tmp_path / "adam", tmp_path / "ours")
        with pytest.raises(CheckpointError, match=r"step 0: .* holds step 0 already"):
            import_checkpoint(tmp_path / "adam", tmp_path / "ours")
        with pytest.raises(FileExistsError, match="is there already"):
            export_checkpoint(tmp_path / "ours", tmp_path / "adam")
        with pytest.raises(FileNotFoundError, match=r"step 4: not in .*, which holds \[0\]"):
            export_checkpoint(tmp_path / "ours", tmp_path / "back", step=4)


def test_a_chunk_of_leaves_at_a_time_over_all_devices(data_mesh, tmp_path, monkeypatch):
    tree = {f"w{i}": jnp.ones((16, 16)) for i in range(6)} | {"large": jnp.ones((64, 40))}
    plain_save(tmp_path / "a", {"params": tree, "opt_state": (optax.scale_by_adam().init(tree),)})
    sizes, load = [], stream._load

    def counted(chunk, mesh):
        sizes.append(sum(leaf.nbytes for leaf in chunk))
        arrays = load(chunk, mesh)
        assert all(x.sharding.is_fully_replicated == (x.size == 1) for x in arrays)
        return arrays

    monkeypatch.setattr(stream, "_load", counted)
    import_checkpoint(tmp_path / "a", tmp_path / "ours", chunk_bytes=3000)
    assert sum(sizes) == 3 * (6 * 1024 + 10240) + 3 * 4  # count, which names the step and is told in the seal, too
    assert max(sizes) == 10240
    assert sorted(sizes)[-4] <= 3000
    found = stream.item_tree(epath.Path(tmp_path / "ours" / "0" / "state"))
    assert len(leaves(found)) == 22


def test_sources_are_not_changed_and_other_meshes_do(tmp_path, data_mesh):
    params = params_on(make_mesh({"data": 2}))
    plain_save(tmp_path / "a", {"params": params, "opt_state": optax.adam(1e-2).init(params)})
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    import_checkpoint(tmp_path / "a", tmp_path / "ours")
    assert {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()} == before
    tx = shardadam.adam(1e-2, mesh=data_mesh)
    like = shardadam.TrainState.create(apply_fn=None, params=params_on(data_mesh, 3), tx=tx)
    like = {"params": like.params, "opt_state": like.opt_state}
    restored = Checkpointer(tmp_path / "ours", plan=tx.plan_of(like["params"])).restore(like)
    assert_same_bits(restored["params"], params)


def test_wide_numbers_keep_every_bit(tmp_path):
    wide = {"w": np.array([1 / 3, 1e-300, 1e300]), "at": np.array([2**40 + 1])}
    state = {"params": wide, "opt_state": (optax.ScaleByAdamState(jnp.int32(3), mu=wide, nu=wide),)}
    plain_save(tmp_path / "a", state)
    import_checkpoint(tmp_path / "a", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    assert_same_bits(plain_restore(tmp_path / "back", state), state)
    with pytest.raises(
        CheckpointError, match=r"`params/w`: 1 finite numbers, the largest 1e\+300, are infinite in bfloat16"
    ):
        export_checkpoint(tmp_path / "ours", tmp_path / "narrow", to="params", dtype="bfloat16")
