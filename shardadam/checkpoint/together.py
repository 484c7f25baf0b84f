"""Work that the processes of a run share: all get what it gave, and all raise where one of them failed."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from shardadam import runtime
from shardadam.checkpoint.errors import CheckpointError, ElsewhereError, errno_of

Result = TypeVar("Result")


def on_process_zero(name: str, work: Callable[[], Any]) -> Any:
    """What `work` gives process 0, as JSON brings it, on all of them. All call this in the same order.

    Raises:
      CheckpointError: it failed in process 0, which itself raises the error; an ElsewhereError where that was one of
        its operating system.
    """
    failure: Exception | None = None
    said = ""
    if jax.process_index() == 0:
        said, failure = _said(work)
    answer = json.loads(runtime.from_process_zero(name, said))
    if failure is not None:
        raise failure
    _check([answer])
    return answer["value"]


def on_every_process(name: str, work: Callable[[], Any], *, timeout_seconds: float = 600) -> list[Any]:
    """What `work` gives each process, as JSON brings it, on all of them. All call this in the same order.

    Args:
      name: what it is about.
      work: gives what JSON holds.
      timeout_seconds: how long to wait for each of the others.

    Raises:
      CheckpointError: it failed in some process, which itself raises the error; an ElsewhereError where that was one of
        its operating system.
    """
    said, failure = _said(work)
    answers = [json.loads(text) for text in runtime.from_every_process(name, said, timeout_seconds=timeout_seconds)]
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # Or it would keep itself, and all that `work` holds, alive.
    _check(answers)
    return [answer["value"] for answer in answers]


def fail_on_every_process(name: str, error: BaseException) -> None:
    """Has the others' `on_every_process` of that name raise what failed here, in place of taking part in it."""
    runtime.tell_every_process(name, json.dumps(_failure(error)))


def all_succeed(name: str, work: Callable[[], Result]) -> Result:
    """What `work` gives this process, once it has succeeded in all of them. All call this in the same order.

    Raises:
      CheckpointError: it failed in some process, which itself raises the error.
    """
    own: list[Result] = []
    on_every_process(name, lambda: own.append(work()))
    return own[0]


def _said(work: Callable[[], Any]) -> tuple[str, Exception | None]:
    try:
        return json.dumps({"value": work()}), None
    except Exception as error:  # noqa: BLE001 - raised again once the others know
        return json.dumps(_failure(error)), error


def _failure(error: BaseException) -> dict[str, Any]:
    # What we raise ourselves, we have judged: that a file is not there may be damage, and no fault of the system's.
    of_system = isinstance(error, OSError) or not isinstance(error, CheckpointError)
    return {"error": f"{type(error).__name__}: {error}", "errno": errno_of(error) if of_system else None}


def _check(answers: list[Any]) -> None:
    """Raises what processes, from the first one on, have failed with."""
    failed = {index: answer for index, answer in enumerate(answers) if "error" in answer}
    if not failed:
        return
    told = "; ".join(f"process {index}: {answer['error']}" for index, answer in failed.items())
    numbers = [answer["errno"] for answer in failed.values() if answer["errno"] is not None]
    if not numbers:
        raise CheckpointError(told)
    error = ElsewhereError(told)
    error.errno = numbers[0]
    raise error
