"""Work that the processes of a run share: all get what it gave, and all raise where one of them failed."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from shardadam import runtime
from shardadam.checkpoint.match import CheckpointError

Result = TypeVar("Result")


def on_process_zero(name: str, work: Callable[[], Any]) -> Any:
    """What `work` gives process 0, as JSON brings it, on all of them. All call this in the same order.

    Raises:
      CheckpointError: it failed in process 0, which itself raises the error.
    """
    failure: Exception | None = None
    said = ""
    if jax.process_index() == 0:
        said, failure = _said(work)
    answer = json.loads(runtime.from_process_zero(name, said))
    if failure is not None:
        raise failure
    if "error" in answer:
        raise CheckpointError(f"process 0: {answer['error']}")
    return answer["value"]


def on_every_process(name: str, work: Callable[[], Any]) -> list[Any]:
    """What `work` gives each process, as JSON brings it, on all of them. All call this in the same order.

    Raises:
      CheckpointError: it failed in some process, which itself raises the error.
    """
    said, failure = _said(work)
    answers = [json.loads(text) for text in runtime.from_every_process(name, said)]
    if failure is not None:
        raise failure
    if errors := [f"process {index}: {answer['error']}" for index, answer in enumerate(answers) if "error" in answer]:
        raise CheckpointError("; ".join(errors))
    return [answer["value"] for answer in answers]


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
        return json.dumps({"error": f"{type(error).__name__}: {error}"}), error
