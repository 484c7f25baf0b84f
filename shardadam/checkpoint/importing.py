"""Writes a state that lies elsewhere as a step, leaf by leaf, with a seal of the digests of what was read there."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from shardadam.checkpoint import reading
from shardadam.checkpoint.checkpointer import Checkpointer
from shardadam.checkpoint.forms import leaves
from shardadam.checkpoint.match import CheckpointError
from shardadam.checkpoint.seal import Seal, SealedLeaf
from shardadam.checkpoint.sealing import is_count, write_seal
from shardadam.checkpoint.steps import Steps
from shardadam.checkpoint.stream import Leaf, Reader, digest_of, handler, number


def save_imported(directory: epath.Path, step: int, tree: Any, reader: Reader) -> None:
    """Writes a tree of `Leaf`s and numbers as a step; one array at a time is in memory.

    Args:
      directory: the `Checkpointer`'s, which is locked meanwhile.
      step: later than all that are there.
      tree: nested dicts and lists.
      reader: gives the arrays of the leaves.

    Raises:
      CheckpointError: the step, or a later one, is there already, or a run writes there.
    """
    steps = Steps(directory)
    there = [*steps.seals(), *steps.unsealed()]
    if there and step <= max(there):
        raise CheckpointError(
            f"step {step}: {directory} holds step {max(there)} already; import into another directory"
        )
    sealed: dict[str, SealedLeaf] = {}
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    handlers = {reading.STATE: handler(_sealing(reader, tree, sealed))}
    with Checkpointer(directory) as locked:
        locked.lock()
        with ocp.CheckpointManager(directory, item_handlers=handlers, options=options) as manager:
            manager.save(step, args=ocp.args.Composite(**{reading.STATE: ocp.args.PyTreeSave(tree)}))
        for names, leaf in leaves(tree).items():
            if not isinstance(leaf, Leaf):
                path, x = "/".join(names), np.asarray(leaf)
                sealed[path] = SealedLeaf(*digest_of(x, path), x.shape, x.dtype.name)
        counts = [number(x) for names, x in leaves(tree).items() if isinstance(x, Leaf) and is_count(names, x.shape)]
        count = int(counts[0]) if counts else None
        write_seal(steps, Seal(step=step, files={}, leaves=sealed, count=count, origin="imported"))


def _sealing(reader: Reader, tree: Any, sealed: dict[str, SealedLeaf]) -> Reader:
    """A reader that notes the digest of each array, under the keypath that it has in the tree to write."""
    paths = {id(leaf): "/".join(names) for names, leaf in leaves(tree).items()}

    def noting(wanted: Sequence[Leaf]) -> Iterator[jax.Array | np.ndarray]:
        for leaf, x in zip(wanted, reader(wanted), strict=True):
            path = paths[id(leaf)]
            sealed[path] = SealedLeaf(*digest_of(x, path), leaf.shape, np.dtype(leaf.dtype).name)
            yield x

    return noting
