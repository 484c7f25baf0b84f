"""Finds the trees in a directory that plain Orbax, Flax or shardadam wrote: a tree, a step with items, many steps."""

from typing import Any, NamedTuple

from etils import epath

from shardadam.checkpoint.errors import CheckpointError
from shardadam.checkpoint.files import existing
from shardadam.checkpoint.steps import Steps
from shardadam.checkpoint.stream import Leaf, item_tree

_TREE_FILE = "_METADATA"  # What Orbax writes beside every tree.
_WHOLE = ("default", "state", "pytree", "checkpointables")  # Item names under which Orbax and we put a whole state.


class Source(NamedTuple):
    """A state on disk.

    Attributes:
      path: the directory of the tree, or of the step that has it as items.
      step: the step's number, where a directory's name says it.
      tree: nested dicts, lists and `Leaf`s; of a step with several items, a dict of them.
      kind: how it was found, for people.
    """

    path: epath.Path
    step: int | None
    tree: Any
    kind: str


def find(path: epath.Path, step: int | None = None) -> Source:
    """Opens what is saved in a directory; reads metadata only.

    Args:
      path: a tree (`ocp.StandardCheckpointer`), a step with items (`ocp.CheckpointManager`, Orbax v1), or a directory
        of steps (those, or Flax's `checkpoint_<step>`).
      step: which step of a directory of steps; default: the latest.

    Raises:
      FileNotFoundError: there is no such directory, or no such step in it.
      CheckpointError: no tree of Orbax's is there, or it is damaged.
    """
    own = _number(existing(path).name)
    if step is not None and own == step and _is_step(path):
        step = None
    if step is None and (path / _TREE_FILE).exists():
        return Source(path, own, _tree(path), "an Orbax tree")
    if step is None and (items := _items(path)):
        return _of_items(path, own, items)
    steps = {number: found for found in path.iterdir() if (number := _number(found.name)) is not None}
    if step is not None and step not in steps:
        raise FileNotFoundError(f"step {step}: not in {path}, which holds {sorted(steps) or 'no steps'}")
    committed = {number: found for number, found in steps.items() if _is_step(found)}
    if not committed or (step is not None and step not in committed):
        raise CheckpointError(
            f"{path}: got {sorted(x.name for x in path.iterdir())[:8]}, wanted an Orbax checkpoint: a directory with "
            f"{_TREE_FILE}, a step whose items have one, or a directory of such steps"
        )
    sealed = [
        number for number in Steps(path).sealed() if number in committed
    ]  # One without a seal may be half a save.
    latest = step if step is not None else max(sealed or committed)
    found = find(committed[latest])
    return found._replace(step=latest, kind=f"step {latest} (of {len(committed)}), {found.kind}")


def _of_items(path: epath.Path, step: int | None, items: dict[str, epath.Path]) -> Source:
    """A step with one tree, or with several that are parts of a state, such as `params` and `opt_state`."""
    if len(items) == 1:
        ((name, item),) = items.items()
        tree = _tree(item)
        return Source(path, step, tree if name in _WHOLE else {name: tree}, f"item '{name}'")
    whole = [name for name in _WHOLE if name in items]
    if len(whole) == 1:
        return Source(path, step, _tree(items[whole[0]]), f"item '{whole[0]}' of {sorted(items)}")
    trees = {name: _tree(item) for name, item in items.items()}
    return Source(path, step, trees, f"items {sorted(items)}")


def _items(path: epath.Path) -> dict[str, epath.Path]:
    """The trees below a step, by name; Flax's `checkpoint_7` is a step, not an item."""
    found = {x.name: x for x in sorted(path.iterdir()) if x.is_dir() and (x / _TREE_FILE).exists()}
    return {name: item for name, item in found.items() if _number(name) is None}


def _tree(item: epath.Path) -> Any:
    """The tree of an item; of what Orbax says where it is damaged, which may name no file, which one it is about."""
    try:
        return item_tree(item)
    except (CheckpointError, OSError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{item}: its metadata cannot be read, it may be damaged: {what}") from error


def _is_step(path: epath.Path) -> bool:
    return path.is_dir() and ((path / _TREE_FILE).exists() or bool(_items(path)))


def _number(name: str) -> int | None:
    """The step that a directory is named for: `7`, `step_7`, `checkpoint_7`; None for all else, tmp directories too."""
    digits = name.rpartition("_")[2]
    prefix = name.removesuffix(digits)
    return int(digits) if digits.isdecimal() and (not prefix or prefix[:-1].isidentifier()) else None


def shown(tree: Any) -> str:
    """A tree for people: its keypaths with shapes and dtypes, the first forty."""
    rows = list(_rows(tree, ()))
    more = [f"  ... and {len(rows) - 40} more"] if len(rows) > 40 else []
    return "\n".join([f"  {row}" for row in rows[:40]] + more)


def _rows(tree: Any, names: tuple[str, ...]) -> Any:
    if isinstance(tree, Leaf):
        yield f"{'/'.join(names)}: {tree.dtype}{list(tree.shape)}"
    elif isinstance(tree, dict | list) and tree:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _rows(value, (*names, str(key)))
    else:
        yield f"{'/'.join(names)}: empty"
