"""How one leaf of the state lies: its `LeafPlan`, and the inverse pair `pack` / `unpack` behind the packed layout."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

LANES = 1024  # Rows x 1024, split on dim 0, keeps both the TPU and the GPU compiler on their fast paths.
MAX_WASTE = 1 / 2048  # What rows x 1024 may waste of a leaf; with it a whole tree stays within 1.001 of an even split.

Layout = Literal["natural", "packed", "whole"]
Entries = tuple[tuple[str, ...], ...]


def choose_lanes(part_size: int, num_shards: int) -> int:
    """How wide the rows are that `part_size` elements are folded to: 1024, or what splits them nearly evenly.

    Args:
      part_size: elements to fold, 0 included.
      num_shards: how many blocks of rows they are split into.

    Returns:
      1024 where that wastes at most MAX_WASTE of a shard; never more than 2048.

    Example:
      >>> choose_lanes(8192 * 28672, num_shards=256), choose_lanes(17 * 257, num_shards=8)
      (1024, 547)
    """
    return _fold(-(-part_size // num_shards))[1]


def num_rows(part_size: int, num_shards: int) -> int:
    """Rows of `choose_lanes` elements that hold `part_size` elements; `num_shards` divides them."""
    return _fold(-(-part_size // num_shards))[0] * num_shards


def could_be_packed(rows: int, lanes: int) -> bool:
    """Whether `pack` folds some shard to just these rows and lanes: many an array that is not packed has such, too."""
    if lanes == LANES or not (0 < lanes <= 2 * LANES and rows < 2 * LANES):
        return lanes == LANES and rows > 0
    return any(_fold(size) == (rows, lanes) for size in range(rows * lanes, rows * (lanes - 1), -1))


@functools.lru_cache(maxsize=2**14)
def _fold(shard_size: int) -> tuple[int, int]:
    """Rows and lanes of one shard: 1024 lanes, else of the numbers of rows near that the first that wastes far less."""
    fewest = max(1, -(-shard_size // LANES))
    bearable = shard_size * MAX_WASTE
    if fewest * LANES - shard_size <= bearable:
        return fewest, LANES
    near = range(max(1, fewest - 1), min(2 * fewest, fewest + 32))
    rows = min(near, key=lambda rows: max(-shard_size % rows, bearable / 4))
    return rows, max(1, -(-shard_size // rows))


def pack(x: jax.Array, num_shards: int, stacked_dims: int = 0) -> jax.Array:
    """Flattens `x` row-major, pads it with zeros and folds it to (rows, lanes). Inverse of `unpack`.

    Args:
      x: an array of any shape and dtype, sizes 0 and 1 included.
      num_shards: what the number of rows must be divisible by.
      stacked_dims: how many leading dims stay as they are: each layer of a stack is packed for itself.

    Returns:
      An array of shape (num_rows(size, num_shards), choose_lanes(size, num_shards)), after the stacked dims, with the
      size of a layer: `num_shards` equal blocks of rows, hardly larger than size / num_shards elements.

    Example:
      >>> pack(jnp.arange(5000.0), num_shards=8).shape
      (8, 625)
    """
    stack, size = x.shape[:stacked_dims], math.prod(x.shape[stacked_dims:])
    rows, lanes = num_rows(size, num_shards), choose_lanes(size, num_shards)
    flat = jnp.pad(x.reshape(*stack, size), [(0, 0)] * len(stack) + [(0, rows * lanes - size)])
    return flat.reshape(*stack, rows, lanes)


def pack_block(x: jax.Array, num_shards: int, index: jax.Array, stacked_dims: int = 0) -> jax.Array:
    """One of the blocks of rows of `pack(x, num_shards, stacked_dims)`, from that part of `x` alone.

    Args:
      x: as for `pack`.
      num_shards: as for `pack`.
      index: which block, an int32 of shape ().
      stacked_dims: as for `pack`.

    Example:
      >>> pack_block(jnp.arange(5000.0), 8, 7)[0, -2:]
      Array([4998., 4999.], dtype=float32)
    """
    stack, layer = x.shape[:stacked_dims], x.shape[stacked_dims:]
    rows, lanes = num_rows(math.prod(layer), num_shards) // num_shards, choose_lanes(math.prod(layer), num_shards)
    size, width = rows * lanes, max(1, layer[-1] if layer else 1)
    lines = x.reshape(*stack, -1, width) if x.size else jnp.zeros((*stack, 1, width), x.dtype)
    height = min(lines.shape[-2], size // width + 2)  # A block begins and ends within a line.
    starts = np.arange(num_shards) * size
    firsts = np.minimum(starts // width, lines.shape[-2] - height)
    offsets = np.minimum(starts - firsts * width, height * width)  # The last blocks may be padding alone.
    first, offset = (jnp.asarray(table, jnp.int32)[index] for table in (firsts, offsets))
    near = jax.lax.dynamic_slice_in_dim(lines, first, height, axis=stacked_dims).reshape(*stack, height * width)
    near = jnp.pad(near, [(0, 0)] * len(stack) + [(0, size)])
    return jax.lax.dynamic_slice_in_dim(near, offset, size, axis=stacked_dims).reshape(*stack, rows, lanes)


def unpack(packed: jax.Array, shape: tuple[int, ...], stacked_dims: int = 0) -> jax.Array:
    """Drops the padding and restores `shape`. Inverse of `pack`.

    Args:
      packed: (rows, lanes) after the stacked dims, as `pack` gives it.
      shape: the shape that was packed, stacked dims included.
      stacked_dims: as `pack` was told.

    Example:
      >>> unpack(pack(jnp.arange(5.0), num_shards=8), (5,))
      Array([0., 1., 2., 3., 4.], dtype=float32)
    """
    flat = packed.reshape(*shape[:stacked_dims], math.prod(packed.shape[stacked_dims:]))
    return flat[..., : math.prod(shape[stacked_dims:])].reshape(shape)


def entries(spec: P, ndim: int) -> Entries:
    """A spec as one tuple of axis names per dim. Inverse of `canonical_spec`."""
    parts = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
    return tuple(parts) + ((),) * (ndim - len(parts))


def shard_shape(shape: tuple[int, ...], spec: P, axis_sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of one device's part of an array whose dims `spec` divides evenly.

    Example:
      >>> shard_shape((16, 6), P(None, ("x", "y")), {"x": 3, "y": 2})
      (16, 1)
    """
    split = zip(shape, entries(spec, len(shape)), strict=True)
    return tuple(dim // math.prod(axis_sizes[axis] for axis in axes) for dim, axes in split)


def canonical_spec(parts: Entries) -> P:
    """The spec that jit's own outputs carry: no 1-tuples, no trailing None. Inverse of `entries`."""
    short = [None if not e else e[0] if len(e) == 1 else e for e in parts]
    while short and short[-1] is None:
        short.pop()
    return P(*short)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafPlan:
    """Where mu and nu of one parameter live.

    Attributes:
      shape: the parameter's (logical, global) shape.
      dtype: the parameter's dtype, which is nu's, and mu's where no mu_dtype is set.
      param_spec: how the parameter itself is sharded; never changed.
      state_spec: how the state's array, of shape `state_shape`, is sharded.
      layout: "natural" (the parameter's shape), "packed" (rows x lanes) or "whole" (as the parameter).
      padding: elements of `state_shape` that hold no parameter, over all devices.
      reason: why this layout, for people.
      part_axes: mesh axes that shard the parameter's dims, other than stacked ones; a packed leaf is packed from each
        device's own part.
      shard_axes: mesh axes that the state is split over in addition.
      num_parts: product of the sizes of `part_axes`.
      num_shards: product of the sizes of `shard_axes`.
      stacked_dims: how many leading dims stack layers. They are never split over `shard_axes` and never packed away, so
        that a layer of the state can be taken out of it on every device, as a `lax.scan` over layers does.
      stack_parts: into how many parts the parameter's own spec splits the stacked dims.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    param_spec: P
    state_spec: P
    layout: Layout
    padding: int
    reason: str
    part_axes: tuple[str, ...] = ()
    shard_axes: tuple[str, ...] = ()
    num_parts: int = 1
    num_shards: int = 1
    stacked_dims: int = 0
    stack_parts: int = 1

    @property
    def size(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)

    @property
    def stack(self) -> tuple[int, ...]:
        """The stacked dims' sizes."""
        return self.shape[: self.stacked_dims]

    @property
    def layer_size(self) -> int:
        """Elements of one layer; of all of the parameter, where none are stacked."""
        return math.prod(self.shape[self.stacked_dims :])

    @property
    def lanes(self) -> int:
        """How wide the rows of a packed leaf are: its state's last dim."""
        return choose_lanes(self.layer_size // self.num_parts, self.num_shards)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of mu and of nu as held in memory (on disk it is always `shape`)."""
        if self.layout != "packed":
            return self.shape
        return (*self.stack, self.num_parts * num_rows(self.layer_size // self.num_parts, self.num_shards), self.lanes)

    @property
    def elements_per_device(self) -> int:
        """Elements of mu on each device: the same on all of them, padding included."""
        return math.prod(self.state_shape) // (self.stack_parts * self.num_parts * self.num_shards)


def plan_leaf(
    shape: tuple[int, ...],
    dtype: np.dtype,
    param_spec: P,
    *,
    axis_sizes: Mapping[str, int],
    axis_names: tuple[str, ...],
    layout: Literal["auto", "natural", "packed"],
    min_size: int,
    explicit: frozenset[str] = frozenset(),
    stacked_dims: int = 0,
) -> LeafPlan:
    """Chooses the layout of one leaf; the arguments are `make_plan`'s, already checked.

    `explicit` names the mesh's Explicit axes. A dim never holds axes of both types: JAX then places Explicit ones
    first, or loses one, whatever the spec says.
    """
    parts = entries(param_spec, len(shape))
    stack, layer = parts[:stacked_dims], parts[stacked_dims:]
    stack_axes, used = (tuple(axis for e in dims for axis in e) for dims in (stack, layer))
    axes = tuple(axis for axis in axis_names if axis not in used + stack_axes)
    num_parts = math.prod(axis_sizes[axis] for axis in used)
    num_shards = math.prod(axis_sizes[axis] for axis in axes)
    size = math.prod(shape[stacked_dims:])
    part_size = size // num_parts

    def leaf(kind: Layout, reason: str, state: Entries = parts, shards: int = num_shards) -> LeafPlan:
        split = kind == "packed" or state != parts
        plan = LeafPlan(
            shape=shape,
            dtype=dtype,
            param_spec=canonical_spec(parts),
            state_spec=canonical_spec(state),
            layout=kind,
            padding=0,
            reason=reason,
            part_axes=used,
            shard_axes=axes if split else (),
            num_parts=num_parts,
            num_shards=shards if split else 1,
            stacked_dims=stacked_dims,
            stack_parts=math.prod(axis_sizes[axis] for axis in stack_axes),
        )
        return dataclasses.replace(plan, padding=math.prod(plan.state_shape) - plan.size)

    if num_shards == 1:
        over = " and ".join(repr(axis) for axis in axis_names)
        follows = len(axes) < len(axis_names)
        return leaf("natural", f"the parameter is already sharded over {over}" if follows else "one shard")
    if math.prod(shape) == 0 or size < max(min_size, 1) or not layer:
        scalar = "scalar" if not stacked_dims else "a scalar per layer"
        per_layer = " per layer" if stacked_dims else ""
        return leaf("whole", scalar if not layer else f"{size:,} elements{per_layer}, under min_size={min_size:,}")
    if layout != "packed":
        for dim in sorted(range(stacked_dims, len(shape)), key=lambda dim: (len(parts[dim]), dim)):
            divides = shape[dim] % (num_shards * math.prod(axis_sizes[axis] for axis in parts[dim])) == 0
            if divides and len({axis in explicit for axis in parts[dim] + axes}) == 1:
                # Minor-most on a dim that the parameter shards already: the other order costs cross-axis permutes.
                state = tuple(e + axes if i == dim else e for i, e in enumerate(parts))
                return leaf("natural", f"dim {dim} divides by {num_shards}", state)
        if layout == "natural":
            return leaf("whole", f"layout='natural', and no dim divides by {num_shards}")
        if part_size < num_shards:
            return leaf("whole", f"fewer elements than {num_shards} shards")
    if len({axis in explicit for axis in used + axes}) > 1:
        return leaf("whole", f"{' and '.join(used + axes)} are Auto and Explicit axes, which cannot share its one dim")
    why = "layout='packed'" if layout == "packed" else f"no dim divides by {num_shards}"
    return leaf("packed", why, (*stack, used + axes))
