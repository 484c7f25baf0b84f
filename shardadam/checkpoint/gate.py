"""Holds Orbax's writers of leaves back while a save begins: the loop waits for its end, and they contend with it."""

import contextlib
import copy
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import orbax.checkpoint as ocp

_LONGEST = 10.0  # seconds that writers are held: it is a matter of speed, and must not be one of hanging.


class Gate:
    """What writers wait for, between the copying of a state off its devices and the writing of it."""

    def __init__(self) -> None:
        self._opening = _Opening()

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Within, what has been copied is not written; nor after it, where something fails within."""
        self._opening = opening = _Opening()
        try:
            yield
        except BaseException:
            opening.cancel()
            raise
        opening.set_result(None)

    def held(self) -> ocp.type_handlers.TypeHandlerRegistry:
        """Orbax's handlers of leaves, which save only within `closed`, and write after it."""
        kinds = ocp.type_handlers.supported_types()
        handlers = [(kind, self._hold(ocp.type_handlers.get_type_handler(kind))) for kind in kinds]
        return ocp.type_handlers.create_type_handler_registry(*handlers)

    def _hold(self, handler: ocp.type_handlers.TypeHandler) -> ocp.type_handlers.TypeHandler:
        handler = copy.copy(handler)
        begin = handler.serialize

        async def serialize(values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
            # Writers wait for their directory, which is there: copies, as others ask them for it, too.
            infos = [info.replace(await_path_creation=self._opening.wait) for info in infos]
            return await begin(values, infos, args)

        handler.serialize = serialize
        return handler


class _Opening(Future[None]):
    """Of a gate, for one save."""

    def __init__(self) -> None:
        super().__init__()
        self._until = time.monotonic() + _LONGEST

    async def wait(self) -> None:
        """Called in the threads that write, each of which has its own event loop and nothing else to do.

        Raises:
          CancelledError: the save did not begin. Orbax's threads end with it, and log nothing.
        """
        with contextlib.suppress(TimeoutError):
            self.result(max(0.0, self._until - time.monotonic()))
