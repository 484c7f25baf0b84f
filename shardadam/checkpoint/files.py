"""Files of ours: written whole or not at all, made durable, and read only where they are what they seem."""

import contextlib
import errno
import glob
import os
import stat
import uuid

from etils import epath

from shardadam.checkpoint.errors import CheckpointError

_MOST_BYTES = 2**28  # Of a seal: a thousand times that of a model with a thousand leaves.


def write_durably(path: epath.Path, text: str) -> None:
    """Writes a small file: whole or not at all, and on the disk when this returns."""
    if not is_local(path):
        path.write_text(text)  # An object store has neither half objects nor directories.
        return
    draft = f"{os.fspath(path)}.{uuid.uuid4().hex[:12]}.tmp"
    try:
        with open(draft, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)
    sync_directory(path.parent)


def read_small(path: epath.Path) -> bytes:
    """What is in a file of no more than `_MOST_BYTES`, that leads nowhere else.

    Raises:
      CheckpointError: it is a link, a directory, a pipe or a device, or larger.
    """
    if not is_local(path):
        return path.read_bytes()
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO):
            raise CheckpointError(f"{path}: is a symbolic link or no regular file") from None
        raise
    try:
        status = os.fstat(file)  # Before `open`, which says of a directory no more than the descriptor's number.
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
            raise CheckpointError(f"{path}: is no regular file, or larger than any seal: {status.st_size:,} bytes")
        with open(file, "rb", closefd=False) as opened:
            return opened.read(_MOST_BYTES)
    finally:
        os.close(file)


def sync_file(path: epath.Path) -> None:
    """Makes what was written to a file survive a loss of power."""
    if is_local(path):
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def sync_directory(path: epath.Path) -> None:
    """Makes the names in a directory survive a loss of power."""
    if is_local(path):
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def existing(path: epath.Path) -> epath.Path:
    """The path, of a directory that is there; raises FileNotFoundError where it is not."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such directory")
    return path


def check_writable_name(directory: epath.Path) -> None:
    """Refuses a directory to which Orbax cannot write, without saying so.

    It looks for what its processes have written by a pattern that begins with the directory's name: `a[1]` is for it
    one for `a1`. TensorStore takes a backslash for a slash.

    Raises:
      ValueError: its name, or that of one above it, is a pattern, or has a backslash.
    """
    for name in directory.parts if is_local(directory) else ():
        if "\\" in name or glob.escape(name) != name:
            raise ValueError(
                f"{directory}: Orbax and TensorStore would not write there all that they are to save, for the name "
                f"{name!r}; give a directory without any of * ? [ \\ in its path"
            )


def is_local(path: epath.Path) -> bool:
    """Whether a path is a file system's, and not an object store's."""
    return "://" not in os.fspath(path)
