"""Which steps a directory holds, and how one leaves it: by one rename, so that no lister ever sees half a step.

DIRECTORY/<step>/             what Orbax wrote
DIRECTORY/seals/<step>.json   its seal; a step counts as saved when it is there
DIRECTORY/damaged/            steps that were moved aside, with the reason; never deleted
DIRECTORY/trash/              what is being deleted
"""

import contextlib
import itertools
import logging
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from shardadam.checkpoint import reading
from shardadam.checkpoint.errors import CheckpointError
from shardadam.checkpoint.files import is_local, read_small, sync_directory, write_durably
from shardadam.checkpoint.seal import Seal

SEALS, DAMAGED, TRASH = "seals", "damaged", "trash"
PARTIAL = ".orbax-checkpoint-tmp"  # In the names of what Orbax has not committed.

_made = itertools.count()  # Alike in all processes, which make the same Checkpointers in the same order.

log = logging.getLogger("shardadam.checkpoint")


class Steps:
    """The steps in a directory.

    Args:
      directory: the Checkpointer's.
    """

    def __init__(self, directory: epath.Path) -> None:
        self.directory = directory
        self._number = next(_made)

    def key(self, name: str) -> str:
        """A name for what the processes say to each other about these steps, see `together`.

        Those who say it in other threads, about other directories, say it under other names.
        """
        return f"checkpoints {self._number}: {name}"

    def path(self, step: int) -> epath.Path:
        """Of what Orbax wrote."""
        return self.directory / str(step)

    def seal_path(self, step: int) -> epath.Path:
        """Of the step's seal."""
        return self._folder(SEALS) / f"{step}.json"

    def sealed(self) -> list[int]:
        """The saved steps, ascending: those with a seal."""
        return [step for step in self.seals() if self.path(step).is_dir()]

    def seals(self) -> list[int]:
        """The steps that have a seal, ascending; a step whose own directory is gone, too."""
        with contextlib.suppress(FileNotFoundError):
            names = (path.name.removesuffix(".json") for path in self._folder(SEALS).iterdir())
            return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))
        return []

    def unsealed(self, at_least: int = 0) -> list[int]:
        """The steps, from one on, that Orbax committed and nobody sealed, ascending.

        Of an older shardadam or plain Orbax, or of a process that was killed before it could write the seal.
        """
        seals = self.seals()
        names = [path.name for path in self.directory.iterdir()] if self.directory.exists() else []
        if not any(name.isdecimal() and int(name) >= at_least and int(name) not in seals for name in names):
            return []  # Orbax's list takes a thread for each step.
        return [step for step in reading.committed_steps(self.directory) if step >= at_least and step not in seals]

    def read_seal(self, step: int) -> Seal:
        """The seal of a step.

        Raises:
          CheckpointError: it is damaged, or that of another step, or there is none.
          OSError: it is there, and cannot be read.
        """
        try:
            text = read_small(self.seal_path(step))
        except FileNotFoundError:
            raise CheckpointError("there is no seal") from None
        seal = Seal.from_text(text.decode(errors="replace"))
        if seal.step != step:
            raise CheckpointError(f"the seal is that of step {seal.step}")
        return seal

    def has_readable_seal(self, step: int) -> bool:
        """Whether `read_seal` gives a seal."""
        try:
            self.read_seal(step)
        except (CheckpointError, OSError):
            return False
        return True

    def write_seal(self, seal: Seal) -> None:
        """Makes a step count as saved, in one rename."""
        path = self.seal_path(seal.step)
        path.parent.mkdir(exist_ok=True)
        write_durably(path, seal.to_text())

    def set_aside(self, step: int, why: str) -> epath.Path:
        """Moves a step that is not to be restored, and its seal, to `damaged`, where it stays until a user removes it.

        Returns:
          Where it is now.
        """
        name = f"{step}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:4]}"
        target = self._folder(DAMAGED) / name
        target.parent.mkdir(exist_ok=True)
        # The step first: a seal without one is reported again, a step without a seal would be as one never finished.
        _move(self.path(step), target)
        _move(self.seal_path(step), target.with_name(f"{name}.json"))
        try:
            write_durably(target.with_name(f"{name}.txt"), why + "\n")
        except OSError as error:  # A full disk has room for names still.
            log.warning("why step %d was moved cannot be written to %s: %s", step, target.parent, error)
        log.warning("step %d moved to %s: %s", step, target, why)
        return target

    def retire(self, step: int) -> None:
        """Has a step no longer count as saved, in one rename; `sweep` removes it."""
        trash = self._folder(TRASH)
        trash.mkdir(exist_ok=True)
        self.seal_path(step).rename(trash / f"{step}-{uuid.uuid4().hex[:12]}.json")

    def sweep(self) -> None:
        """Removes the steps that were retired, also by a process that was killed then, and drafts of seals.

        Each leaves the listing in one rename before anything of it is removed.
        """
        for draft in self._folder(SEALS).glob("*.tmp"):
            draft.unlink(missing_ok=True)
        trash = self._folder(TRASH)
        if not trash.exists():
            return
        if records := sorted(trash.glob("*.json")):
            for folder in (trash, self._folder(SEALS)):  # A step that is gone must not be sealed, though power is lost.
                sync_directory(folder)
        for record in records:
            self._empty(record)
        for left in trash.iterdir():
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            elif left.suffix != ".json":  # A record has come since, whose step is still to go: the next time.
                left.unlink(missing_ok=True)

    def _folder(self, name: str) -> epath.Path:
        """One of the three directories beside the steps.

        Raises:
          CheckpointError: it is a symbolic link: what is deleted or trusted there would be somebody else's.
        """
        path = self.directory / name
        if is_local(path) and os.path.islink(path):
            raise CheckpointError(f"{path}: is a symbolic link, which it must not be; remove it")
        return path

    def _empty(self, record: epath.Path) -> None:
        """Removes the step that `record`, its former seal, stands for."""
        step, name = int(record.name.partition("-")[0]), record.name.removesuffix(".json")
        if not self.seal_path(step).exists():  # Else it was saved anew since.
            _move(self.path(step), record.with_name(name))
        if record.with_name(name).exists():
            shutil.rmtree(record.with_name(name))
        record.unlink(missing_ok=True)


def remove_partial(steps: Steps, step: int | None = None) -> None:
    """Removes what saves that failed, or were killed, have left: only the one writer of a directory may call it.

    What cannot be removed now, as when its disk is read-only, or is still being written to, goes the next time.

    Args:
      steps: of the directory.
      step: one that Orbax may have committed: if nobody has sealed it, it goes, too.
    """
    if not is_local(steps.directory) or not steps.directory.is_dir():
        return
    directory = Path(steps.directory)
    left = [path for path in directory.iterdir() if PARTIAL in path.name]
    try:
        if step is not None and step not in steps.seals():
            left.append(directory / str(step))
    except (CheckpointError, OSError) as error:
        log.warning("step %d stays in %s, with a seal or without: %s", step, directory, error)
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            log.warning("%s is left of a save that failed, and cannot be removed now", path)


def make_room(steps: Steps, step: int) -> None:
    """Makes sure that a step can be saved: nothing of that number or a greater one is there, and its directory can be.

    If it could not, Orbax would find that in process 0, and the others would wait for ever.

    Raises:
      CheckpointError: it, or a later one, is saved.
      OSError: what the operating system has against a directory.
    """
    remove_retired(steps)
    remove_partial(steps)
    seals = steps.seals()
    saved = [left for left in seals if steps.path(left).is_dir()]
    if saved and step <= saved[-1]:
        raise CheckpointError(
            f"step {step}: not saved: {steps.directory} holds {short(saved)} already; steps must ascend. Restore "
            "the latest and go on from there, or save in another directory"
        )
    lost = [left for left in seals if left not in saved and left >= step]
    in_the_way = sorted([*steps.unsealed(at_least=step), *lost])
    folder = steps.seal_path(step).parent
    if in_the_way and not folder.exists():
        raise CheckpointError(
            f"step {step}: not saved: {steps.directory} holds {short(in_the_way)} of plain Orbax or of an older "
            f"shardadam; adopt({in_the_way[-1]}) and go on from there, or save in another directory"
        )
    folder.mkdir(exist_ok=True)
    for left in in_the_way:
        why = "its directory is gone" if left in seals else "it has no seal: a run was ended in this save"
        steps.set_aside(left, f"{why}, or its seal was lost; in the way of step {step}")
    if is_local(steps.directory):
        probe = steps.directory / f"{step}{PARTIAL}"  # Orbax's name of it.
        os.mkdir(probe)
        os.rmdir(probe)


def to_delete(steps: Steps, max_to_keep: int | None, keep_period: int | None) -> list[int]:
    """All sealed steps but the last `max_to_keep` and the multiples of `keep_period`, ascending.

    One whose seal cannot be read stays, and is none of the last: nothing could be restored from it.
    """
    if max_to_keep is None:
        return []
    newer, found = 0, []
    for step in reversed(steps.sealed()):
        if newer < max_to_keep:
            newer += steps.has_readable_seal(step)
        elif (keep_period is None or step % keep_period) and steps.has_readable_seal(step):
            found.append(step)
    return found[::-1]


def retire_old(steps: Steps, max_to_keep: int | None, keep_period: int | None) -> None:
    """Retires the steps that `to_delete` names. One that cannot be is logged, and tried again after the next save."""
    for step in to_delete(steps, max_to_keep, keep_period):
        try:
            steps.retire(step)
        except OSError as error:
            log.warning("step %d of %s could not be deleted: %s", step, steps.directory, error)


def remove_retired(steps: Steps) -> None:
    """Removes the steps that were retired; what cannot be removed is logged, and tried again by the next save."""
    try:
        steps.sweep()
    except (CheckpointError, OSError) as error:
        log.warning("what is left of deleted steps in %s cannot be removed: %s", steps.directory, error)


def short(steps: Sequence[int]) -> str:
    """Steps for an error message: all of them, or how many there are and the last ones."""
    if len(steps) > 8:
        return f"{len(steps)} steps, the last {', '.join(map(str, steps[-4:]))}"
    return ("steps " + ", ".join(map(str, steps))) if steps else "no steps"


def _move(source: epath.Path, target: epath.Path) -> None:
    """Renames what is there, and makes both names durable."""
    if not source.exists() and not os.path.islink(source):
        return
    source.rename(target)
    sync_directory(target.parent)
    sync_directory(source.parent)
