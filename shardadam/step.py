"""The train step: gradients as shards, clipped by their norm, applied on shards; and the update alone."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from shardadam.communication import Collective
from shardadam.gradients import value_and_grad
from shardadam.layout import LeafPlan, entries
from shardadam.plan import Plan
from shardadam.sharding import check_context, constrain, map_leaves, pack_leaf, unpack_leaf
from shardadam.transformation import ShardedTransformation


class Applied(NamedTuple):
    """What `apply_on_shards` gives: new parameters and optimizer state, and where asked for their norms."""

    params: Any
    opt_state: Any
    norms: dict[str, jax.Array]


def make_train_step(
    loss_fn: Callable[..., Any],
    state: Any,
    *,
    num_microbatches: int = 1,
    accumulate: Literal["shards", "local"] = "shards",
    max_grad_norm: float | None = None,
    skip_nonfinite: bool = False,
    has_aux: bool = False,
    reduce_dtype: Any = None,
    collective: Collective = "joint",
    stage: Literal[1, 2] = 2,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A jitted, donating `step(state, batch, *args) -> (state, metrics)`.

    Args:
      loss_fn: `loss_fn(params, batch, *args)`, as for `value_and_grad`: it sees whole parameters and one device's part
        of the batch, and returns a mean, or `(sum, weight)`.
      state: a `shardadam.TrainState`, concrete or abstract: its plan and optimizer are used, not its arrays.
      num_microbatches: see `value_and_grad`.
      accumulate: see `value_and_grad`.
      max_grad_norm: gradients with a greater global norm are scaled down to it.
      skip_nonfinite: a step whose gradients have a NaN or an inf, on any device, changes neither params nor opt_state
        (so not its count); `state.step` goes on. The choice is made element by element as the results are written.
      has_aux: see `value_and_grad`; the aux is in the metrics, under "aux".
      reduce_dtype: see `value_and_grad`.
      collective: see `value_and_grad`.
      stage: 2: gradients are reduced onto shards. 1: they are reduced whole on every device, as XLA likes.

    Returns:
      The step. `metrics` are float32 scalars on the device: loss, grad_norm (before clipping), param_norm and
      update_norm; skipped, 1 for a step that was; learning_rate, where the optimizer's is a number or a schedule.

    Raises:
      ValueError: a bad option.

    References:
      Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, 2019 (arXiv 1910.02054).
      Pascanu et al., On the difficulty of training recurrent neural networks, 2012 (arXiv 1211.5063), section 3.2.
    """
    if stage not in (1, 2):
        raise ValueError(f"stage: got {stage!r}, wanted 1 or 2")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm: got {max_grad_norm!r}, wanted a number above 0, or None")
    plan, tx = state.plan, state.tx
    reduced = plan if stage == 2 else _unsplit(plan, plan.leaves)
    differentiate = value_and_grad(
        loss_fn,
        reduced,
        has_aux=has_aux,
        num_microbatches=num_microbatches,
        accumulate=accumulate,
        reduce_dtype=reduce_dtype,
        collective=collective,
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, batch: Any, *args: Any) -> tuple[Any, dict[str, Any]]:
        loss, grads = differentiate(state.params, batch, *args)
        loss, aux = loss if has_aux else (loss, None)
        grad_norm = global_norm(grads, reduced)
        keep = jnp.isfinite(grad_norm) if skip_nonfinite else None
        if max_grad_norm is not None:
            factor = max_grad_norm / jnp.maximum(grad_norm, max_grad_norm)
            grads = jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)
        done = apply_on_shards(
            grads, state.opt_state, state.params, tx=tx, plan=plan, scattered=stage == 2, keep=keep, measure=True
        )
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            **done.norms,
            "skipped": jnp.zeros([], jnp.float32) if keep is None else 1 - keep.astype(jnp.float32),
            **_learning_rate(tx, state.opt_state),
            **({"aux": aux} if has_aux else {}),
        }
        return state.replace(step=state.step + 1, params=done.params, opt_state=done.opt_state), metrics

    return step


def apply_on_shards(
    grads: Any,
    opt_state: Any,
    params: Any,
    *,
    tx: Any,
    plan: Plan,
    scattered: bool,
    keep: jax.Array | None = None,
    measure: bool = False,
) -> Applied:
    """Adds the optimizer's updates on each device's shards, then gathers the new parameters in their own dtype.

    Args:
      grads: a tree like params: in the layout of the state if `scattered`, in the parameters' own if not.
      opt_state: of `tx`.
      params: the parameters, of the plan's shapes and specs.
      tx: a `ShardedTransformation`, or one within optax's combinators.
      plan: of the parameters.
      scattered: see `grads`.
      keep: a bool of shape (); where it is False, params and opt_state stay as they were.
      measure: whether to take update_norm and param_norm, of the new parameters.

    Raises:
      ValueError: a leaf that does not have the plan's shape.
    """
    # Within a combinator of optax's, something else may go by a parameter's shape (a mask on ndim): packed leaves then
    # keep that shape outside of Adam, and only their updates are gathered instead.
    check_context(plan.mesh)
    packed = isinstance(tx, ShardedTransformation)

    def in_shards(leaf: LeafPlan) -> bool:
        return packed or leaf.layout != "packed"

    def to_shards(leaf: LeafPlan, x: Any, path: str) -> Any:
        if x is not None and jnp.shape(x) != leaf.shape:
            raise ValueError(
                f"`{path}`: got shape {jnp.shape(x)}, the plan has {leaf.shape}; make a state for this tree"
            )
        return pack_leaf(x, leaf, plan.mesh) if x is not None and in_shards(leaf) else x

    def as_given(leaf: LeafPlan, g: Any, path: str) -> Any:
        return g if in_shards(leaf) else unpack_leaf(g, leaf, plan.mesh)

    def to_whole(leaf: LeafPlan, x: Any, path: str) -> Any:
        return unpack_leaf(x, leaf, plan.mesh) if in_shards(leaf) else constrain(x, plan.mesh, leaf.param_spec)

    shards = map_leaves(to_shards, params, plan)
    grads = map_leaves(as_given if scattered else to_shards, grads, plan)
    update = optax.with_extra_args_support(tx).update
    updates, new_state = update(grads, opt_state, shards, shards_of=plan, packed=packed)
    with jax.numpy_dtype_promotion("standard"):  # float32 updates of bfloat16 parameters, also where users forbid it
        new_shards = optax.apply_updates(shards, updates)
    if keep is not None:
        new_shards, new_state = _select(keep, (new_shards, new_state), (shards, opt_state))
    norms = {}
    if measure:
        held = plan if packed else _unsplit(plan, [path for path, leaf in plan.items if leaf.layout == "packed"])
        norms = {"update_norm": global_norm(updates, held), "param_norm": global_norm(new_shards, held)}
    return Applied(map_leaves(to_whole, new_shards, plan), new_state, norms)


def global_norm(tree: Any, plan: Plan) -> jax.Array:
    """sqrt(sum of |x|^2) over all leaves, of which each device has a shard: one all-reduce of one float32.

    Args:
      tree: like the parameters, in the layout of the state. Padding is zeros and adds nothing.
      plan: of the parameters.
    """
    specs, leaves = [], []

    def collect(leaf: LeafPlan, x: Any, path: str) -> None:
        if x is not None:
            specs.append(leaf.state_spec)
            leaves.append(constrain(x, plan.mesh, leaf.state_spec))

    map_leaves(collect, tree, plan)
    mesh = plan.mesh

    def local(xs: list[jax.Array]) -> jax.Array:
        total = jnp.zeros([], jnp.float32)
        for x, spec in zip(xs, specs, strict=True):
            split = math.prod(mesh.shape[axis] for axes in entries(spec, x.ndim) for axis in axes)
            square = jnp.sum(jnp.square(jnp.abs(x).astype(jnp.float32)))
            total += square * jnp.float32(split / mesh.size)  # Every device that has a copy adds its part of it.
        return jax.lax.psum(total, mesh.axis_names)

    squared = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P(), check_vma=False)(leaves)
    return jnp.sqrt(squared)


def _unsplit(plan: Plan, paths: Collection[str]) -> Plan:
    """The plan with some leaves whole: as gradients are that are reduced and not scattered, or as a combinator sees."""

    def whole(leaf: LeafPlan) -> LeafPlan:
        return dataclasses.replace(
            leaf, state_spec=leaf.param_spec, layout="whole", padding=0, shard_axes=(), num_shards=1, reason="unsplit"
        )

    return dataclasses.replace(
        plan, items=tuple((path, whole(leaf) if path in paths else leaf) for path, leaf in plan.items)
    )


def _select(keep: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(keep, a, jnp.asarray(b)), new, old)


def _learning_rate(tx: Any, opt_state: Any) -> dict[str, jax.Array]:
    """The rate of this step, where the optimizer says it: a number, or a schedule of its count."""
    rate = getattr(tx, "learning_rate", None)
    if callable(rate):
        (_, count), *_ = optax.tree.get_all_with_path(opt_state, "count")
        rate = rate(count)
    return {} if rate is None else {"learning_rate": jnp.asarray(rate, jnp.float32)}
