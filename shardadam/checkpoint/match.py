"""Does a checkpoint hold what is wanted? Tree, shapes and dtypes are compared before anything is loaded."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint.metadata import ScalarMetadata

from shardadam.checkpoint.errors import CheckpointError
from shardadam.checkpoint.logical import PYTHON_NUMBERS, Slot, is_key, looks_packed

_MAX_LISTED = 8  # Leaves named per kind of fault: a wrong tree may have thousands.


def check_match(saved: Mapping[tuple[str, ...], Any], slots: Sequence[Slot], where: str) -> None:
    """Compares a checkpoint's metadata with the leaves that are to be restored from it.

    Orbax itself casts dtypes in silence: 1e30 restored as float16 is inf.

    Args:
      saved: Orbax's metadata of each leaf on disk, by the names of its keypath.
      slots: the leaves wanted.
      where: the checkpoint, for the error.

    Raises:
      CheckpointError: names each leaf that is missing, unexpected, or of another shape or dtype: got, wanted, remedy.
    """
    wanted = {slot.names: slot for slot in slots}
    missing = [f"`{slot.path}`: not in the checkpoint" for names, slot in wanted.items() if names not in saved]
    extra = [f"`{'/'.join(names)}`: in the checkpoint, not wanted" for names in saved if names not in wanted]
    faults = [_fault(saved[names], slot) for names, slot in wanted.items() if names in saved]
    wrong = [fault for fault in faults if fault is not None]
    if missing or extra or wrong:
        remedy = "Restore into a state made by the same model and optimizer as the saved one"
        if missing or extra:
            remedy += "; plain Orbax reads any part of it"
        raise CheckpointError(
            f"{where} is not what is wanted:{_listed(wrong)}{_listed(missing)}{_listed(extra)}\n{remedy}."
        )


def is_scalar(saved: Any, slot: Slot) -> bool:
    """Whether a leaf is a number, which Python held when it was saved or is to hold now.

    A Flax TrainState's `step` starts as a Python int and is an int32 array after one jitted step.
    """
    python = isinstance(slot.like, PYTHON_NUMBERS) or isinstance(saved, ScalarMetadata)
    return python and slot.shape == () and tuple(saved.shape) == ()


def exact(value: np.ndarray, slot: Slot) -> Any:
    """A number read from disk, as a Python number or in the wanted dtype.

    Raises:
      CheckpointError: the dtype cannot hold the number.
    """
    if isinstance(slot.like, PYTHON_NUMBERS):
        return type(slot.like)(value.item())
    number = value.astype(slot.dtype)
    if not np.array_equal(number.astype(value.dtype), value, equal_nan=value.dtype.kind in "fc"):
        raise CheckpointError(
            f"`{slot.path}`: got {value.item()}, which {slot.dtype} cannot hold; widen the leaf's dtype"
        )
    return number


def _fault(saved: Any, slot: Slot) -> str | None:
    """What is wrong with one leaf on disk; None if nothing is."""
    shape, dtype = slot.shape, slot.dtype
    if is_key(dtype):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype))
        shape, dtype = data.shape, data.dtype
    if tuple(saved.shape) != shape:
        hint = ""
        if slot.packed is None and looks_packed(slot.like):
            hint = "; if the leaf wanted is packed, pass its plan: Checkpointer(directory, plan=plan)"
        return f"`{slot.path}`: got shape {tuple(saved.shape)}, wanted {shape}{hint}"
    if saved.dtype != dtype and not (is_scalar(saved, slot) and _kind(saved.dtype) == _kind(dtype)):
        return f"`{slot.path}`: got dtype {saved.dtype}, wanted {dtype}; restore as {saved.dtype}, then cast"
    return None


def _kind(dtype: Any) -> Any:
    kinds = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    return next((kind for kind in kinds if jnp.issubdtype(dtype, kind)), dtype)


def _listed(faults: list[str]) -> str:
    more = f"\n  ... and {len(faults) - _MAX_LISTED} more" if len(faults) > _MAX_LISTED else ""
    return "".join(f"\n  {fault}" for fault in faults[:_MAX_LISTED]) + more
