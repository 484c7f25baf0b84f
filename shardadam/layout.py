"""How one leaf of the state lies: its `LeafPlan`, and the inverse pair `pack` / `unpack` behind the packed layout."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

LANES = 1024  # Rows x 1024, split on dim 0, keeps both the TPU and the GPU compiler on their fast paths.

Layout = Literal["natural", "packed", "whole"]
Entries = tuple[tuple[str, ...], ...]


def num_rows(size: int, num_shards: int) -> int:
    """Rows of LANES that hold `size` elements, rounded up so that `num_shards` divides them."""
    return -(-size // (LANES * num_shards)) * num_shards


def pack(x: jax.Array, num_shards: int) -> jax.Array:
    """Flattens `x` row-major, pads it with zeros and folds it to (rows, 1024). Inverse of `unpack`.

    Args:
      x: an array of any shape and dtype, sizes 0 and 1 included.
      num_shards: what the number of rows must be divisible by.

    Returns:
      An array of shape (num_rows(x.size, num_shards), 1024): each of `num_shards` equal blocks of rows is at most
      one row larger than x.size / num_shards elements.

    Example:
      >>> pack(jnp.arange(5.0), num_shards=8).shape
      (8, 1024)
    """
    rows = num_rows(x.size, num_shards)
    return jnp.pad(x.reshape(-1), (0, rows * LANES - x.size)).reshape(rows, LANES)


def unpack(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Drops the padding and restores `shape`. Inverse of `pack`.

    Args:
      packed: (rows, 1024), as `pack` gives it.
      shape: the shape that was packed.

    Example:
      >>> unpack(pack(jnp.arange(5.0), num_shards=8), (5,))
      Array([0., 1., 2., 3., 4.], dtype=float32)
    """
    return packed.reshape(-1)[: math.prod(shape)].reshape(shape)


def entries(spec: P, ndim: int) -> Entries:
    """A spec as one tuple of axis names per dim. Inverse of `canonical_spec`."""
    parts = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
    return tuple(parts) + ((),) * (ndim - len(parts))


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
      layout: "natural" (the parameter's shape), "packed" (rows x 1024) or "whole" (as the parameter, split no further).
      padding: elements of `state_shape` that hold no parameter, over all devices.
      reason: why this layout, for people.
      part_axes: mesh axes that shard the parameter; a packed leaf is packed from each device's own part.
      shard_axes: mesh axes that the state is split over in addition.
      num_parts: product of the sizes of `part_axes`.
      num_shards: product of the sizes of `shard_axes`.
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

    @property
    def size(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of mu and of nu as held in memory (on disk it is always `shape`)."""
        if self.layout != "packed":
            return self.shape
        return (self.num_parts * num_rows(self.size // self.num_parts, self.num_shards), LANES)

    @property
    def elements_per_device(self) -> int:
        """Elements of mu on each device: the same on all of them, padding included."""
        return math.prod(self.state_shape) // (self.num_parts * self.num_shards)


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
) -> LeafPlan:
    """Chooses the layout of one leaf; the arguments are `make_plan`'s, already checked.

    `explicit` names the mesh's Explicit axes. A dim never holds axes of both types: JAX then places Explicit ones
    first, or loses one, whatever the spec says.
    """
    parts = entries(param_spec, len(shape))
    used = tuple(axis for e in parts for axis in e)
    axes = tuple(axis for axis in axis_names if axis not in used)
    num_parts = math.prod(axis_sizes[axis] for axis in used)
    num_shards = math.prod(axis_sizes[axis] for axis in axes)
    size = math.prod(shape)

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
        )
        return dataclasses.replace(plan, padding=math.prod(plan.state_shape) - size)

    if num_shards == 1:
        over = " and ".join(repr(axis) for axis in axis_names)
        follows = len(axes) < len(axis_names)
        return leaf("natural", f"the parameter is already sharded over {over}" if follows else "one shard")
    if size < max(min_size, 1) or not shape:
        return leaf("whole", "scalar" if not shape else f"{size:,} elements, under min_size={min_size:,}")
    if layout != "packed":
        for dim in sorted(range(len(shape)), key=lambda dim: (len(parts[dim]), dim)):
            divides = shape[dim] % (num_shards * math.prod(axis_sizes[axis] for axis in parts[dim])) == 0
            if divides and len({axis in explicit for axis in parts[dim] + axes}) == 1:
                # Minor-most on a dim that the parameter shards already: the other order costs cross-axis permutes.
                state = tuple(e + axes if i == dim else e for i, e in enumerate(parts))
                return leaf("natural", f"dim {dim} divides by {num_shards}", state)
        if layout == "natural":
            return leaf("whole", f"layout='natural', and no dim divides by {num_shards}")
        if num_rows(size // num_parts, num_shards) * LANES // num_shards >= size // num_parts:
            return leaf("whole", f"no dim divides by {num_shards}, and whole it is under one padded row")
    if len({axis in explicit for axis in used + axes}) > 1:
        return leaf("whole", f"{' and '.join(used + axes)} are Auto and Explicit axes, which cannot share its one dim")
    why = "layout='packed'" if layout == "packed" else f"no dim divides by {num_shards}"
    return leaf("packed", why, (used + axes,))
