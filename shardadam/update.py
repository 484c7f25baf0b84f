"""An element-wise transformation on a mesh: its own `init` and `update`, from whole leaves to shards and back."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from shardadam.plan import Plan
from shardadam.program import Program, Result, make_program, run
from shardadam.sharding import constrain, pack_leaf, unpack_leaf
from shardadam.slots import Slot, check_shapes, logical, logical_slots, param_slots, state_slots

InShards = Literal["none", "shaped", "all"]
"""Which leaves of grads, params and updates lie as the state does: none, those that keep their shape so, or all."""


def initializer(rule: optax.GradientTransformationExtraArgs) -> Callable[[Any, Plan], Any]:
    """`rule.init` on a mesh: `(params, plan) -> state`, each device making its own shards.

    What it compiles lives as long as it does: a rule may hold on to the caller's tracers.
    """

    made_of_params: dict[Any, bool] = {}  # Found once for parameters of the same shapes.

    def program(params: Any, plan: Plan) -> Program:
        return make_program(
            rule.init, [params], [param_slots(params, plan)], lambda out: logical_slots(out, plan), plan
        )

    @functools.partial(jax.jit, static_argnames=("shapes", "plan"), inline=True)
    def make(params: Any, *, shapes: Any, plan: Plan) -> Any:
        if shapes is not None:  # Nothing comes of the parameters' values.
            params = jax.tree.unflatten(shapes[0], [jnp.zeros(x.shape, x.dtype) for x in shapes[1]])
        made = program(params, plan)
        shards = [_to_shard(*row, plan) for row in zip(jax.tree.leaves(params), made.ins, strict=True)]
        return jax.tree.structure(made.traced.out).unflatten(_placed(run(made, shards), made.outs, plan))

    def init(params: Any, plan: Plan) -> Any:
        if isinstance(plan.mesh, AbstractMesh) and not isinstance(jnp.zeros([]), jax.core.Tracer):
            raise ValueError(
                f"plan: made without devices, for {dict(plan.mesh.shape)}; pass mesh=, or enter jax.set_mesh(mesh)"
            )
        slots = param_slots(params, plan)
        leaves, treedef = jax.tree.flatten(logical(params, slots))
        key = (treedef, tuple(leaves), plan)
        if key not in made_of_params:
            traced = program(params, plan)
            _check_update(rule, params, traced, plan)
            made_of_params[key] = any(kind.owner is not None for kind in traced.kinds)
        if made_of_params[key]:
            return make(_on_mesh(params, slots, plan), shapes=None, plan=plan)
        return make(None, shapes=key[:2], plan=plan)

    return init


def updater(rule: optax.GradientTransformationExtraArgs) -> Callable[..., tuple[Any, Any]]:
    """`rule.update` on a mesh; what it compiles lives as long as it does.

    It takes `(updates, state, params, extra, keep)`, where `extra` is a dict of rule.update's further keywords, and
    static: the plan, which leaves are `in_shards`, and pairs of those keywords that are no arrays.
    """

    @functools.partial(jax.jit, static_argnames=("plan", "in_shards", "static"), inline=True)
    def kernel(
        updates: Any, state: Any, params: Any, extra: Any, keep: Any, *, plan: Plan, in_shards: InShards, static: Any
    ) -> tuple[Any, Any]:
        trees = (updates, state, params, extra)
        slots = [f(x, plan) for f, x in zip((param_slots, state_slots, param_slots, logical_slots), trees, strict=True)]
        made = update_program(rule, trees, slots, static, plan)
        lying: tuple[InShards, ...] = (in_shards, "all", in_shards, "none")
        shards = [
            [_to_shard(x, slot, plan, _lies(slot, where)) for x, slot in zip(jax.tree.leaves(tree), each, strict=True)]
            for tree, each, where in zip(trees, slots, lying, strict=True)
        ]
        shards[0] = [_as_value(g, slot) for g, slot in zip(shards[0], slots[0], strict=True)]
        count = len(jax.tree.leaves(made.traced.out[0]))
        gradient_of = {slot.path: i for i, slot in enumerate(slots[0])}
        state_at = {slot.keypath: len(slots[0]) + i for i, slot in enumerate(slots[1])}
        results = run(
            made,
            [x for each in shards for x in each],
            updates=count,
            before=[gradient_of.get(slot.path) for slot in made.outs[:count]]
            + [state_at.get(slot.keypath) for slot in made.outs[count:]],
            keep=keep,
        )
        done = [
            _from_shard(x, slot, plan, _lies(slot, in_shards))
            for x, slot in zip(results[:count], made.outs, strict=False)
        ]
        done += _placed(results[count:], made.outs[count:], plan)
        return jax.tree.structure(made.traced.out).unflatten(done)

    def update(
        updates: Any,
        state: Any,
        params: Any,
        *,
        plan: Plan,
        in_shards: InShards,
        keep: jax.Array | None,
        extra: dict[str, Any],
    ) -> tuple[Any, Any]:
        slots = param_slots(updates, plan)
        check_shapes(updates, slots, lambda slot: _lies(slot, in_shards))
        arrays = {k: v for k, v in extra.items() if all(map(_is_array, jax.tree.leaves(v)))}
        static = tuple((k, v) for k, v in extra.items() if k not in arrays)
        updates = _on_mesh(updates, slots, plan, in_shards)
        params = _on_mesh(params, param_slots(params, plan), plan, in_shards)
        return kernel(updates, state, params, arrays, keep, plan=plan, in_shards=in_shards, static=static)

    return update


def update_program(rule: Any, trees: Any, slots: Any, static: tuple[tuple[str, Any], ...], plan: Plan) -> Program:
    """`rule.update` of `(updates, state, params, extra)`, of arrays or of ShapeDtypeStructs."""

    def update(updates: Any, state: Any, params: Any, extra: Any) -> Any:
        return rule.update(updates, state, params, **extra, **dict(static))

    def outs(out: Any) -> list[Slot]:
        return param_slots(out[0], plan) + logical_slots(out[1], plan)

    return make_program(update, trees, slots, outs, plan)


def _check_update(rule: Any, params: Any, init: Program, plan: Plan) -> None:
    """Refuses a rule whose `update` is not element-wise, as soon as there is a state; on abstract values."""
    state = init.traced.out
    if not init.ins:
        return  # The placeholder for a tree of parameters that optax.tree.map_params comes with.
    slots = [init.ins, logical_slots(state, plan), init.ins, []]
    try:
        update_program(rule, (params, state, params, {}), slots, (), plan)
    except TypeError:
        return  # It wants keywords that only the caller of update has; it is checked there as well.


def _on_mesh(tree: Any, slots: list[Slot], plan: Plan, in_shards: InShards = "none") -> Any:
    """A tree like the parameters whose eager arrays, which may still be on one device, are on the plan's mesh."""
    if not isinstance(plan.mesh, Mesh):
        return tree

    def place(x: Any, slot: Slot) -> Any:
        if isinstance(x, jax.core.Tracer) or _lies(slot, in_shards):
            return x
        return constrain(x, plan.mesh, P() if slot.leaf is None else slot.leaf.param_spec)

    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([place(*row) for row in zip(leaves, slots, strict=True)])


def _lies(slot: Slot, in_shards: InShards) -> bool:
    """Whether a leaf of grads, params or updates is in the state's layout."""
    return in_shards == "all" or (in_shards == "shaped" and (slot.leaf is None or slot.leaf.layout != "packed"))


def _to_shard(x: jax.Array, slot: Slot, plan: Plan, in_layout: bool = False) -> jax.Array:
    """A leaf in the state's layout, which it may have already. Inverse of `_from_shard`."""
    if slot.leaf is None or in_layout:
        return constrain(jnp.asarray(x), plan.mesh, slot.spec)
    return pack_leaf(x, slot.leaf, plan.mesh)


def _from_shard(result: Result, slot: Slot, plan: Plan, in_layout: bool) -> jax.Array:
    """An update as optax returns it, or in the state's layout.

    Its last factor, the learning rate, comes here: in one fusion with the sum with the parameter, where one FMA takes
    both, as on one device.
    """
    x, factor = result
    x = constrain(x, plan.mesh, slot.spec) if slot.leaf is None or in_layout else unpack_leaf(x, slot.leaf, plan.mesh)
    return x if factor is None else x * factor


def _placed(results: list[Result], slots: list[Slot], plan: Plan) -> list[jax.Array]:
    """The leaves of a state."""
    return [constrain(result.x, plan.mesh, slot.spec) for result, slot in zip(results, slots, strict=True)]


def _as_value(g: jax.Array, slot: Slot) -> jax.Array:
    """A gradient's shard as a value of its own.

    Without the barrier XLA:CPU fuses its slice into the moments' sums, and for odd shapes contracts b1 mu + (1 - b1) g
    into the other of its two FMAs than in the program of one device, an ulp away from optax. Costs 1/N of a gradient.
    """
    return g if slot.leaf is None or slot.leaf.num_shards == 1 else jax.lax.optimization_barrier(g)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | int | float | complex) or hasattr(x, "__array__")
