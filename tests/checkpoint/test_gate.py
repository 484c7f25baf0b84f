"""Orbax's writers begin once a save has begun all else, and not at all where it fails before."""

import asyncio
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from shardadam.checkpoint import Checkpointer, SaveError, gate, saving


@pytest.fixture
def state(data_mesh):
    x = np.arange(64, dtype=np.float32)
    return {"x": jax.device_put(x, jax.NamedSharding(data_mesh, jax.P("data"))), "on_host": x, "number": 3}


@pytest.fixture
def held(monkeypatch):
    """Until the gate is opened, as long as that may take."""
    monkeypatch.setattr(gate, "_LONGEST", 1000)


def written(directory, step):
    """The files of a step's state, whether or not it is committed."""
    return [path for path in directory.glob(f"{step}*/state*/**/*") if path.is_file()]


@pytest.mark.usefixtures("held")
def test_nothing_is_written_before_all_has_begun(tmp_path, state, monkeypatch):
    begin, seen = ocp.CheckpointManager.save, []

    def seeing(manager, step, **options):
        is_saved = begin(manager, step, **options)
        time.sleep(0.5)  # So long it does not take to write this.
        seen.append(written(tmp_path, step))
        return is_saved

    monkeypatch.setattr(ocp.CheckpointManager, "save", seeing)
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state, wait=True)
            assert seen == [[]] * step
            assert written(tmp_path, step)


def at_the_end(patch, writers):
    begin = ocp.CheckpointManager.save

    def failing(*args, **options):
        begin(*args, **options)
        fail(writers)

    patch.setattr(ocp.CheckpointManager, "save", failing)


def in_another_item(patch, writers):
    async def failing(*_, **__):
        await asyncio.sleep(0.2)
        fail(writers)

    patch.setattr(ocp.JsonCheckpointHandler, "async_save", failing)


def fail(writers):
    """Fails when threads are there that are to write, and says which."""
    writers.extend(t for t in threading.enumerate() if t.name.endswith("_handler"))
    raise OSError("no such luck")


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("fails", [at_the_end, in_another_item])
def test_writers_of_a_save_that_fails_to_begin_end_and_write_nothing(tmp_path, state, monkeypatch, fails):
    writers = []
    with Checkpointer(tmp_path) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(saving, "remove_partial", lambda *_: None)
            fails(patch, writers)
            with pytest.raises(SaveError, match=r"step 1: not saved in .*no such luck"):
                checkpointer.save(1, state, extra={"batch": 7})
        assert {"array_type_handler", "np_type_handler"} <= {thread.name for thread in writers}
        for thread in writers:
            threading.Thread.join(thread, 200)
            assert not thread.is_alive()
        assert written(tmp_path, 1) == []
        checkpointer.save(2, state, wait=True)
        assert checkpointer.all_steps() == [2]


def test_a_gate_that_stays_closed_opens_once_for_all_leaves(monkeypatch):
    monkeypatch.setattr(gate, "_LONGEST", 1.0)
    closing, waited = gate.Gate(), []
    with closing.closed():
        for _ in range(100):
            asyncio.run(closing._opening.wait())
            waited.append(time.monotonic())
    assert waited[-1] - waited[0] < 50  # Of 99 more, not each a second.
