"""A save under way: it keeps the lock if its Checkpointer goes, is not sealed without it, and outlives a Ctrl-C."""

import dataclasses
import gc
import os
import signal
import threading
import time

import jax.numpy as jnp
import pytest
from conftest import no_root

from shardadam.checkpoint import Checkpointer, CheckpointError, SaveError, saving, sealing
from shardadam.checkpoint.holder import Holder


def state(value):
    return {"x": jnp.full((8, 4), value, jnp.float32)}


@pytest.fixture
def gate(monkeypatch):
    """Seals are written once it is set."""
    opened, write = threading.Event(), sealing.write_seal

    def when_open(*args, **options):
        assert opened.wait(200)
        return write(*args, **options)

    monkeypatch.setattr(saving, "write_seal", when_open)
    yield opened
    opened.set()


def test_the_lock_is_held_until_a_save_is_sealed_whose_checkpointer_is_gone(tmp_path, gate):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state(1))
    del checkpointer
    gc.collect()
    with Checkpointer(tmp_path) as other:
        with pytest.raises(CheckpointError, match="another Checkpointer of this process writes there"):
            other.save(2, state(2))
        deadline = time.monotonic() + 200
        while not (tmp_path / "1").is_dir():  # And nothing was swept away.
            assert time.monotonic() < deadline
            time.sleep(0.01)
        gate.set()
        while other.latest_step() != 1 or (tmp_path / "writer.lock").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
            gc.collect()
        other.save(2, state(2), wait=True)
        assert other.all_steps() == [1, 2]


def test_a_step_is_not_sealed_nor_an_older_one_deleted_without_the_lock(tmp_path, gate):
    with Checkpointer(tmp_path, max_to_keep=2) as checkpointer:
        gate.set()
        for step in (1, 2):
            checkpointer.save(step, state(step), wait=True)
        gate.clear()
        checkpointer.save(3, state(3))
        lock = tmp_path / "writer.lock"
        lock.unlink()
        lock.write_text(dataclasses.replace(Holder.this_process("new"), host="elsewhere").to_text())
        gate.set()
        with pytest.raises(SaveError, match=r"step 3: not saved in .*writer.lock has been taken over by another run"):
            checkpointer.wait()
        assert checkpointer.all_steps() == [1, 2]
        assert (tmp_path / "3").exists()  # It may be the other run's by now.
        lock.unlink()


@pytest.fixture
def interruptible():
    """SIGINT interrupts, also in the processes of pytest-xdist, which ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_a_save_fails_with_is_told_after_a_wait_that_was_interrupted(tmp_path, monkeypatch, interruptible):
    interrupted, await_end = threading.Event(), sealing.Sealing.await_end

    def full(*_, **__):
        assert interrupted.wait(200)
        raise OSError(28, "No space left on device")

    def interrupted_meanwhile(self):
        monkeypatch.setattr(sealing.Sealing, "await_end", await_end)
        # Started within the wait: before it, a machine that is slow would have the signal come where nobody expects it.
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        await_end(self)

    with Checkpointer(tmp_path) as checkpointer:
        monkeypatch.setattr(saving, "write_seal", full)
        monkeypatch.setattr(sealing.Sealing, "await_end", interrupted_meanwhile)
        checkpointer.save(1, state(1))
        with pytest.raises(KeyboardInterrupt):
            checkpointer.wait()
        interrupted.set()
        with pytest.raises(SaveError, match=r"step 1: not saved in .*No space left"):
            checkpointer.wait()


def test_a_save_that_cannot_begin_leaves_nothing_that_waits(open_place):
    """Threads of Orbax's, which waited for directories that could not be made, kept a process from its end."""
    with Checkpointer(open_place) as checkpointer:
        checkpointer.save(1, state(1), wait=True)
        before = threading.enumerate()
        open_place.chmod(0o555)
        with no_root(), pytest.raises(SaveError, match=r"step 2: not saved in .*Permission denied"):
            checkpointer.save(2, state(2), wait=True)
        open_place.chmod(0o777)
        deadline = time.monotonic() + 200
        while left := [t for t in threading.enumerate() if t not in before and not t.daemon]:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
        checkpointer.save(3, state(3), wait=True)
        assert checkpointer.all_steps() == [1, 3]
