"""One writer per checkpoint directory: a lock file that says who it is, taken over when that process is gone."""

import contextlib
import errno
import fcntl
import logging
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple

from shardadam.checkpoint.errors import CheckpointError
from shardadam.checkpoint.holder import Holder

NAME = "writer.lock"
HEARTBEAT = 10.0  # Seconds between two of the holder's.
STALE_AFTER = 60.0  # Without a heartbeat for so long, a holder on another host counts as dead.
_PATIENCE = 3.0  # For a holder on this host, which may be ending just now, or a save of this process's.
_POLL = 0.1
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

log = logging.getLogger("shardadam.checkpoint")


class WriterLock:
    """Held by one process at a time. Safe on NFS, whose file locks may be off: it is made by linking a whole file.

    A holder on this host is dead when its process is gone (pid, start time and boot are compared). One elsewhere is
    dead when it has not touched the file for `STALE_AFTER` seconds by the file server's clock, and no flock is held.

    Whoever takes over from a dead holder first links a file named for that holder's token. Only one can; a contender
    that found the same holder dead, and comes late, sees that the lock does not lead to its own file, and begins anew.
    If the one that takes over dies on the way, its file is where the next one goes on.

    Not the filelock package: its soft locks judge by the pid alone and know no heartbeat from other hosts; its flock
    ones do not say who holds them, and hold nothing where the file system has no flock.

    Args:
      directory: what is to be held; it exists.
      run_id: of the run that holds it.
    """

    def __init__(self, directory: Path, run_id: str) -> None:
        self.path = directory / NAME
        self._run_id = run_id
        self._mine: Holder | None = None  # None: not held.
        self._end = threading.Event()

    def acquire(self) -> None:
        """Takes the lock, or keeps it. Called again before each save, it finds out whether another has taken it over.

        Raises:
          CheckpointError: another run holds it; the message says who.
          OSError: the directory cannot be written.
        """
        if self.is_held():
            return
        if self._mine is not None:
            log.warning("%s: no longer this run's (%s)", self.path, self._mine)
            self._let_go()
        mine = Holder.this_process(self._run_id)
        candidate = self.path.with_name(f"{NAME}.{mine.token}")
        try:
            candidate.write_text(mine.to_text())
            self._await_turn(mine, candidate)
        finally:
            candidate.unlink(missing_ok=True)
        self._hold(mine)

    def is_held(self) -> bool:
        """Whether it is this one's, and nobody has taken it over."""
        if self._mine is None:
            return False
        chain = self._chain()
        return bool(chain) and chain[-1].holder == self._mine

    def release(self) -> None:
        """Gives the lock back. Does nothing where it is not held, or in a fork of the holder."""
        if self._mine is None or os.getpid() != self._mine.pid:
            return
        successor = self._successor(self._mine)
        self._let_go()
        # Takes over from itself first: after that nobody else can, and the lock that is removed is its own.
        farewell = Holder.this_process(self._run_id)
        candidate = self.path.with_name(f"{NAME}.{farewell.token}")
        try:
            candidate.write_text(farewell.to_text())
            if _link(candidate, successor):
                chain = self._chain()
                if chain and chain[-1].holder == farewell:
                    self.path.unlink()
                successor.unlink(missing_ok=True)
            candidate.unlink(missing_ok=True)
        except OSError as error:  # A full or vanished disk. Harmless: the next run sees that this process is gone.
            log.warning("%s: not given back: %s", self.path, error)

    def _await_turn(self, mine: Holder, candidate: Path) -> None:
        deadline, first = time.monotonic() + _PATIENCE, None
        while (link := self._claim(mine, candidate)) is not None:
            if link.holder.is_here():
                alive = time.monotonic() > deadline
            elif first is None or first.holder != link.holder:
                first, alive = link, _is_flocked(link.path)
                log.info("%s: held by %s; waiting for a sign of life, %g s at most", self.path, link, STALE_AFTER)
            else:
                alive = link.beat != first.beat
            if alive:
                raise self._refusal(link.holder)
            time.sleep(_POLL)

    def _claim(self, mine: Holder, candidate: Path) -> "_Link | None":
        """Tries once, or again where another was faster: None when the lock is `mine`, else who holds it."""
        while True:
            if not (chain := self._chain()):
                if _link(candidate, self.path):
                    return None
                if self.path.is_symlink():
                    raise CheckpointError(f"{self.path}: is a symbolic link, which it must not be; remove it")
                continue
            if not self._is_dead(chain[-1], candidate):
                return chain[-1]
            successor = self._successor(chain[-1].holder)
            if not _link(candidate, successor):
                continue
            if (chain := self._chain()) and chain[-1].holder == mine:
                break
            successor.unlink(missing_ok=True)  # Another had taken over before, and the lock leads to it.
        log.warning("%s: taken over from %s, which is gone", self.path, chain[-2].holder)
        os.replace(candidate, self.path)
        for link in chain[1:]:
            link.path.unlink(missing_ok=True)
        return None

    def _is_dead(self, link: "_Link", candidate: Path) -> bool:
        if link.holder.is_here():
            return not link.holder.is_running()
        os.utime(candidate)  # Now, by the file server's clock, as the heartbeats are.
        return candidate.stat().st_mtime - link.beat > STALE_AFTER and not _is_flocked(link.path)

    def _chain(self) -> "list[_Link]":
        """The holder that the lock names, the one that takes over from it, and so on. Empty: nobody holds the lock."""
        chain: list[_Link] = []
        path = self.path
        while True:
            try:
                holder = Holder.from_text(path.read_text(encoding="utf-8", errors="replace"))
                chain.append(_Link(path, holder, path.stat().st_mtime))
            except FileNotFoundError:
                return chain
            path = self._successor(holder)

    def _successor(self, holder: Holder) -> Path:
        return self.path.with_name(f"{NAME}.{holder.token}.next")

    def _hold(self, mine: Holder) -> None:
        # Kept open: heartbeats go to this very file, never to that of one that takes over.
        file = os.open(self.path, os.O_RDWR)
        with contextlib.suppress(OSError):  # The file system has no flock: the heartbeats have to do.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._mine, self._end = mine, threading.Event()
        threading.Thread(target=_beat, args=(file, self._end), name="checkpoint-lock", daemon=True).start()
        for left in self.path.parent.glob(f"{NAME}.*"):  # By processes that were killed in here.
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(file).st_mtime - left.stat().st_mtime > STALE_AFTER:
                    left.unlink()

    def _let_go(self) -> None:
        self._mine = None
        self._end.set()

    def _refusal(self, holder: Holder) -> CheckpointError:
        own = holder.pid == os.getpid() and holder.is_here()
        who = "another Checkpointer of this process" if own else "another run"
        remedy = "Close that one" if own else "Stop that run"
        return CheckpointError(
            f"{self.path.parent}: {who} writes there ({holder}); two writers destroy each other's steps. {remedy}, "
            f"or save in another directory. If it is surely gone, remove {self.path}"
        )


class _Link(NamedTuple):
    """A file that names a holder, and when it was touched last."""

    path: Path
    holder: Holder
    beat: float

    def __str__(self) -> str:
        return str(self.holder)


def _beat(file: int, end: threading.Event) -> None:
    while not end.wait(HEARTBEAT):
        try:
            os.utime(file)
        except OSError as error:
            log.warning("checkpoint lock: no heartbeat: %s", error)
    os.close(file)


def _link(source: Path, target: Path) -> bool:
    """Makes `target` with what is in `source`, whole, unless it is there already; whether it did."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            file = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        try:
            os.write(file, source.read_bytes())
        finally:
            os.close(file)
    return True


def _is_flocked(path: Path) -> bool:
    """Whether a live process holds the file's flock. False says nothing: the file system may have none."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(file)
    return False
