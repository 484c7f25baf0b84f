"""After Orbax has committed a step: its files are made durable and hashed, and the seal is written."""

import dataclasses
import functools
import importlib.metadata
import os
import platform
import stat
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np
from etils import epath

from shardadam.checkpoint.digest import Started, finish
from shardadam.checkpoint.errors import CheckpointError, NotFiniteError
from shardadam.checkpoint.files import is_local, sync_directory
from shardadam.checkpoint.hashing import HashedAhead, hash_together
from shardadam.checkpoint.logical import Slot
from shardadam.checkpoint.seal import Seal, SealedLeaf
from shardadam.checkpoint.steps import Steps
from shardadam.checkpoint.together import on_process_zero

_PACKAGES = ("jax", "jaxlib", "orbax-checkpoint", "tensorstore", "optax", "numpy", "shardadam")


class Sealing:
    """Waits for a step's commit in the background, then seals it, and after that tidies up.

    Args:
      ahead: makes what hashes the step's files meanwhile.
      commit: returns when the step is committed; raises what the save failed with.
      seal: what is to be done then, given what has been hashed already.
      tidy: what nobody need wait for, once it is sealed; raises nothing.
    """

    def __init__(
        self,
        ahead: Callable[[], HashedAhead],
        commit: Callable[[], None],
        seal: Callable[[HashedAhead], None],
        tidy: Callable[[], None],
    ) -> None:
        self._ahead, self._commit, self._seal, self._tidy = ahead, commit, seal, tidy
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._all: Future[None] | None = None

    def start(self, background: ThreadPoolExecutor) -> None:
        """Begins, in a thread that is there from the second save on: starting one would take the loop time."""
        self._all = background.submit(self._run)

    def has_ended(self) -> bool:
        """Whether `wait` would not have to."""
        return self._ended.is_set()

    def await_end(self) -> None:
        """Returns when the step is sealed, or is not to be."""
        self._ended.wait()

    def wait(self) -> None:
        """Returns when the step is sealed; raises what went wrong, to the first who asks."""
        self.await_end()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def join(self) -> None:
        """Returns when it has tidied up, too."""
        if self._all is not None:
            wait([self._all])

    def _run(self) -> None:
        try:
            with self._ahead() as ahead:
                self._commit()
            self._seal(ahead)
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            self._error = error
        failed = self._error is not None
        self._ended.set()
        if not failed:
            self._tidy()
        del self._ahead, self._commit, self._seal, self._tidy  # What refers to the saver goes with the save.


def sealed_leaves(
    steps: Steps, described: Sequence[tuple[str, tuple[int, ...], str]], started: Started
) -> dict[str, SealedLeaf]:
    """What a seal says of each leaf, as process 0 knows it. All processes call this; it waits for the digests.

    Args:
      steps: of the directory.
      described: each leaf's keypath, shape and dtype, on disk.
      started: their digests, under way: see `digest.start`.
    """
    found = finish(started, steps.key("digests of leaves"))
    told = on_process_zero(steps.key("leaves"), lambda: found)
    return {path: SealedLeaf(*digest, *rest) for digest, (path, *rest) in zip(told, described, strict=True)}


def check_finite(step: int, leaves: Mapping[str, SealedLeaf]) -> None:
    """Refuses a state with NaN or infinities in it.

    Raises:
      NotFiniteError: names the leaves.
    """
    bad = {path: leaf.num_nonfinite for path, leaf in leaves.items() if leaf.num_nonfinite}
    if bad:
        listed = ", ".join(f"`{path}` ({count})" for path, count in list(bad.items())[:4])
        raise NotFiniteError(
            f"step {step}: not saved: {len(bad)} of {len(leaves)} leaves have elements that are NaN or infinite: "
            f"{listed}; restore the newest step and go on from there, or save with allow_nonfinite=True"
        )


def count_of(slots: Sequence[Slot]) -> int | None:
    """Adam's count in a state; None if it has none."""
    for slot in slots:
        if is_count(slot.names, slot.shape):
            x = slot.like.addressable_data(0) if isinstance(slot.like, jax.Array) else slot.like
            return int(np.asarray(x))
    return None


def is_count(names: Sequence[str], shape: tuple[int, ...]) -> bool:
    """Whether a leaf is a count of updates: Adam's own, or a schedule's beside it, which are equal."""
    return shape == () and [name for name in names if name != "value"][-1:] == ["count"]


def write_seal(
    steps: Steps, draft: Seal, ahead: HashedAhead | None = None, *, permit: Callable[[], None] = lambda: None
) -> Seal:
    """Makes a committed step's files durable, hashes them, and writes its seal. All processes call it.

    Args:
      steps: of the directory.
      draft: the seal, but for its files, versions and time.
      ahead: what each process has hashed already.
      permit: called by process 0 before it writes; raises where it must not.

    Returns:
      The seal.

    Raises:
      OSError: a file cannot be read, or the seal not be written; in the other processes a CheckpointError.
    """
    path = steps.path(draft.step)
    names = on_process_zero(steps.key("to seal"), lambda: list_files(path))
    with ThreadPoolExecutor(1) as pool:
        synced = pool.submit(_sync_directories, path) if jax.process_index() == 0 else None
        files = hash_together(steps.key("hashes"), path, names, ahead=ahead, durably=True)

    def write() -> str:
        assert synced is not None
        synced.result()
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        seal = dataclasses.replace(draft, files=files, versions=versions(), sealed_at=now)
        permit()
        steps.write_seal(seal)
        return seal.to_text()

    return Seal.from_text(on_process_zero(steps.key("sealed"), write))


def list_files(path: epath.Path) -> dict[str, int]:
    """The size of every file below a directory, by its path there.

    Raises:
      CheckpointError: something there is neither a file nor a directory, such as a symbolic link, which might lead
        anywhere.
    """
    if is_local(path) and os.path.islink(path):
        raise CheckpointError(f"{path}: is a symbolic link, which no checkpoint is")
    found: dict[str, int] = {}
    for entry in sorted(_walk(path)):
        status = os.lstat(entry) if is_local(entry) else None
        if status is not None and not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{entry}: is a symbolic link or no regular file, which no checkpoint holds")
        found[os.path.relpath(entry, path)] = status.st_size if status else entry.stat().length
    return found


@functools.cache
def versions() -> Mapping[str, str]:
    """Of Python and of what writes a checkpoint."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _PACKAGES}}


def _walk(path: epath.Path) -> Any:
    for entry in path.iterdir():
        if entry.is_dir() and not os.path.islink(entry):
            yield from _walk(entry)
        else:
            yield entry


def _sync_directories(path: epath.Path) -> None:
    """Makes a step's name, and all names in it, survive a loss of power."""
    for directory in [*_directories(path), path.parent]:
        sync_directory(directory)


def _directories(path: epath.Path) -> Any:
    """A directory and those below it, the lowest first."""
    for entry in path.iterdir():
        if entry.is_dir():
            yield from _directories(entry)
    yield path
