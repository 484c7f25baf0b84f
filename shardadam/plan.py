"""`make_plan`: from abstract parameters and a mesh to a frozen `Plan` of where every moment lives."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardadam.layout import LeafPlan, entries, plan_leaf
from shardadam.precision import state_itemsize

DEFAULT_MIN_SIZE = 1024  # Below it, latency costs more than the bytes are worth.


def path_name(keypath: tuple[Any, ...]) -> str:
    """A leaf's name, such as `encoder/kernel`: the same for a Flax NNX Variable and for the array in it."""
    if keypath and isinstance(keypath[-1], jax.tree_util.GetAttrKey) and keypath[-1].name == "value":
        keypath = keypath[:-1]
    return jax.tree_util.keystr(keypath, simple=True, separator="/")


def is_none(x: Any) -> bool:
    """For `is_leaf`: optax takes a None among gradients for "no gradient here"."""
    return x is None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Where mu and nu of every parameter live. Frozen, hashable, and the same on every process.

    Attributes:
      mesh: the mesh it was made for; an AbstractMesh where it was planned without devices.
      axis_names: the mesh axes that the state is split over.
      items: (keypath, LeafPlan) for each parameter, in tree order.
    """

    mesh: Mesh | AbstractMesh
    axis_names: tuple[str, ...]
    items: tuple[tuple[str, LeafPlan], ...]

    @functools.cached_property
    def leaves(self) -> Mapping[str, LeafPlan]:
        """The `LeafPlan` of each parameter, by keypath."""
        return MappingProxyType(dict(self.items))

    @property
    def num_shards(self) -> int:
        """How many shards a leaf that is replicated over `axis_names` is split into."""
        return math.prod(self.mesh.shape[axis] for axis in self.axis_names)

    def leaf(self, path: str) -> LeafPlan:
        """The `LeafPlan` of one parameter.

        Raises:
          ValueError: the plan has no such parameter.
        """
        if path not in self.leaves:
            known = ", ".join(repr(p) for p in list(self.leaves)[:4])
            raise ValueError(
                f"`{path}`: the plan has no such leaf (it has {len(self.items)}: {known}, ...); "
                "make the plan from the same tree that the optimizer is given"
            )
        return self.leaves[path]

    def state_bytes_per_device(self, mu_dtype: Any = None, master_dtype: Any = None) -> int:
        """Bytes of mu, nu, count and masters on each device.

        Args:
          mu_dtype: what mu is held in; default: what nu is held in.
          master_dtype: of the masters of narrower parameters, whose nu is held in it, too; default: there are none, and
            nu is in the parameter's dtype.
        """
        return 4 + sum(
            p.elements_per_device * state_itemsize(p.dtype, mu_dtype, master_dtype) for p in self.leaves.values()
        )

    def replicated_state_bytes(self, mu_dtype: Any = None, master_dtype: Any = None) -> int:
        """The same where they follow the parameters, as optax.adam's do."""
        return 4 + sum(
            p.size // p.num_parts * state_itemsize(p.dtype, mu_dtype, master_dtype) for p in self.leaves.values()
        )

    def report(self, mu_dtype: Any = None, master_dtype: Any = None) -> str:
        """A table for people: each leaf's layout, spec, bytes per device and the reason, then the totals."""
        rows = [("leaf", "shape", "dtype", "params", "state", "layout", "bytes/device", "why")]
        for path, p in self.items:
            size = f"{p.elements_per_device * state_itemsize(p.dtype, mu_dtype, master_dtype):,}"
            shape = "x".join(map(str, p.shape)) or "()"
            rows.append(
                (path, shape, p.dtype.name, _short(p.param_spec), _short(p.state_spec), p.layout, size, p.reason)
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        dtypes = mu_dtype, master_dtype
        mine, replicated = self.state_bytes_per_device(*dtypes), self.replicated_state_bytes(*dtypes)
        whole = [p for p in self.leaves.values() if p.layout == "whole"]
        mesh = ", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
        lines += [
            "",
            f"mesh {mesh}; state over {' and '.join(map(repr, self.axis_names))}: {self.num_shards} shards",
            f"{len(self.items)} leaves, {sum(p.size for p in self.leaves.values()):,} parameters; "
            f"{len(whole)} leaves stay whole ({sum(p.size for p in whole):,} parameters)",
            f"state per device: {mine:,} bytes; following the parameters, as optax.adam: {replicated:,} bytes "
            f"({replicated / mine:.2f} x)",
        ]
        return "\n".join(lines)

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.mesh, self.axis_names, self.items))

    # A plan is a static argument of every step: hashing hundreds of leaves anew would cost dispatch time.
    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        # Without what was cached: a hash of names is another in another process.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Plan) or self._hash != other._hash:
            return False
        return (self.mesh, self.axis_names, self.items) == (other.mesh, other.axis_names, other.items)


def make_plan(
    params: Any,
    mesh: Mesh | AbstractMesh | Mapping[str, int],
    *,
    axis_name: str | tuple[str, ...] = "data",
    param_specs: Any = None,
    layout: Literal["auto", "natural", "packed"] = "auto",
    min_size: int = DEFAULT_MIN_SIZE,
    stacked_dims: Any = 0,
) -> Plan:
    """Plans where Adam's mu and nu live, from shapes alone: nothing is allocated.

    Args:
      params: a tree of arrays or `jax.ShapeDtypeStruct`s.
      mesh: a `Mesh`, an `AbstractMesh`, or axis sizes such as `{"data": 512}`, which need no such devices.
      axis_name: the mesh axis, or axes, that the state is split over: those the parameters are replicated over.
      param_specs: a tree of `PartitionSpec`s like `params` (a prefix of it is enough; None means replicated).
        Default: what each leaf's own NamedSharding says, replicated where it has none.
      layout: "auto" takes natural where a dim divides evenly, else packed; "natural" leaves such leaves whole, listed;
        "packed" packs every leaf.
      min_size: leaves with fewer elements (per layer) stay whole: replicated over `axis_name`, and listed by
        `Plan.report`. So do, with layout="auto", those with fewer elements than shards.
      stacked_dims: how many leading dims of a leaf stack layers, as the parameters of a `lax.scan` over layers have
        them: an int, or a tree of ints like `params` (a prefix of it is enough). They are never split, so that a train
        step can reduce each layer's gradient inside the backward scan.

    Returns:
      A `Plan`: frozen, hashable, the same on every process.

    Raises:
      ValueError: an axis that the mesh does not have, a spec that does not fit its leaf, a bad layout or min_size.

    Example:
      >>> plan = make_plan({"kernel": jax.ShapeDtypeStruct((4096, 1024), jnp.float32)}, {"data": 512})
      >>> plan.leaves["kernel"].state_spec == P("data"), plan.state_bytes_per_device()
      (True, 65540)
    """
    if not isinstance(mesh, Mesh | AbstractMesh):
        _check_sizes(mesh)
        mesh = AbstractMesh(tuple(mesh.values()), tuple(mesh), axis_types=(AxisType.Auto,) * len(mesh))
    axis_names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    _check_axes(axis_names, mesh)
    if layout not in ("auto", "natural", "packed"):
        raise ValueError(f"layout: got {layout!r}, wanted 'auto', 'natural' or 'packed'")
    if not isinstance(min_size, int) or min_size < 0:
        raise ValueError(f"min_size: got {min_size!r}, wanted a number of elements, 0 or more")

    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    if param_specs is None:
        specs = [spec_of(x) for _, x in leaves]
    else:
        specs = _broadcast("param_specs", "PartitionSpec, or None for replicated,", param_specs, params, treedef)
        specs = [P() if s is None else s for s in specs]
    stacks = _broadcast("stacked_dims", "int", stacked_dims, params, treedef)
    sizes = dict(mesh.shape)
    explicit = frozenset(
        name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit
    )
    items = []
    for (keypath, x), spec, stack in zip(leaves, specs, stacks, strict=True):
        path, shape, dtype = path_name(keypath), tuple(np.shape(x)), _dtype(x)
        _check_spec(path, shape, spec, sizes)
        _check_stack(path, shape, stack)
        plan = plan_leaf(
            shape,
            dtype,
            spec,
            axis_sizes=sizes,
            axis_names=axis_names,
            layout=layout,
            min_size=min_size,
            explicit=explicit,
            stacked_dims=stack,
        )
        items.append((path, plan))
    _check_names([path for path, _ in items])
    return Plan(mesh=mesh, axis_names=axis_names, items=tuple(items))


def spec_of(x: Any) -> P:
    """The spec of an array's or a ShapeDtypeStruct's own NamedSharding; replicated where it has none."""
    sharding = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    return P(*sharding.spec) if isinstance(sharding, NamedSharding) else P()


def _dtype(x: Any) -> np.dtype:
    return np.dtype(jax.dtypes.canonicalize_dtype(x.dtype if hasattr(x, "dtype") else jnp.result_type(x)))


def _short(spec: P) -> str:
    return "(" + ", ".join("+".join(e) or "-" for e in entries(spec, len(spec))) + ")"


def _broadcast(name: str, what: str, prefix: Any, params: Any, treedef: Any) -> list[Any]:
    """The values of a prefix tree (specs, or numbers), one per leaf of `params`."""

    def is_value(x: Any) -> bool:
        return x is None or isinstance(x, P)

    try:
        full = jax.tree.map(lambda s, sub: jax.tree.map(lambda _: s, sub), prefix, params, is_leaf=is_value)
        return treedef.flatten_up_to(full)
    except ValueError as error:
        raise ValueError(
            f"{name}: got a tree that does not match params ({error}); wanted one {what} per leaf or per subtree"
        ) from error


def _check_sizes(mesh: Any) -> None:
    if not isinstance(mesh, Mapping):
        raise ValueError(f"mesh: got {mesh!r}, wanted a Mesh, an AbstractMesh or axis sizes such as {{'data': 512}}")
    for axis, size in mesh.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"mesh: axis {axis!r} has size {size!r}, wanted a number of devices, 1 or more")


def _check_axes(axis_names: tuple[str, ...], mesh: Mesh | AbstractMesh) -> None:
    if not axis_names or len(set(axis_names)) != len(axis_names):
        raise ValueError(f"axis_name: got {axis_names!r}, wanted one mesh axis or a tuple of different ones")
    for axis in axis_names:
        if axis not in mesh.shape:
            raise ValueError(f"axis_name: the mesh has no axis {axis!r}, only {tuple(mesh.shape)}")
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if len({types[axis] for axis in axis_names}) > 1:
        raise ValueError(
            f"axis_name: {axis_names!r} are of different axis types ({types}); make them all Auto or Explicit"
        )


def _check_names(paths: list[str]) -> None:
    """Refuses two leaves of one name, as {"a/b": x, "a": {"b": y}} has: one would take the other's place."""
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"`{twice}`: two leaves have this name; rename a key of the tree that has '/' in it")


def _check_stack(path: str, shape: tuple[int, ...], stacked_dims: Any) -> None:
    if not isinstance(stacked_dims, int) or not 0 <= stacked_dims <= len(shape):
        raise ValueError(
            f"`{path}`: got stacked_dims={stacked_dims!r}, wanted a number of leading dims, 0 to {len(shape)} (shape "
            f"{shape})"
        )


def _check_spec(path: str, shape: tuple[int, ...], spec: P, sizes: Mapping[str, int]) -> None:
    """Refuses a spec that does not fit: JAX would replicate such a leaf in silence, or fail far from here."""
    if not isinstance(spec, P) or P.UNCONSTRAINED in tuple(spec):
        raise ValueError(f"`{path}`: got {spec!r} among param_specs, wanted a PartitionSpec or None")
    if len(spec) > len(shape):
        raise ValueError(f"`{path}`: {spec} names {len(spec)} dims, the leaf has {len(shape)} (shape {shape})")
    parts = entries(spec, len(shape))
    flat = [axis for e in parts for axis in e]
    for axis in flat:
        if axis not in sizes:
            raise ValueError(f"`{path}`: {spec} names axis {axis!r}, the mesh has {tuple(sizes)}")
    if len(set(flat)) != len(flat):
        raise ValueError(f"`{path}`: {spec} names an axis twice")
    for dim, e in enumerate(parts):
        split = math.prod(sizes[axis] for axis in e)
        if shape[dim] % split:
            raise ValueError(
                f"`{path}`: dim {dim} is {shape[dim]}, not divisible by {split} devices on {' x '.join(e)}, "
                f"as {spec} asks; shard another dim of this parameter"
            )
