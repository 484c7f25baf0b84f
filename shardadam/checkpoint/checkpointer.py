"""`Checkpointer`: saves while training goes on, and restores on any mesh; a thin adapter over Orbax."""

import json
import logging
import operator
import os
import uuid
import weakref
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import jax
from etils import epath

from shardadam.checkpoint.adopting import adopt
from shardadam.checkpoint.errors import CheckpointError
from shardadam.checkpoint.files import check_writable_name
from shardadam.checkpoint.lock import WriterLock
from shardadam.checkpoint.restoring import Damage, Verify, chosen, read_extra, restore_newest, restore_step
from shardadam.checkpoint.saving import Saver
from shardadam.checkpoint.seal import Seal, described_plan
from shardadam.checkpoint.sealing import count_of
from shardadam.checkpoint.shared import check_shared
from shardadam.checkpoint.slots import check_names, plan_of, slots
from shardadam.checkpoint.steps import Steps, retire_old
from shardadam.checkpoint.together import on_process_zero
from shardadam.plan import Plan

State = TypeVar("State")

log = logging.getLogger("shardadam.checkpoint")


class Checkpointer:
    """Saves and restores training states in one directory, a step in each of its subdirectories.

    On disk, mu and nu have their parameters' shapes, whatever their layout in memory: a checkpoint is what
    `optax.adam` with the same tree would have written. It restores on any number of devices, with other specs and
    other layouts, and into plain optax by plain Orbax (item "state" of the step).

    A step counts as saved once its seal is written, in the background, after Orbax has committed it: the SHA-256 of
    every file and the digest of every leaf, outside of the step's directory. `restore` holds a step to its seal.

    Every process of a multi-process run makes the same calls, in the same order. While one saves, `latest_step` and
    `all_steps` may differ between processes for a moment; after `wait` they agree.

    Args:
      directory: where the steps go; made if it is not there.
      plan: how mu and nu of the states lie, for states that do not carry their own in `.plan`. Packed moments need
        it: flax's own TrainState, a bare optax state or `nnx.state(optimizer)` do not say how they were packed.
      max_to_keep: older steps than the last so many are deleted once a newer one is sealed; 2 at the least, or damage
        to the newest would leave none. None keeps all.
      keep_period: steps that are multiples of it are kept all the same.
      run_id: the run's name, for whoever finds the directory locked; default: drawn.
      config: the run's, kept in every seal; anything that JSON holds.
      on_error: "raise" a save's failure; or "warn" of it and go on, until `close` raises the last save's. That a state
        is not finite is always raised.
      compress: array files by zstd, as plain Orbax does: of float32 8% smaller, of bfloat16 22%, and saved and restored
        in about twice the processor time. Steps of either kind are read alike.

    Attributes:
      damaged: what `restore` found damaged, and where it is now.
      restored_step: which step `restore` took last; None before.

    Raises:
      CheckpointError: the processes of the run do not share the directory.
      ValueError: `max_to_keep` is under 2, `keep_period` under 1, or Orbax cannot write to a directory of that name.

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
        keep_period: int | None = None,
        run_id: str | None = None,
        config: Any = None,
        on_error: Literal["raise", "warn"] = "raise",
        compress: bool = False,
    ) -> None:
        if max_to_keep is not None and max_to_keep < 2:
            raise ValueError(f"max_to_keep: got {max_to_keep}, wanted 2 or more, or None to keep all")
        if keep_period is not None and keep_period < 1:
            raise ValueError(f"keep_period: got {keep_period}, wanted 1 or more, or None")
        if on_error not in ("raise", "warn"):
            raise ValueError(f"on_error: got {on_error!r}, wanted 'raise' or 'warn'")
        name = os.fspath(directory)
        self.directory = epath.Path(name if "://" in name else os.path.abspath(name))
        check_writable_name(self.directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.damaged: list[Damage] = []
        self.restored_step: int | None = None
        self._steps = Steps(self.directory)
        self._plan = plan
        self._run_id = run_id or uuid.uuid4().hex[:12]
        self._config = json.loads(json.dumps(config))
        self._closed = False
        lock: WriterLock | None = None  # None: an object store, where nothing can be locked.
        if "://" not in name:
            check_shared(Path(self.directory))
            lock = WriterLock(Path(self.directory), self._run_id)
        retain = partial(retire_old, self._steps, max_to_keep, keep_period)
        self._saver = Saver(self._steps, lock, on_error, retain, compress=compress)
        if lock is not None:
            # Of the saver, which a save under way keeps. Also at the interpreter's end.
            weakref.finalize(self._saver, lock.release)

    def lock(self) -> None:
        """Takes the directory for this run's writing, as the first `save` does otherwise; until `close`.

        Readers need no lock. With several processes all call this, and process 0 holds it.

        Raises:
          CheckpointError: another run writes there; the message says who.
          OSError: the directory cannot be written.
        """
        self._saver.lock()

    def save(
        self, step: int, state: Any, *, extra: Any = None, wait: bool = False, allow_nonfinite: bool = False
    ) -> None:
        """Saves a state. Returns when it has been copied off the devices; it may then be donated.

        Waits for the save before it, and raises that one's error, if it has failed. A process that ends without `close`
        waits for its last save, too, and ends with 1 if that fails.

        Args:
          step: names the step's directory; greater than all that are saved. After a save that failed, take the next
            number: what is left of it may still be writing to the old one.
          state: any tree of arrays and numbers, such as a TrainState.
          extra: anything that JSON holds, read back by `extra`.
          wait: return only when the step is sealed.
          allow_nonfinite: save it though it has NaN or infinities in it. Without, such a step is not sealed and leaves
            nothing, and the steps before it stay; this is found in the background, and raised by the next `check`,
            `wait`, `save` or `close`.

        Raises:
          CheckpointError: the step, or a later one, is there already, or another run writes in the directory.
          NotFiniteError: a CheckpointError, of the save before this one; with `wait`, of this one.
          TypeError: `extra` is not JSON.
          ValueError: the checkpointer is closed, `step` is negative, or a leaf cannot be saved: packed with no plan,
            laid out otherwise than its plan says, empty, or neither array nor number.
          SaveError: an OSError, too. This save, or the one before it, failed; the message says why, how much space is
            free, and which steps are there.
        """
        step = self._check_step(step)
        extra = json.loads(json.dumps(extra))
        self.wait()
        plan = plan_of(state, self._plan)
        parts = list(slots(state, plan))
        check_names(slot.names for slot in parts)
        for slot in parts:
            slot.check_savable()
        draft = Seal(
            step=step, files={}, leaves={}, count=count_of(parts), plan=described_plan(plan), config=self._config,
            run_id=self._run_id, num_processes=jax.process_count(),
        )  # fmt: skip
        self._saver.begin(draft, parts, jax.tree.structure(state), extra, allow_nonfinite=allow_nonfinite)
        if wait:
            self.wait()

    def restore(self, like: State, step: int | None = None, *, verify: Verify = "files") -> State:
        """Restores a state: values from disk; tree, layout, shardings and static fields from `like`.

        A TrainState's masters, loss scale and count of skipped steps need not be on disk, nor be in `like`: masters are
        made from the parameters, a scale is `like`'s own, a count 0.

        Without `step`, a step that is not what its seal says is moved to `damaged` in the directory (it is never
        deleted), logged, told in `self.damaged`, and the one before it is taken.

        Args:
          like: a state, or the same tree of `jax.ShapeDtypeStruct`s with shardings. It is not changed.
          step: which to restore, or an error if it is damaged; default: the newest that is not.
          verify: "files": every file is compared with the seal, the small ones before anything is loaded, large ones
            meanwhile; "full": so are the digests of the leaves when they are in their places; False: neither, and no
            seal is needed.

        Returns:
          A tree like `like`. Its arrays are new and can be donated; those that `like` holds uncommitted are
          uncommitted, its Python numbers are Python numbers.

        Raises:
          FileNotFoundError: the directory has no such step, or none at all.
          CheckpointError: the step is damaged, or all are, or has no seal; or it holds another tree, shape or dtype,
            and every such leaf is named.
          ValueError: a leaf of `like` says not where it is to be, or is not laid out as its plan says; `verify` is none
            of the three.
        """
        if verify not in ("files", "full", False):
            raise ValueError(f"verify: got {verify!r}, wanted 'files', 'full' or False")
        self.wait()
        plan = plan_of(like, self._plan)
        list(slots(like, plan))  # Refuses a `like` that is not laid out as its plan says.
        if step is None and verify:
            step, state = restore_newest(self._steps, like, plan, verify, self._set_aside)
        else:
            step = chosen(self._steps, None if step is None else operator.index(step), sealed=bool(verify))
            state = restore_step(self._steps, step, like, plan, verify)
        self.restored_step = step
        return state

    def adopt(self, step: int) -> None:
        """Seals a step that was committed without a seal, by plain Orbax or an older shardadam: as it is now.

        Raises:
          CheckpointError: it has a seal, is not committed, or another run writes in the directory.
        """
        self.wait()
        self._saver.tidied()  # Tidying up removes drafts of seals, and this makes one.
        self.lock()
        adopt(self._steps, operator.index(step), run_id=self._run_id, config=self._config)

    def extra(self, step: int | None = None) -> Any:
        """What `save` was given as `extra` with a step (default: the latest); None if it was given none.

        Raises:
          FileNotFoundError: the directory has no such step, or none at all.
          CheckpointError: it is damaged.
        """
        self.wait()
        return read_extra(self._steps, None if step is None else operator.index(step))

    def all_steps(self) -> list[int]:
        """The saved steps, ascending: those with a seal. A save under way is not among them."""
        return self._steps.sealed()

    def latest_step(self) -> int | None:
        """The latest saved step; None if there is none."""
        return max(self.all_steps(), default=None)

    def check(self) -> None:
        """Raises what the last save has failed with, if it has by now. Waits for nothing: call it at every step.

        Raises:
          NotFiniteError: see `save`.
          SaveError: see `save`.
        """
        self._saver.check()

    def wait(self) -> None:
        """Waits until the last save is sealed.

        Raises:
          NotFiniteError: its state is not finite; the earlier steps are still there.
          SaveError: it failed; so they are.
        """
        self._saver.wait()

    def close(self) -> None:
        """Waits for the last save, as `wait` does, and frees the writer. Reading goes on to work.

        Raises:
          NotFiniteError: the last save's state is not finite.
          SaveError: it failed, whatever `on_error` says.
        """
        self._closed = True
        self._saver.close()

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

    def _set_aside(self, step: int, why: str) -> Damage | None:
        """Moves a damaged step away, if nobody else writes here; None if it is not there any more."""
        if not on_process_zero(self._steps.key("still there"), lambda: step in self._steps.seals()):
            return None
        self._saver.release_manager()  # It has listed the step.
        moved = None
        try:
            self.lock()
            moved = on_process_zero(self._steps.key("aside"), lambda: str(self._steps.set_aside(step, why)))
        except (CheckpointError, OSError) as error:
            log.warning("step %d is damaged: %s; left where it is: %s", step, why, error)
        self.damaged.append(Damage(step, why, None if moved is None else epath.Path(moved)))
        return self.damaged[-1]

    def _check_step(self, step: int) -> int:
        if self._closed:
            raise ValueError(f"step {step}: not saved: the checkpointer of {self.directory} is closed; make another")
        if (index := operator.index(step)) < 0:
            raise ValueError(f"step: got {index}, wanted 0 or more")
        return index
