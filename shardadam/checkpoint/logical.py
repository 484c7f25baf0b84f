"""Between a state in memory, packed or not, and the logical shapes that a checkpoint holds: one `Slot` per leaf."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from shardadam.copies import only_here
from shardadam.layout import LeafPlan, could_be_packed, entries
from shardadam.sharding import named_sharding, pack_leaf, unpack_leaf

PYTHON_NUMBERS = (bool, int, float)


def is_key(dtype: Any) -> bool:
    """Whether a dtype is that of typed PRNG keys, which are on disk as their key data."""
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def looks_packed(x: Any) -> bool:
    """Whether an array could be rows of a packed leaf, by its shape and place; a natural one may be, too."""
    sharding = getattr(x, "sharding", None)
    if np.ndim(x) < 2 or not isinstance(sharding, NamedSharding):
        return False
    over_rows, over_lanes = entries(P(*sharding.spec), np.ndim(x))[-2:]
    rows, lanes = np.shape(x)[-2:]
    shards = math.prod(sharding.mesh.shape[axis] for axis in over_rows)
    return bool(over_rows) and not over_lanes and could_be_packed(rows // shards, lanes)


class Packing(NamedTuple):
    """How one leaf lies packed in memory."""

    leaf: LeafPlan
    mesh: Mesh

    @property
    def sharding(self) -> NamedSharding:
        """Of the packed array."""
        return named_sharding(self.mesh, self.leaf.state_spec, len(self.leaf.state_shape))

    @property
    def logical_sharding(self) -> NamedSharding:
        """Of the unpacked one."""
        return split_sharding(self.leaf.shape, self.mesh)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """One leaf of a state, and how to bring it to disk and back.

    Attributes:
      names: its keypath, as Orbax names it on disk.
      like: the leaf itself: an array, a ShapeDtypeStruct with a sharding, or a number.
      packed: how it is packed, if it is a moment that lies so in memory; None otherwise.
    """

    names: tuple[str, ...]
    like: Any
    packed: Packing | None = None

    @property
    def path(self) -> str:
        """The keypath for people."""
        return "/".join(self.names)

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape: the one on disk."""
        return tuple(np.shape(self.like)) if self.packed is None else self.packed.leaf.shape

    @property
    def dtype(self) -> Any:
        """The dtype, in memory and on disk; bytes in this machine's order, in which Orbax writes them."""
        dtype = self.like.dtype if hasattr(self.like, "dtype") else np.asarray(self.like).dtype
        return dtype.newbyteorder("=") if isinstance(dtype, np.dtype) else dtype

    @property
    def on_disk(self) -> tuple[tuple[int, ...], str]:
        """Shape and dtype on disk; of typed PRNG keys those of their data."""
        if is_key(self.dtype):
            data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(self.shape, self.dtype))
            return data.shape, data.dtype.name
        return self.shape, np.dtype(self.dtype).name

    @property
    def sharding(self) -> Sharding | None:
        """Where the leaf must be; None where it is on the host or uncommitted."""
        if isinstance(self.like, jax.Array) and not self.like.committed:
            return None
        own = getattr(self.like, "sharding", None)
        if own is None and self.packed is not None:
            return self.packed.sharding
        if isinstance(self.like, jax.ShapeDtypeStruct) and (
            own is None or isinstance(getattr(own, "mesh", None), AbstractMesh)
        ):
            raise ValueError(
                f"`{self.path}`: a ShapeDtypeStruct without devices ({own}): nothing says where to restore it; "
                "give it sharding=, on a Mesh"
            )
        return own

    def check_savable(self) -> None:
        """Refuses a leaf that Orbax cannot save.

        Raises:
          ValueError: it is neither array nor number, or has no elements.
        """
        if not isinstance(self.like, (jax.Array, np.ndarray, np.generic, *PYTHON_NUMBERS)):
            raise ValueError(f"`{self.path}`: got {type(self.like).__name__}, and only arrays and numbers can be saved")
        if 0 in self.shape:
            raise ValueError(f"`{self.path}`: got shape {self.shape}, and Orbax saves no empty arrays; drop the leaf")

    def to_disk(self) -> Any:
        """The leaf, if it is savable, in its logical shape, as Orbax takes it. Inverse of `from_disk`."""
        if self.packed is not None:
            x = jax.device_put(self.like, self.packed.sharding)
            # Waited for, so that only one leaf at a time is gathered on its way to its logical shape.
            return jax.block_until_ready(_unpacker(self.packed)(x))
        if isinstance(self.like, np.generic | np.ndarray):
            return np.array(self.like)  # A copy: it is written after `save` has returned.
        if isinstance(self.like, jax.Array) and only_here(self.like):
            # Orbax refuses device arrays that only one process knows.
            return np.asarray(jax.random.key_data(self.like) if is_key(self.dtype) else self.like)
        return self.like

    def target(self) -> Any:
        """What Orbax is to read: an abstract array with a sharding, or a NumPy array for what has none."""
        if self.packed is not None:
            return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.packed.logical_sharding)
        if self.sharding is not None:
            return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.sharding)
        shape, dtype = self.on_disk
        # Says shape and dtype, and takes no memory: a view of one zero.
        return np.broadcast_to(np.zeros((), dtype), shape)

    def from_disk(self, x: Any) -> Any:
        """Brings what Orbax read to this leaf's layout, sharding and kind. Inverse of `to_disk`."""
        if self.packed is not None:
            x = jax.block_until_ready(_packer(self.packed)(x))
        if isinstance(self.like, np.generic | np.ndarray):
            return np.array(x)[()] if isinstance(self.like, np.generic) else np.array(x)
        if isinstance(self.like, PYTHON_NUMBERS):
            return x
        if self.sharding is not None:
            x = jax.device_put(x, self.sharding)
            return x if self.packed is not None or is_offloaded(self.sharding) else _copier(self.sharding)(x)
        if is_key(self.dtype):
            return jax.random.wrap_key_data(jnp.array(x), impl=jax.random.key_impl(self.like))
        # Uncommitted, as it was: jit may then use it beside arrays on other devices.
        return jnp.array(x)


def split_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Splits a logical shape as far as it goes over all of a mesh's devices, in their order.

    With its parameter's spec, an unpacked moment would be whole on every device. A dim of size d takes
    gcd(d, devices left) of them; what no dim takes holds copies.

    Args:
      shape: the logical shape.
      mesh: the mesh whose devices to use; its axes do not matter.

    Example:
      (6, 50) on 12 devices: 6 along dim 0, 2 along dim 1.
    """
    left, sizes = mesh.size, [1] * len(shape)
    for dim in sorted(range(len(shape)), key=lambda dim: -math.gcd(shape[dim], mesh.size)):
        sizes[dim] = math.gcd(shape[dim], left)
        left //= sizes[dim]
    axes = tuple(f"dim{dim}" for dim in range(len(shape)))
    return NamedSharding(Mesh(mesh.devices.reshape(*sizes, left), (*axes, "copies")), P(*axes))


@functools.cache
def _unpacker(packed: Packing) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: unpack_leaf(x, packed.leaf, packed.mesh), out_shardings=packed.logical_sharding)


@functools.cache
def _packer(packed: Packing) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: pack_leaf(x, packed.leaf, packed.mesh), out_shardings=packed.sharding)


@functools.cache
def _copier(sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
    # An output of jit can be donated; arrays as Orbax makes them have failed to: https://github.com/jax-ml/jax/issues/18617
    return jax.jit(jnp.copy, out_shardings=sharding)


def is_offloaded(sharding: Sharding) -> bool:
    """Whether a sharding is on other memory than its devices' own."""
    return sharding.memory_kind not in (None, default_memory_kind(sharding))


def default_memory_kind(sharding: Sharding) -> str:
    """The memory that arrays on a sharding's devices live in unless told otherwise."""
    return next(iter(sharding.device_set)).default_memory().kind
