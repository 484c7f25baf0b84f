"""How Orbax is told to write a step: into which files, and whether compressed."""

import math
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from shardadam.checkpoint import reading
from shardadam.checkpoint.commit import Commit
from shardadam.checkpoint.gate import Gate

# Of a file with array data, once it is full. Orbax's own limit makes one file of most states, which one core hashes
# after all is written; of several, most are hashed meanwhile, and side by side.
_FILE_BYTES, _MOST_BYTES = 2**25, 2**31


def writer(directory: epath.Path, commit: Commit, gate: Gate, *, compress: bool) -> ocp.CheckpointManager:
    """Orbax's writer of the steps in a directory.

    Args:
      directory: the `Checkpointer`'s.
      commit: what the processes say to each other of each step.
      gate: what writers of leaves wait at.
      compress: by zstd, as Orbax does otherwise. Of float32 that saves 8%, and takes most of a save's and a restore's
        time.
    """
    of_state = ocp.PyTreeCheckpointHandler(use_compression=compress, type_handler_registry=gate.held())
    handlers = {reading.STATE: commit.watch(of_state), reading.EXTRA: commit.watch(ocp.JsonCheckpointHandler())}
    # Directories are made before `save` returns: where they cannot be, Orbax's threads would wait for them for ever,
    # and the process would not end.
    options = ocp.CheckpointManagerOptions(
        async_options=ocp.AsyncOptions(barrier_sync_fn=commit.barrier, create_directories_asynchronously=False)
    )
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def to_write(state: Any, extra: Any) -> ocp.args.Composite:
    """What Orbax is to write of a step.

    Args:
      state: a tree of arrays in their logical shapes, and numbers.
      extra: what JSON holds; None for nothing.
    """
    items = {reading.STATE: ocp.args.PyTreeSave(state, ocdbt_target_data_file_size=file_bytes(state))}
    beside = {} if extra is None else {reading.EXTRA: ocp.args.JsonSave(extra)}
    return ocp.args.Composite(**items, **beside)


def file_bytes(state: Any) -> int:
    """How large a file with array data becomes: no smaller than what any device has of a leaf.

    Orbax would cut that into chunks of at most a file, by the divisors of its shape: of a prime length, into single
    elements.

    Args:
      state: what is to be written, on every process.
    """
    parts = [
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
        if isinstance(x, jax.Array) and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]
    on_host = [x.nbytes for x in jax.tree.leaves(state) if isinstance(x, np.ndarray)]
    return min(_MOST_BYTES, max([_FILE_BYTES, *parts, *on_host]))
