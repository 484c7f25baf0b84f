"""Every kind of mesh that a pretraining job has, parameters laid as it lays them, and what one update does there."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from conftest import make_mesh
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from trees import make_step, put, random_tree

import shardadam
from shardadam.assertions import axes_of
from shardadam.hlo import CollectiveOp, collectives
from shardadam.plan import Plan

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
TRUNK = {"embed": (96, 32), "w_in": (32, 64), "w_out": (64, 32), "odd": (34, 65), "bias": (330,), "scale": (7,)}
TENSOR = {"embed": P("model"), "w_in": P(None, "model"), "w_out": P("model"), "odd": P("model")}


class Case(NamedTuple):
    """One kind of mesh."""

    name: str
    sizes: dict[str, int]
    axis_name: str | tuple[str, ...]
    specs: dict[str, P]  # Parameters that are not named are replicated.
    shapes: dict[str, tuple[int, ...]] = TRUNK
    mixed: tuple[tuple[AxisType, ...], ...] = ()  # The mixtures of axis types that its axes allow,
    mixed_axis_name: str | tuple[str, ...] = ""  # with another axis_name where its own are of two types then.


FSDP = {"embed": P("fsdp"), "w_in": P("fsdp"), "w_out": P("fsdp"), "odd": P()}
CASES = (
    Case("data", {"data": 8}, "data", {}),
    Case(
        "data x model", {"data": 4, "model": 2}, "data", TENSOR, mixed=((AUTO, EXPLICIT), (EXPLICIT, AUTO))
    ),
    Case(
        "data x fsdp (HSDP)", {"data": 2, "fsdp": 4}, ("data", "fsdp"), FSDP,
        mixed=((AUTO, EXPLICIT), (EXPLICIT, AUTO)), mixed_axis_name="data",
    ),
    Case(
        "fsdp alone", {"fsdp": 8}, "fsdp", {name: P("fsdp") for name in ("embed", "w_in", "w_out")},
        shapes={name: TRUNK[name] for name in ("embed", "w_in", "w_out")},
    ),
    Case(
        "data x fsdp x model", {"data": 2, "fsdp": 2, "model": 2}, ("data", "fsdp"),
        {"embed": P("model", "fsdp"), "w_in": P("fsdp", "model"), "w_out": P("model", "fsdp"), "odd": P("model")},
        mixed=((AUTO, AUTO, EXPLICIT), (EXPLICIT, EXPLICIT, AUTO)),
    ),
    Case("slice x data", {"slice": 2, "data": 4}, ("slice", "data"), {}),
    Case(
        "data x expert", {"data": 4, "expert": 2}, ("data", "expert"),
        {"experts_in": P("expert"), "experts_out": P("expert")},
        shapes=TRUNK | {"experts_in": (4, 32, 40), "experts_out": (4, 33, 31)},
        mixed=((AUTO, EXPLICIT), (EXPLICIT, AUTO)), mixed_axis_name="data",
    ),
)  # fmt: skip


class Variant(NamedTuple):
    """A case with its axes' types."""

    case: Case
    types: tuple[AxisType, ...]

    @property
    def types_name(self) -> str:
        """For people: "Auto", "Explicit", or each axis with its own."""
        if len(set(self.types)) == 1:
            return self.types[0].name
        return ", ".join(f"{axis} {kind.name}" for axis, kind in zip(self.case.sizes, self.types, strict=True))

    @property
    def axis_name(self) -> str | tuple[str, ...]:
        """What the state is split over."""
        mixed = len(set(self.types)) > 1
        return (self.case.mixed_axis_name if mixed else "") or self.case.axis_name


VARIANTS = [
    Variant(case, types)
    for case in CASES
    for types in ((AUTO,) * len(case.sizes), (EXPLICIT,) * len(case.sizes), *case.mixed)
]
KINDS = ("drop-in", "TrainState")


class Laid(NamedTuple):
    """Parameters on a mesh, and their plan."""

    plan: Plan
    params: Any

    def place(self, tree: Any) -> Any:
        """A host tree as the parameters are."""
        return put(tree, self.plan.mesh, {path: leaf.param_spec for path, leaf in self.plan.items})


def lay(variant: Variant) -> Laid:
    """Puts the case's parameters on its mesh, and plans their state, every leaf that can be split included."""
    case = variant.case
    mesh, host = make_mesh(case.sizes, variant.types), random_tree(0, shapes=case.shapes)
    # By name: on a mixed mesh, types show only the Explicit part of a spec.
    specs = {name: case.specs.get(name, P()) for name in case.shapes}
    plan = shardadam.make_plan(host, mesh, axis_name=variant.axis_name, param_specs=specs, min_size=64)
    return Laid(plan, put(host, mesh, specs))


class Update(NamedTuple):
    """One compiled update, its first arguments, and how to go on."""

    compiled: Any
    state: Any  # (params, opt_state), or a TrainState.
    advance: Any  # (state, grads) -> state

    def params_and_state(self, state: Any) -> tuple[Any, Any]:
        """The parameters and the optimizer's state in `state`."""
        return state if isinstance(state, tuple) else (state.params, state.opt_state)


def compile_update(laid: Laid, kind: str) -> Update:
    """The update of a hand-written loop with the drop-in, or that of a TrainState; Adam with weight decay."""
    tx = shardadam.adamw(1e-2, plan=laid.plan)
    if kind == "drop-in":
        state = (laid.params, tx.init(laid.params))
        compiled = make_step(tx).lower(*state, laid.params).compile()
        return Update(compiled, state, lambda state, grads: compiled(*state, grads))
    state = shardadam.TrainState.create(apply_fn=None, params=laid.params, tx=tx)
    compiled = jax.jit(lambda state, grads: state.apply_gradients(grads=grads)).lower(state, laid.params).compile()
    return Update(compiled, state, compiled)


def held_per_device(state: Any, mesh: Any) -> set[int]:
    """Bytes of a tree on each device, each number once."""
    leaves = jax.tree.leaves(state)
    return {
        sum(s.data.nbytes for x in leaves for s in x.addressable_shards if s.device == device)
        for device in mesh.devices.flat
    }


class Gathered(NamedTuple):
    """All collectives of one op over the same axes."""

    op: str
    axes: tuple[str, ...]
    count: int
    num_bytes: int  # What one device sends.


def traffic(compiled: Any, plan: Plan) -> list[Gathered]:
    """The collectives of one update, summed up."""

    def key(op: CollectiveOp) -> tuple[str, tuple[str, ...]]:
        axes = axes_of(op, plan)
        return op.op, tuple(axis for axis in plan.mesh.axis_names if axis in axes)

    ops = sorted((op for op in collectives(compiled) if op.group_size > 1), key=key)
    groups = ((k, list(group)) for k, group in itertools.groupby(ops, key))
    return [
        Gathered(*k, sum(len(op.operands) for op in group), sum(op.total_wire_bytes or 0 for op in group))
        for k, group in groups
    ]


def row(variant: Variant, plan: Plan, updates: dict[str, Any]) -> str:
    """The variant's line in docs/meshes.md, from what was compiled."""

    def cell(compiled: Any) -> str:
        found = traffic(compiled, plan)
        each = (f"{g.count} {g.op}{'s' * (g.count > 1)} over {' x '.join(g.axes)}: {g.num_bytes:,}" for g in found)
        return "; ".join(each) or "none"

    over = variant.axis_name if isinstance(variant.axis_name, str) else " x ".join(variant.axis_name)
    numbers = f"{plan.replicated_state_bytes():,} | {plan.state_bytes_per_device():,}"
    cells = " | ".join(cell(updates[kind]) for kind in KINDS)
    return f"| {variant.case.name} | {variant.types_name} | {over} | {numbers} | {cells} |"


@functools.cache
def one_device(case_name: str, steps: int) -> tuple[Any, Any]:
    """The oracle: (params, ScaleByAdamState) of jitted optax on one device, after so many updates."""
    case = next(case for case in CASES if case.name == case_name)
    tx = optax.adamw(1e-2)
    params = jax.tree.map(jax.numpy.array, random_tree(0, shapes=case.shapes))
    state, step = tx.init(params), make_step(tx)
    for t in range(steps):
        params, state = step(params, state, random_tree(1 + t, shapes=case.shapes))
    return jax.tree.map(np.asarray, (params, state[0]))
