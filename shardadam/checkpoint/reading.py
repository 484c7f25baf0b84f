"""Reads step directories that Orbax committed, with a fresh handler each time.

After a failed restore an Orbax CheckpointManager cannot restore good steps either; nothing here outlives its call.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from shardadam.checkpoint.errors import CheckpointError

STATE, EXTRA = "state", "extra"  # The items of a step: directories below the one named by the step's number.


def committed_steps(directory: epath.Path) -> list[int]:
    """The committed steps of a directory, ascending. The manager's own list names those in flight, too."""
    return sorted(ocp.utils.checkpoint_steps(directory)) if directory.exists() else []


def saved_leaves(step_directory: epath.Path) -> Mapping[tuple[str, ...], Any]:
    """Orbax's metadata of each leaf of a saved state: shape and dtype, by the names of its keypath."""
    return ocp.tree.to_flat_dict(saved_tree(step_directory))


def saved_tree(step_directory: epath.Path) -> Any:
    """The tree of a saved state as it is on disk, which may have other containers than the state, of Orbax's metadata.

    Raises:
      CheckpointError: the step holds no state that `Checkpointer` saved.
    """
    if not (step_directory / STATE).exists():
        items = sorted(path.name for path in step_directory.iterdir() if path.is_dir())
        raise CheckpointError(
            f"{step_directory}: got items {items}, wanted {STATE!r}; it was not saved by shardadam.Checkpointer, "
            "or is damaged"
        )
    with _naming(step_directory):
        return metadata(step_directory / STATE)


def metadata(item: epath.Path) -> Any:
    """The tree of any item that Orbax wrote, of its metadata: each array's file says what shape and chunks it has."""
    standard = ((kind, ocp.type_handlers.get_type_handler(kind)) for kind in (int, np.ndarray, str))
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, _NoShardings()), *standard)
    # The handler itself: an Orbax Checkpointer would log that the item lacks the metadata that only a step has.
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry).metadata(item).tree


class _NoShardings(ocp.type_handlers.ArrayHandler):
    """Reads the metadata of device arrays as if they were the host's: without shardings, which take as long again."""

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        return await ocp.type_handlers.NumpyHandler().metadata(infos)


def read_state(
    step_directory: epath.Path, tree: Any, targets: Mapping[tuple[str, ...], Any]
) -> dict[tuple[str, ...], Any]:
    """Loads the leaves of a state by the names of their keypaths.

    Args:
      step_directory: of the step.
      tree: its `saved_tree`.
      targets: for every leaf on disk its shape, dtype and sharding, as Orbax takes it.
    """
    # The handler itself: an Orbax Checkpointer would wait for the other processes, though one of them may have failed.
    handler = ocp.PyTreeCheckpointHandler()
    with _naming(step_directory):
        target = jax.tree_util.tree_map_with_path(
            lambda keypath, _: targets[ocp.tree.str_keypath(keypath)], tree, is_leaf=lambda x: hasattr(x, "shape")
        )
        how = ocp.checkpoint_utils.construct_restore_args(target)
        # Partial, as Orbax counts a None in the saved tree, such as a TrainState has for what it does without, a leaf.
        args = ocp.args.PyTreeRestore(target, restore_args=how, partial_restore=True)
        return ocp.tree.to_flat_dict(handler.restore(step_directory / STATE, args=args))


def read_extra(step_directory: epath.Path) -> Any:
    """What was saved beside the state; None if nothing was."""
    if not (step_directory / EXTRA).exists():
        return None
    with _naming(step_directory), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(step_directory / EXTRA)


@contextlib.contextmanager
def _naming(step_directory: epath.Path) -> Iterator[None]:
    """Says of an error of Orbax's, which may name no file, which step it was about and what else there is."""
    try:
        yield
    except Exception as error:
        others = [step for step in committed_steps(step_directory.parent) if str(step) != step_directory.name]
        error.add_note(
            f"{step_directory} cannot be read: it may be damaged; other steps there: {others[-4:] or 'none'}."
        )
        raise
