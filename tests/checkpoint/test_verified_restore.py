"""A damaged step is found, moved aside and told, and the one before it is restored; the run goes on past it."""

import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_seal import train_state

from shardadam.checkpoint import Checkpointer, CheckpointError, verify
from shardadam.checkpoint.restoring import Damaged
from shardadam.checkpoint.steps import Steps


def state_of(value):
    return {"x": jnp.full((8, 4), value, jnp.float32), "y": jnp.arange(3)}


@pytest.fixture
def saved(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state_of(step), extra={"step": step})
    return tmp_path


def largest(path):
    return max((p for p in path.rglob("d/*")), key=lambda p: p.stat().st_size)


def flip(path, at=None):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 if at is None else at] ^= 16
    path.write_bytes(raw)


@pytest.mark.parametrize("check", ["files", "full"])
def test_the_newest_good_one_is_restored_and_the_run_goes_on(saved, caplog, check):
    flip(largest(saved / "3" / "state"))
    (saved / "2" / "commit_success.txt").unlink()
    with Checkpointer(saved) as checkpointer, caplog.at_level(logging.WARNING, "shardadam.checkpoint"):
        restored = checkpointer.restore(state_of(0), verify=check)
        assert restored["x"][0, 0] == checkpointer.restored_step == 1
        assert [damage.step for damage in checkpointer.damaged] == [3, 2]
        assert "its bytes are not those that were sealed" in checkpointer.damaged[0].why
        assert "commit_success.txt: is not there" in checkpointer.damaged[1].why
        assert "restored step 1 in place of 3, 2" in caplog.text
        assert checkpointer.all_steps() == [1]
        for step in (2, 3, 4):  # As the run gets there again.
            checkpointer.save(step, state_of(10 * step))
            checkpointer.wait()
        assert checkpointer.restore(state_of(0))["x"][0, 0] == 40
        assert len(checkpointer.damaged) == 2
    for damage in checkpointer.damaged:  # All of it is kept, with its seal and the reason.
        assert (damage.moved_to / "state").is_dir()
        assert damage.moved_to.with_name(f"{damage.moved_to.name}.json").exists()
        assert damage.why in damage.moved_to.with_name(f"{damage.moved_to.name}.txt").read_text()


LARGE = {"x": jnp.zeros(5 * 2**16), "y": jnp.ones(3)}  # A file of more than 1 MiB, compressed or not.


def large_state(step):
    return {
        "x": LARGE["x"] + np.random.default_rng(step).standard_normal(LARGE["x"].shape, np.float32),
        "y": LARGE["y"],
    }


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "compressed"])
def large_steps(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "steps"
    with Checkpointer(path, compress=request.param) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, large_state(step))
    return path


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (flip, "its bytes are not those that were sealed"),
        (cut, "bytes, sealed with"),
        (lengthen, "bytes, sealed with"),
        (lambda path: path.unlink(), "is not there"),
    ],
    ids=["flipped", "cut", "lengthened", "deleted"],
)
@pytest.mark.parametrize("check", ["files", "full"])
def test_a_file_that_is_hashed_while_it_is_read_and_is_damaged(large_steps, tmp_path, damage, why, check):
    """Orbax may have handed out what is wrong by the time that the hash is known: it must not get to the caller."""
    root = tmp_path / "steps"
    shutil.copytree(large_steps, root)
    path = largest(root / "2" / "state")
    assert path.stat().st_size >= verify._LARGE
    damage(path)
    with Checkpointer(root) as checkpointer:
        restored = checkpointer.restore(LARGE, verify=check)
        assert checkpointer.restored_step == 1
        np.testing.assert_array_equal(restored["x"], large_state(1)["x"])
        (told,) = checkpointer.damaged
        assert f"{path.name}: " in told.why
        assert why in told.why
        assert told.moved_to.is_dir()
        assert checkpointer.all_steps() == [1]


def test_a_step_that_is_asked_for_and_damaged_is_an_error(saved):
    flip(largest(saved / "2" / "state"))
    with Checkpointer(saved) as checkpointer:
        with pytest.raises(Damaged, match="its bytes are not those that were sealed"):
            checkpointer.restore(state_of(0), 2)
        assert checkpointer.all_steps() == [1, 2, 3]  # And it is left where it is.
        assert checkpointer.restore(state_of(0), 1)["x"][0, 0] == 1


def test_all_damaged(saved):
    for step in (1, 2, 3):
        flip(saved / "seals" / f"{step}.json")
    with Checkpointer(saved) as checkpointer:
        with pytest.raises(
            CheckpointError, match=r"(?s)none of its steps is.*step 3: the seal is damaged.*step 1: the"
        ):
            checkpointer.restore(state_of(0))
        assert sorted(p.name[0] for p in (saved / "damaged").iterdir() if p.is_dir()) == ["1", "2", "3"]


def test_what_was_saved_beside_the_state_is_held_to_the_seal_too(saved):
    (saved / "3" / "extra" / "metadata").write_text('{"step": 4}')
    with Checkpointer(saved) as checkpointer:
        assert checkpointer.extra(2) == {"step": 2}
        with pytest.raises(Damaged, match="extra/metadata: its bytes are not those"):
            checkpointer.extra()
        checkpointer.restore(state_of(0))
        assert checkpointer.extra() == {"step": 2}


def test_another_tree_is_the_callers_mistake_and_moves_nothing(saved):
    with Checkpointer(saved) as checkpointer:
        with pytest.raises(CheckpointError, match="`z`: not in the checkpoint"):
            checkpointer.restore({**state_of(0), "z": jnp.ones(1)})
        with pytest.raises(ValueError, match="verify: got True, wanted 'files', 'full' or False"):
            checkpointer.restore(state_of(0), verify=True)
        assert checkpointer.all_steps() == [1, 2, 3]


def test_a_reader_beside_a_writer_moves_nothing(saved):
    flip(largest(saved / "3" / "state"))
    with Checkpointer(saved) as writer, Checkpointer(saved) as reader:
        writer.lock()
        assert reader.restore(state_of(0))["x"][0, 0] == 2
        assert reader.damaged[0].moved_to is None
        assert writer.all_steps() == [1, 2, 3]


def test_a_step_that_is_deleted_while_it_is_verified_is_no_damage(saved, monkeypatch):
    steps, found = Steps(Checkpointer(saved).directory), verify.list_files

    def deleted_meanwhile(path):
        if path.name == "3":
            steps.retire(3)
            steps.sweep()
        return found(path)

    monkeypatch.setattr(verify, "list_files", deleted_meanwhile)
    with Checkpointer(saved) as checkpointer:
        assert checkpointer.restore(state_of(0))["x"][0, 0] == 2
        assert checkpointer.damaged == []
    assert not (saved / "damaged").exists()


def test_what_the_files_cannot_tell_the_digests_do(tmp_path):
    """Bits that changed between the device and the disk are sealed with the files."""
    state = {"w": jax.device_put(jnp.arange(64.0), NamedSharding(make_mesh({"data": 8}), P("data"))), "n": 3}
    other = {**state, "w": state["w"].at[5].set(7)}
    for name, x in (("a", state), ("b", other)):
        with Checkpointer(tmp_path / name) as checkpointer:
            checkpointer.save(1, state, wait=True)
            checkpointer.save(2, x, wait=True)
    a, b = (Steps(Checkpointer(tmp_path / name).directory) for name in "ab")
    shutil.rmtree(a.path(2))
    shutil.copytree(b.path(2), a.path(2))
    seal = a.read_seal(2)
    a.write_seal(type(seal)(step=2, files=b.read_seal(2).files, leaves=seal.leaves))
    with Checkpointer(tmp_path / "a") as checkpointer:
        assert checkpointer.restore(state)["w"][5] == 7  # Nothing is wrong with the files.
        assert checkpointer.restore(state, verify="full")["w"][5] == 5
        assert checkpointer.damaged[0].why == "`w`: its digest is not the one that was sealed"
    assert list(verify.stored_leaf_faults(b.path(2), seal)) == ["`w`: its digest is not the one that was sealed"]
    assert list(verify.stored_leaf_faults(b.path(2), b.read_seal(2), chunk_bytes=1)) == []


def test_every_kind_of_leaf_stands_the_full_verification(tmp_path):
    mesh = make_mesh({"data": 8})
    state = {
        "python": 3, "float": 0.5, "bool": True, "numpy": np.arange(6.0), "number": np.int64(2**40),
        "key": jax.random.key(7), "bfloat16": jnp.ones((4,), jnp.bfloat16), "int4": jnp.ones((4,), jnp.int4),
        "keys": jax.device_put(jax.random.split(jax.random.key(1), 8), NamedSharding(mesh, P("data"))),
        "packed": train_state(),
    }  # fmt: skip
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        checkpointer.restore({**state, "packed": train_state(5, "natural")}, verify="full")
        # A TrainState's step is a Python int at first, and an int32 array after a step.
        restored = checkpointer.restore({**state, "python": jnp.int32(0), "float": jnp.float32(0)}, verify="full")
        assert restored["python"].dtype == jnp.int32
        assert checkpointer.damaged == []
    assert (
        list(
            verify.stored_leaf_faults(Steps(checkpointer.directory).path(1), Steps(checkpointer.directory).read_seal(1))
        )
        == []
    )
