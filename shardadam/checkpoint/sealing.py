"""After Orbax has committed a step: its files are made durable and hashed, and the seal is written."""

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import stat
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath

from shardadam.checkpoint.digest import Started, finish
from shardadam.checkpoint.logical import Slot
from shardadam.checkpoint.match import CheckpointError, NotFiniteError
from shardadam.checkpoint.seal import Seal, SealedFile, SealedLeaf
from shardadam.checkpoint.steps import Steps, is_local, sync_directory, sync_file
from shardadam.checkpoint.together import on_every_process, on_process_zero

_THREADS = 4  # hashlib gives the GIL back while it hashes.
_BLOCK = 2**20  # bytes
_PACKAGES = ("jax", "jaxlib", "orbax-checkpoint", "tensorstore", "optax", "numpy", "shardadam")


class Sealing(threading.Thread):
    """Waits for a step's commit in the background, and then seals it.

    Args:
      commit: returns when the step is committed; raises what the save failed with.
      seal: what is to be done then.
    """

    def __init__(self, commit: Callable[[], None], seal: Callable[[], None]) -> None:
        super().__init__(name="checkpoint-seal")
        self._commit, self._seal = commit, seal
        self._error: BaseException | None = None

    def run(self) -> None:
        """Called by the thread."""
        try:
            self._commit()
            self._seal()
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            self._error = error

    def wait(self) -> None:
        """Returns when the step is sealed; raises what went wrong, to the first who asks."""
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error


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


def write_seal(steps: Steps, draft: Seal) -> Seal:
    """Makes a committed step's files durable, hashes them, and writes its seal. All processes call it.

    Args:
      steps: of the directory.
      draft: the seal, but for its files, versions and time.

    Returns:
      The seal.

    Raises:
      OSError: a file cannot be read, or the seal not be written; in the other processes a CheckpointError.
    """
    path = steps.path(draft.step)
    names = on_process_zero(steps.key("to seal"), lambda: list_files(path))
    files = hash_together(steps.key("hashes"), path, names, durably=True)

    def write() -> str:
        for directory in [*_directories(path), path.parent]:
            sync_directory(directory)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        seal = dataclasses.replace(draft, files=files, versions=versions(), sealed_at=now)
        steps.write_seal(seal)
        return seal.to_text()

    return Seal.from_text(on_process_zero(steps.key("sealed"), write))


def hash_together(
    key: str, path: epath.Path, names: Mapping[str, int], *, durably: bool = False
) -> dict[str, SealedFile]:
    """The size and SHA-256 of files, each read by one of the processes. All call it.

    Args:
      key: a name for what the processes say to each other, see `together`.
      path: the step's.
      names: each file's size, by its path there; the same on every process.
      durably: whether to see to it, meanwhile, that the files are on the disk.

    Raises:
      OSError: a file cannot be read; in the other processes a CheckpointError.
    """
    mine = _shares(names, jax.process_count())[jax.process_index()]

    def hash_mine() -> dict[str, SealedFile]:
        with ThreadPoolExecutor(_THREADS) as pool, ThreadPoolExecutor(_THREADS) as waiting:
            synced = waiting.map(lambda name: sync_file(path / name), mine if durably else [])
            found = dict(zip(mine, pool.map(lambda name: hash_file(path / name), mine), strict=True))
            list(synced)  # Raises what went wrong.
        return found

    answers = on_every_process(key, hash_mine)
    return {name: SealedFile(*file) for answer in answers for name, file in answer.items()}


def hash_file(path: epath.Path) -> SealedFile:
    """A file's size and SHA-256."""
    checksum, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum.update(block)
            size += len(block)
    return SealedFile(size, checksum.hexdigest())


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


def versions() -> dict[str, str]:
    """Of Python and of what writes a checkpoint."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _PACKAGES}}


def _walk(path: epath.Path) -> Any:
    for entry in path.iterdir():
        if entry.is_dir() and not os.path.islink(entry):
            yield from _walk(entry)
        else:
            yield entry


def _directories(path: epath.Path) -> Any:
    """A directory and those below it, the lowest first."""
    for entry in path.iterdir():
        if entry.is_dir():
            yield from _directories(entry)
    yield path


def _shares(names: Mapping[str, int], count: int) -> list[list[str]]:
    """Deals files out, the largest first, each to who has the fewest bytes."""
    shares: list[list[str]] = [[] for _ in range(count)]
    load = [0] * count
    for name in sorted(names, key=lambda name: (-names[name], name)):
        least = load.index(min(load))
        shares[least].append(name)
        load[least] += names[name] + 1
    return shares
