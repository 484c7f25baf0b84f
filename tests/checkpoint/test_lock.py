"""One writer per directory: refused while it lives, taken over when it is dead, and never two at once."""

import dataclasses
import errno
import gc
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from shardadam import runtime
from shardadam.checkpoint import Checkpointer, CheckpointError, lock, shared
from shardadam.checkpoint.holder import Holder

ROOT = Path(__file__).parents[2]
STATE = {"x": jnp.arange(4.0)}


def contenders(*arguments):
    command = [sys.executable, str(ROOT / "tests/checkpoint/contenders.py"), *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE", 0.2)
    monkeypatch.setattr(lock, "_POLL", 0.01)


def lock_file(directory, *, silent=0.0, **changes):
    """A lock of another run's, as a process elsewhere would have left it."""
    holder = dataclasses.replace(Holder.this_process("the-other"), **changes)
    path = directory / lock.NAME
    path.unlink(missing_ok=True)
    path.write_text(holder.to_text())
    os.utime(path, (time.time() - silent,) * 2)
    return path


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path, quick, caplog):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, STATE)
    assert not (tmp_path / lock.NAME).exists()
    first = contenders("hold", tmp_path)
    pid = int(first.stdout.readline())
    with Checkpointer(tmp_path) as second:
        for write in (second.lock, lambda: second.save(2, STATE)):
            with pytest.raises(CheckpointError) as caught:
                write()
            said = re.escape(f"run the-holder, process {pid} on host {socket.gethostname()}, since 20")
            assert re.search(said, str(caught.value))
            assert f"Stop that run, or save in another directory. If it is surely gone, remove {tmp_path}/" in str(
                caught.value
            )
        assert second.restore(STATE)["x"][3] == 3  # Reading needs no lock.
        first.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # Ended, and a zombie: as a launcher may leave it.
        second.save(2, STATE)
        assert f"taken over from run the-holder, process {pid}" in caplog.text
    first.communicate()
    assert {path.name for path in tmp_path.iterdir()} >= {"1", "2"}
    assert not list(tmp_path.glob(f"{lock.NAME}*"))


def test_two_checkpointers_of_one_process(tmp_path, quick, monkeypatch):
    one, two = Checkpointer(tmp_path), Checkpointer(tmp_path, run_id="two")
    one.save(1, STATE)
    with pytest.raises(CheckpointError, match=r"another Checkpointer of this process writes there.*\. Close that one"):
        two.save(2, STATE)
    one.close()
    two.save(2, STATE, wait=True)
    monkeypatch.setattr(lock, "_PATIENCE", 100.0)  # For the thread that ends the save, on a machine that is slow.
    del two  # Not closed: the next gets the directory all the same.
    gc.collect()
    with Checkpointer(tmp_path) as three:
        three.wait()
        three.lock()


@pytest.mark.parametrize("changes", [{"started": 1}, {"pid": 2**22 + 1}], ids=["another got its pid", "gone"])
def test_a_dead_process_here_is_known_at_once(tmp_path, changes):
    lock_file(tmp_path, **{"pid": os.getppid()} | changes)
    lock.WriterLock(tmp_path, "mine").acquire()
    assert "mine" in (tmp_path / lock.NAME).read_text()


@pytest.mark.parametrize("what", ["host", "boot_id", "pid_namespace"])
def test_elsewhere_the_heartbeat_tells(tmp_path, quick, monkeypatch, what):
    elsewhere = {what: "another"}
    monkeypatch.setattr(lock, "STALE_AFTER", 1.0)
    path = lock_file(tmp_path, silent=0.5, pid=1, **elsewhere)
    silent_since = path.stat().st_mtime
    held = lock.WriterLock(tmp_path, "mine")
    began = time.monotonic()
    held.acquire()
    assert time.time() - silent_since > 1  # Not before it has been silent for STALE_AFTER,
    assert time.monotonic() - began < 50  # and not as long after as it is without the patch.
    held.release()

    monkeypatch.setattr(lock, "STALE_AFTER", 3600.0)  # However long this process is stopped between two looks.
    lock_file(tmp_path, **elsewhere)
    holder = os.open(path, os.O_RDWR)
    # It beats while the other waits. Of this module alone: other threads sleep, too.
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: os.utime(holder))
    monkeypatch.setattr(lock, "time", clock)
    with pytest.raises(CheckpointError, match=r"another run writes there \(run the-other, "):
        held.acquire()
    os.utime(holder, (0, 0))  # Long silent, but its flock says that it lives.
    lock.fcntl.flock(holder, lock.fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match="another run writes there"):
        held.acquire()
    os.close(holder)
    held.acquire()


def test_one_that_was_taken_for_dead_finds_out_before_it_saves(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.02)
    with Checkpointer(tmp_path, run_id="slow") as slow:
        slow.save(1, STATE, wait=True)
        path = lock_file(tmp_path, silent=30, pid=os.getppid(), started=Holder.this_process("").started)
        monkeypatch.setattr(lock.Holder, "is_running", lambda self: True)
        time.sleep(0.2)
        assert time.time() - path.stat().st_mtime > 20  # The slow one's heartbeats do not keep the other alive.
        with pytest.raises(CheckpointError, match="another run writes there"):
            slow.save(2, STATE)
    assert "the-other" in path.read_text()  # Nor does it give back what is not its own.
    path.unlink()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": "../x"}', "[" * 100_000])
def test_a_lock_that_cannot_be_read_goes_by_its_heartbeat(tmp_path, text, quick, monkeypatch):
    (tmp_path / lock.NAME).write_text(text)
    os.utime(tmp_path / lock.NAME, (0, 0))
    lock.WriterLock(tmp_path, "mine").acquire()
    assert "mine" in (tmp_path / lock.NAME).read_text()


def test_without_hard_links(tmp_path, quick, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    one, two = lock.WriterLock(tmp_path, "one"), lock.WriterLock(tmp_path, "two")
    one.acquire()
    with pytest.raises(CheckpointError, match="run one"):
        two.acquire()
    one.release()
    lock_file(tmp_path, pid=2**22 + 1)
    two.acquire()
    assert [path.name for path in tmp_path.iterdir()] == [lock.NAME]


def test_never_two_at_once_however_they_die(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    race = contenders("race", tmp_path, 2.5, 31, 6)
    out, _ = race.communicate(timeout=250)
    assert race.returncode == 0
    holds, killed, started = map(int, out.split())
    assert holds > 30
    assert killed > 5
    assert started > killed  # Those that were killed in between held nothing, or were giving back.


def test_one_process_shares_with_itself_and_a_reader_needs_no_more(tmp_path, monkeypatch):
    shared.check_shared(tmp_path / "nowhere")
    monkeypatch.setattr(runtime, "coordination_client", lambda: object())
    monkeypatch.setattr(runtime, "from_process_zero", lambda name, value: value)
    monkeypatch.setattr(runtime, "from_every_process", lambda name, value: [value])
    shared.check_shared(tmp_path / "nowhere")  # Cannot be written: nothing to find out.
    shared.check_shared(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_a_link_is_refused_wherever_it_leads(tmp_path, quick):
    (tmp_path / lock.NAME).symlink_to(tmp_path / "nowhere")
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointError, match="is a symbolic link"):
        checkpointer.lock()
