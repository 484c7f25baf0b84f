"""`Checkpointer`: saves while training goes on, and restores on any mesh; a thin adapter over Orbax."""

import contextlib
import json
import operator
import os
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from shardadam.checkpoint import reading
from shardadam.checkpoint.lock import WriterLock
from shardadam.checkpoint.match import CheckpointError, check_match, exact, is_scalar
from shardadam.checkpoint.shared import acquire_for_all, check_shared
from shardadam.checkpoint.slots import check_names, plan_of, slots
from shardadam.plan import Plan

State = TypeVar("State")


class Checkpointer:
    """Saves and restores training states in one directory, a step in each of its subdirectories.

    On disk, mu and nu have their parameters' shapes, whatever their layout in memory: a checkpoint is what
    `optax.adam` with the same tree would have written. It restores on any number of devices, with other specs and
    other layouts, and into plain optax by plain Orbax (item "state" of the step).

    Every process of a multi-process run makes the same calls, in the same order. While one saves, `latest_step` and
    `all_steps` may differ between processes for a moment; after `wait` they agree.

    Args:
      directory: where the steps go; made if it is not there.
      plan: how mu and nu of the states lie, for states that do not carry their own in `.plan`. Packed moments need
        it: flax's own TrainState, a bare optax state or `nnx.state(optimizer)` do not say how they were packed.
      max_to_keep: older steps than the last so many are deleted once a newer one is committed. None keeps all.
      run_id: the run's name, for whoever finds the directory locked; default: drawn.

    Raises:
      CheckpointError: the processes of the run do not share the directory.
      ValueError: `max_to_keep` is less than 1.

    Example:
      >>> with Checkpointer("runs/a/checkpoints") as checkpointer:
      ...     checkpointer.save(int(state.step), state, extra={"seed": 0})
      ...     state = checkpointer.restore(state)
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        plan: Plan | None = None,
        max_to_keep: int | None = None,
        run_id: str | None = None,
    ) -> None:
        if max_to_keep is not None and max_to_keep < 1:
            raise ValueError(f"max_to_keep: got {max_to_keep}, wanted 1 or more, or None to keep all")
        name = os.fspath(directory)
        self.directory = epath.Path(name if "://" in name else os.path.abspath(name))
        self.directory.mkdir(parents=True, exist_ok=True)
        self._plan = plan
        self._max_to_keep = max_to_keep
        self._writer: ocp.CheckpointManager | None = None  # Made by the first save, and anew after one that failed.
        self._in_flight: int | None = None
        self._closed = False
        self._lock: WriterLock | None = None  # None: an object store, where nothing can be locked.
        if "://" not in name:
            check_shared(Path(self.directory))
            self._lock = WriterLock(Path(self.directory), run_id or uuid.uuid4().hex[:12])
            weakref.finalize(self, self._lock.release)  # Also at the interpreter's end.

    def lock(self) -> None:
        """Takes the directory for this run's writing, as the first `save` does otherwise; until `close`.

        Readers need no lock. With several processes all call this, and process 0 holds it.

        Raises:
          CheckpointError: another run writes there; the message says who.
          OSError: the directory cannot be written.
        """
        if self._lock is not None:
            acquire_for_all(self._lock)

    def save(self, step: int, state: Any, *, extra: Any = None, wait: bool = False) -> None:
        """Saves a state. Returns when it has been copied off the devices; it may then be donated.

        Waits for the save before it, and raises that one's error, if it has failed.

        Args:
          step: names the step's directory; greater than all that are there. After a save that failed, take the next
            number: what is left of it may still be writing to the old one.
          state: any tree of arrays and numbers, such as a TrainState.
          extra: anything that JSON holds, read back by `extra`.
          wait: return only when the step is committed.

        Raises:
          CheckpointError: the step, or a later one, is there already, another run writes in the directory, or Orbax
            did not save.
          TypeError: `extra` is not JSON.
          ValueError: the checkpointer is closed, `step` is negative, or a leaf cannot be saved: packed with no plan,
            laid out otherwise than its plan says, empty, or neither array nor number.
          OSError: and whatever else the save before this one failed with.
        """
        step = self._check_step(step)
        beside = {} if extra is None else {reading.EXTRA: ocp.args.JsonSave(json.loads(json.dumps(extra)))}
        self.wait()
        steps = self.all_steps()
        if steps and step <= steps[-1]:
            raise CheckpointError(
                f"step {step}: not saved: {self.directory} holds {_short(steps)} already; steps must ascend. Restore "
                "the latest and go on from there, or save in another directory"
            )
        parts = list(slots(state, plan_of(state, self._plan)))
        check_names(parts)
        leaves = [slot.to_disk() for slot in parts]
        self.lock()
        logical = ocp.args.StandardSave(jax.tree.unflatten(jax.tree.structure(state), leaves))
        self._in_flight = step
        with self._surfacing():
            if not self._manager().save(step, args=ocp.args.Composite(**{reading.STATE: logical}, **beside)):
                raise CheckpointError(
                    f"step {step}: Orbax did not save it in {self.directory}, which holds {_short(steps)}"
                )
        if wait:
            self.wait()

    def restore(self, like: State, step: int | None = None) -> State:
        """Restores a state: values from disk; tree, layout, shardings and static fields from `like`.

        Args:
          like: a state, or the same tree of `jax.ShapeDtypeStruct`s with shardings. It is not changed.
          step: which to restore; default: the latest.

        Returns:
          A tree like `like`. Its arrays are new and can be donated; those that `like` holds uncommitted are
          uncommitted, its Python numbers are Python numbers.

        Raises:
          FileNotFoundError: the directory has no such step, or none at all.
          CheckpointError: the step holds another tree, shape or dtype; every such leaf is named.
          ValueError: a leaf of `like` says not where it is to be, or is not laid out as its plan says.
        """
        self.wait()
        path = self._step_directory(step)
        wanted = list(slots(like, plan_of(like, self._plan)))
        saved = reading.saved_leaves(path)
        check_match(saved, wanted, str(path))
        numbers = [is_scalar(saved[slot.names], slot) for slot in wanted]
        targets = [
            np.zeros((), saved[slot.names].dtype) if number else slot.target()
            for slot, number in zip(wanted, numbers, strict=True)
        ]
        treedef = jax.tree.structure(like)
        leaves = jax.tree.leaves(reading.read_state(path, jax.tree.unflatten(treedef, targets)))
        for i, (slot, number) in enumerate(zip(wanted, numbers, strict=True)):
            # In place: a leaf as it was on disk goes as soon as the one in its layout is there.
            leaves[i] = slot.from_disk(exact(leaves[i], slot) if number else leaves[i])
        return jax.tree.unflatten(treedef, leaves)

    def extra(self, step: int | None = None) -> Any:
        """What `save` was given as `extra` with a step (default: the latest); None if it was given none.

        Raises:
          FileNotFoundError: the directory has no such step, or none at all.
        """
        self.wait()
        return reading.read_extra(self._step_directory(step))

    def all_steps(self) -> list[int]:
        """The committed steps, ascending; a save under way is not among them."""
        return reading.committed_steps(self.directory)

    def latest_step(self) -> int | None:
        """The latest committed step; None if there is none."""
        return max(self.all_steps(), default=None)

    def wait(self) -> None:
        """Waits until the last save is committed.

        Raises:
          OSError: and whatever else the save failed with; the earlier steps are still there.
        """
        if self._writer is not None:
            with self._surfacing():
                self._writer.wait_until_finished()
        self._in_flight = None

    def close(self) -> None:
        """Waits for the last save, as `wait` does, and frees the writer. Reading goes on to work."""
        self._closed = True
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"Besides, the last save failed: {failure!r}")

    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's manager: for saving only, as it lists steps that are not committed and breaks on a failed restore."""
        if self._writer is None:
            keep = self._max_to_keep
            policy = None if keep is None else ocp.checkpoint_managers.LatestN(n=keep)
            options = ocp.CheckpointManagerOptions(preservation_policy=policy)
            self._writer = ocp.CheckpointManager(self.directory, options=options)
        return self._writer

    @contextlib.contextmanager
    def _surfacing(self) -> Iterator[None]:
        """Says which step an error was about, and leaves the manager that failed: it thinks the step is there."""
        try:
            yield
        except Exception as error:
            # Not closed: that would take the thread pool from what Orbax still has running, and a thread that waits for
            # it would hold up the process's end for 20 minutes.
            self._writer = None
            step, self._in_flight = self._in_flight, None
            error.add_note(f"Step {step} is not saved; committed in {self.directory}: {_short(self.all_steps())}.")
            raise

    def _check_step(self, step: int) -> int:
        if self._closed:
            raise ValueError(f"step {step}: not saved: the checkpointer of {self.directory} is closed; make another")
        if (index := operator.index(step)) < 0:
            raise ValueError(f"step: got {index}, wanted 0 or more")
        return index

    def _step_directory(self, step: int | None) -> epath.Path:
        steps = self.all_steps()
        if not steps:
            raise FileNotFoundError(f"no checkpoint in {self.directory}: no step has been committed there")
        if step is not None and operator.index(step) not in steps:
            raise FileNotFoundError(f"step {step}: not in {self.directory}, which holds {_short(steps)}")
        return self.directory / str(steps[-1] if step is None else operator.index(step))


def _short(steps: list[int]) -> str:
    """Steps for an error message: all of them, or how many there are and the last ones."""
    if len(steps) > 8:
        return f"{len(steps)} steps, the last {', '.join(map(str, steps[-4:]))}"
    return ("steps " + ", ".join(map(str, steps))) if steps else "no steps"
