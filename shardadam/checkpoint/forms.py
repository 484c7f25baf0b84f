"""The forms in which a state with Adam's moments lies on disk, told by names alone, and the way from one to another."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from shardadam.checkpoint.errors import CheckpointError
from shardadam.checkpoint.source import shown
from shardadam.checkpoint.stream import Leaf

FORMS = ("train_state", "opt_state", "nnx", "params")
# Of shardadam's TrainState beside those of Flax's; None where they are not used.
OWN_FIELDS = ("master", "loss_scale", "num_skipped")
# States without arrays that follow Adam's in optax's tuple when the learning rate is a number; nnx does not save them.
TRAILING = {"adam": 1, "nadam": 1, "adamw": 2, "nadamw": 2}
_REMEDY = "say which parts it has: --params KEY --opt-state KEY"


class Parts(NamedTuple):
    """What a state is made of; None for what it has not.

    Attributes:
      form: `train_state`: {step, params, opt_state, ...}; `opt_state`: optax's state alone; `nnx`: {model, optimizer}
        of `nnx.state`, or the optimizer alone; `params`: parameters alone.
      params: their tree.
      opt_state: optax's state; of nnx, with tuples as lists and without its `value` keys.
      step: a `Leaf` or a number.
      rest: other fields of a TrainState, or variables of a model that have no moments.
    """

    form: str
    params: Any = None
    opt_state: Any = None
    step: Any = None
    rest: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default, never changed

    def described(self) -> str:
        """One line for people."""
        parts = [f"{len(leaves(self.params))} parameters"] if self.params is not None else []
        parts += [f"optimizer {optimizer_name(self.opt_state)}"] if self.opt_state is not None else []
        parts += [f"besides {', '.join(self.rest)}"] if self.rest else []
        return f"{self.form}: {', '.join(parts)}"


def take_apart(tree: Any, params: str | None = None, opt_state: str | None = None, optimizer: str = "adam") -> Parts:
    """Finds the parts of a state. Inverse of `put_together`.

    Args:
      tree: nested dicts and lists of `Leaf`s.
      params: the keypath of the parameters, for trees whose form is none of the known ones.
      opt_state: that of the optimizer's state.
      optimizer: whose state an nnx optimizer's is, a key of `TRAILING`.

    Raises:
      CheckpointError: the form is not known, or moments do not go with the parameters; shows the tree.
    """
    if params is not None or opt_state is not None:
        given = {key: _at(tree, key) for key in (params, opt_state) if key is not None}
        form = "train_state" if len(given) == 2 else "opt_state" if opt_state else "params"
        step = tree.get("step") if isinstance(tree, dict) else None
        parts = Parts(form, given.get(params or ""), given.get(opt_state or ""), step)
    else:
        parts = _detect(tree, optimizer)
    _check_moments(parts)
    return parts


def put_together(parts: Parts, form: str) -> Any:
    """The tree of a state in a form. Inverse of `take_apart`, but that `step` must be a number in another form.

    Raises:
      CheckpointError: the form needs what the state has not, or has no place for what it has.
    """
    if parts.params is None and form in ("train_state", "params"):
        raise CheckpointError(f"{parts.described()}: has no parameters, and the form {form} needs them")
    if parts.opt_state is None and form != "params":
        raise CheckpointError(f"{parts.described()}: has no optimizer state, and the form {form} needs one")
    if parts.rest and form in ("train_state", "nnx") and form != parts.form:
        raise CheckpointError(f"the form {form} has no place for {sorted(parts.rest)}; leave them out: --drop KEY")
    if form == "params":
        return parts.params
    if form == "opt_state":
        return parts.opt_state
    if form == "train_state":
        return {"step": parts.step, "params": parts.params, "opt_state": parts.opt_state, **parts.rest}
    optimizer = {"step": {"value": parts.step}, "opt_state": _to_nnx(parts.opt_state)}
    return optimizer if parts.params is None else {"model": _to_nnx(parts.params), "optimizer": optimizer}


def adam_states(tree: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every `ScaleByAdamState` in a tree, with its keypath."""
    if isinstance(tree, dict) and {"count", "mu", "nu"} <= set(tree):
        yield (), tree
        return
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        for names, found in adam_states(child):
            yield (str(key), *names), found


def optimizer_name(state: Any) -> str:
    """How the optimizer must have been made, as far as its state tells."""
    if state is None or isinstance(state, tuple):
        return "-"
    if isinstance(state, list):
        return f"({', '.join(map(optimizer_name, state))})"
    if isinstance(state, dict):
        keys = set(state)
        if {"count", "mu", "nu"} <= keys:
            return "ScaleByAdamState"
        if "hyperparams" in keys:
            return f"inject_hyperparams{optimizer_name(state.get('inner_state'))}"
        if keys == {"inner_state"}:
            return f"masked{optimizer_name(state['inner_state'])}"
        return "{" + ", ".join(f"{key}: {optimizer_name(value)}" for key, value in state.items()) + "}"
    return "array"


def leaves(tree: Any, names: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The `Leaf`s and numbers of a tree by the names of their keypaths."""
    if isinstance(tree, dict | list):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, child in pairs for k, v in leaves(child, (*names, str(key))).items()}
    # Orbax makes lists of tuples, but for empty ones.
    return {} if tree is None or isinstance(tree, tuple) else {names: tree}


def without(tree: Any, drop: Sequence[str]) -> Any:
    """A tree without the parts at the given keypaths.

    Raises:
      CheckpointError: there is no such part.
    """
    for path in drop:
        *above, last = path.split("/")
        parent = _at(tree, "/".join(above)) if above else tree
        if not isinstance(parent, dict) or last not in parent:
            raise CheckpointError(f"--drop {path}: not in the checkpoint, which holds\n{shown(tree)}")
        smaller = {key: value for key, value in parent.items() if key != last}
        tree = _replaced(tree, above, smaller)
    return tree


def _detect(tree: Any, optimizer: str) -> Parts:
    if isinstance(tree, dict):
        if {"params", "opt_state"} <= set(tree):
            rest = {key: value for key, value in tree.items() if key not in ("params", "opt_state", "step")}
            return Parts("train_state", tree["params"], tree["opt_state"], tree.get("step"), rest)
        if set(tree) == {"step", "opt_state"}:
            return Parts("nnx", None, _from_nnx(tree["opt_state"], optimizer), _pure(tree["step"]))
        inner = [key for key, value in tree.items() if isinstance(value, dict) and set(value) == {"step", "opt_state"}]
        if len(inner) == 1 and len(tree) == 2:
            (model,) = (value for key, value in tree.items() if key != inner[0])
            return _nnx(_pure(model), tree[inner[0]], optimizer)
        if set(tree) == {"params"}:
            return Parts("params", tree["params"])
        if len(tree) == 1 and _is_optax(tree) is False:
            return _detect(next(iter(tree.values())), optimizer)
    if _is_optax(tree) and any(True for _ in adam_states(tree)):
        return Parts("opt_state", opt_state=tree)
    raise CheckpointError(f"its form is none of {', '.join(FORMS)}; {_REMEDY}. It holds\n{shown(tree)}")


def _nnx(model: Any, saved: dict[str, Any], optimizer: str) -> Parts:
    """Parts of {model, optimizer}: a model's parameters are its variables that have moments."""
    opt_state = _from_nnx(saved["opt_state"], optimizer)
    moments = {names for _, adam in adam_states(opt_state) for names in leaves(adam["mu"])}
    rest = {"/".join(names): leaf for names, leaf in leaves(model).items() if names not in moments}
    for path in rest:
        model = without(model, [path])
    return Parts("nnx", _pruned(model), opt_state, _pure(saved["step"]), rest)


def _is_optax(tree: Any) -> bool:
    """Whether the outermost node is one of optax's states: a tuple, or what its combinators and Adam itself name."""
    known = ({"count", "mu", "nu"}, {"inner_state"}, {"inner_states"}, {"hyperparams", "inner_state"})
    return isinstance(tree, list) or (isinstance(tree, dict) and any(keys <= set(tree) for keys in known))


def _check_moments(parts: Parts) -> None:
    """Refuses moments that are not of their parameters' shapes: packed ones, or those of another model."""
    if parts.opt_state is None:
        return
    params = leaves(parts.params)
    found = list(adam_states(parts.opt_state))
    if not found:
        raise CheckpointError(f"no state of Adam's (count, mu, nu) is in it. It holds\n{shown(parts.opt_state)}")
    for names, adam in found:
        mu, nu = leaves(adam["mu"]), leaves(adam["nu"])
        for name in mu.keys() | nu.keys():
            shapes = [tree[name].shape if name in tree else None for tree in (mu, nu)]
            wanted = params[name].shape if name in params else None
            if shapes[0] != shapes[1] or (parts.params is not None and shapes[0] != wanted):
                at = "/".join((*names, "mu", *name))
                raise CheckpointError(
                    f"`{at}`: got shapes {shapes[0]} (mu) and {shapes[1]} (nu), wanted the parameter's, "
                    f"{wanted or 'both alike'}; is it of another model, or packed? shardadam.Checkpointer unpacks"
                )


def _from_nnx(state: Any, optimizer: str) -> Any:
    """An nnx optimizer's state as optax's: tuples where nnx has keys of digits. Inverse of `_to_nnx`."""

    def convert(node: Any) -> Any:
        if not isinstance(node, dict) or {"count", "mu", "nu"} <= set(node) or not node:
            return node
        if not all(key.isdecimal() for key in node):
            return {key: convert(child) for key, child in node.items()}
        found = {int(key): convert(child) for key, child in node.items()}
        last = max(found)
        is_adam = isinstance(found[last], dict) and {"mu", "nu"} <= set(found[last])
        return [found.get(i) for i in range(last + 1)] + [None] * (TRAILING[optimizer] if is_adam else 0)

    return convert(_pure(state))


def _to_nnx(tree: Any) -> Any:
    """A tree as `nnx.state` has it: every leaf under `value`, tuples as dicts, nothing for empty states."""
    if isinstance(tree, Leaf | int | float):
        return {"value": tree}
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {str(key): _to_nnx(child) for key, child in pairs if leaves(child) or isinstance(child, Leaf)}


def _pure(tree: Any) -> Any:
    """A tree without nnx's `value` keys, if all its leaves have one."""
    if isinstance(tree, Leaf) or not all(names and names[-1] == "value" for names in leaves(tree)):
        return tree

    def convert(node: Any) -> Any:
        if isinstance(node, dict) and set(node) == {"value"}:
            return node["value"]
        return {key: convert(child) for key, child in node.items()} if isinstance(node, dict) else node

    return convert(tree)


def _pruned(tree: Any) -> Any:
    """A tree without empty dicts."""
    if not isinstance(tree, dict):
        return tree
    return {key: kept for key, child in tree.items() if (kept := _pruned(child)) != {}}


def _at(tree: Any, path: str) -> Any:
    for key in path.split("/"):
        if isinstance(tree, list) and key.isdecimal() and int(key) < len(tree):
            tree = tree[int(key)]
        elif isinstance(tree, dict) and key in tree:
            tree = tree[key]
        else:
            raise CheckpointError(f"{path}: not in the checkpoint, which holds\n{shown(tree)}")
    return tree


def _replaced(tree: Any, path: Sequence[str], value: Any) -> Any:
    if not path:
        return value
    key, *below = path
    if isinstance(tree, list):
        return [_replaced(child, below, value) if i == int(key) else child for i, child in enumerate(tree)]
    return {k: _replaced(child, below, value) if k == key else child for k, child in tree.items()}
