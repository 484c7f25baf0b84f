"""When a step counts as saved, what waits for what, and where errors surface."""

import errno
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import make_mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from shardadam.checkpoint import Checkpointer, CheckpointError


def state_of(value):
    return {"x": jnp.full((8, 4), value, jnp.float32)}


@pytest.fixture
def writing(monkeypatch):
    """Holds saves that have an `extra` between their start and their commit, until `writing.set()`."""
    gate = threading.Event()
    write = ocp.JsonCheckpointHandler._save_fn

    async def held(*args, **kwargs):
        assert gate.wait(200)
        return await write(*args, **kwargs)

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", held)
    yield gate
    gate.set()


@pytest.fixture
def disk_full(monkeypatch):
    """Saves that have an `extra` fail after they have started, until `disk_full()`."""

    async def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.JsonCheckpointHandler, "_save_fn", fail)
        yield patch.undo


def test_steps_extra_and_latest(tmp_path):
    with Checkpointer(tmp_path / "not" / "there" / "yet") as checkpointer:
        assert checkpointer.all_steps() == []
        assert checkpointer.latest_step() is None
        for step in (2, np.int64(10), jnp.int32(30)):
            checkpointer.save(step, state_of(step), extra={"step": int(step), "nested": [1, None]}, wait=True)
        checkpointer.save(31, state_of(31), wait=True)
        assert checkpointer.all_steps() == [2, 10, 30, 31]
        assert checkpointer.latest_step() == 31
        assert checkpointer.extra(10) == {"step": 10, "nested": [1, None]}
        assert checkpointer.extra() is None
        assert checkpointer.restore(state_of(0))["x"][0, 0] == 31
        assert checkpointer.restore(state_of(0), step=2)["x"][0, 0] == 2
    assert {path.name for path in (tmp_path / "not" / "there" / "yet").iterdir()} == {"2", "10", "30", "31", "seals"}


def test_a_relative_directory_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpointer = Checkpointer("runs/a")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir("other")
    checkpointer.save(0, state_of(0), wait=True)
    assert (tmp_path / "runs" / "a" / "0").is_dir()


def test_a_save_under_way_is_no_step_yet(tmp_path, writing):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state_of(1), wait=True)
    checkpointer.save(2, state_of(2), extra={})
    assert checkpointer.latest_step() == 1
    assert checkpointer.all_steps() == [1]
    writing.set()
    checkpointer.wait()
    assert checkpointer.latest_step() == 2
    checkpointer.close()


def test_leaving_the_with_waits(tmp_path, writing):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state_of(1), extra={})
        threading.Timer(0.2, writing.set).start()
    assert checkpointer.all_steps() == [1]


def test_leaving_the_with_by_an_error_waits_and_keeps_the_error(tmp_path, writing):
    with pytest.raises(KeyError, match="mine"), Checkpointer(tmp_path) as checkpointer:  # noqa: PT012 - the body is the test
        checkpointer.save(1, state_of(1), extra={})
        threading.Timer(0.2, writing.set).start()
        raise KeyError("mine")
    assert checkpointer.all_steps() == [1]


def test_an_error_in_the_body_is_not_masked_by_one_in_the_save(tmp_path, disk_full):
    with pytest.raises(KeyError, match="mine") as caught, Checkpointer(tmp_path) as checkpointer:  # noqa: PT012 - the body is the test
        checkpointer.save(1, state_of(1), extra={})
        raise KeyError("mine")
    assert "No space left" in caught.value.__notes__[0]


@pytest.mark.parametrize("where", ["wait", "save", "close", "exit", "restore"])
def test_an_error_in_a_save_surfaces_at_the_next_call(where, tmp_path, disk_full):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state_of(1), wait=True)
    checkpointer.save(2, state_of(2), extra={})
    calls = {
        "wait": checkpointer.wait,
        "save": lambda: checkpointer.save(3, state_of(3)),
        "close": checkpointer.close,
        "exit": lambda: checkpointer.__exit__(None, None, None),
        "restore": lambda: checkpointer.restore(state_of(0)),
    }
    with pytest.raises(OSError, match="No space left") as caught:
        calls[where]()
    assert f"step 2: not saved in {tmp_path}: " in str(caught.value)
    assert "saved there: steps 1." in str(caught.value)
    assert checkpointer.all_steps() == [1]
    assert checkpointer.restore(state_of(0))["x"][0, 0] == 1
    checkpointer.close()


def test_after_a_failed_save_the_next_one_succeeds(tmp_path, disk_full):
    with Checkpointer(tmp_path, max_to_keep=2) as checkpointer:
        checkpointer.save(1, state_of(1), wait=True)
        with pytest.raises(OSError, match="No space left"):
            checkpointer.save(2, state_of(2), extra={}, wait=True)
        assert checkpointer.all_steps() == [1]
        disk_full()
        # Not step 2: what is left of its failed save may still be writing, and Orbax would write in the same place.
        checkpointer.save(3, state_of(3), extra={"again": True}, wait=True)
        assert checkpointer.all_steps() == [1, 3]
        assert checkpointer.extra() == {"again": True}
        assert checkpointer.restore(state_of(0))["x"][0, 0] == 3


def test_a_save_that_orbax_refuses_leaves_the_checkpointer_usable(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("refused")

    checkpointer = Checkpointer(tmp_path)
    before = set(threading.enumerate())
    with monkeypatch.context() as patch:
        patch.setattr(ocp.PyTreeCheckpointHandler, "async_save", refuse)
        with pytest.raises(ValueError, match="refused") as caught:
            checkpointer.save(1, state_of(1))
    assert "step 1: not saved" in str(caught.value)
    checkpointer.save(2, state_of(2), wait=True)
    assert checkpointer.restore(state_of(0))["x"][0, 0] == 2
    # No thread of Orbax's is left waiting for what never comes: it would hold up the end of the process.
    for thread in {t for t in set(threading.enumerate()) - before if "_target_setting_result" in t.name}:
        threading.Thread.join(thread, 200)
        assert not thread.is_alive()


def test_a_save_that_does_not_happen_is_an_error(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(5, state_of(5))
    for step in (5, 4):
        with pytest.raises(
            CheckpointError, match=rf"step {step}: not saved: .* holds steps 5 already; steps must ascend"
        ):
            checkpointer.save(step, state_of(step))
    monkeypatch.setattr(ocp.CheckpointManager, "save", lambda *args, **kwargs: False)
    with pytest.raises(CheckpointError, match=r"step 6: Orbax did not save it in .* holds steps 5"):
        checkpointer.save(6, state_of(6))


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="max_to_keep: got 1, wanted 2 or more"):
        Checkpointer(tmp_path, max_to_keep=1)
    with pytest.raises(ValueError, match="keep_period: got 0, wanted 1 or more"):
        Checkpointer(tmp_path, keep_period=0)
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(ValueError, match="step: got -1, wanted 0 or more"):
        checkpointer.save(-1, state_of(0))
    with pytest.raises(TypeError):
        checkpointer.save(1.5, state_of(0))
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpointer.save(1, state_of(0), extra={"array": jnp.ones(3)})
    with pytest.raises(ValueError, match="`x`: got shape \\(0, 3\\), and Orbax saves no empty arrays"):
        checkpointer.save(1, {"x": jnp.zeros((0, 3))})
    with pytest.raises(ValueError, match="`a/0`: got str, and only arrays and numbers can be saved"):
        checkpointer.save(1, {"a": ["text"]})
    assert list(tmp_path.iterdir()) == []
    checkpointer.close()
    checkpointer.close()
    with pytest.raises(ValueError, match=r"step 1: not saved: the checkpointer of .* is closed"):
        checkpointer.save(1, state_of(0))


def test_max_to_keep(tmp_path):
    with Checkpointer(tmp_path, max_to_keep=2) as checkpointer:
        for step in range(5):
            checkpointer.save(step, state_of(step))
    assert Checkpointer(tmp_path).all_steps() == [3, 4]


def test_extra_is_read_when_save_is_called(tmp_path, writing):
    extra = {"a": 1}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state_of(0), extra=extra)
        extra["a"] = 2
        writing.set()
        checkpointer.wait()
        assert checkpointer.extra() == {"a": 1}


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    sharding = NamedSharding(make_mesh({"data": 8}), P("data"))
    host = {
        "x": np.arange(2**22, dtype=np.float32),
        "y": np.arange(2**20, dtype=np.float32),
    }  # Large: written for a while.
    state = {"x": jax.device_put(host["x"], sharding), "y": jnp.array(host["y"])}
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state)
        for _ in range(3):
            state = step(state)
        jax.block_until_ready(state)
        restored = checkpointer.restore(state)
    jax.tree.map(np.testing.assert_array_equal, restored, host)


def test_a_step_restores_alike_compressed_or_not(tmp_path):
    state = {"x": jnp.zeros((256, 1024)), "y": jnp.arange(8.0)}
    sizes = []
    for compress in (False, True):
        directory = tmp_path / str(compress)
        with Checkpointer(directory, compress=compress) as checkpointer:
            checkpointer.save(1, state)
        restored = Checkpointer(directory, compress=not compress).restore(jax.tree.map(jnp.ones_like, state))
        assert all(jax.tree.map(np.array_equal, restored, state).values())
        sizes.append(sum(path.stat().st_size for path in directory.rglob("d/*")))
    assert sizes[0] > state["x"].nbytes > 100 * sizes[1]
