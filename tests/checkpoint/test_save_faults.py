"""Saves on disks that are full, over a quota, read-only or gone: told in time, and why; the older steps stand."""

import contextlib
import errno
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from shardadam.checkpoint import (
    Checkpointer,
    CheckpointError,
    SaveError,
    errors,
    export_checkpoint,
    failures,
    saving,
)
from shardadam.checkpoint.steps import Steps

ROOT = Path(__file__).parents[2]
SMALL = {"x": jnp.arange(1000.0)}
BIG = {"x": jax.random.normal(jax.random.key(0), (2**20,))}  # 4 MB that do not compress


def mount(*arguments):
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode == 0


CAN_MOUNT = os.geteuid() == 0 and shutil.which("mount") is not None


@pytest.fixture
def disk(tmp_path):
    """Where steps go: on a disk of its own with 3 MB, where the tests may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    if not (CAN_MOUNT and mount("-t", "tmpfs", "-o", "size=3m", "none", place)):
        pytest.skip("only root, and not in every container, may mount a small disk")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@contextlib.contextmanager
def full(directory):
    """A `disk`."""
    yield "No space left on device (ENOSPC)"


@contextlib.contextmanager
def over_the_limit(directory):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield "File too large (EFBIG)"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def over_the_quota(directory):
    """As a network's file system tells it: writes are taken, and refused when they are to be on the disk."""
    fsync = os.fsync

    def refuse(file):
        if os.readlink(f"/proc/self/fd/{file}").startswith(f"{directory}/2/"):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        fsync(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        yield "Disk quota exceeded (EDQUOT)"


@contextlib.contextmanager
def read_only(directory):
    assert mount("--bind", directory, directory)
    assert mount("-o", "remount,ro,bind", directory)
    try:
        yield "Read-only file system (EROFS)"
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


@contextlib.contextmanager
def gone(directory):
    away = directory.with_name("away")
    directory.rename(away)
    yield "the directory is gone"
    away.rename(directory)


FAULTS = [full, over_the_limit, over_the_quota, read_only, gone]
NEED_A_DISK = [full, read_only]


def at_the_next_step(checkpointer):
    """What a training loop does: it asks after every step."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        checkpointer.check()
        time.sleep(0.01)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_fault_of_the_disk(request, tmp_path, fault, on_error, caplog):
    directory = (request.getfixturevalue("disk") if fault in NEED_A_DISK else tmp_path) / "steps"
    with Checkpointer(directory, on_error=on_error) as checkpointer:
        checkpointer.save(1, SMALL, wait=True)
        with fault(directory) as told:
            if on_error == "raise":
                with pytest.raises(SaveError) as caught:  # noqa: PT012 - either may be the one
                    checkpointer.save(2, BIG)
                    at_the_next_step(checkpointer)
                said = str(caught.value)
                assert isinstance(caught.value, OSError)
                assert caught.value.errno == getattr(errno, told.split("(")[1][:-1] if "(" in told else "ENOENT")
            else:
                with caplog.at_level(logging.WARNING, "shardadam.checkpoint"):
                    checkpointer.save(2, BIG)
                    while checkpointer._saver.step is not None:
                        checkpointer.check()
                        time.sleep(0.01)
                said = caplog.text
                assert "going on without it" in said
            assert f"step 2: not saved in {directory}: {told}; " in said
            assert "bytes are free; saved there: " in said
            if fault is not gone:
                assert "saved there: steps 1. " in said
                assert (checkpointer.latest_step(), checkpointer.all_steps()) == (1, [1])
                np.testing.assert_array_equal(checkpointer.restore(SMALL)["x"], SMALL["x"])
        assert not (directory / "2").exists()
        # The disk is well again: training has gone on, and saves.
        checkpointer.save(3, SMALL, wait=True)
        assert checkpointer.all_steps() == [1, 3]
        assert not list(directory.glob("*tmp*"))
    np.testing.assert_array_equal(Checkpointer(directory).restore(SMALL)["x"], SMALL["x"])


def test_close_raises_what_was_only_warned_of(tmp_path):
    checkpointer = Checkpointer(tmp_path / "steps", on_error="warn")
    checkpointer.save(1, SMALL, wait=True)
    with over_the_limit(tmp_path):
        checkpointer.save(2, BIG)
        checkpointer.wait()
    with pytest.raises(SaveError, match="step 2: not saved"):
        checkpointer.close()
    checkpointer.close()
    assert not list((tmp_path / "steps").glob("*tmp*"))


def test_the_saved_steps_cannot_even_be_listed(tmp_path, caplog):
    """As on a disk that fails: what is warned of, or raised, is the save's failure, and the run goes on."""
    for on_error in ("warn", "raise"):
        directory = tmp_path / on_error
        checkpointer = Checkpointer(directory, on_error=on_error)
        checkpointer.save(1, SMALL, wait=True)
        seals = (directory / "seals").rename(directory / "elsewhere")
        (directory / "seals").write_text("")
        told = r"step 2: not saved in .*Not a directory \(ENOTDIR\).*saved there: unknown \(.*seals'\)"
        if on_error == "warn":
            checkpointer.save(2, SMALL, wait=True)
            assert re.search(told, caplog.text)
        else:
            with pytest.raises(SaveError, match=told):
                checkpointer.save(2, SMALL, wait=True)
        (directory / "seals").unlink()
        seals.rename(directory / "seals")
        checkpointer.save(3, SMALL)
        checkpointer.close()
        assert checkpointer.all_steps() == [1, 3]


@pytest.mark.parametrize("name", ["run[1]", "lr[!a]", "a*", "a\\b"])
def test_a_directory_that_orbax_would_not_write_to_is_refused(tmp_path, name):
    """Steps were committed without their arrays there, and sealed."""
    with pytest.raises(ValueError, match="would not write there all that they are to save, for the name"):
        Checkpointer(tmp_path / name / "checkpoints")
    with pytest.raises(ValueError, match="give a directory without any of"):
        export_checkpoint(tmp_path, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    for other in ("a]b", "c d\n"):
        with Checkpointer(tmp_path / other) as checkpointer:
            checkpointer.save(1, SMALL)
        checkpointer.restore(SMALL, verify="full")


def test_a_refusal_is_no_fault_of_the_disk(tmp_path):
    with Checkpointer(tmp_path, on_error="warn") as checkpointer:
        checkpointer.save(1, SMALL)
        with pytest.raises(CheckpointError, match="steps must ascend"):
            checkpointer.save(1, SMALL)
        with pytest.raises(CheckpointError, match="NaN"):
            checkpointer.save(2, {"x": jnp.array([jnp.nan])}, wait=True)
    with pytest.raises(ValueError, match="on_error: got 'ignore', wanted 'raise' or 'warn'"):
        Checkpointer(tmp_path, on_error="ignore")


@pytest.mark.parametrize("instead", [True, False])
def test_a_directory_that_is_removed_while_it_is_saved_in(tmp_path, monkeypatch, instead):
    directory = tmp_path / "steps"
    removed, write_seal = threading.Event(), saving.write_seal
    checkpointer = Checkpointer(directory)
    checkpointer.save(1, SMALL, wait=True)
    # However long this thread has to wait for its turn, the step is not sealed before.
    monkeypatch.setattr(
        saving, "write_seal", lambda *args, **options: removed.wait(200) and write_seal(*args, **options)
    )
    checkpointer.save(2, BIG)
    while directory.exists():
        shutil.rmtree(directory, ignore_errors=True)  # What is still being written comes back.
    if instead:
        directory.mkdir(exist_ok=True)
    removed.set()
    with pytest.raises(SaveError, match=r"step 2: not saved in .*saved there: no steps"):
        checkpointer.wait()
    assert checkpointer.all_steps() == []


def test_a_directory_that_is_replaced_is_the_cause_of_what_orbax_fails_with(tmp_path, monkeypatch):
    directory, written, replaced = tmp_path / "steps", threading.Event(), threading.Event()

    def finds_no_files(self, directory):
        written.set()
        assert replaced.wait(200)
        raise ValueError("Save failed: 1/1 params are missing .zarray in checkpoint:\nx.")

    checkpointer = Checkpointer(directory)
    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "finalize", finds_no_files)
    checkpointer.save(1, SMALL)
    assert written.wait(200)
    directory.rename(tmp_path / "elsewhere")
    directory.mkdir()
    replaced.set()
    with pytest.raises(SaveError, match=r"step 1: not saved in .*: the directory was replaced by another; ") as caught:
        checkpointer.wait()
    assert caught.value.errno == errno.ENOENT


def test_a_directory_in_the_place_of_another_is_not_the_same(tmp_path):
    place = tmp_path / "steps"
    place.mkdir()
    same = failures.SamePlace(place)
    same.check()
    place.rmdir()
    place.mkdir()
    with pytest.raises(FileNotFoundError, match="was replaced by another"):
        same.check()


def test_what_the_system_said_is_found_in_what_others_make_of_it(tmp_path):
    outer = ValueError("Error writing: Disk quota exceeded [os_error_code='122']")
    assert errors.errno_of(outer) == errno.EDQUOT
    outer.__cause__ = None
    inner = RuntimeError("failed")
    inner.__cause__ = OSError(errno.EIO, "Input/output error")
    assert errors.errno_of(inner) == errno.EIO
    assert errors.errno_of(ValueError("Errno")) is None
    said = str(failures.save_error(Steps(tmp_path), 7, inner))
    assert "step 7: not saved in" in said
    assert "Input/output error (EIO)" in said
    assert said.endswith("saved there: no steps. The disk is failing: save elsewhere")


ENDS = """
import os, sys
import jax, jax.numpy as jnp
from shardadam.checkpoint import Checkpointer
checkpointer = Checkpointer(sys.argv[1], on_error=sys.argv[2])
checkpointer.save(1, {"x": jnp.arange(10.0)}, wait=True)
print("saved", flush=True)
if sys.argv[3] == "full":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
checkpointer.save(2, {"x": jax.random.normal(jax.random.key(0), (2**20,))})
"""


@pytest.mark.parametrize(("disk_is", "on_error"), [("well", "raise"), ("full", "raise"), ("full", "warn")])
def test_a_process_that_ends_without_close(tmp_path, disk_is, on_error):
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ENDS), str(tmp_path), on_error, disk_is],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert ran.stdout == "saved\n"
    if disk_is == "well":
        assert ran.returncode == 0, ran.stderr
        assert Checkpointer(tmp_path).all_steps() == [1, 2]
    else:
        assert ran.returncode == 1
        assert (
            f"the process ends, and its last save has failed: step 2: not saved in {tmp_path}: File too" in ran.stderr
        )
        assert Checkpointer(tmp_path).all_steps() == [1]
