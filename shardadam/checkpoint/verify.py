"""Is a step what its seal says? Its files byte for byte, and its leaves digest by digest."""

import dataclasses
import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath

from shardadam.checkpoint import reading
from shardadam.checkpoint.digest import digests, host_digest
from shardadam.checkpoint.errors import CheckpointError
from shardadam.checkpoint.hashing import hash_together
from shardadam.checkpoint.logical import PYTHON_NUMBERS, Slot, is_key
from shardadam.checkpoint.seal import Seal, SealedFile, SealedLeaf
from shardadam.checkpoint.sealing import list_files
from shardadam.checkpoint.steps import Steps
from shardadam.checkpoint.stream import CHUNK_BYTES, Leaf, item_tree, read
from shardadam.checkpoint.together import on_process_zero

_LARGE = 2**20  # Bytes of a file from which on it is worth a thread.


def read_seal(steps: Steps, step: int) -> Seal:
    """The seal of a step, as process 0 reads it. All processes call this.

    Raises:
      CheckpointError: it is damaged, or that of another step, or there is none.
    """
    return Seal.from_text(on_process_zero(steps.key("seal"), lambda: steps.read_seal(step).to_text()))


def file_faults(steps: Steps, seal: Seal, *, below: str = "") -> list[str]:
    """How a step's files differ from its seal; empty if they do not. All processes call this, and get the same.

    Args:
      steps: of the directory.
      seal: the step's.
      below: look only at files whose path begins so.

    Returns:
      For each fault one line. Without any, exactly the files that were sealed are there, with every bit.
    """
    known, others = begin_file_faults(steps, seal, below=below)
    return known or others()


def begin_file_faults(steps: Steps, seal: Seal, *, below: str = "") -> tuple[list[str], Callable[[], list[str]]]:
    """`file_faults`, the large files in the background, so that they can be read meanwhile.

    Returns:
      The faults that are known at once: a file that is missing, in excess or of another size, and small ones, such as
      all metadata, that do not have every bit. And a function that waits for those of the large files.

    Raises:
      OSError: a file is there and cannot be read; so does the function.
    """
    path = steps.path(seal.step)
    try:
        there = on_process_zero(steps.key("files"), lambda: list_files(path))
    except (OSError, CheckpointError) as error:
        return [_fault(error)], list
    wanted = {name: file for name, file in seal.files.items() if name.startswith(below)}
    there = {name: size for name, size in there.items() if name.startswith(below)}
    faults = [f"{name}: is not there" for name in wanted if name not in there]
    faults += [f"{name}: was not there when the step was sealed" for name in there if name not in wanted]
    faults += [
        f"{name}: has {size} bytes, sealed with {wanted[name].size}"
        for name, size in there.items()
        if name in wanted and size != wanted[name].size
    ]
    small = {name: file for name, file in wanted.items() if file.size < _LARGE}
    large = {name: file for name, file in wanted.items() if file.size >= _LARGE}
    # What is damaged already need not be hashed.
    faults = faults or _content_faults(steps.key("small files"), path, small)
    if faults or not large:
        return faults, list
    pool = ThreadPoolExecutor(1)
    others = pool.submit(_content_faults, steps.key("large files"), path, large)
    pool.shutdown(wait=False)
    return [], others.result


def _content_faults(key: str, path: epath.Path, wanted: Mapping[str, SealedFile]) -> list[str]:
    try:
        found = hash_together(key, path, {name: file.size for name, file in wanted.items()})
    except (OSError, CheckpointError) as error:
        return [_fault(error)]
    return [f"{name}: its bytes are not those that were sealed" for name in wanted if found[name] != wanted[name]]


def _fault(error: OSError | CheckpointError) -> str:
    """What is wrong with a step of which something is not there, or is a link; raises what may be no fault of its own.

    What cannot be read for want of a permission, of memory or of a server may be read tomorrow.
    """
    if isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.ENOTDIR):
        raise error
    return str(error)


def shape_faults(saved: Mapping[tuple[str, ...], Any], seal: Seal) -> list[str]:
    """How the shapes and dtypes that Orbax's metadata tells differ from the seal's; before anything is allocated.

    Args:
      saved: Orbax's metadata by the names of the keypaths, see `reading.saved_leaves`.
      seal: the step's.
    """
    there = {"/".join(names): (tuple(leaf.shape), np.dtype(leaf.dtype).name) for names, leaf in saved.items()}
    wanted = {path: (leaf.shape, leaf.dtype) for path, leaf in seal.leaves.items()}
    return [
        f"`{path}`: is {_shown(there.get(path))}, sealed as {_shown(wanted.get(path))}"
        for path in {**wanted, **there}
        if there.get(path) != wanted.get(path)
    ]


def chunk_faults(saved: Mapping[tuple[str, ...], Any]) -> list[str]:
    """Leaves whose chunks are larger than they are: Orbax writes none, and a reader would allocate them.

    Compressed data need no such limit: TensorStore stops decompressing where a chunk ends.

    Args:
      saved: Orbax's metadata by the names of the keypaths.
    """
    faults = []
    for names, leaf in saved.items():
        chunk = getattr(getattr(leaf, "storage", None), "chunk_shape", None)
        if chunk is not None and any(size > max(dim, 1) for size, dim in zip(chunk, leaf.shape, strict=True)):
            faults.append(f"`{'/'.join(names)}`: has chunks of shape {tuple(chunk)}, and itself {tuple(leaf.shape)}")
    return faults


def leaf_faults(slots: Sequence[Slot], seal: Seal) -> list[str]:
    """How leaves in memory differ from a seal. All processes call this; nothing is gathered.

    Args:
      slots: of the state, each `like` the leaf itself.
      seal: of the step that it was restored from.
    """
    slots = [_as_sealed(slot, seal.leaves[slot.path]) for slot in slots]
    pairs = zip(slots, digests(slots), strict=True)
    return [_leaf_fault(slot.path) for slot, digest in pairs if digest.text != seal.leaves[slot.path].digest]


def stored_leaf_faults(step_directory: epath.Path, seal: Seal, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[str]:
    """How leaves on disk differ from a seal, leaf by leaf, on a machine with any devices.

    Args:
      step_directory: of the step.
      seal: its seal.
      chunk_bytes: so many bytes of leaves are in memory at once, or one leaf that is larger.
    """
    saved = reading.saved_leaves(step_directory)
    faults = shape_faults(saved, seal) + chunk_faults(saved)
    yield from faults
    if not faults:
        for leaf, x in stored_leaves(step_directory, chunk_bytes=chunk_bytes):
            if host_digest(x, leaf.path).text != seal.leaves[leaf.path].digest:
                yield _leaf_fault(leaf.path)


def stored_leaves(step_directory: epath.Path, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[Leaf, np.ndarray]]:
    """Every leaf of a step with its content, on the host, in its dtype on disk.

    Args:
      step_directory: of the step.
      chunk_bytes: so many bytes of leaves are in memory at once, or one leaf that is larger.
    """
    leaves = [x for x in jax.tree.leaves(item_tree(step_directory / reading.STATE)) if isinstance(x, Leaf)]
    for leaf, x in zip(leaves, read(leaves, chunk_bytes, on_host=True), strict=True):
        yield leaf, np.asarray(x)


def _as_sealed(slot: Slot, sealed: SealedLeaf) -> Slot:
    """A number that was restored as a Python number or in another dtype, as it is on disk."""
    if slot.shape or is_key(slot.dtype) or np.dtype(slot.dtype).name == sealed.dtype:
        return slot
    x = slot.like
    value = x if isinstance(x, PYTHON_NUMBERS) else np.asarray(x.addressable_data(0) if isinstance(x, jax.Array) else x)
    return dataclasses.replace(slot, like=np.asarray(value).astype(sealed.dtype))


def _leaf_fault(path: str) -> str:
    return f"`{path}`: its digest is not the one that was sealed"


def _shown(leaf: tuple[tuple[int, ...], str] | None) -> str:
    return "not there" if leaf is None else f"{leaf[1]}{list(leaf[0])}"
