"""SHA-256 of a step's files: each by one of the processes, and the large ones while Orbax still writes others."""

import contextlib
import glob
import hashlib
import io
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, Self

import jax
from etils import epath

from shardadam.checkpoint.files import is_local, sync_file
from shardadam.checkpoint.reading import STATE
from shardadam.checkpoint.seal import SealedFile
from shardadam.checkpoint.steps import PARTIAL
from shardadam.checkpoint.together import on_every_process

_THREADS = 4  # hashlib gives the GIL back while it hashes.
_BLOCK = 2**20  # bytes
_LOOK = 0.01  # Seconds from one look at what is there to the next.
# Seconds that a file has not changed for before it is hashed ahead. The clock of its times may tick every 10 ms only: a
# write within the same tick would not show.
_SETTLED = 0.03
_MOST_OPEN = 16  # Files that are open to be hashed ahead.


class Stamp(NamedTuple):
    """Which file it is, and when it changed last: every write sets `changed`, which nobody can set back."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int


class HashedAhead:
    """Hashes the large files of a step that Orbax is writing, each once it is full and has not changed for a moment.

    Such a hash counts if, after the commit, the file has the stamp that it had before it was read. A file that was
    written to since, or not begun with, is hashed then. A context, left when the step is committed.

    Args:
      directory: the steps'.
      step: the one being written.
      full: how many bytes a full file has at the least.
    """

    def __init__(self, directory: epath.Path, step: int, full: int) -> None:
        self._full = full
        # Only what this process writes: of others' files a network's file system may show it old times.
        written = (f"{step}{PARTIAL}*", f"{STATE}*", f"ocdbt.process_{jax.process_index()}", "d", "*")
        self._pattern = os.path.join(glob.escape(os.fspath(directory)), *written)
        self._hashed: dict[Stamp, Future[SealedFile]] = {}
        self._committed = threading.Event()
        self._watch = threading.Thread(target=self._look, name="checkpoint-hash")
        self._pool = ThreadPoolExecutor(max(1, _threads() // 2))  # Orbax wants the other half of the cores.
        self._has_times = is_local(directory)

    def __enter__(self) -> Self:
        if self._has_times:
            self._watch.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._committed.set()
        if self._has_times:
            self._watch.join()
        self._pool.shutdown(wait=kind is not None)

    def of(self, path: epath.Path) -> SealedFile | None:
        """The hash of a file, if it was begun when the file was what it is now; waits for it."""
        hashed = self._hashed.get(_stamp(os.stat(path))) if self._hashed else None
        return None if hashed is None else hashed.result()

    def _look(self) -> None:
        begun: set[int] = set()  # Inodes: what changes while it is hashed waits for the commit.
        while not self._committed.wait(_LOOK):
            for path in glob.iglob(self._pattern):
                if sum(not hashed.done() for hashed in self._hashed.values()) >= _MOST_OPEN:
                    break
                with contextlib.suppress(OSError):  # As when it was moved meanwhile: read after the commit.
                    stamp = _stamp(os.stat(path))
                    settled = time.time_ns() - stamp.changed > _SETTLED * 1e9
                    if stamp.size >= self._full and settled and stamp.inode not in begun:
                        begun.add(stamp.inode)
                        # Opened at once: by the time that a thread is free its directory may have another name.
                        file = open(path, "rb", buffering=0)  # noqa: SIM115 - `_hash_open` closes it
                        self._hashed[stamp] = self._pool.submit(_hash_open, file)


def hash_together(
    key: str, path: epath.Path, names: Mapping[str, int], *, ahead: HashedAhead | None = None, durably: bool = False
) -> dict[str, SealedFile]:
    """The size and SHA-256 of files, each read by one of the processes. All call it.

    Args:
      key: a name for what the processes say to each other, see `together`.
      path: the step's.
      names: each file's size, by its path there; the same on every process.
      ahead: what this process has hashed already.
      durably: whether to see to it, meanwhile, that the files are on the disk.

    Raises:
      OSError: a file cannot be read; in the other processes a CheckpointError.
    """
    shares = _shares if ahead is None else _shares_by_writer
    mine = shares(names, jax.process_count())[jax.process_index()]

    def hash_one(name: str) -> SealedFile:
        known = None if ahead is None else ahead.of(path / name)
        return known or hash_file(path / name)

    def hash_mine() -> dict[str, SealedFile]:
        with ThreadPoolExecutor(_threads()) as pool, ThreadPoolExecutor(_THREADS) as waiting:
            synced = waiting.map(lambda name: sync_file(path / name), mine if durably else [])
            found = dict(zip(mine, pool.map(hash_one, mine), strict=True))
            list(synced)  # Raises what went wrong.
        return found

    answers = on_every_process(key, hash_mine)
    return {name: SealedFile(*file) for answer in answers for name, file in answer.items()}


def hash_file(path: epath.Path) -> SealedFile:
    """A file's size and SHA-256."""
    if is_local(path):
        return _hash_open(open(path, "rb", buffering=0))
    with path.open("rb") as file:
        return _hash(iter(partial(file.read, _BLOCK), b""))


def _hash_open(file: io.FileIO) -> SealedFile:
    into = memoryview(bytearray(_BLOCK))
    with file:
        return _hash(into[:count] for count in iter(partial(file.readinto, into), 0))


def _hash(blocks: Iterable[bytes | memoryview]) -> SealedFile:
    checksum, size = hashlib.sha256(), 0
    for block in blocks:
        checksum.update(block)
        size += len(block)
    return SealedFile(size, checksum.hexdigest())


def _shares(names: Mapping[str, int], count: int) -> list[list[str]]:
    """Deals files out, the largest first, each to who has the fewest bytes."""
    shares: list[list[str]] = [[] for _ in range(count)]
    load = [0] * count
    for name in sorted(names, key=lambda name: (-names[name], name)):
        least = load.index(min(load))
        shares[least].append(name)
        load[least] += names[name] + 1
    return shares


def _shares_by_writer(names: Mapping[str, int], count: int) -> list[list[str]]:
    """Each process gets the files that it has written, which it may have hashed ahead; the first one all others."""
    shares: list[list[str]] = [[] for _ in range(count)]
    for name in names:
        writer = re.search(r"/ocdbt\.process_(\d+)/", name)
        shares[int(writer[1]) % count if writer else 0].append(name)
    return shares


def _threads() -> int:
    """How many hash: in a restore as many as there are cores, since hashing takes longer there than Orbax's reading."""
    return min(_THREADS, os.cpu_count() or 1)


def _stamp(status: os.stat_result) -> Stamp:
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
