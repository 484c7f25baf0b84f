"""What the processes of a run agree on: that they were started alike, and where to stop when one is asked to."""

import contextlib
import itertools
import json
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import jax

from shardadam import runtime
from shardadam.trainer.config import ConfigError, TrainConfig
from shardadam.trainer.run_dir import flat, versions

log = logging.getLogger("shardadam.trainer")
_instances = itertools.count()
_NOBODY = "nobody"


def check_alike(config: TrainConfig, sha256: str) -> None:
    """Refuses to train where processes have another config, text or version than process 0: they would diverge.

    Raises:
      ConfigError: in each process that differs, with what differs.
    """
    facts = flat(asdict(config)) | {"text": sha256, **versions()}
    del facts["python"]  # patch releases may differ, as long as the text does not
    wanted = json.loads(runtime.from_process_zero("alike", json.dumps(facts)))
    differ = [
        f"'{name}' is {facts[name]!r}, there {wanted.get(name)!r}" for name in facts if facts[name] != wanted.get(name)
    ]
    if differ:
        raise ConfigError(f"process {jax.process_index()} is not like process 0: {'; '.join(differ)}; start all alike")


@contextlib.contextmanager
def stop_agreement(requested: threading.Event) -> Iterator[Callable[[], bool]]:
    """A function for the places where the run may stop: True from the same call on in every process.

    Args:
      requested: set where this process has been asked to stop.
    """
    client = runtime.coordination_client()
    if client is None:
        yield requested.is_set
        return
    agreement = _Agreement(client, requested)
    yield agreement
    agreement.close()  # not after an error: the others may be gone, and with them the answers it would wait for


class _Agreement:
    """Asked to stop, every process tells how many calls it has answered, and all stop at the call after the most.

    Answers are withheld meanwhile, so that no process passes what it has told. The calls are counted, not the steps:
    evaluation asks between its batches. `multihost_utils.reached_preemption_sync_point` does the same, for SIGTERM
    alone, whose handler it takes for itself.
    """

    def __init__(self, client: Any, requested: threading.Event) -> None:
        self._client, self._requested = client, requested
        self._prefix = f"shardadam/stop/{next(_instances)}"  # created by all processes in the same order
        self._answer = threading.Lock()
        self._told, self._num_calls = False, 0
        self._stop_at: int | None = None
        self._thread = threading.Thread(target=self._settle, name="stop-agreement", daemon=True)
        self._thread.start()

    def __call__(self) -> bool:
        if self._requested.is_set() and not self._told:
            self._told = self._tell(str(jax.process_index()))
        with self._answer:
            self._num_calls += 1
            return self._stop_at is not None and self._num_calls >= self._stop_at

    def close(self) -> None:
        """Ends the thread: the interpreter must not end while it waits in C++, which then aborts."""
        self._tell(_NOBODY)
        self._thread.join()

    def _tell(self, who: str) -> bool:
        """The first to tell decides for all whether anything is to be settled."""
        try:
            self._client.key_value_set(f"{self._prefix}/asked", who)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise
        return True

    def _settle(self) -> None:
        who = self._get(f"{self._prefix}/asked")
        if who == _NOBODY:
            return
        with self._answer:
            self._client.key_value_set(f"{self._prefix}/{jax.process_index()}", str(self._num_calls))
            answered = [int(self._get(f"{self._prefix}/{index}")) for index in range(jax.process_count())]
            self._stop_at = 1 + max(answered)
        log.info("process %s was asked to stop: all do, at the same step", who)

    def _get(self, key: str) -> str:
        return self._client.blocking_key_value_get(key, 2**31 - 1)  # ms: 25 days
