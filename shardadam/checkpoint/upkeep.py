"""Verifies and deletes the steps of a directory, without a state to restore them into."""

import os
from typing import NamedTuple

from etils import epath

from shardadam.checkpoint.checkpointer import Checkpointer
from shardadam.checkpoint.convert import as_path
from shardadam.checkpoint.errors import CheckpointError
from shardadam.checkpoint.files import existing
from shardadam.checkpoint.seal import Seal
from shardadam.checkpoint.steps import Steps, remove_retired, to_delete
from shardadam.checkpoint.verify import file_faults, read_seal, stored_leaf_faults


class Verdict(NamedTuple):
    """Whether a step is what its seal says.

    Attributes:
      step: its number.
      path: its directory.
      faults: what is wrong, a line for each; empty if nothing is.
    """

    step: int
    path: str
    faults: list[str]


class Pruned(NamedTuple):
    """The sealed steps that were deleted, or would be, and those that are left."""

    deleted: list[int]
    kept: list[int]


def verify(path: str | os.PathLike[str], *, every: bool = False, with_digests: bool = False) -> list[Verdict]:
    """Compares steps with their seals: the SHA-256 of every file, and which files there are. Changes nothing.

    Args:
      path: a step's directory, or that of a `Checkpointer`, of which the newest sealed step is taken.
      every: all steps of a `Checkpointer`'s directory; one without a seal, or a seal without its step, is a fault.
      with_digests: reads the leaves, too, a few at a time, and compares their digests with those that were taken in
        memory when the step was saved.

    Raises:
      FileNotFoundError: there is no such directory, or no step in it.
    """
    steps, wanted = _chosen(as_path(path), every)
    return [Verdict(step, os.fspath(steps.path(step)), _faults(steps, step, with_digests)) for step in wanted]


def prune(
    directory: str | os.PathLike[str], *, keep: int, keep_period: int | None = None, dry_run: bool = False
) -> Pruned:
    """Deletes the sealed steps of a directory but the newest, under the writer's lock; see `Checkpointer`.

    A step whose seal cannot be read stays, and is none of the newest: to go back to, it is of no use.

    Args:
      directory: the `Checkpointer`'s.
      keep: how many of the newest stay, 2 or more.
      keep_period: steps that are multiples of it stay, too.
      dry_run: deletes nothing.

    Raises:
      CheckpointError: a run writes there.
      FileNotFoundError: there is no such directory.
      ValueError: `keep` is less than 2, or `keep_period` less than 1.
      OSError: a step cannot be deleted.
    """
    root = existing(as_path(directory))
    with Checkpointer(root, max_to_keep=keep, keep_period=keep_period) as checkpointer:
        steps = Steps(root)
        if dry_run:
            gone = to_delete(steps, keep, keep_period)
            return Pruned(gone, [step for step in steps.sealed() if step not in gone])
        checkpointer.lock()
        steps.sweep()
        gone = to_delete(steps, keep, keep_period)
        try:
            for step in gone:
                steps.retire(step)
        finally:
            remove_retired(steps)
        return Pruned(gone, steps.sealed())


def seal_or_fault(steps: Steps, step: int) -> tuple[Seal | None, str]:
    """A step's seal; None, and what is the matter with it."""
    if not steps.seal_path(step).exists():
        return None, "no seal"
    try:
        return read_seal(steps, step), ""
    except (CheckpointError, OSError) as error:
        return None, str(error)


def _faults(steps: Steps, step: int, with_digests: bool) -> list[str]:
    if not steps.path(step).is_dir():
        return ["its seal is there, but not its directory"]
    seal, fault = seal_or_fault(steps, step)
    if seal is None:
        return [fault]
    try:
        faults = file_faults(steps, seal)
    except OSError as error:
        return [f"cannot be read: {error}"]
    return list(stored_leaf_faults(steps.path(step), seal)) if with_digests and not faults else faults


def _chosen(path: epath.Path, every: bool) -> tuple[Steps, list[int]]:
    if path.name.isdecimal() and not every:
        steps, step = Steps(path.parent), int(path.name)
        if step not in steps.seals():
            existing(path)
        return steps, [step]
    steps = Steps(existing(path))
    there = sorted({*steps.seals(), *steps.unsealed()})
    if not there:
        raise FileNotFoundError(f"no checkpoint in {path}: no step has been saved there")
    return steps, there if every else [(steps.seals() or there)[-1]]
