"""`assert_collectives`: holds a compiled program to what its plan says goes over the wire."""

import dataclasses
import math
from collections.abc import Collection, Iterator
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from shardadam.estimate import estimate_bytes
from shardadam.hlo import CollectiveOp, collectives
from shardadam.layout import LeafPlan
from shardadam.plan import Plan

_WANTED = ("all-reduce", "reduce-scatter", "all-gather")
_SCALARS = 64  # XLA:GPU joins all-reduces of scalars into one of a short array: up to here they count as scalars.
_FEW_BYTES = 2**16  # What all scalars of a step may send beside the plan's bytes: some for each layer and microbatch.


def assert_collectives(
    compiled: Any,
    plan: Plan,
    *,
    stage: Literal[1, 2, 3] = 2,
    num_reductions: int = 1,
    reduce_dtype: Any = None,
    max_ratio: float = 1.05,
    allow_widening: bool = False,
    allow_ops: Collection[str] = (),
    model_axes: Collection[str] = (),
) -> None:
    """Fails where a compiled step, or update, moves other data than its plan says, with the offending instructions.

    Over the plan's axes there may be reduce-scatters and all-gathers, and all-reduces of scalars and of leaves that
    stay whole (at stage 1: of every leaf). Scalars are of up to 64 elements; where all of them together send more than
    64 KiB they count with the plan's bytes.

    Args:
      compiled: what `jax.jit(step).lower(...).compile()` returns, or its text. Its mesh is the plan's.
      plan: of the parameters.
      stage: as for `make_train_step`.
      num_reductions: how often a step reduces the gradients, and at stage 3 gathers the parameters: `num_microbatches`
        where it accumulates shards, 0 where they come reduced.
      reduce_dtype: the widest dtype that gradients may be reduced in; default: each leaf's own.
      max_ratio: how many times the plan's bytes may go over the wire: in all, and of gathers and of reductions what is
        wider than some of the plan's dtypes.
      allow_widening: XLA:CPU has no collectives in 16 bits and does them in float32: True compares as if that were
        asked for. TPU and GPU need no such thing.
      allow_ops: more ops that may appear, such as "collective-permute", with which TPUs align what they reduce-scatter.
      model_axes: axes that the model itself communicates over, as tensor parallelism does: what stays within them is
        not looked at.

    Raises:
      AssertionError: lists every offence and its instruction.
      ValueError: a program for another number of devices than the plan's.

    Example:
      >>> params = {"kernel": jnp.ones((8, 128))}
      >>> plan = shardadam.make_plan(params, jax.make_mesh((1,), ("data",)))
      >>> tx = shardadam.adam(1e-3, plan=plan)
      >>> update = jax.jit(tx.update).lower(params, tx.init(params), params)
      >>> shardadam.assert_collectives(update.compile(), plan, num_reductions=0)
    """
    if allow_widening:
        reduce_dtype = None if reduce_dtype is None else _widest(jnp.dtype(reduce_dtype))
        plan = _widened(plan)
    found = [op for op in collectives(compiled) if op.group_size > 1]
    ours = [op for op in found if not axes_of(op, plan) <= set(model_axes)]
    faults = []
    for op in ours:
        across = sorted(axes_of(op, plan) - set(plan.axis_names))
        if op.op not in (*_WANTED, *allow_ops):
            faults.append(f"an unexpected {op.op}: {op}")
        elif across:
            faults.append(f"{op.op} over {across}, which is not among the plan's axes {plan.axis_names}: {op}")
        elif op.op == "all-reduce" and stage != 1 and not _may_be_whole(op, plan):
            faults.append(f"all-reduced, and should be reduce-scattered or gathered: {op}")
    faults += _excess(ours, plan, stage, num_reductions, reduce_dtype, max_ratio)
    if faults:
        raise AssertionError(f"{len(faults)} faults in {len(found)} collectives:\n  " + "\n  ".join(faults))


def axes_of(op: CollectiveOp, plan: Plan) -> set[str]:
    """The axes of the plan's mesh that a collective runs over.

    Raises:
      ValueError: the program runs on more devices than the mesh has.
    """
    shape, names = tuple(plan.mesh.shape.values()), tuple(plan.mesh.shape)
    if max(max(group) for group in op.groups) >= math.prod(shape):
        raise ValueError(f"compiled: got a program for more devices than the plan's {dict(plan.mesh.shape)}: {op}")
    found = set()
    for group in op.groups:
        places = np.array(np.unravel_index(group, shape))
        found |= {name for name, along in zip(names, places, strict=True) if len(set(along.tolist())) > 1}
    return found


def _may_be_whole(op: CollectiveOp, plan: Plan) -> bool:
    """Whether all that is reduced are scalars and leaves that stay whole, or layers of such."""
    allowed = {size for leaf in plan.leaves.values() if leaf.num_shards == 1 for size in _sizes(leaf)}
    return all(x.size <= _SCALARS or x.size in allowed for x in op.operands)


def _sizes(leaf: LeafPlan) -> Iterator[int]:
    yield leaf.size // (leaf.num_parts * leaf.stack_parts)
    yield leaf.layer_size // leaf.num_parts


def _widened(plan: Plan) -> Plan:
    """The plan as if every leaf were of float32, or of what it has that is wider."""
    items = tuple((path, dataclasses.replace(leaf, dtype=_widest(leaf.dtype))) for path, leaf in plan.items)
    return dataclasses.replace(plan, items=items)


def _widest(dtype: np.dtype) -> np.dtype:
    return dtype if dtype.itemsize >= 4 else np.dtype(np.float32)


def _excess(
    ops: list[CollectiveOp], plan: Plan, stage: Literal[1, 2, 3], num_reductions: int, reduce_dtype: Any, ratio: float
) -> list[str]:
    """What is wrong with the bytes of all collectives but those of a few scalars: in all, and in the wider dtypes."""
    scalars = [op for op in ops if all(x.size <= _SCALARS for x in op.operands)]
    if sum(op.total_wire_bytes or 0 for op in scalars) <= _FEW_BYTES:
        scalars = []
    arrays = [op for op in ops if any(x.size > _SCALARS for x in op.operands)]
    unknown = [op for op in arrays if op.total_wire_bytes is None]
    if unknown:
        return [f"in a loop whose trip count is not in the program, so its bytes are not known: {op}" for op in unknown]
    widths = {leaf.dtype.itemsize for leaf in plan.leaves.values()}
    widths |= set() if reduce_dtype is None else {jnp.dtype(reduce_dtype).itemsize}
    faults = []
    for width in [0, *sorted(widths)]:
        wide = [op for op in arrays if any(x.size > _SCALARS and x.bits > 8 * width for x in op.operands)]
        reduced, gathered = _budget(plan, stage, num_reductions, reduce_dtype, width)
        gathers = [op for op in wide if op.op == "all-gather"]
        others = [op for op in wide if op.op != "all-gather"]
        rows = [(gathers, gathered), (others, reduced)] if width else [(wide + scalars, reduced + gathered)]
        faults += [fault for ops, budget in rows if (fault := _over(ops, budget, width, ratio))]
    return faults


def _budget(plan: Plan, stage: Literal[1, 2, 3], num_reductions: int, reduce_dtype: Any, width: int) -> tuple[int, int]:
    """The plan's bytes on the wire, of reductions and of gathers, in dtypes of more than `width` bytes an element."""

    def of(reduced: bool) -> Any:
        own = reduce_dtype if reduced else None
        kept = [
            (path, leaf)
            for path, leaf in plan.items
            if (leaf.dtype if own is None else jnp.dtype(own)).itemsize > width
        ]
        return estimate_bytes(dataclasses.replace(plan, items=tuple(kept)), stage=stage, reduce_dtype=reduce_dtype)

    times = max(1, num_reductions) if stage == 3 else 1
    return num_reductions * of(reduced=True).reduce_bytes, times * of(reduced=False).gather_bytes


def _over(ops: list[CollectiveOp], budget: int, width: int, ratio: float) -> str | None:
    """Whether collectives send more than they may."""
    sent = sum(op.total_wire_bytes or 0 for op in ops)
    if sent <= ratio * budget:
        return None
    most = max(ops, key=lambda op: op.total_wire_bytes or 0)
    wide = f" in more than {width} bytes an element" if width else ""
    return f"{sent:,} bytes on the wire{wide}, the plan has {budget:,} ({ratio} x is allowed); the most by {most}"
