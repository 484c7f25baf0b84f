"""What goes wrong with a checkpoint, and which number the operating system has for it."""

import errno
import re
from collections.abc import Iterator

# As tensorstore and Python tell the operating system's errors in their messages.
_NUMBER = re.compile(r"os_error_code='(\d+)'|\[Errno (\d+)\]|\[OS error (\d+)")


class CheckpointError(ValueError):
    """A checkpoint cannot be saved as asked, or does not hold what is wanted of it."""


class ElsewhereError(OSError, CheckpointError):
    """What the operating system of another process failed with; `errno` is its number there."""


class SaveError(OSError, CheckpointError):
    """A step was not saved. Those saved before it are still there."""


class NotFiniteError(CheckpointError):
    """A step was not saved, as there is NaN or infinity in it. Those saved before it are still there."""


def errno_of(error: BaseException | None) -> int | None:
    """The operating system's number for what went wrong, from an error or what it came from; None if none says."""
    for each in _chain(error):
        if isinstance(each, OSError) and each.errno is not None:
            return each.errno
        if isinstance(each, FileNotFoundError):  # As Orbax raises it.
            return errno.ENOENT
        if found := _NUMBER.search(str(each)):
            return int(next(filter(None, found.groups())))
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__
