"""`value_and_grad` whose gradients end as shards in the state's layout, and `gather`: where they are reduced."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from shardadam.communication import Collective, reduce_scatter, tap
from shardadam.layout import LeafPlan, canonical_spec, entries, pack
from shardadam.plan import Plan
from shardadam.sharding import constrain, map_leaves, only_axes


class Region(NamedTuple):
    """The part of a mesh that a loss is computed in, device by device, and how gradients are reduced there."""

    mesh: Mesh | AbstractMesh
    manual: tuple[str, ...]  # The axes each device has its own part of the batch on.
    collective: Collective
    reduce_dtype: Any

    @property
    def auto(self) -> tuple[str, ...]:
        """The other axes: JAX splits the loss over them by the parameters' own specs."""
        return tuple(axis for axis in self.mesh.axis_names if axis not in self.manual)

    @property
    def num_devices(self) -> int:
        """Into how many parts the batch is split."""
        return math.prod(self.mesh.shape[axis] for axis in self.manual)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["whole", "block"], meta_fields=["leaf", "region"])
class Gatherable:
    """A parameter inside a loss that `gather` has not been called on yet: a pytree node, which a scan can slice."""

    def __init__(self, whole: jax.Array, block: jax.Array, leaf: LeafPlan, region: Region) -> None:
        self.whole, self.block, self.leaf, self.region = whole, block, leaf, region


def gather(params: Any) -> Any:
    """Parameters to compute with: to be called inside the body of a scan over stacked layers.

    `value_and_grad` and `make_train_step` call it themselves on every leaf that stacks no layers. Those that do
    (`make_plan(..., stacked_dims=...)`) reach the loss as handles that `lax.scan` slices; gathered in its body, a
    layer's gradient is reduce-scattered inside the backward scan.

    Args:
      params: a tree of arrays and handles. Arrays are returned as they are, so that the same model runs without a step.

    Returns:
      The tree with an array for each handle.

    Example:
      >>> def body(h, layer):
      ...     layer = shardadam.gather(layer)
      ...     return jnp.tanh(h @ layer["w"]), None
      >>> layers = {"w": jnp.zeros((3, 4, 4))}
      >>> jax.lax.scan(body, jnp.ones((2, 4)), layers)[0].shape
      (2, 4)
    """

    def is_handle(x: Any) -> bool:
        return isinstance(x, Gatherable)

    def one(x: Any) -> Any:
        if not is_handle(x):
            return x
        return tap(x.whole, x.block, functools.partial(scatter_leaf, leaf=x.leaf, region=x.region))

    return jax.tree.map(one, params, is_leaf=is_handle)


def value_and_grad(
    loss_fn: Callable[..., Any],
    plan: Plan,
    *,
    has_aux: bool = False,
    num_microbatches: int = 1,
    accumulate: Literal["shards", "local"] = "shards",
    reduce_dtype: Any = None,
    collective: Collective = "joint",
) -> Callable[..., tuple[Any, Any]]:
    """`jax.value_and_grad` over a mesh, with gradients that are reduced onto the shards of the optimizer's state.

    Args:
      loss_fn: `loss_fn(params, batch, *args)`, called with whole parameters (handles for stacked leaves, see `gather`)
        and one device's part of the batch. It returns the mean over that part, or `(sum, weight)`: the gradient is
        then that of the sum over all devices divided by the weight of all. With has_aux, `(loss, aux)`.
      plan: of the parameters.
      has_aux: the loss comes with more numbers: their means over devices and microbatches are returned.
      num_microbatches: into how many parts each device's batch is cut, along its leading dim; gradients are summed
        over them in float32.
      accumulate: "shards" reduces each microbatch's gradient as it comes, and adds shards; "local" adds whole
        gradients, N times the memory of the shards, and reduces once.
      reduce_dtype: the dtype gradients are reduced in; default: their own, or with "local" that of their sum.
      collective: "joint" or "per_axis", see `shardadam.communication.reduce_scatter`.

    Returns:
      A function of (params, batch, *args) that returns `(loss, grads)`, or `((loss, aux), grads)`: the float32 loss,
      and a tree like params of float32 gradients in the layout of the state (`LeafPlan.state_shape`, `state_spec`),
      for `tx.update(grads, opt_state, shards, shards_of=plan)`. The batch's leading dim is split over the plan's axes.

    Raises:
      ValueError: an option that is not one of the above; a batch that does not divide.
    """
    _check_options(num_microbatches, accumulate, collective)
    used = {axis for leaf in plan.leaves.values() for e in entries(leaf.param_spec, len(leaf.shape)) for axis in e}
    manual = tuple(axis for axis in plan.axis_names if axis not in used)
    if not manual:
        raise ValueError(
            f"plan: the parameters are sharded over every one of its axes {plan.axis_names}: there is nothing to "
            "reduce over; use jax.value_and_grad"
        )
    region = Region(plan.mesh, manual, collective, reduce_dtype)
    local = functools.partial(
        _local_sums, loss_fn, plan, region, has_aux=has_aux, num_microbatches=num_microbatches, accumulate=accumulate
    )

    def run(params: Any, batch: Any, *args: Any) -> tuple[Any, Any]:
        _check_batch(batch, region.num_devices, num_microbatches)
        blocks = map_leaves(lambda leaf, x, path: _part_of_spec(block_spec(leaf), manual), params, plan)
        loss, aux, blocks = jax.shard_map(
            local,
            mesh=plan.mesh,
            in_specs=(P(), P(manual), P()),
            out_specs=(P(), P(), blocks),
            axis_names=set(manual),
            check_vma=False,
        )(params, batch, args)
        grads = map_leaves(lambda leaf, x, path: block_to_state(x, leaf, plan.mesh), blocks, plan)
        return ((loss, aux) if has_aux else loss), grads

    return run


def scatter_leaf(g: jax.Array, *, leaf: LeafPlan, region: Region) -> jax.Array:
    """One device's gradient, summed over the region's devices onto their blocks; whole where the leaf is not split.

    Args:
      g: of `leaf.shape`, or of one layer of it.
      leaf: the leaf's plan.
      region: where this is called.

    Returns:
      The block, after the stacked dims that `g` has and two dims of size 1 for the shard and the part: see
      `block_spec`.
    """
    g = g if region.reduce_dtype is None else g.astype(region.reduce_dtype)
    if leaf.num_shards == 1:
        return jax.lax.psum(g, region.manual)
    num_stacked = g.ndim - (len(leaf.shape) - leaf.stacked_dims)  # Within a scan, a layer has none.
    skipped = leaf.stacked_dims - num_stacked

    def own_block(part: jax.Array) -> jax.Array:
        dim = num_stacked if leaf.layout == "packed" else _split_dim(leaf) - skipped
        x = pack(part, leaf.num_shards, num_stacked) if leaf.layout == "packed" else part
        x = reduce_scatter(x, leaf.shard_axes, dim=dim, summed=region.manual, collective=region.collective)
        return jnp.expand_dims(x, (num_stacked, num_stacked + 1))

    if not region.auto:
        return own_block(g)
    whole = _part_of_spec(leaf.param_spec, region.auto, skipped)
    block = _part_of_spec(block_spec(leaf), region.auto, skipped)
    # Manual over the other axes as well: each device scatters its own part, and nothing moves over those axes.
    local = jax.shard_map(own_block, in_specs=whole, out_specs=block, axis_names=set(region.auto), check_vma=False)
    return local(g)


def block_spec(leaf: LeafPlan) -> P:
    """How a leaf's blocks are sharded as one array: (stacked dims, num_shards, num_parts, a device's block)."""
    if leaf.num_shards == 1:
        return leaf.param_spec
    stack = entries(leaf.param_spec, len(leaf.shape))[: leaf.stacked_dims]
    return canonical_spec((*stack, leaf.shard_axes, leaf.part_axes))


def block_to_state(x: jax.Array, leaf: LeafPlan, mesh: Mesh | AbstractMesh) -> jax.Array:
    """Blocks, one array with dims for the shard and the part, as the array that the state has: moves nothing."""
    if leaf.num_shards == 1:
        return constrain(x, mesh, leaf.param_spec)
    spec = block_spec(leaf)
    k = leaf.stacked_dims
    own = jax.shard_map(lambda b: jnp.squeeze(b, (k, k + 1)), mesh=mesh, in_specs=spec, out_specs=leaf.state_spec)
    return constrain(own(constrain(x, mesh, spec)), mesh, leaf.state_spec)


def _local_sums(
    loss_fn: Callable[..., Any],
    plan: Plan,
    region: Region,
    params: Any,
    batch: Any,
    args: tuple[Any, ...],
    *,
    has_aux: bool,
    num_microbatches: int,
    accumulate: str,
) -> tuple[jax.Array, Any, Any]:
    """On one device: (loss, aux, blocks of gradients), each averaged over all devices and microbatches."""
    tapped = accumulate == "shards"

    def summed(variables: Any, microbatch: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        given = _handles(params, variables, plan, region) if tapped else variables
        out = loss_fn(given, microbatch, *args)
        loss, aux = out if has_aux else (out, None)
        total, weight = loss if isinstance(loss, tuple) else (loss, 1.0)
        return total.astype(jnp.float32), (jnp.asarray(weight, jnp.float32), aux)

    variables = map_leaves(lambda leaf, x, path: _zero_block(x, leaf, region), params, plan) if tapped else params
    differentiate = jax.value_and_grad(summed, has_aux=True)

    def one(microbatch: Any) -> Any:
        (total, (weight, aux)), grads = differentiate(variables, microbatch)
        return total, weight, aux, jax.tree.map(lambda g: g.astype(_wide(g)), grads)

    if num_microbatches == 1:
        total, weight, aux, grads = one(batch)
    else:
        total, weight, aux, grads = _sum_over(one, _cut(batch, num_microbatches))
    total, weight = jax.lax.psum((total, weight), region.manual)
    count = num_microbatches * region.num_devices
    aux = jax.tree.map(lambda x: jax.lax.psum(x, region.manual) / count, aux)
    if not tapped:
        grads = map_leaves(lambda leaf, g, path: scatter_leaf(g, leaf=leaf, region=region), grads, plan)
    return total / weight, aux, jax.tree.map(lambda g: g.astype(_wide(g)) / weight, grads)


def _handles(params: Any, blocks: Any, plan: Plan, region: Region) -> Any:
    """What the loss gets: arrays, tapped, and handles for leaves that stack layers."""

    def one(x: jax.Array, block: jax.Array, leaf: LeafPlan) -> Any:
        handle = Gatherable(x, block, leaf, region)
        return handle if leaf.stacked_dims else gather(handle)

    return jax.tree.map(one, params, blocks, map_leaves(lambda leaf, x, path: leaf, params, plan))


def _zero_block(x: jax.Array, leaf: LeafPlan, region: Region) -> jax.Array:
    """What a leaf's gradient is taken with respect to: zeros of its block's shape, never read."""
    shape = jax.eval_shape(functools.partial(scatter_leaf, leaf=leaf, region=region), x)
    return jnp.zeros(shape.shape, _wide(x))


def _sum_over(f: Callable[[Any], Any], microbatches: Any) -> Any:
    """The sum of `f` over the leading dim of a tree, one after the other."""
    first = jax.eval_shape(f, jax.tree.map(lambda x: x[0], microbatches))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    return jax.lax.scan(lambda acc, m: (jax.tree.map(jnp.add, acc, f(m)), None), zeros, microbatches)[0]


def _cut(batch: Any, num_microbatches: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(num_microbatches, x.shape[0] // num_microbatches, *x.shape[1:]), batch)


def _wide(x: jax.Array) -> Any:
    """float32, or what is wider: the dtype that gradients are summed in."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _split_dim(leaf: LeafPlan) -> int:
    """The dim of a natural leaf that holds its shards."""
    parts = entries(leaf.state_spec, len(leaf.shape))
    return next(dim for dim, axes in enumerate(parts) if set(leaf.shard_axes) <= set(axes))


def _part_of_spec(spec: P, axes: tuple[str, ...], skipped: int = 0) -> P:
    """What a spec says of some axes, without the leading dims that a scan has taken off."""
    rest = P(*tuple(spec)[skipped:])
    return only_axes(rest, axes, len(rest))


def _check_options(num_microbatches: Any, accumulate: str, collective: str) -> None:
    if not isinstance(num_microbatches, int) or num_microbatches < 1:
        raise ValueError(f"num_microbatches: got {num_microbatches!r}, wanted a number, 1 or more")
    if accumulate not in ("shards", "local"):
        raise ValueError(f"accumulate: got {accumulate!r}, wanted 'shards' or 'local'")
    if collective not in ("joint", "per_axis"):
        raise ValueError(f"collective: got {collective!r}, wanted 'joint' or 'per_axis'")


def _check_batch(batch: Any, num_devices: int, num_microbatches: int) -> None:
    for keypath, x in jax.tree_util.tree_leaves_with_path(batch):
        if not jnp.ndim(x) or jnp.shape(x)[0] % (num_devices * num_microbatches):
            name = f"batch{jax.tree_util.keystr(keypath)}"
            raise ValueError(
                f"{name}: got shape {jnp.shape(x)}, wanted a leading dim that divides by {num_devices} devices x "
                f"{num_microbatches} microbatches"
            )
