"""The parameter trees in `tests/zoo`: their shapes as published models have them, layer patterns written once."""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

ZOO = Path(__file__).parent / "zoo"
_REPEATED = re.compile(r"(.*)\{(\d+)\}$")


class Model(NamedTuple):
    """One file of the zoo."""

    name: str
    parameters: int  # As published; the tree must have just so many.
    source: str
    tree: Any  # Shapes; a key such as "layers_{32}" stands for layers_0 to layers_31.

    def params(self) -> Any:
        """Abstract float32 parameters, each layer with its own leaves."""
        return _abstract(_unrolled(self.tree))

    def stacked(self) -> tuple[Any, Any]:
        """(abstract parameters, stacked dims) with layers as one leaf each, as a `lax.scan` over them has it."""
        return _abstract(_stacked(self.tree)), _dims(self.tree)


def models() -> list[Model]:
    """All of the zoo, by size."""
    found = [Model(**json.loads(path.read_text())) for path in sorted(ZOO.glob("*.json"))]
    return sorted(found, key=lambda model: model.parameters)


def size_of(tree: Any) -> int:
    """Elements in all leaves."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _abstract(shapes: Any) -> Any:
    def one(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: one(value) for key, value in x.items()}
        return jax.ShapeDtypeStruct(tuple(x), jnp.float32)

    return one(shapes)


def _unrolled(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    out = {}
    for key, value in tree.items():
        repeated = _REPEATED.match(key)
        names = [f"{repeated[1]}{i}" for i in range(int(repeated[2]))] if repeated else [key]
        out |= dict.fromkeys(names, _unrolled(value))
    return out


def _stacked(tree: Any, stack: tuple[int, ...] = ()) -> Any:
    if not isinstance(tree, dict):
        return [*stack, *tree]
    return {key: _stacked(value, (*stack, *_count(key))) for key, value in tree.items()}


def _dims(tree: Any, depth: int = 0) -> Any:
    """How many stacked dims each leaf of `_stacked` has."""
    if not isinstance(tree, dict):
        return depth
    return {key: _dims(value, depth + len(_count(key))) for key, value in tree.items()}


def _count(key: str) -> tuple[int, ...]:
    repeated = _REPEATED.match(key)
    return (int(repeated[2]),) if repeated else ()
