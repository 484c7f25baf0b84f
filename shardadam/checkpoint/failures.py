"""A save that failed: what is said about it, what it leaves behind, and that the process does not end with 0."""

import atexit
import errno
import logging
import os
import shutil
import sys
import threading
import weakref
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import NoReturn

from etils import epath

from shardadam.checkpoint.errors import CheckpointError, ElsewhereError, NotFiniteError, SaveError, errno_of
from shardadam.checkpoint.files import is_local
from shardadam.checkpoint.steps import Steps, short

_REMEDIES = {
    errno.ENOSPC: "Free some space there, or keep fewer steps",
    errno.EDQUOT: "Free some space, or have the quota raised",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "Have it mounted for writing: a disk that fails is often made read-only",
    errno.EACCES: "Let this user write there",
    errno.EPERM: "Let this user write there",
    errno.ENOENT: "Put the directory back, or mount it again",
    errno.ESTALE: "Mount the directory again",
    errno.EIO: "The disk is failing: save elsewhere",
}

log = logging.getLogger("shardadam.checkpoint")


class SamePlace:
    """Notices that a directory was removed, replaced or unmounted, also where another is there under its name."""

    def __init__(self, directory: epath.Path) -> None:
        self._path = directory if is_local(directory) else None
        if self._path is not None:
            # Held open, so that its number is not given to another meanwhile.
            self._open = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
            weakref.finalize(self, os.close, self._open)

    def lost(self) -> str:
        """What has become of the directory; empty where it is the same."""
        if self._path is None:
            return ""
        was = os.fstat(self._open)
        try:
            now = os.stat(self._path)
        except OSError:
            return "is gone"
        return "" if (was.st_dev, was.st_ino) == (now.st_dev, now.st_ino) else "was replaced by another"

    def check(self) -> None:
        """Raises FileNotFoundError where it is no longer the same directory."""
        if lost := self.lost():
            raise FileNotFoundError(errno.ENOENT, f"{self._path} {lost} while it was saved in")


def save_error(
    steps: Steps, step: int, error: BaseException, place: SamePlace | None = None
) -> SaveError | NotFiniteError:
    """An error that says what the save of a step failed with, how much space is free, and which steps are there.

    Args:
      steps: those of the directory.
      step: which was not saved.
      error: what Orbax, tensorstore or the operating system raised.
      place: the directory as it was when the save began, if it did: where it is another, that is the cause of whatever
        was raised.
    """
    if isinstance(error, SaveError | NotFiniteError):
        return error  # It says all that itself.
    where, cause, number = steps.directory, f"{type(error).__name__}: {error}", errno_of(error)
    if lost := _lost(where) if place is None else place.lost():
        number, cause = errno.ENOENT, f"the directory {lost}"
    elif number is not None:
        cause = f"{os.strerror(number)} ({errno.errorcode.get(number, number)})"
        cause += f", in {error}" if isinstance(error, ElsewhereError) else ""
    free = f"; {_free_space(Path(where))}" if is_local(where) else ""
    remedy = f". {_REMEDIES[number]}" if number in _REMEDIES else ""
    told = SaveError(f"step {step}: not saved in {where}: {cause}{free}; saved there: {_saved(steps)}{remedy}")
    told.errno = number
    return told


def explained(wait: Callable[[], None], steps: Steps, step: int, place: SamePlace) -> None:
    """Waits for the save of a step; what that raises is raised as a `save_error`."""
    try:
        wait()
    except Exception as error:
        raise save_error(steps, step, error, place) from error


def raise_it(error: Exception) -> NoReturn:
    """Raises an error."""
    raise error


_unfinished: dict[Hashable, Callable[[], None]] = {}
_registered, _failed = threading.Event(), threading.Event()


def expect(key: Hashable, wait: Callable[[], None]) -> None:
    """From now on the process does not end before `wait` has returned, nor with 0 if it raises. Inverse of `settled`.

    Args:
      key: whose save this is; another one of the same takes its place.
      wait: returns when the save is done, raises what it failed with.
    """
    if not _registered.is_set():
        _registered.set()
        # Python joins its pools of threads, without which Orbax cannot commit, before it runs what atexit has. Only
        # what is registered here comes before that, the last one first.
        threading._register_atexit(_wait_for_all)  # type: ignore[attr-defined]
    _unfinished[key] = wait


def settled(key: Hashable) -> None:
    """Inverse of `expect`: whoever saves knows how it ended."""
    _unfinished.pop(key, None)


def _wait_for_all() -> None:
    while _unfinished:
        _, wait = _unfinished.popitem()
        try:
            wait()
        except Exception as error:  # noqa: BLE001 - nobody is left to raise it to
            print(f"shardadam: the process ends, and its last save has failed: {error}", file=sys.stderr, flush=True)
            _failed.set()


@atexit.register  # On import, and so run after all that is registered later.
def _end_with_failure() -> None:
    if _failed.is_set():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # The only way left: sys.exit is ignored here.


def _lost(directory: epath.Path) -> str:
    return "is gone" if is_local(directory) and not os.path.isdir(directory) else ""


def _saved(steps: Steps) -> str:
    try:
        return short(steps.sealed())
    except (OSError, CheckpointError) as error:  # The disk, or whatever it was that failed, may not even list them.
        return f"unknown ({error})"


def _free_space(path: Path) -> str:
    while not path.is_dir() and path != path.parent:
        path = path.parent
    try:
        usage, stat = shutil.disk_usage(path), os.statvfs(path)
    except OSError as error:
        return f"free space unknown ({error.strerror})"
    told = f"{usage.free:,} of {usage.total:,} bytes are free"
    return told if stat.f_favail or not stat.f_files else f"{told}, but no further file can be made"
