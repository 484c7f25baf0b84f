"""Runs a traced function on a part of each array's elements, and refuses one that does not work element by element.

The function is traced once, on whole (logical) shapes, so that what it makes of a shape (a mask on ndim, a division by
the number of elements) is what it would make of it without shards. `evaluate` then runs its primitives on any part of
the elements, such as one device's shard, in any layout.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.sharding import AbstractMesh

# fmt: off
_ELEMENTWISE = frozenset([
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "bitcast_convert_type",
    "cbrt", "ceil", "clamp", "clz", "complex", "conj", "convert_element_type", "copy", "copy_p", "cos", "cosh",
    "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "imag",
    "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg",
    "nextafter", "not", "or", "population_count", "pow", "real", "reduce_precision", "rem", "round", "rsqrt",
    "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square",
    "sub", "tan", "tanh", "xor",
])
_RESHAPES = frozenset(["broadcast_in_dim", "reshape", "squeeze", "expand_dims"])
_PLACES = frozenset(["shard_map", "sharding_constraint", "reshard", "mesh_cast"])
_CALLS = frozenset([
    "jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr",
    "checkpoint", "remat", "remat2",
])
_ODD = frozenset([
    "abs", "asin", "asinh", "atan", "cbrt", "ceil", "conj", "convert_element_type", "copy", "copy_p", "erf", "expm1",
    "floor", "imag", "log1p", "neg", "real", "reduce_precision", "round", "sign", "sin", "sinh", "sqrt", "square",
    "tan", "tanh",
])  # Those that are zero at zero.
# fmt: on
_RULE = re.compile(r"(\w+)\.<locals>\.(?:update|init)(?:_fn)?\b")


class NotElementwise(ValueError):
    """An element of a result depends on more than the same element of the arguments, and on scalars."""

    def __init__(self, what: str, where: str = ""):
        """`what` meets what, and in which transformation, where that is known."""
        self.what, self.where = what, where
        place = f" (in {where})" if where else ""
        super().__init__(f"not element-wise: {what}{place}; keep it out of shardadam.shard, or give state_specs=")


class Part(NamedTuple):
    """The part of one leaf's elements that `evaluate` works on."""

    shape: tuple[int, ...]
    axes: tuple[str, ...] = ()  # The manual mesh axes over which it varies.
    real: Any = None  # Where it has elements, and no padding: a bool array; None: everywhere.


@dataclasses.dataclass(frozen=True)
class Value:
    """An array within a traced function.

    Attributes:
      data: with an owner, a part of its elements. Without one the same on every device: the array, or a scalar that
        stands for an array of `shape` all of whose elements it is.
      shape: of the whole array, as traced.
      owner: the leaf whose elements these are made of, one for one.
      factor: `(x, scalar)` where data is their product: who adds it to something elsewhere can multiply there.
      origin: the primitive that made an array without an owner which is no scalar.
      is_zero: whether it is known to be zero on the padding.
    """

    data: Any
    shape: tuple[int, ...]
    owner: str | None = None
    factor: tuple[Any, Any] | None = None
    origin: str = "an argument"
    is_zero: bool = False

    @property
    def is_uniform(self) -> bool:
        """Whether it is a scalar, or stands for equal elements."""
        return self.owner is None and jnp.ndim(self.data) == 0


class Traced(NamedTuple):
    """A function traced on whole shapes: its program, and the tree of what it returns."""

    closed: ClosedJaxpr
    out: Any


def trace(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Traced:
    """Traces `f` on trees of ShapeDtypeStructs, outside of any mesh: meshes belong to whoever evaluates it."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        return Traced(*jax.make_jaxpr(f, return_shape=True)(*args, **kwargs))


def evaluate(
    closed: ClosedJaxpr, consts: Sequence[Any], args: Sequence[Value], parts: Mapping[str, Part]
) -> list[Value]:
    """The results of a traced function, for a part of the elements of each leaf.

    Args:
      closed: what was traced.
      consts: its constants, the same on every device.
      args: its arguments.
      parts: by leaf, which part of its elements the arguments have.

    Raises:
      NotElementwise: names the primitive, the leaf and, as far as the trace says it, the transformation.
    """
    values = [Value(c, jnp.shape(c), origin="a constant") for c in consts]
    return _run(closed.jaxpr, values, args, parts)


def local_data(value: Value, owner: str | None, parts: Mapping[str, Part]) -> Any:
    """The value as a part of the owner's elements, or, without an owner, as the whole array."""
    shape = value.shape if owner is None else parts[owner].shape
    if value.owner is not None:
        return value.data
    data = value.data if jnp.shape(value.data) == shape else jnp.broadcast_to(value.data, shape)
    return data if owner is None else _vary(data, parts[owner].axes)


def _run(jaxpr: Jaxpr, consts: Sequence[Value], args: Sequence[Value], parts: Mapping[str, Part]) -> list[Value]:
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(v: Any) -> Value:
        if not isinstance(v, Literal):
            return env[v]
        shape = jnp.shape(v.val)
        return Value(v.val, shape, origin="a constant", is_zero=shape == () and v.val == 0)

    for eqn in jaxpr.eqns:
        results = _equation(eqn, [read(v) for v in eqn.invars], parts)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _equation(eqn: Any, ins: list[Value], parts: Mapping[str, Part]) -> list[Value]:
    name, owners = eqn.primitive.name, sorted({x.owner for x in ins if x.owner is not None})
    shape = getattr(eqn.outvars[0].aval, "shape", ()) if eqn.outvars else ()
    if name in _CALLS:
        inner = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
        closed = isinstance(inner, ClosedJaxpr)
        try:
            return evaluate(inner, inner.consts, ins, parts) if closed else _run(inner, [], ins, parts)
        except NotElementwise as error:
            raise NotElementwise(error.what, error.where or _where(eqn)) from None
    if name in _PLACES:
        raise NotElementwise(f"`{name}`: something within has its own idea of where arrays lie", _where(eqn))
    if not owners and all(x.is_uniform for x in ins) and name in _ELEMENTWISE | _RESHAPES and ins:
        data = ins[0].data if name in _RESHAPES else _bind(eqn, [x.data for x in ins])[0]
        return [Value(data, shape, is_zero=name in _RESHAPES | _ODD and ins[0].is_zero)]
    if name == "cond" and owners:
        return _branches(eqn, ins[0], ins[1:], parts)
    if not owners:
        whole = _bind(eqn, [local_data(x, None, parts) for x in ins])
        return [Value(x, jnp.shape(x), origin=f"`{name}`") for x in whole]
    if name in _RESHAPES and ins[0].shape == shape:
        return [ins[0]]
    if len(owners) > 1 or name not in _ELEMENTWISE or len(eqn.outvars) != 1:
        where = " and ".join(f"`{owner}`" for owner in owners)
        raise NotElementwise(f"`{name}` over {where}", _where(eqn))
    for x in ins:
        if x.owner is None and not x.is_uniform:
            raise NotElementwise(f"`{owners[0]}` meets an array of shape {x.shape} from {x.origin}", _where(eqn))
    return [_elements(eqn, ins, owners[0], shape, parts)]


def _elements(eqn: Any, ins: list[Value], owner: str, shape: tuple[int, ...], parts: Mapping[str, Part]) -> Value:
    """One primitive on a part of the elements."""
    part = parts[owner]

    def operand(x: Value) -> Any:
        return local_data(x, owner, parts) if x.shape else _vary(x.data, part.axes)

    operands, singular = [operand(x) for x in ins], _singular(eqn)
    if part.real is not None and singular is not None and ins[singular].owner is not None:
        # 0 / 0 on the padding would be NaN. A choice here leaves alone what XLA makes one FMA of, one of results not.
        operands[singular] = jnp.where(part.real, operands[singular], jnp.ones([], operands[singular].dtype))
    factor = None
    if eqn.primitive.name == "mul" and any(x.is_uniform for x in ins):
        (x,), (scalar,) = ([x.data for x in ins if x.is_uniform is uniform] for uniform in (False, True))
        factor = (x, scalar)
    return Value(_bind(eqn, operands)[0], shape, owner, factor, is_zero=_keeps_zero(eqn, ins))


def _singular(eqn: Any) -> int | None:
    """Which operand of a primitive must not be zero."""
    name = eqn.primitive.name
    if name in ("rsqrt", "log", "pow") or (name == "integer_pow" and eqn.params["y"] < 0):
        return 0
    return 1 if name in ("div", "rem") else None


def _keeps_zero(eqn: Any, ins: list[Value]) -> bool:
    """Whether zeros on the padding give zeros there, with scalars that are finite."""
    name, zero = eqn.primitive.name, [x.is_zero for x in ins]
    if name in _ODD or (name == "div" and not ins[0].is_uniform) or (name == "integer_pow" and eqn.params["y"] > 0):
        return zero[0]
    if name == "mul":
        return any(zero)
    return name in ("add", "add_any", "sub", "max", "min", "select_n") and all(zero[name == "select_n" :])


def _branches(eqn: Any, index: Value, ops: list[Value], parts: Mapping[str, Part]) -> list[Value]:
    """`lax.cond` whose branches work element by element."""
    if index.owner is not None:
        raise NotElementwise(f"a branch that `{index.owner}` decides", _where(eqn))
    branches = eqn.params["branches"]

    def run(branch: ClosedJaxpr, data: list[Any]) -> list[Value]:
        values = [dataclasses.replace(op, data=x, factor=None) for op, x in zip(ops, data, strict=True)]
        return evaluate(branch, branch.consts, values, parts)

    data = [op.data for op in ops]
    kinds = [outline(lambda xs, branch=branch: run(branch, xs), data) for branch in branches]
    merged = [_merge(each) for each in zip(*kinds, strict=True)]

    def same_kinds(branch: ClosedJaxpr, data: list[Any]) -> list[Any]:
        each = zip(run(branch, data), merged, strict=True)
        return [x.data if kind.is_uniform else local_data(x, kind.owner, parts) for x, kind in each]

    results = jax.lax.switch(index.data, [lambda xs, b=branch: same_kinds(b, xs) for branch in branches], data)
    return [dataclasses.replace(kind, data=x) for x, kind in zip(results, merged, strict=True)]


def _merge(kinds: Sequence[Value]) -> Value:
    """The kind that a branch's result must be brought to: that of the branch which says the most of it."""
    most = max(kinds, key=lambda kind: (kind.owner is not None, not kind.is_uniform))
    return dataclasses.replace(most, factor=None, origin="`cond`", is_zero=all(kind.is_zero for kind in kinds))


def outline(f: Callable[..., list[Value]], *args: Any) -> list[Value]:
    """What `f` returns, with ShapeDtypeStructs for data, and nothing computed."""
    kinds: list[Value] = []

    def data(*args: Any) -> list[Any]:
        kinds[:] = f(*args)
        return [(x.data, x.factor) for x in kinds]

    shapes = jax.eval_shape(data, *args)
    return [dataclasses.replace(x, data=d, factor=f) for x, (d, f) in zip(kinds, shapes, strict=True)]


def _bind(eqn: Any, operands: list[Any]) -> list[Any]:
    """A primitive on operands of other shapes than it was traced with; where they are is not its affair."""
    params = eqn.params | ({"sharding": None} if "sharding" in eqn.params else {})
    out = eqn.primitive.bind(*operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _vary(x: Any, axes: tuple[str, ...]) -> Any:
    """What is the same on every device, as something that may differ from one to the other."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _where(eqn: Any) -> str:
    """The transformation that an equation was traced in, as far as its traceback tells."""
    frames = getattr(eqn.source_info.traceback, "frames", ())
    names = [found[1] for frame in frames if (found := _RULE.search(frame.function_name))]
    return names[0] if names else ""
