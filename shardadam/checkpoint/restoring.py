"""Restores the newest step that is what its seal says, and has the damaged ones that it meets moved aside."""

import dataclasses
import errno
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from shardadam.checkpoint import reading
from shardadam.checkpoint.errors import CheckpointError, errno_of
from shardadam.checkpoint.match import check_match, exact, is_scalar
from shardadam.checkpoint.optional import as_saved, as_wanted
from shardadam.checkpoint.seal import Seal
from shardadam.checkpoint.sealing import list_files
from shardadam.checkpoint.slots import slots
from shardadam.checkpoint.steps import Steps, short
from shardadam.checkpoint.together import all_succeed, on_every_process, on_process_zero
from shardadam.checkpoint.verify import (
    begin_file_faults,
    chunk_faults,
    file_faults,
    leaf_faults,
    read_seal,
    shape_faults,
)
from shardadam.plan import Plan

Verify = Literal["files", "full", False]

_MAX_LISTED = 4  # Faults named per step: where a disk is broken there may be thousands.

log = logging.getLogger("shardadam.checkpoint")


class Damage(NamedTuple):
    """A step that was not what its seal says.

    Attributes:
      step: its number.
      why: what is wrong with it.
      moved_to: where it is now; None where it could not be moved.
    """

    step: int
    why: str
    moved_to: epath.Path | None


class Damaged(CheckpointError):
    """A step is not what its seal says."""


SetAside = Callable[[int, str], Damage | None]


def restore_newest(steps: Steps, like: Any, plan: Plan | None, verify: Verify, set_aside: SetAside) -> tuple[int, Any]:
    """Restores the newest sealed step that stands the verification; every damaged one that it meets is set aside.

    All processes call this, and restore the same step.

    Args:
      steps: of the directory.
      like: what to restore into, see `Checkpointer.restore`.
      plan: how the leaves of `like` lie, see `slots`.
      verify: "files" or "full", see `Checkpointer.restore`.
      set_aside: told each damaged step and why; gives None if it was deleted meanwhile.

    Returns:
      The step, and the state.

    Raises:
      FileNotFoundError: nothing is sealed there.
      CheckpointError: every sealed step is damaged, or the step holds another tree, shape or dtype than is wanted.
    """
    found: list[Damage] = []
    _report_unsealed(steps)
    while (newest := _newest(steps, without=[damage.step for damage in found])) is not None:
        step, lost = newest
        try:
            if lost:
                raise Damaged("its seal is there, but not its directory")
            state = restore_step(steps, step, like, plan, verify)
        except Damaged as error:
            damage = set_aside(step, str(error))
            if damage is not None:
                found.append(damage)
            continue
        except OSError as error:
            if errno_of(error) == errno.ENOENT and not _is_sealed(steps, step):
                continue  # The run that writes here has deleted it meanwhile.
            error.add_note(f"Step {step} of {steps.directory} cannot be read now; nothing was moved.")
            raise
        if found:
            log.warning("restored step %d in place of %s", step, ", ".join(str(damage.step) for damage in found))
        return step, state
    if not found:
        chosen(steps, on_process_zero(steps.key("unsealed"), lambda: max(steps.unsealed(), default=None)), sealed=True)
    listed = "".join(f"\n  step {damage.step}: {damage.why}; now in {damage.moved_to}" for damage in found)
    raise CheckpointError(f"{steps.directory}: none of its steps is what its seal says:{listed}")


def restore_step(steps: Steps, step: int, like: Any, plan: Plan | None, verify: Verify) -> Any:
    """Restores one step: a state like `like`.

    Raises:
      Damaged: it is not what its seal says.
      CheckpointError: it holds another tree, shape or dtype than is wanted.
    """
    if not verify:
        on_process_zero(steps.key("files"), lambda: list_files(steps.path(step)))  # Refuses links, which lead anywhere.
        return _read_step(steps, step, like, plan, None, verify)
    seal = _seal(steps, step)
    known, others = begin_file_faults(steps, seal)
    _refuse(known)
    try:
        state = _read_step(steps, step, like, plan, seal, verify)
    except Exception:
        _refuse(others())  # What is damaged may be misread in any way.
        raise
    _refuse(others())
    return state


def _read_step(steps: Steps, step: int, like: Any, plan: Plan | None, seal: Seal | None, verify: Verify) -> Any:
    path = steps.path(step)
    tree = all_succeed(steps.key("metadata"), lambda: reading.saved_tree(path))
    saved = ocp.tree.to_flat_dict(tree)
    _refuse(chunk_faults(saved) + ([] if seal is None else shape_faults(saved, seal)))
    target = as_saved(like, saved)
    wanted = list(slots(target, plan))
    check_match(saved, wanted, str(path))
    numbers = [is_scalar(saved[slot.names], slot) for slot in wanted]
    targets = {
        slot.names: np.zeros((), saved[slot.names].dtype) if number else slot.target()
        for slot, number in zip(wanted, numbers, strict=True)
    }
    found = all_succeed(steps.key("state"), lambda: reading.read_state(path, tree, targets))
    leaves = []
    for slot, number in zip(wanted, numbers, strict=True):
        x = found.pop(slot.names)  # A leaf as it was on disk goes as soon as the one in its layout is there.
        leaves.append(slot.from_disk(exact(x, slot) if number else x))
        del x
    if seal is not None and verify == "full":
        there = [dataclasses.replace(slot, like=x) for slot, x in zip(wanted, leaves, strict=True)]
        # Arrays on the host may differ between processes.
        faults = on_every_process(steps.key("digests"), lambda: leaf_faults(there, seal))
        _refuse(sorted({fault for own in faults for fault in own}))
    return as_wanted(jax.tree.unflatten(jax.tree.structure(target), leaves), like)


def read_extra(steps: Steps, step: int | None) -> Any:
    """What was saved beside the state of a step (default: the newest); its files are held to the seal, if it has one.

    Raises:
      Damaged: they are not what it says.
      FileNotFoundError: there is no such step.
    """
    step = chosen(steps, step, sealed=False)
    if _is_sealed(steps, step):
        _refuse(file_faults(steps, _seal(steps, step), below=f"{reading.EXTRA}/"))
    return reading.read_extra(steps.path(step))


def chosen(steps: Steps, step: int | None, *, sealed: bool) -> int:
    """The step to read, of those with a seal, or of all that are committed; the newest, if it is not given.

    Without one, those with a seal go first. All processes call this.

    Raises:
      FileNotFoundError: there is none, or not this one.
      CheckpointError: it has no seal.
    """

    def choose() -> int:
        saved, unsealed = steps.sealed(), steps.unsealed()
        if sealed and step in unsealed:
            raise CheckpointError(without_seal(steps, step))
        if not saved and not unsealed:
            raise FileNotFoundError(f"no checkpoint in {steps.directory}: no step has been saved there")
        if step is not None and step not in [*saved, *unsealed]:
            raise FileNotFoundError(f"step {step}: not in {steps.directory}, which holds {short(saved + unsealed)}")
        return step if step is not None else saved[-1] if saved else unsealed[-1]

    return on_process_zero(steps.key("chosen"), choose)


def without_seal(steps: Steps, step: int) -> str:
    """What to do about a step that has no seal, for an error."""
    return (
        f"{steps.directory}: {short(steps.unsealed())} there have no seal: of plain Orbax, of an older shardadam, or "
        f"of a run that was ended in a save. Nothing says whether they are whole: restore(like, {step}, verify=False) "
        f"takes one as it is, adopt({step}) seals it as it is"
    )


def _seal(steps: Steps, step: int) -> Seal:
    """A step's seal, if it is whole."""
    try:
        return read_seal(steps, step)
    except OSError:  # An ElsewhereError, too.
        raise
    except CheckpointError as error:
        raise Damaged(str(error)) from None


def _is_sealed(steps: Steps, step: int) -> bool:
    """Whether a step has a seal still."""
    return on_process_zero(steps.key("still sealed"), lambda: step in steps.seals())


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        more = f" and {len(faults) - _MAX_LISTED} more" if len(faults) > _MAX_LISTED else ""
        raise Damaged("; ".join(faults[:_MAX_LISTED]) + more)


def _newest(steps: Steps, without: Sequence[int]) -> tuple[int, bool] | None:
    """The newest step with a seal, and whether the step itself is lost; listed anew: others may be deleting."""

    def newest() -> Any:
        step = next((step for step in reversed(steps.seals()) if step not in without), None)
        # Looked for after its seal was seen: a step is there before its seal is.
        return None if step is None else [step, not steps.path(step).is_dir()]

    found = on_process_zero(steps.key("newest"), newest)
    return None if found is None else (found[0], found[1])


def _report_unsealed(steps: Steps) -> None:
    sealed = steps.sealed()
    if sealed and (newer := [step for step in steps.unsealed() if step > sealed[-1]]):
        log.warning(
            "%s: %s, newer than the last sealed one, %d, have no seal and are not restored: the run may have been "
            "ended in a save, or the seals are lost",
            *(steps.directory, short(newer), sealed[-1]),
        )
