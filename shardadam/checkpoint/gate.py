"""Holds Orbax's writers back while a save begins: the loop waits for its end, and they would contend with it."""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import PurePath
from typing import Any

from etils import epath

_LONGEST = 10.0  # seconds that writers are held: it is a matter of speed, and must not be one of hanging.


class Gate:
    """What writers wait for, between the copying of a state off its devices and the writing of it."""

    def __init__(self) -> None:
        self._opened: Future[None] = Future()

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Within, what a handler that is held has copied is not written; nor after it, where something fails within."""
        self._opened = opened = Future()
        try:
            yield
        except BaseException:
            opened.cancel()
            raise
        opened.set_result(None)

    def hold(self, handler: Any) -> Any:
        """An Orbax handler that takes deferred paths, which saves only within `closed`, and writes after it."""
        begin = handler.async_save

        async def async_save(directory: epath.Path, *args: Any, **kwargs: Any) -> Sequence[Any] | None:
            return await begin(_Later(directory, self._opened), *args, **kwargs)

        handler.async_save = async_save
        return handler


class _Later:
    """A directory as Orbax's handlers take one that is still to be made, its `PathAwaitingCreation`."""

    def __init__(self, path: epath.Path, opened: Future[None]) -> None:
        self.path, self._opened = path, opened

    def __truediv__(self, name: str | PurePath) -> "_Later":
        return _Later(self.path / name, self._opened)

    async def await_creation(self) -> epath.Path:
        """Called in the threads that write, each of which has its own event loop and nothing else to do.

        Raises:
          CancelledError: the save did not begin. Orbax's threads end with it, and log nothing.
        """
        with contextlib.suppress(TimeoutError):
            self._opened.result(_LONGEST)
        return self.path
