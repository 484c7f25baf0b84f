"""From a checkpoint of optax's, Flax's or nnx's state to shardadam's and back, leaf by leaf."""

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from shardadam.checkpoint.errors import CheckpointError
from shardadam.checkpoint.files import check_writable_name
from shardadam.checkpoint.forms import FORMS, OWN_FIELDS, Parts, leaves, put_together, take_apart, without
from shardadam.checkpoint.importing import save_imported
from shardadam.checkpoint.source import Source, find
from shardadam.checkpoint.steps import Steps
from shardadam.checkpoint.stream import CHUNK_BYTES, Leaf, Reader, number, read, write
from shardadam.checkpoint.verify import file_faults
from shardadam.validation import check_floating


class Converted(NamedTuple):
    """What a conversion found and wrote.

    Attributes:
      source: where the state was found.
      found: its form and optimizer.
      form: the form that was written.
      path: where.
      step: the step's number.
      num_leaves: how many arrays and numbers.
      nbytes: of the arrays, as they were read.
    """

    source: str
    found: str
    form: str
    path: str
    step: int
    num_leaves: int
    nbytes: int


def import_checkpoint(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    step: int | None = None,
    to: str | None = None,
    params: str | None = None,
    opt_state: str | None = None,
    optimizer: str = "adam",
    drop: Sequence[str] = (),
    allow_nonfinite: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> Converted:
    """Makes a checkpoint of optax's Adam state into one that `Checkpointer(directory).restore` takes, on any mesh.

    Nothing is changed but names: every array has the bits, shape and dtype that it had. The step is sealed with the
    digests of what was read.

    Args:
      source: what plain Orbax, Flax or `nnx.state` saved: a tree, a step with items, or a directory of steps.
      directory: of the `Checkpointer`.
      step: which step of a directory of steps; default: the latest.
      to: the form to write: `train_state`, `opt_state`, `nnx` or `params`; default: the form that was found.
      params: the keypath of the parameters, where the form is not known; `opt_state` likewise.
      opt_state: the keypath of optax's state.
      optimizer: what an nnx optimizer was made of: adam, adamw, nadam or nadamw. Where its learning rate is a number,
        nnx does not save how many states follow Adam's.
      drop: keypaths to leave out.
      allow_nonfinite: import it though it has NaN or infinities in it.
      chunk_bytes: how much is in memory at once, or one leaf that is larger.

    Returns:
      What was found and written.

    Raises:
      CheckpointError: the form is not known (its tree is shown), or has no place for what was found; a leaf is not
        finite; a step that has a seal is damaged; another run writes in `directory`.
      FileNotFoundError: there is nothing at `source`.

    Example:
      >>> import_checkpoint("old/checkpoints", "runs/a/checkpoints", to="train_state")
    """
    found = _find_whole(as_path(source), step)
    parts = take_apart(without(found.tree, drop), params, opt_state, optimizer)
    tree, form = _nested(without(found.tree, drop), parts, to, given=params is not None or opt_state is not None)
    at = found.step if found.step is not None else _step_of(parts)
    target = as_path(directory)
    reader = functools.partial(read, chunk_bytes=chunk_bytes)
    save_imported(target, at, tree, reader, allow_nonfinite=allow_nonfinite)
    return _converted(found, parts, form, target / str(at), at, tree)


def export_checkpoint(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    to: str | None = None,
    dtype: Any = None,
    optimizer: str = "adam",
    drop: Sequence[str] = (),
    chunk_bytes: int = CHUNK_BYTES,
) -> Converted:
    """Writes a step of a `Checkpointer` as a plain Orbax tree, which `ocp.StandardCheckpointer` restores into optax,
    Flax or nnx without shardadam. Inverse of `import_checkpoint`.

    Args:
      source: the `Checkpointer`'s directory, or that of one step.
      path: the directory to make.
      step: which step; default: the latest.
      to: the form to write, see `import_checkpoint`; `params` for the parameters alone.
      dtype: of the parameters, for serving, a floating one; only with `to="params"`. Integers and complex numbers keep
        theirs.
      optimizer: see `import_checkpoint`.
      drop: keypaths to leave out.
      chunk_bytes: how much is in memory at once, or one leaf that is larger.

    Returns:
      What was found and written.

    Raises:
      CheckpointError: the form has no place for what was found, or a finite number is infinite in `dtype`; the step is
        damaged.
      FileExistsError: there is something at `path`.
      FileNotFoundError: there is no such step.
      ValueError: `dtype` without `to="params"`, or not a floating one; Orbax cannot write to a `path` of that name.

    Example:
      >>> export_checkpoint("runs/a/checkpoints", "serving/a", to="params", dtype="bfloat16")
    """
    if dtype is not None and to != "params":
        raise ValueError(f"dtype: got {dtype} with to={to!r}; a state keeps its dtypes, only to='params' can be cast")
    check_floating("dtype", dtype)
    target = as_path(path)
    check_writable_name(target)
    if target.exists():
        raise FileExistsError(f"{target}: is there already; give a directory that is not")
    found = _find_whole(as_path(source), step)
    tree = without(found.tree, drop)
    if isinstance(tree, dict):  # Flax's own TrainState has not even the names of what is not used.
        tree = {key: part for key, part in tree.items() if part is not None or key not in OWN_FIELDS}
    parts = take_apart(tree, optimizer=optimizer)
    tree, form = _nested(tree, parts, to)
    reader: Reader = functools.partial(read, chunk_bytes=chunk_bytes)
    write(target, tree, reader if dtype is None else _casting(reader, jnp.dtype(dtype)))
    return _converted(found, parts, form, target, found.step or 0, tree)


def _find_whole(path: epath.Path, step: int | None) -> Source:
    """Opens a state; where it has a seal, only if every file is what the seal says."""
    found = find(path, step)
    steps, name = Steps(found.path.parent), found.path.name
    seal = steps.read_seal(int(name)) if name.isdecimal() and int(name) in steps.seals() else None
    if seal is not None and (faults := file_faults(steps, seal)):
        raise CheckpointError(f"{found.path}: is damaged: {'; '.join(faults[:4])}; take another step")
    return found


def _nested(tree: Any, parts: Parts, to: str | None, *, given: bool = False) -> tuple[Any, str]:
    """The tree in the form that is wanted, with what were Python numbers as such."""
    if to is not None and to not in FORMS:
        raise ValueError(f"to: got {to!r}, wanted one of {', '.join(FORMS)}")
    form = to or parts.form
    if form != parts.form or given or (to == "train_state" and parts.step is None):
        step = _step_of(parts)
        tree = put_together(parts._replace(step=np.asarray(step, np.uint32) if form == "nnx" else step), form)
    return jax.tree.map(lambda leaf: number(leaf) if isinstance(leaf, Leaf) and leaf.python else leaf, tree), form


def _step_of(parts: Parts) -> int:
    """The step that a state is at: its own, else as many as Adam has counted; 0 if nothing tells."""
    if parts.step is not None:
        return int(number(parts.step))
    counts = [leaf for names, leaf in leaves(parts.opt_state).items() if names[-1] == "count"]
    return max((int(number(leaf)) for leaf in counts if not leaf.shape), default=0)


def _casting(reader: Reader, dtype: np.dtype) -> Reader:
    """A reader whose floating arrays are cast.

    Raises:
      CheckpointError: naming the leaf with a finite number that becomes infinite.
    """

    def cast(wanted: Sequence[Leaf]) -> Iterator[jax.Array | np.ndarray]:
        for leaf, x in zip(wanted, reader(wanted), strict=True):
            if not jnp.issubdtype(x.dtype, jnp.floating):
                yield x
                continue
            y, overflows, largest = _cast(x, dtype)
            if int(overflows):
                raise CheckpointError(
                    f"`{leaf.path}`: {int(overflows)} finite numbers, the largest {float(largest):.4g}, are infinite "
                    f"in {dtype}, which ends at {float(jnp.finfo(dtype).max):.4g}; export in a wider dtype"
                )
            yield y

    return cast


def _cast(x: jax.Array | np.ndarray, dtype: np.dtype) -> tuple[Any, Any, Any]:
    """An array in another dtype, how many finite elements are infinite there, and the largest finite one."""
    # What is on the host is wider than what JAX computes in.
    if not isinstance(x, np.ndarray):
        return _casts_on_device(x, dtype, jnp)
    with np.errstate(over="ignore"):
        return _casts(x, dtype, np)


def _casts(x: Any, dtype: np.dtype, xp: Any) -> tuple[Any, Any, Any]:
    y, finite = x.astype(dtype), xp.isfinite(x)
    return y, xp.sum(finite & ~xp.isfinite(y)), xp.max(xp.where(finite, xp.abs(x), 0), initial=0)


_casts_on_device = jax.jit(_casts, static_argnums=(1, 2))


def _converted(source: Source, parts: Parts, form: str, path: epath.Path, step: int, tree: Any) -> Converted:
    written = leaves(tree).values()
    nbytes = sum(leaf.nbytes for leaf in written if isinstance(leaf, Leaf))
    return Converted(source.kind, parts.described(), form, os.fspath(path), step, len(written), nbytes)


def as_path(name: str | os.PathLike[str]) -> epath.Path:
    """A directory's absolute path, or its URL."""
    text = os.fspath(name)
    return epath.Path(text if "://" in text else os.path.abspath(text))
