"""How Orbax is told to write a step: into which files, and whether compressed."""

from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from shardadam.checkpoint import reading

# Of a file with array data. Orbax's own 2 GB make one file of most states, which one core hashes after all is written;
# of several, most are hashed meanwhile, and side by side.
FILE_BYTES = 2**25


def writer(directory: epath.Path, *, compress: bool) -> ocp.CheckpointManager:
    """Orbax's writer of the steps in a directory.

    Args:
      directory: the `Checkpointer`'s.
      compress: by zstd, as Orbax does otherwise. Of float32 that saves 8%, and takes most of a save's and a restore's
        time.
    """
    handlers = {
        reading.STATE: ocp.PyTreeCheckpointHandler(use_compression=compress),
        reading.EXTRA: ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(directory, item_handlers=handlers)


def to_write(state: Any, extra: Any) -> ocp.args.Composite:
    """What Orbax is to write of a step.

    Args:
      state: a tree of arrays in their logical shapes, and numbers.
      extra: what JSON holds; None for nothing.
    """
    items = {reading.STATE: ocp.args.PyTreeSave(state, ocdbt_target_data_file_size=FILE_BYTES)}
    beside = {} if extra is None else {reading.EXTRA: ocp.args.JsonSave(extra)}
    return ocp.args.Composite(**items, **beside)
