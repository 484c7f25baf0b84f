"""Writes a state that lies elsewhere as a step, leaf by leaf, with a seal of the digests of what was read there."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from shardadam.checkpoint import reading
from shardadam.checkpoint.checkpointer import Checkpointer
from shardadam.checkpoint.errors import CheckpointError
from shardadam.checkpoint.forms import leaves
from shardadam.checkpoint.seal import Seal, SealedLeaf
from shardadam.checkpoint.sealing import is_count, write_seal
from shardadam.checkpoint.slots import check_names
from shardadam.checkpoint.steps import Steps, remove_partial
from shardadam.checkpoint.stream import Leaf, Reader, digest_of, handler, number


def save_imported(
    directory: epath.Path, step: int, tree: Any, reader: Reader, *, allow_nonfinite: bool = False
) -> None:
    """Writes a tree of `Leaf`s and numbers as a step; one array at a time is in memory.

    Args:
      directory: the `Checkpointer`'s, which is locked meanwhile.
      step: later than all that are there.
      tree: nested dicts and lists.
      reader: gives the arrays of the leaves.
      allow_nonfinite: write it though it has NaN or infinities in it.

    Raises:
      CheckpointError: the step, or a later one, is there already, a leaf is not finite, or a run writes there.
      ValueError: two leaves would go to one place.
    """
    steps = Steps(directory)
    there = [*steps.seals(), *steps.unsealed()]
    if there and step <= max(there):
        raise CheckpointError(
            f"step {step}: {directory} holds step {max(there)} already; import into another directory"
        )
    check_names(leaves(tree))
    seal = partial(_sealed_leaf, step, allow_nonfinite=allow_nonfinite)
    numbers = {"/".join(names): np.asarray(x) for names, x in leaves(tree).items() if not isinstance(x, Leaf)}
    sealed = {path: seal(path, x, x.shape, x.dtype) for path, x in numbers.items()}
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    handlers = {reading.STATE: handler(_sealing(reader, tree, seal, sealed))}
    with Checkpointer(directory) as locked:
        locked.lock()
        try:
            with ocp.CheckpointManager(directory, item_handlers=handlers, options=options) as manager:
                manager.save(step, args=ocp.args.Composite(**{reading.STATE: ocp.args.PyTreeSave(tree)}))
        except BaseException:
            remove_partial(steps, step)
            raise
        counts = [number(x) for names, x in leaves(tree).items() if isinstance(x, Leaf) and is_count(names, x.shape)]
        count = int(counts[0]) if counts else None
        write_seal(steps, Seal(step=step, files={}, leaves=sealed, count=count, origin="imported"))


def _sealed_leaf(
    step: int, path: str, x: jax.Array | np.ndarray, shape: tuple[int, ...], dtype: np.dtype, *, allow_nonfinite: bool
) -> SealedLeaf:
    """What the seal says of a leaf.

    Raises:
      CheckpointError: it is not finite, and has to be.
    """
    leaf = SealedLeaf(*digest_of(x, path), shape, np.dtype(dtype).name)
    if leaf.num_nonfinite and not allow_nonfinite:
        raise CheckpointError(
            f"step {step}: not imported: `{path}`: {leaf.num_nonfinite} elements are NaN or infinite; take an earlier "
            "step, or allow it, if that is by design: --allow-nonfinite, allow_nonfinite=True"
        )
    return leaf


def _sealing(reader: Reader, tree: Any, seal: Callable[..., SealedLeaf], sealed: dict[str, SealedLeaf]) -> Reader:
    """A reader that notes what is to be sealed of each array, under the keypath that it has in the tree to write."""
    paths = {id(leaf): "/".join(names) for names, leaf in leaves(tree).items()}

    def noting(wanted: Sequence[Leaf]) -> Iterator[jax.Array | np.ndarray]:
        for leaf, x in zip(wanted, reader(wanted), strict=True):
            sealed[paths[id(leaf)]] = seal(paths[id(leaf)], x, leaf.shape, leaf.dtype)
            yield x

    return noting
