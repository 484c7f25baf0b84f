"""What must be on the disk before a step counts as saved is there before: the order of fsyncs and renames, recorded."""

import os
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import pytest

from shardadam.checkpoint import Checkpointer, writing


class Call(NamedTuple):
    """One that the system answered: of a rename the new name; and what the root's names were then."""

    name: str
    path: str
    source: str
    names: tuple[str, ...]


class Recorder:
    """Records this process's fsyncs, by what the descriptors lead to, and its renames.

    Of tensorstore's own, in C++, it hears nothing: shardadam does not rely on them.
    """

    def __init__(self, root, monkeypatch):
        self.root, self.calls = root, []
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self._record_fsync)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self._recorded(name, getattr(os, name)))

    def _record_fsync(self, file):
        number = file if isinstance(file, int) else file.fileno()
        path, names = os.readlink(f"/proc/self/fd/{number}"), tuple(os.listdir(self.root))
        self._fsync(file)
        self.calls.append(Call("fsync", path, "", names))  # Done, and of the names that were there when it began.

    def _recorded(self, name, call):
        def recorded(source, target, **kwargs):
            self.calls.append(Call("rename", os.fspath(target), os.fspath(source), tuple(os.listdir(self.root))))
            call(source, target, **kwargs)

        return recorded

    def index(self, name, path):
        """When it was called with that; exactly once."""
        (found,) = (i for i, call in enumerate(self.calls) if (call.name, call.path) == (name, str(path)))
        return found

    def synced(self, begin, end=None):
        return {call.path for call in self.calls[begin:end] if call.name == "fsync"}


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("without /proc nothing tells which file a descriptor is of")
    root = tmp_path / "steps"
    root.mkdir()
    return Recorder(root, monkeypatch)


def assert_sealed_durably(recorder, step):
    root, seal = recorder.root, recorder.root / "seals" / f"{step}.json"
    sealed = recorder.index("rename", seal)
    before, draft = recorder.calls[:sealed], recorder.calls[sealed].source
    assert Path(draft).parent == seal.parent  # A rename from elsewhere would need that synced, too.
    assert draft in recorder.synced(0, sealed)
    # Under these names, and so after Orbax's rename of the step: every file, and all directories that name one.
    within = {str(path) for path in (root / str(step)).rglob("*")}
    assert len([path for path in within if os.path.isfile(path)]) > 5
    assert {*within, str(root / str(step))} - recorder.synced(0, sealed) == set()
    # The root names the step and, from the first save on, the directory of the seals.
    names = [set(call.names) for call in before if (call.name, call.path) == ("fsync", str(root))]
    assert any({str(step), "seals"} <= each for each in names)
    assert str(seal.parent) in recorder.synced(sealed)


@pytest.mark.parametrize("file_bytes", [2**25, 2**16], ids=["in one file", "in several files"])
def test_a_step_is_on_the_disk_before_its_seal_and_that_before_the_save_is_told(recorder, file_bytes, monkeypatch):
    monkeypatch.setattr(writing, "_FILE_BYTES", file_bytes)
    state = {f"x{i}": jnp.full(2**13, float(i)) for i in range(16)}
    with Checkpointer(recorder.root) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state, extra={"a": 1}, wait=True)
            assert_sealed_durably(recorder, step)  # All of it by the time that `wait` returned.


def test_an_adopted_step_is_on_the_disk_before_its_seal(recorder):
    with Checkpointer(recorder.root) as checkpointer:
        checkpointer.save(1, {"x": jnp.ones(3)}, wait=True)
        (recorder.root / "seals" / "1.json").unlink()
        recorder.calls.clear()
        checkpointer.adopt(1)
        assert_sealed_durably(recorder, 1)


def test_a_step_is_retired_on_the_disk_before_anything_of_it_is_removed(recorder):
    """Else, after a loss of power, its seal might be there again and half of the step not."""
    with Checkpointer(recorder.root, max_to_keep=2) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, {"x": jnp.ones(3)}, wait=True)
    seals, trash = (str(recorder.root / name) for name in ("seals", "trash"))
    (retired,) = (i for i, call in enumerate(recorder.calls) if call.source == f"{seals}/1.json")
    (moved,) = (i for i, call in enumerate(recorder.calls) if call.source == str(recorder.root / "1"))
    assert recorder.calls[retired].path.startswith(trash)
    assert {seals, trash} <= recorder.synced(retired, moved)
    # And no step goes before the one that takes its place is there to be restored.
    sealed = recorder.index("rename", f"{seals}/3.json")
    assert sealed < retired
    assert seals in recorder.synced(sealed, retired)


def test_a_damaged_step_is_moved_aside_durably(recorder):
    with Checkpointer(recorder.root) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"x": jnp.ones(3)}, wait=True)
        (recorder.root / "2" / "commit_success.txt").unlink()
        recorder.calls.clear()
        checkpointer.restore({"x": jnp.ones(3)})
        (damage,) = checkpointer.damaged
    step, seal = (recorder.index("rename", path) for path in (damage.moved_to, f"{damage.moved_to}.json"))
    why = recorder.index("rename", f"{damage.moved_to}.txt")
    assert step < seal < why
    assert {str(recorder.root), str(recorder.root / "damaged")} <= recorder.synced(step, seal)
    assert {str(recorder.root / "seals"), str(recorder.root / "damaged")} <= recorder.synced(seal, why)
    assert recorder.calls[why].source in recorder.synced(seal, why)
