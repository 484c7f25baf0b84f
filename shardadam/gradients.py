"""`value_and_grad` whose gradients end as shards in the state's layout, and `total_and_weight`: the loss alone."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from shardadam.blocks import (
    Region,
    block_spec,
    block_to_state,
    gather_leaf,
    part_of_spec,
    scatter_leaf,
    state_to_block,
)
from shardadam.communication import Collective, resolve_collective
from shardadam.handles import handles
from shardadam.layout import LeafPlan, entries
from shardadam.plan import Plan
from shardadam.precision import widest
from shardadam.sharding import map_leaves
from shardadam.validation import (
    check_batch,
    check_choice,
    check_count,
    check_devices,
    check_floating,
    check_loss,
    check_pair,
)


def value_and_grad(
    loss_fn: Callable[..., Any],
    plan: Plan,
    *,
    stage: Literal[2, 3] = 2,
    has_aux: bool = False,
    num_microbatches: int = 1,
    accumulate: Literal["shards", "local"] = "shards",
    reduce_dtype: Any = None,
    collective: Literal["joint", "per_axis", "auto"] = "auto",
) -> Callable[..., tuple[Any, Any]]:
    """`jax.value_and_grad` over a mesh, with gradients that are reduced onto the shards of the optimizer's state.

    Args:
      loss_fn: `loss_fn(params, batch, *args)`, called with whole parameters (handles for stacked leaves, see `gather`)
        and one device's part of the batch. It returns the mean over that part, or `(sum, weight)`: the gradient is
        then that of the sum over all devices divided by the weight of all. With has_aux, `(loss, aux)`.
      plan: of the parameters.
      stage: 2: `params` are whole, as their own specs have them. 3: they are in shards, in the layout of the state
        (`pack_params`), and gathered where they are used.
      has_aux: the loss comes with more numbers: their means over devices and microbatches are returned.
      num_microbatches: into how many parts each device's batch is cut, along its leading dim; gradients are summed
        over them in float32.
      accumulate: "shards" reduces each microbatch's gradient as it comes, and adds shards; "local" adds whole
        gradients, N times the memory of the shards, and reduces once. At stage 3, "local" also gathers all parameters
        once, at the start.
      reduce_dtype: the dtype gradients are reduced in; default: their own, or with "local" that of their sum.
      collective: "joint" or "per_axis", see `shardadam.communication.reduce_scatter`; "auto": as the devices like it.

    Returns:
      A function of (params, batch, *args, loss_scale=None) that returns `(loss, grads)`, or `((loss, aux), grads)`: the
      float32 loss, and a tree like params of float32 gradients in the layout of the state (`LeafPlan.state_shape`,
      `state_spec`), for `tx.update(grads, opt_state, shards, shards_of=plan)`. The batch's leading dim is split over
      the plan's axes. With a loss_scale the backward pass is of the loss times it, and the gradients are divided by it
      once they are float32.

    Raises:
      ValueError: an option that is not one of the above; a batch that does not divide.
    """
    check_choice("stage", stage, (2, 3))
    check_count("num_microbatches", num_microbatches)
    check_choice("accumulate", accumulate, ("shards", "local"))
    check_choice("collective", collective, ("joint", "per_axis", "auto"))
    check_floating("reduce_dtype", reduce_dtype)
    check_devices(plan.mesh)
    region = region_of(plan, collective, reduce_dtype)
    in_shards = stage == 3
    local = functools.partial(
        _local_sums,
        loss_fn,
        plan,
        region,
        in_shards=in_shards,
        has_aux=has_aux,
        num_microbatches=num_microbatches,
        tapped=accumulate == "shards",
    )

    def run(params: Any, batch: Any, *args: Any, loss_scale: Any = None) -> tuple[Any, Any]:
        check_devices(plan.mesh)  # Again: the mesh may have been set since.
        check_batch(batch, region.num_devices, num_microbatches)
        blocks = _block_specs(params, plan, region)
        params, specs = _enter(params, plan, region, in_shards)
        loss, aux, grads = jax.shard_map(
            local,
            mesh=plan.mesh,
            in_specs=(specs, P(region.manual), P(), P()),
            out_specs=(P(), P(), blocks),
            axis_names=set(region.manual),
            check_vma=False,
        )(params, batch, args, loss_scale)
        grads = map_leaves(lambda leaf, x, path: block_to_state(x, leaf, plan.mesh), grads, plan)
        return ((loss, aux) if has_aux else loss), grads

    return run


def total_and_weight(
    loss_fn: Callable[..., Any],
    plan: Plan,
    *,
    stage: Literal[2, 3] = 2,
    collective: Literal["joint", "per_axis", "auto"] = "auto",
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The loss over a mesh without its gradients, for evaluation: what `value_and_grad` divides one by the other.

    Args:
      loss_fn: see `value_and_grad`; it returns no aux.
      plan: of the parameters.
      stage: see `value_and_grad`.
      collective: see `value_and_grad`.

    Returns:
      A function of (params, batch, *args) that returns two float32 scalars: the sum over all devices, and the weight.
      Of a mean these are the sum of the devices' means, and the number of devices.
    """
    check_choice("stage", stage, (2, 3))
    region = region_of(plan, collective, None)

    def local(params: Any, batch: Any, args: tuple[Any, ...]) -> Any:
        blocks = map_leaves(lambda leaf, x, path: _unread_block(x, leaf, region, stage == 3), params, plan)
        total, weight = _as_sum(loss_fn(handles(params, blocks, plan, region, stage == 3), batch, *args))
        return jax.lax.psum((total, weight), region.manual)

    def run(params: Any, batch: Any, *args: Any) -> tuple[jax.Array, jax.Array]:
        check_devices(plan.mesh)
        check_batch(batch, region.num_devices, 1)
        params, specs = _enter(params, plan, region, stage == 3)
        return jax.shard_map(
            local,
            mesh=plan.mesh,
            in_specs=(specs, P(region.manual), P()),
            out_specs=P(),
            axis_names=set(region.manual),
            check_vma=False,
        )(params, batch, args)

    return run


def region_of(plan: Plan, collective: Literal["joint", "per_axis", "auto"], reduce_dtype: Any) -> Region:
    """Where a loss is computed: manual over those of the plan's axes that shard no parameter.

    Raises:
      ValueError: there is no such axis.
    """
    used = {axis for leaf in plan.leaves.values() for e in entries(leaf.param_spec, len(leaf.shape)) for axis in e}
    manual = tuple(axis for axis in plan.axis_names if axis not in used)
    if not manual:
        raise ValueError(
            f"plan: the parameters are sharded over every one of its axes {plan.axis_names}: there is nothing to "
            "reduce over; use jax.value_and_grad"
        )
    resolved: Collective = resolve_collective(collective, plan.mesh, plan.axis_names)
    return Region(plan.mesh, manual, resolved, reduce_dtype)


def _block_specs(params: Any, plan: Plan, region: Region) -> Any:
    """How blocks of parameters, or of gradients, leave and enter a region."""
    return map_leaves(lambda leaf, x, path: part_of_spec(block_spec(leaf), region.manual), params, plan)


def _enter(params: Any, plan: Plan, region: Region, in_shards: bool) -> tuple[Any, Any]:
    """The parameters as they enter a region, and their specs: whole, or as blocks."""
    if not in_shards:
        return params, P()
    return map_leaves(functools.partial(_to_block, plan), params, plan), _block_specs(params, plan, region)


def _to_block(plan: Plan, leaf: LeafPlan, x: jax.Array, path: str) -> jax.Array:
    if jnp.shape(x) != leaf.state_shape:
        raise ValueError(
            f"`{path}`: got shape {jnp.shape(x)}, wanted the shards of stage 3, {leaf.state_shape} ({leaf.layout}); "
            "bring the parameters there with shardadam.pack_params, or use stage=2"
        )
    return state_to_block(x, leaf, plan.mesh)


def _local_sums(
    loss_fn: Callable[..., Any],
    plan: Plan,
    region: Region,
    params: Any,
    batch: Any,
    args: tuple[Any, ...],
    loss_scale: Any,
    *,
    in_shards: bool,
    has_aux: bool,
    num_microbatches: int,
    tapped: bool,
) -> tuple[jax.Array, Any, Any]:
    """On one device: (loss, aux, blocks of gradients), each averaged over all devices and microbatches."""
    scale = 1.0 if loss_scale is None else loss_scale

    def summed(variables: Any, microbatch: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Any]]:
        given = handles(params, variables, plan, region, in_shards) if tapped else variables
        out = loss_fn(given, microbatch, *args)
        if has_aux:
            check_pair(out)
        loss, aux = out if has_aux else (out, None)
        total, weight = _as_sum(loss)
        # Summed in float32 over microbatches and devices, whatever they are: 8 times True is no bool.
        aux = jax.tree.map(lambda x: jnp.asarray(x).astype(_wide(jnp.asarray(x))), aux)
        return total * scale, (total, weight, aux)

    if tapped:
        variables = map_leaves(lambda leaf, x, path: _unread_block(x, leaf, region, in_shards), params, plan)
    elif in_shards:
        variables = map_leaves(lambda leaf, x, path: gather_leaf(x, leaf=leaf, region=region), params, plan)
    else:
        variables = params
    differentiate = jax.value_and_grad(summed, has_aux=True)

    def one(microbatch: Any) -> Any:
        (_, (total, weight, aux)), grads = differentiate(variables, microbatch)
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
    return total / weight, aux, jax.tree.map(lambda g: g.astype(_wide(g)) / (weight * scale), grads)


def _as_sum(loss: Any) -> tuple[jax.Array, jax.Array]:
    """What a loss function returned as (sum, weight) in float32: a mean is a sum of weight 1."""
    check_loss(loss)
    total, weight = loss if isinstance(loss, tuple) else (loss, 1.0)
    return jnp.asarray(total).astype(jnp.float32), jnp.asarray(weight, jnp.float32)


def _unread_block(x: jax.Array, leaf: LeafPlan, region: Region, in_shards: bool) -> jax.Array:
    """What a leaf's gradient is taken with respect to: infinities of its block's shape, never read.

    A loss that computes with `jax.tree.leaves` of handles, as a penalty of all weights, does read them, and is not
    finite: with zeros its gradient would lack these leaves in silence. (Not NaNs, which jax_debug_nans would find.)
    """
    shape = x.shape if in_shards else jax.eval_shape(lambda x: scatter_leaf(x, leaf=leaf, region=region), x).shape
    return jnp.full(shape, jnp.inf, _wide(x))


def _sum_over(f: Callable[[Any], Any], microbatches: Any) -> Any:
    """The sum of `f` over the leading dim of a tree, one after the other."""
    first = jax.eval_shape(f, jax.tree.map(lambda x: x[0], microbatches))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    return jax.lax.scan(lambda acc, m: (jax.tree.map(jnp.add, acc, f(m)), None), zeros, microbatches)[0]


def _cut(batch: Any, num_microbatches: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(num_microbatches, x.shape[0] // num_microbatches, *x.shape[1:]), batch)


def _wide(x: jax.Array) -> Any:
    """float32, or what is wider: the dtype that gradients are summed in."""
    return widest(x.dtype, jnp.float32)
