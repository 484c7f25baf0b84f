"""The save under way: begun in the foreground, sealed in the background, and its failure told exactly once."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp

from shardadam.checkpoint.commit import Commit
from shardadam.checkpoint.digest import Started, start
from shardadam.checkpoint.errors import CheckpointError, NotFiniteError, SaveError
from shardadam.checkpoint.failures import SamePlace, expect, explained, raise_it, save_error, settled
from shardadam.checkpoint.gate import Gate
from shardadam.checkpoint.hashing import HashedAhead
from shardadam.checkpoint.lock import WriterLock
from shardadam.checkpoint.logical import Slot
from shardadam.checkpoint.reading import STATE
from shardadam.checkpoint.seal import Seal
from shardadam.checkpoint.sealing import Sealing, check_finite, sealed_leaves, write_seal
from shardadam.checkpoint.shared import acquire_for_all
from shardadam.checkpoint.slices import sliced
from shardadam.checkpoint.steps import Steps, make_room, remove_partial, remove_retired, short
from shardadam.checkpoint.together import all_succeed, on_process_zero
from shardadam.checkpoint.writing import to_write, writer

log = logging.getLogger("shardadam.checkpoint")


class Saver:
    """Saves one step at a time in a directory, and keeps what became of the last one until somebody was told.

    Args:
      steps: of the directory.
      lock: the directory's; None for an object store, where nothing can be locked.
      on_error: "raise" a save's failure; or "warn" of it and go on, until `close` raises the last save's. That a state
        is not finite is always raised.
      retain: called by process 0 when a step was sealed: retires older ones, which are then removed.
      compress: whether array files are compressed.

    Attributes:
      step: the one under way; None when there is none.
    """

    def __init__(
        self,
        steps: Steps,
        lock: WriterLock | None,
        on_error: Literal["raise", "warn"],
        retain: Callable[[], None],
        *,
        compress: bool,
    ) -> None:
        self._steps, self._lock, self._on_error, self._retain = steps, lock, on_error, retain
        self._compress, self._commit, self._gate = compress, Commit(steps.key), Gate()
        self._manager: ocp.CheckpointManager | None = None  # Made by the first save, and anew after one that failed.
        self._background = ThreadPoolExecutor(1, "checkpoint-seal")
        self._sealing: Sealing | None = None
        self._tidying: Sealing | None = None  # The one before, which nobody need wait for but the next save.
        self.step: int | None = None  # The one under way.
        self._place: SamePlace | None = None  # The directory, as it was when that began.
        self._failure: CheckpointError | None = None  # The last save's, while nobody has been raised it.

    def lock(self) -> None:
        """Takes the directory for this run's writing; see `Checkpointer.lock`."""
        if self._lock is not None:
            acquire_for_all(self._lock)

    def begin(
        self,
        draft: Seal,
        parts: Sequence[Slot],
        structure: jax.tree_util.PyTreeDef,
        extra: Any,
        *,
        allow_nonfinite: bool,
    ) -> None:
        """Begins to save a step, when none is under way; returns when it has been copied off the devices.

        Args:
          draft: its seal, but for the files and leaves.
          parts: its leaves as they are in memory.
          structure: of the tree that they are of.
          extra: what JSON holds, to be written beside it; None for nothing.
          allow_nonfinite: seal it though there is NaN or infinity in it.

        Raises:
          CheckpointError: a step of that number or a later one is there, or another run writes in the directory.
          SaveError: it failed, and failures are raised.
        """
        self.step = draft.step
        with self._surfacing("prepare"):
            self.tidied()
            place = self._place = SamePlace(self._steps.directory)
            self.lock()
            on_process_zero(self._steps.key("room"), partial(make_room, self._steps, draft.step))
        if self.step is None:
            return
        described = [(slot.path, *slot.on_disk) for slot in parts]  # And no arrays, which may be donated.
        with self._surfacing("start"):
            manager, args, started = self._write(draft.step, parts, structure, extra)
        if self.step is None:
            return

        def seal(ahead: HashedAhead) -> None:
            place.check()
            leaves = sealed_leaves(self._steps, described, started)
            if not allow_nonfinite:
                check_finite(draft.step, leaves)
            sealed = dataclasses.replace(draft, leaves=leaves)
            write_seal(self._steps, sealed, ahead, permit=partial(self._check_lock, draft.step))
            if jax.process_index() == 0:
                self._retain()

        full = args[STATE].ocdbt_target_data_file_size
        ahead = partial(HashedAhead, self._steps.directory, draft.step, full)
        self._sealing = Sealing(ahead, manager.wait_until_finished, seal, self._tidy)
        # Keeps this saver, and so the lock, until the step is sealed, whether or not somebody else does.
        expect(self._steps, partial(explained, self._sealing.wait, self._steps, draft.step, place))
        self._sealing.start(self._background)

    def check(self) -> None:
        """Raises what the last save has failed with, if it has by now; waits for nothing."""
        if self._sealing is not None and self._sealing.has_ended():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is sealed; raises what it failed with."""
        if (sealing := self._sealing) is None:
            return
        sealing.await_end()  # Interrupted here, the save is still under way.
        self._sealing, self._tidying = None, sealing
        with self._surfacing("wait"):
            sealing.wait()
            self.step, self._place, self._failure = None, None, None
            settled(self._steps)

    def tidied(self) -> None:
        """Waits until the steps that the last save made superfluous have been removed, if its end was waited for."""
        if self._tidying is not None:
            self._tidying.join()
            self._tidying = None

    def close(self) -> None:
        """Waits, and frees the writer and the lock; raises the last save's failure, whatever `on_error` says."""
        try:
            self.wait()
        finally:
            self.tidied()
            self._background.shutdown()
            self.release_manager()
            if self._lock is not None:
                self._lock.release()
        failure, self._failure = self._failure, None
        if failure is not None:
            settled(self._steps)
            raise failure

    def release_manager(self) -> None:
        """Ends Orbax's manager, when no save is under way; the next save makes one that lists the steps anew."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _write(
        self, step: int, parts: Sequence[Slot], structure: jax.tree_util.PyTreeDef, extra: Any
    ) -> tuple[ocp.CheckpointManager, ocp.args.Composite, Started]:
        """Begins the digests of a state, and has Orbax copy it; once this returns, Orbax's writers begin."""
        self._commit.begin(step)
        directory, commit, gate = self._steps.directory, self._commit, self._gate
        manager = self._manager = self._manager or writer(directory, commit, gate, compress=self._compress)
        # Each agreed on: where processes meet, the others would wait for one that has failed by now.
        parts = all_succeed(self._steps.key("sliced"), partial(sliced, parts))
        args, started = all_succeed(self._steps.key("begun"), partial(_begun, parts, structure, extra))
        try:
            with gate.closed():
                is_saved = manager.save(step, args=args)
                all_succeed(self._steps.key("copied"), commit.check)
        except Exception:
            with contextlib.suppress(Exception):  # What has begun ends before anything else does begin.
                manager.wait_until_finished()
            raise
        if not is_saved:
            raise SaveError(
                f"step {step}: Orbax did not save it in {directory}, which holds {short(self._steps.sealed())}"
            )
        return manager, args, started

    def _tidy(self) -> None:
        """After a step was sealed, when nothing is left to be told of it."""
        if jax.process_index() == 0 and self._holds_lock():
            remove_retired(self._steps)
        settled(self._steps)

    def _holds_lock(self) -> bool:
        """Whether this process may delete here: it holds the lock, or there can be none."""
        return self._lock is None or self._lock.is_held()

    def _check_lock(self, step: int) -> None:
        """Of process 0, which holds it for all."""
        if self._lock is not None and not self._lock.is_held():
            raise SaveError(
                f"step {step}: not saved in {self._steps.directory}: {self._lock.path} has been taken over by another "
                "run, or was removed, meanwhile; end one of the two"
            )

    @contextlib.contextmanager
    def _surfacing(self, stage: Literal["prepare", "start", "wait"]) -> Iterator[None]:
        """What fails within is raised, or warned of, as a SaveError; what "prepare" refuses is raised as it is.

        Leaves the manager that failed: it thinks the step is there.
        """
        try:
            yield
        except Exception as error:
            # Not closed: that would take the thread pool from what Orbax still has running, and a thread that waits for
            # it would hold up the process's end for 20 minutes.
            self._manager = None
            step, self.step = self.step, None
            place, self._place = self._place, None
            assert step is not None
            if isinstance(error, CheckpointError) and not isinstance(error, OSError) and stage == "prepare":
                raise
            failure = save_error(self._steps, step, error, place)  # While the disk is as full as it was.
            if stage != "prepare" and self._holds_lock():
                remove_partial(self._steps, step)
            if self._on_error == "raise" or isinstance(failure, NotFiniteError):
                settled(self._steps)
                raise failure from (None if failure is error else error)
            self._failure = failure
            expect(self._steps, partial(raise_it, failure))
            log.warning("%s; going on without it", failure)


def _begun(parts: Sequence[Slot], structure: jax.tree_util.PyTreeDef, extra: Any) -> tuple[ocp.args.Composite, Started]:
    """What Orbax is to write of a state, and its digests, under way."""
    args = to_write(jax.tree.unflatten(structure, [slot.to_disk() for slot in parts]), extra)
    return args, start(parts)
