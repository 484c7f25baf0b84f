"""Files that are hashed while Orbax writes others: the hash counts only for what is on the disk after the commit."""

import hashlib
import os
import queue
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from shardadam.checkpoint import Checkpointer, hashing, reading, sealing, writing
from shardadam.checkpoint.hashing import HashedAhead, hash_file
from shardadam.checkpoint.steps import Steps

SIZE = 2**16


@pytest.fixture
def partial(tmp_path):
    """A directory such as Orbax is writing files to."""
    directory = tmp_path / "7.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp" / "ocdbt.process_0" / "d"
    directory.mkdir(parents=True)
    return directory


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def begun(ahead, count):
    """Waits until so many files are being hashed, or have been."""
    end = time.monotonic() + 200
    while len(ahead._hashed) < count:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_was_written_to_since_it_was_hashed_is_hashed_again(partial, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("same", "longer", "changed", "replaced"):
        (partial / name).write_bytes(rng.bytes(SIZE))
    (partial / "small").write_bytes(b"1")
    with HashedAhead(epath.Path(tmp_path), 7, SIZE) as ahead:
        begun(ahead, 4)
        with open(partial / "longer", "ab") as file:
            file.write(b"1")
        times = (partial / "changed").stat()
        with open(partial / "changed", "r+b") as file:
            file.write(b"1")
        os.utime(partial / "changed", ns=(times.st_atime_ns, times.st_mtime_ns))  # That alone does not hide it.
        (partial / "other").write_bytes(rng.bytes(SIZE))
        (partial / "other").rename(partial / "replaced")
    step = tmp_path / "7"
    partial.parents[2].rename(step)
    folder = epath.Path(step / "state.orbax-checkpoint-tmp" / "ocdbt.process_0" / "d")
    assert ahead.of(folder / "same") == (SIZE, sha(folder / "same"))
    for name in ("longer", "changed", "replaced", "small"):
        assert ahead.of(folder / name) is None, name


def test_a_file_that_may_still_be_written_to_is_not_begun(partial, tmp_path, monkeypatch):
    path = partial / "growing"
    path.write_bytes(b"0" * SIZE)
    monkeypatch.setattr(hashing, "_SETTLED", 3600)
    with HashedAhead(epath.Path(tmp_path), 7, SIZE) as ahead:
        time.sleep(5 * hashing._LOOK)
        assert not ahead._hashed
        path.write_bytes(b"1" * SIZE)
        monkeypatch.setattr(hashing, "_SETTLED", 0.01)
        begun(ahead, 1)
    assert ahead.of(epath.Path(path)) == hash_file(epath.Path(path)) == (SIZE, hashlib.sha256(b"1" * SIZE).hexdigest())


@pytest.mark.parametrize("written", [b"", b"changed after the commit"])
def test_a_seal_holds_what_is_on_the_disk(tmp_path, monkeypatch, written):
    monkeypatch.setattr(writing, "_FILE_BYTES", 2**14)
    settled, write_seal = hashing._SETTLED, sealing.write_seal
    finalize, enter = ocp.PyTreeCheckpointHandler.finalize, HashedAhead.__enter__
    # A disk that is slow may let a file lie before it is written on, or gets its name: then it is not hashed once only.
    monkeypatch.setattr(hashing, "_SETTLED", 3600)
    entered, read = queue.SimpleQueue(), []

    def known(self):
        entered.put(self)
        return enter(self)

    def slow(self, directory):
        sizes = [path.stat().st_size for path in Path(directory).rglob("d/*")]
        monkeypatch.setattr(hashing, "_SETTLED", settled)  # All is written.
        begun(entered.get(timeout=200), sum(size >= 2**14 for size in sizes))
        finalize(self, directory)

    def with_a_change(steps, draft, ahead, **options):
        data = max((tmp_path / "1").rglob("d/*"), key=lambda path: path.stat().st_size)
        with open(data, "r+b") as file:
            file.write(written)
        monkeypatch.setattr(hashing, "hash_file", lambda path: read.append(path) or hash_file(path))
        return write_seal(steps, draft, ahead, **options)

    monkeypatch.setattr(HashedAhead, "__enter__", known)
    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "finalize", slow)
    monkeypatch.setattr("shardadam.checkpoint.saving.write_seal", with_a_change)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {f"x{i}": jnp.arange(2.0**12) for i in range(8)})
    steps = Steps(epath.Path(tmp_path))
    seal = steps.read_seal(1)
    for name, file in seal.files.items():
        assert file == hash_file(steps.path(1) / name), name
    large = {path for path in read if path.stat().length >= 2**14}
    assert len(large) == (1 if written else 0)  # What was hashed ahead is not read again.


def test_a_leaf_is_not_cut_for_the_sake_of_smaller_files(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_FILE_BYTES", 2**14)
    state = {"prime": jnp.arange(10007.0), "small": jnp.arange(2.0**12), "host": np.arange(5003.0)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    saved = reading.saved_leaves(epath.Path(tmp_path / "1"))
    for name, x in state.items():
        assert saved[name,].storage.chunk_shape == x.shape, name
