"""What the leaves of a transformation's arguments and state are: elements of a parameter, or the same everywhere."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from shardadam.elementwise import NotElementwise, Value
from shardadam.layout import LeafPlan
from shardadam.plan import Plan, path_name
from shardadam.planned import KeyPath, owners


class Slot(NamedTuple):
    """One leaf of a tree: the elements of the parameter `path`, by its plan, or (None) the same on every device."""

    keypath: KeyPath
    path: str | None = None
    leaf: LeafPlan | None = None

    @property
    def spec(self) -> P:
        """How its array is sharded, in the state's layout."""
        return P() if self.leaf is None else self.leaf.state_spec


def logical(tree: Any, slots: list[Slot]) -> Any:
    """ShapeDtypeStructs of a tree as optax would hold it: of the parameters' shapes."""

    def shape_of(slot: Slot, x: Any) -> jax.ShapeDtypeStruct:
        weak = getattr(x, "weak_type", isinstance(x, int | float))
        shape = jnp.shape(x) if slot.leaf is None else slot.leaf.shape
        return jax.ShapeDtypeStruct(shape, jnp.result_type(x), weak_type=weak)

    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([shape_of(*row) for row in zip(slots, leaves, strict=True)])


def param_slots(tree: Any, plan: Plan) -> list[Slot]:
    """Of a tree like the parameters. A scalar is the same on every device, also where it is a parameter.

    Raises:
      ValueError: a leaf that the plan does not have.
    """
    keyed = [keypath for keypath, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    leaves = [plan.leaf(path_name(keypath)) for keypath in keyed]
    return [Slot(k, path_name(k), leaf) if leaf.shape else Slot(k) for k, leaf in zip(keyed, leaves, strict=True)]


def state_slots(state: Any, plan: Plan) -> list[Slot]:
    """Of a transformation's state, as it is held.

    Raises:
      ValueError: a leaf that is a parameter's by its name, and not by its shape.
    """

    def misfit(field: str, path: str, shape: tuple[int, ...]) -> Exception:
        leaf = plan.leaves[path]
        return ValueError(
            f"`{path}`: {field} has shape {shape}, the plan has {leaf.state_shape} ({leaf.layout}); the state was made "
            "with another plan, or by optax: use this transformation's own init, or restore the state with "
            "shardadam.Checkpointer, which converts"
        )

    return [
        _slot(keypath, jnp.shape(x), plan, lambda leaf: leaf.state_shape, misfit)
        for keypath, x in jax.tree_util.tree_flatten_with_path(state)[0]
    ]


def logical_slots(tree: Any, plan: Plan) -> list[Slot]:
    """Of a state, or of further arguments, as optax has them.

    Raises:
      NotElementwise: a leaf that is a parameter's by its name, and not by its shape, or the other way round.
    """

    def misfit(field: str, path: str, shape: tuple[int, ...]) -> Exception:
        return NotElementwise(f"`{field}` of `{path}` has shape {shape}, the parameter {plan.leaves[path].shape}")

    split = {leaf.shape for _, leaf in plan.items if leaf.shape and leaf.layout != "whole"}
    slots = []
    for keypath, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        slot = _slot(keypath, jnp.shape(x), plan, lambda leaf: leaf.shape, misfit)
        if slot.path is None and jnp.shape(x) in split:
            raise NotElementwise(f"`{path_name(keypath)}`, of shape {jnp.shape(x)}, has the name of no parameter")
        slots.append(slot)
    return slots


def check_results(kinds: list[Value], slots: list[Slot]) -> None:
    """Refuses a result that is not made of its own parameter's elements.

    Raises:
      NotElementwise: names it.
    """
    for kind, slot in zip(kinds, slots, strict=True):
        if kind.owner not in (None, slot.path) or (
            slot.path is not None and kind.owner is None and not kind.is_uniform
        ):
            name, source = path_name(slot.keypath), kind.origin if kind.owner is None else f"`{kind.owner}`"
            raise NotElementwise(f"`{name}`, of shape {kind.shape}, is made of {source}")


def _slot(keypath: KeyPath, shape: tuple[int, ...], plan: Plan, shape_of: Any, misfit: Any) -> Slot:
    candidates = list(owners(keypath, plan)) if shape else []
    for path in candidates:
        if shape == shape_of(plan.leaves[path]):
            return Slot(keypath, path, plan.leaves[path])
    if not candidates:
        return Slot(keypath)
    field = path_name(keypath).removesuffix(candidates[0]).rstrip("/")
    raise misfit(field, candidates[0], shape)


def check_shapes(grads: Any, slots: list[Slot], in_layout: Callable[[Slot], bool]) -> None:
    """Refuses gradients that do not fit the plan by the leaf's name, before XLA does by an operand's number.

    Raises:
      ValueError: names the leaf.
    """
    for g, slot in zip(jax.tree.leaves(grads), slots, strict=True):
        leaf = slot.leaf
        wanted = () if leaf is None else leaf.state_shape if in_layout(slot) else leaf.shape
        if jnp.shape(g) != wanted:
            raise ValueError(
                f"`{path_name(slot.keypath)}`: the gradient has shape {jnp.shape(g)}, the plan has {wanted}; make the "
                "plan from the parameters that these are the gradients of"
            )
