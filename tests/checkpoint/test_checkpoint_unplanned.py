"""States that do not say how they are packed: found out where that can be, refused where it cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import shardadam
from shardadam.checkpoint import import_checkpoint

HOST = {"w": np.ones((64, 48), np.float32), "odd": np.arange(17 * 257, dtype=np.float32).reshape(17, 257)}


@pytest.fixture
def made(data_mesh):
    plan = shardadam.make_plan(HOST, data_mesh, min_size=0)
    tx = shardadam.adam(1e-2, plan=plan)
    with jax.numpy_dtype_promotion("standard"):
        _, state = jax.jit(tx.update)(HOST, tx.init(HOST))
    return plan, tx, state


def test_packed_moments_without_a_plan_are_refused(made, tmp_path):
    plan, tx, state = made
    with shardadam.Checkpointer(tmp_path / "a") as checkpointer:
        with pytest.raises(ValueError, match=r"`0/mu/odd`: may be packed.*plan=plan"):
            checkpointer.save(0, state)
        with pytest.raises(ValueError, match=r"`odd`: its moment has shape \(8, 547\), the parameter \(17, 257\)"):
            checkpointer.save(0, {"params": HOST, "opt_state": state})
        assert checkpointer.all_steps() == []
    with shardadam.Checkpointer(tmp_path / "b", plan=plan) as checkpointer:
        checkpointer.save(0, {"params": HOST, "opt_state": state}, wait=True)
        back = checkpointer.restore({"params": HOST, "opt_state": tx.init(HOST)})
    jax.tree.map(np.testing.assert_array_equal, back["opt_state"], state)


def test_natural_moments_that_only_look_packed_are_told_by_their_params(data_mesh, tmp_path):
    host = {"w": np.ones((64, 1024), np.float32)}
    state = shardadam.adam(1e-2, mesh=data_mesh).init(host)
    assert state[0].mu["w"].shape == (64, 1024)
    with shardadam.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, {"params": host, "opt_state": state}, wait=True)
        checkpointer.restore({"params": host, "opt_state": state})


def test_each_train_state_in_a_tree_is_unpacked_by_its_own_plan(data_mesh, tmp_path):
    trees = {"gen": HOST, "disc": {"d": np.ones((5, 333), np.float32)}}
    states = {
        name: shardadam.TrainState.create(apply_fn=None, params=params, tx=shardadam.adam(1e-2, mesh=data_mesh))
        for name, params in trees.items()
    }
    assert states["disc"].plan.leaves["d"].layout == "packed"
    plain = {name: optax.adam(1e-2).init(params) for name, params in trees.items()}
    with shardadam.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, states, wait=True)
        back = checkpointer.restore(states)
        like = {
            name: {"step": jnp.int32(0), "params": jax.tree.map(jnp.asarray, trees[name]), "opt_state": plain[name]}
            for name in trees
        }
        logical = checkpointer.restore(like)
    jax.tree.map(np.testing.assert_array_equal, back, states)
    assert logical["disc"]["opt_state"][0].mu["d"].shape == (5, 333)


def test_two_keys_that_orbax_would_write_to_one_place(tmp_path):
    state = {"a.b": np.ones(3, np.float32), "a": {"b": np.zeros(3, np.float32)}}
    with (
        shardadam.Checkpointer(tmp_path) as checkpointer,
        pytest.raises(ValueError, match=r"'a' > 'b' and 'a\.b': Orbax would write both to 'a\.b'"),
    ):
        checkpointer.save(0, state)


def test_two_leaves_that_a_seal_would_have_under_one_name(tmp_path):
    """The digest of one would be that of the other: a good step would be taken for damaged, and moved aside."""
    tree = {"params": {"a/b": jnp.ones(3), "a": {"b": jnp.zeros(3)}}}
    message = "'params' > 'a' > 'b' and 'params' > 'a/b': a seal would have both as 'params/a/b'; rename a key"
    with shardadam.Checkpointer(tmp_path) as checkpointer, pytest.raises(ValueError, match=message):
        checkpointer.save(0, tree)
    with ocp.StandardCheckpointer() as orbax:
        orbax.save(tmp_path / "plain", tree)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(tmp_path / "plain", tmp_path / "imported", step=None)
    assert not (tmp_path / "imported").exists()
    with ocp.CheckpointManager(tmp_path / "old", item_names=("state",)) as manager:
        manager.save(3, args=ocp.args.Composite(state=ocp.args.StandardSave(tree)))
    with shardadam.Checkpointer(tmp_path / "old") as checkpointer, pytest.raises(ValueError, match=message):
        checkpointer.adopt(3)
    assert checkpointer.all_steps() == []
