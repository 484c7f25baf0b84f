"""A save that several processes write is committed by all or by none, and none waits for one that could not write."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import orbax.checkpoint as ocp

from shardadam.checkpoint.together import fail_on_every_process, on_every_process

# In the key of the barrier that Orbax's processes meet at when each has written its part.
_WRITTEN = "async_write_complete"


class Commit:
    """In place of Orbax's barrier, where the others would wait 20 minutes for a process whose disk is full.

    Each process says once for every save that it has written its part, or what it failed with, which ends the save in
    all of them at once.

    Args:
      key: makes a name for what the processes say to each other of what it is given, see `together`.
    """

    def __init__(self, key: Callable[[str], str]) -> None:
        self._key = key
        self._name = ""
        self._has_failed = False
        self._not_begun: Exception | None = None

    def begin(self, step: int) -> None:
        """From now on it is about this step. All processes call it."""
        self._name, self._has_failed, self._not_begun = self._key(f"step {step} is written"), False, None

    def barrier(self, *, key: str, timeout_ms: int) -> None:
        """For Orbax's `AsyncOptions`.

        Raises:
          CheckpointError: what another process could not write its part for; an ElsewhereError, too, where that was
            said by its operating system.
        """
        if _WRITTEN in key:
            on_every_process(self._name, lambda: None, timeout_seconds=timeout_ms / 1000)
        else:
            ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def watch(self, handler: Any) -> Any:
        """An Orbax handler, whose failures the other processes are told of. Of one to begin ask `check`."""
        begin = handler.async_save

        async def async_save(*args: Any, **kwargs: Any) -> Sequence[Any] | None:
            try:
                parts = await begin(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - raised by `check`
                # Raised here, it would leave the others where Orbax has all meet before `save` returns.
                self._not_begun = error
                parts = [Future()]
                parts[0].set_exception(error)
            return None if parts is None else [_Watched(part, self._failed) for part in parts]

        handler.async_save = async_save
        return handler

    def check(self) -> None:
        """Raises what a handler has failed with in the beginning of this process's part; after Orbax's `save`."""
        error, self._not_begun = self._not_begun, None
        if error is not None:
            raise error

    def _failed(self, error: BaseException) -> None:
        if not self._has_failed:
            self._has_failed = True
            fail_on_every_process(self._name, error)


class _Watched:
    """A future of Orbax's, which tells of its failure."""

    def __init__(self, part: Any, failed: Callable[[BaseException], None]) -> None:
        self._part, self._failed = part, failed

    def result(self, timeout: float | None = None) -> Any:
        """Waits for the part to be written."""
        try:
            return self._part.result(timeout=timeout)
        except BaseException as error:
            self._failed(error)
            raise

    def cancel(self) -> bool | None:
        """Ends it, where that can be."""
        return self._part.cancel()
