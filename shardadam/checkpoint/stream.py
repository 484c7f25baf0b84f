"""Reads and writes trees that need not fit into memory: a chunk of leaves at a time, split over all devices."""

import asyncio
import dataclasses
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint.metadata import ScalarMetadata, StringMetadata

from shardadam.checkpoint.digest import Digest, digests, host_digest
from shardadam.checkpoint.errors import CheckpointError
from shardadam.checkpoint.logical import PYTHON_NUMBERS, Slot, is_key, split_sharding
from shardadam.checkpoint.reading import metadata

CHUNK_BYTES = 16 * 2**20  # Read together, so that many small leaves do not cost a reading of the metadata each.

_COMPILED_FROM = 2**26  # Bytes from which a digest on the device, ten times as fast, is worth its compilation.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One array or number on disk, not loaded.

    Attributes:
      item: the directory of the tree that it belongs to.
      names: its keypath in that tree.
      shape: its logical shape.
      dtype: its dtype on disk; of a typed PRNG key, that of its data.
      python: whether a Python number was saved.
    """

    item: epath.Path
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    python: bool = False

    @property
    def path(self) -> str:
        """The keypath for people."""
        return "/".join(self.names)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class HostLeaf(Leaf):
    """One whose dtype JAX would make narrower, such as float64: it is read, cast and written by NumPy."""


Reader = Callable[[Sequence[Leaf]], Iterator[jax.Array | np.ndarray]]


def item_tree(item: epath.Path) -> Any:
    """The tree of an Orbax checkpoint with a `Leaf` for each array; dicts, lists for tuples, None for empty states.

    Raises:
      CheckpointError: it holds a string, which no optimizer's state has.
    """

    def leaf(keypath: tuple[Any, ...], saved: Any) -> Leaf:
        names = ocp.tree.str_keypath(keypath)
        if isinstance(saved, StringMetadata):
            raise CheckpointError(f"{item}: `{'/'.join(names)}`: got a string, and only arrays and numbers are states")
        python = isinstance(saved, ScalarMetadata)
        dtype = np.dtype(saved.dtype)
        kind = Leaf if jax.dtypes.canonicalize_dtype(dtype) == dtype else HostLeaf
        return kind(item=item, names=names, shape=tuple(saved.shape), dtype=dtype, python=python)

    return jax.tree_util.tree_map_with_path(leaf, metadata(item), is_leaf=_is_saved)


def read(
    leaves: Sequence[Leaf], chunk_bytes: int = CHUNK_BYTES, *, on_host: bool = False
) -> Iterator[jax.Array | np.ndarray]:
    """The arrays of leaves, in their order, each split over all devices as far as its dims divide.

    A `HostLeaf`'s is on the host.

    Args:
      leaves: of one or several items.
      chunk_bytes: so many bytes of leaves are in memory at once, or one leaf that is larger.
      on_host: all of them are; then one process of several can read alone.
    """
    mesh = None if on_host else Mesh(np.array(jax.devices()), ("all",))
    for chunk in _chunks(leaves, chunk_bytes):
        arrays = _load(chunk, mesh)
        arrays.reverse()
        while arrays:  # Popped, so that an array goes when its consumer is done with it.
            yield arrays.pop()


def write(item: epath.Path, tree: Any, reader: Reader = read) -> None:
    """Writes a tree of `Leaf`s and Python numbers as a plain Orbax checkpoint; one array at a time is in memory.

    Args:
      item: the directory to make. If writing fails, nothing is left of it.
      tree: nested dicts and lists.
      reader: gives the arrays to write for the leaves, which it is given in one call. Inverse of `item_tree`.
    """
    try:
        with ocp.Checkpointer(handler(reader)) as writer:
            writer.save(item, args=ocp.args.PyTreeSave(tree))
    except BaseException:
        if jax.process_index() == 0:
            for left in item.parent.glob(f"{item.name}.orbax-checkpoint-tmp*"):
                shutil.rmtree(left, ignore_errors=True)
        raise


def handler(reader: Reader) -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler of trees, which also takes `Leaf`s and writes what `reader` reads for them."""
    of = ocp.type_handlers.get_type_handler
    standard = [(kind, of(kind)) for kind in (int, float, np.number, np.ndarray, jax.Array)]
    # The first that fits is taken.
    ours = [(HostLeaf, _LeafHandler(reader, np.ndarray)), (Leaf, _LeafHandler(reader, jax.Array))]
    registry = ocp.type_handlers.create_type_handler_registry(*ours, *standard)
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


class _LeafHandler(ocp.type_handlers.TypeHandler):
    """Writes leaves as arrays, by the handler that Orbax has for their kind, one after the other."""

    def __init__(self, reader: Reader, kind: type) -> None:
        self._reader = reader
        self._arrays = ocp.type_handlers.get_type_handler(kind)

    def typestr(self) -> str:
        return self._arrays.typestr()

    async def serialize(self, values: Sequence[Leaf], infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        arrays = self._reader(values)
        for info, arg in zip(infos, args or [ocp.SaveArgs()] * len(infos), strict=True):
            # In a thread: reading starts Orbax's own event loop, which cannot run within this one.
            array = await asyncio.to_thread(next, arrays)
            for committing in await self._arrays.serialize([array], [info], [arg]):
                await asyncio.to_thread(committing.result)
            del array, committing
        return []

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        return await self._arrays.metadata(infos)

    async def deserialize(self, infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        return await self._arrays.deserialize(infos, args)


def _load(chunk: Sequence[Leaf], mesh: Mesh | None) -> list[jax.Array | np.ndarray]:
    """The arrays of leaves of one item; on the host where there is no mesh."""
    item, wanted = chunk[0].item, {leaf.names: leaf for leaf in chunk}

    def target(keypath: tuple[Any, ...], _: Any) -> Any:
        leaf = wanted.get(ocp.tree.str_keypath(keypath))
        if leaf is None:
            return ocp.PLACEHOLDER
        if mesh is None or isinstance(leaf, HostLeaf):
            return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
        # Not uint32, which may be the data of PRNG keys: their last dim must stay whole.
        split = NamedSharding(mesh, P()) if leaf.dtype == np.uint32 else split_sharding(leaf.shape, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split)

    targets = jax.tree_util.tree_map_with_path(target, metadata(item), is_leaf=_is_saved)
    args = ocp.args.PyTreeRestore(targets, restore_args=ocp.checkpoint_utils.construct_restore_args(targets))
    found = ocp.tree.to_flat_dict(ocp.PyTreeCheckpointHandler().restore(item, args=args))
    return [found[leaf.names] for leaf in chunk]


def number(leaf: Leaf) -> int | float:
    """The value of a leaf that holds one number.

    Raises:
      CheckpointError: it does not.
    """
    if leaf.shape:
        raise CheckpointError(f"`{leaf.path}`: got shape {leaf.shape}, wanted one number")
    (value,) = read([leaf])
    found = np.asarray(value if isinstance(value, np.ndarray) else value.addressable_data(0)).item()
    assert isinstance(found, PYTHON_NUMBERS)
    return found


def digest_of(x: jax.Array | np.ndarray, path: str) -> Digest:
    """The digest of an array that `read` gave, as the leaf at a keypath."""
    if is_key(x.dtype) or x.nbytes >= _COMPILED_FROM:
        (digest,) = digests([Slot(names=tuple(path.split("/")), like=x)])
        return digest
    return host_digest(np.asarray(x), path)


def _chunks(leaves: Iterable[Leaf], chunk_bytes: int) -> Iterator[list[Leaf]]:
    """Consecutive leaves of one item."""
    chunk: list[Leaf] = []
    for leaf in leaves:
        if chunk and (leaf.item != chunk[0].item or sum(x.nbytes for x in chunk) + leaf.nbytes > chunk_bytes):
            yield chunk
            chunk = []
        chunk.append(leaf)
    if chunk:
        yield chunk


def _is_saved(x: Any) -> bool:
    return hasattr(x, "shape") or isinstance(x, StringMetadata)
