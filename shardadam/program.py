"""A traced element-wise function and what its arguments and results are, run on every device's shards."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from shardadam.elementwise import Part, Traced, Value, evaluate, local_data, outline, trace
from shardadam.layout import LeafPlan, entries, shard_shape
from shardadam.plan import Plan
from shardadam.sharding import constrain
from shardadam.slots import Slot, check_results, logical
from shardadam.transformation import select


class Program(NamedTuple):
    """A function of some trees, traced on their logical shapes."""

    traced: Traced
    ins: list[Slot]
    outs: list[Slot]
    kinds: list[Value]  # Of its results, on abstract values.
    plan: Plan


def make_program(
    f: Callable[..., Any],
    trees: Sequence[Any],
    slots: Sequence[list[Slot]],
    out_slots: Callable[[Any], list[Slot]],
    plan: Plan,
) -> Program:
    """Traces `f(*trees)`, of which `slots` say what each leaf is, and `out_slots` what each leaf of its result is.

    Raises:
      NotElementwise: it does not work element by element.
    """
    traced = trace(f, *map(logical, trees, slots))
    ins, outs, closed = [slot for each in slots for slot in each], out_slots(traced.out), traced.closed
    parts = {path: Part(leaf.shape, ()) for path, leaf in plan.items}

    def on_whole(arrays: list[Any], consts: list[Any]) -> list[Value]:
        return evaluate(closed, consts, _values(arrays, ins), parts)

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type) for x in closed.in_avals]
    kinds = outline(on_whole, shapes, [jax.ShapeDtypeStruct(jnp.shape(c), jnp.result_type(c)) for c in closed.consts])
    check_results(kinds, outs)
    return Program(traced, ins, outs, kinds, plan)


class Result(NamedTuple):
    """A result in the state's layout, `x * factor`, or x where that is None."""

    x: Any
    factor: Any


def run(
    program: Program,
    shards: list[jax.Array],
    *,
    updates: int = 0,
    before: Sequence[int | None] | None = None,
    keep: jax.Array | None = None,
) -> list[Result]:
    """Runs it on each device's shards.

    Args:
      program: from `make_program`.
      shards: its arguments' leaves, in the layout of the state.
      updates: how many of its results, the first ones, are updates: they come with their last factor apart, and are
        zeros where `keep` is False.
      before: for each result, which argument is zero where it is padding (default: none), and what the result is
        where `keep` is False.
      keep: a bool of shape ().
    """
    closed, ins, outs, plan = program.traced.closed, program.ins, program.outs, program.plan
    hoisted = [i < updates and kind.factor is not None for i, kind in enumerate(program.kinds)]
    before = [None] * len(outs) if before is None else before

    # Manual axes: XLA sees the very program of one device, and so rounds and fuses as it does there.
    def own(shards: list[jax.Array], consts: list[jax.Array], keep: jax.Array | None) -> list[Result]:
        found = {slot.path: slot.leaf for slot in (*ins, *outs)}
        parts = {path: _part(leaf, plan) for path, leaf in found.items() if path is not None and leaf is not None}
        values = evaluate(closed, consts, _values(shards, ins), parts)

        def settle(i: int, value: Value, slot: Slot) -> Result:
            x, factor = jnp.asarray(local_data(value, slot.path, parts)), None
            if hoisted[i] and value.factor is not None:
                x, factor = value.factor
            at = before[i]
            old = jnp.zeros([], x.dtype) if at is None else shards[at].astype(x.dtype)
            if slot.path is not None and parts[slot.path].real is not None and not value.is_zero:
                x = jnp.where(parts[slot.path].real, x, old)
            return Result(select(keep, x, jnp.zeros([], x.dtype) if i < updates else old), factor)

        return [settle(i, *row) for i, row in enumerate(zip(values, outs, strict=True))]

    scalars = [constrain(jnp.asarray(x), plan.mesh, P()) for x in closed.consts]
    keep = None if keep is None else constrain(jnp.asarray(keep), plan.mesh, P())
    return jax.shard_map(
        own,
        mesh=plan.mesh,
        in_specs=([slot.spec for slot in ins], [P()] * len(scalars), None if keep is None else P()),
        out_specs=[Result(slot.spec, P() if apart else None) for slot, apart in zip(outs, hoisted, strict=True)],
    )(shards, scalars, keep)


def _values(arrays: list[Any], ins: list[Slot]) -> list[Value]:
    shapes = [jnp.shape(x) if slot.leaf is None else slot.leaf.shape for x, slot in zip(arrays, ins, strict=True)]
    rows = zip(arrays, shapes, ins, strict=True)
    return [Value(x, shape, slot.path, is_zero=slot.path is not None) for x, shape, slot in rows]


def _part(leaf: LeafPlan, plan: Plan) -> Part:
    """One device's shard of a leaf of the state."""
    shape = shard_shape(leaf.state_shape, leaf.state_spec, plan.mesh.shape)
    split = entries(leaf.state_spec, len(leaf.state_shape))
    real = _is_real(leaf, shape) if leaf.padding else None
    return Part(shape, tuple(axis for axes in split for axis in axes), real)


def _is_real(leaf: LeafPlan, shape: tuple[int, ...]) -> jax.Array:
    """Where one device's rows of a packed leaf hold elements of the parameter, and no padding."""
    dim = leaf.stacked_dims
    row = jax.lax.axis_index(leaf.shard_axes) * shape[dim] + jax.lax.broadcasted_iota(jnp.int32, shape, dim)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, dim + 1)
    full, rest = divmod(leaf.layer_size // leaf.num_parts, leaf.lanes)
    return (row < full) | ((row == full) & (lane < rest))
