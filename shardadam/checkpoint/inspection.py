"""Looks into checkpoints without a state to restore them into: which steps, which leaves, and where two differ."""

import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from shardadam.checkpoint.convert import as_path
from shardadam.checkpoint.errors import CheckpointError
from shardadam.checkpoint.files import existing
from shardadam.checkpoint.forms import leaves, take_apart
from shardadam.checkpoint.logical import is_key
from shardadam.checkpoint.sealing import list_files
from shardadam.checkpoint.source import find
from shardadam.checkpoint.steps import Steps
from shardadam.checkpoint.stream import Leaf, digest_of, read
from shardadam.checkpoint.upkeep import seal_or_fault

_PART = 2**20  # Elements compared at a time.


class StepRow(NamedTuple):
    """One step of a directory.

    Attributes:
      step: its number.
      state: `saved`, `adopted` or `imported`, as its seal says; else what is the matter with its seal or directory.
      nbytes: of its files.
      num_files: how many.
      saved_at: when it was sealed, in UTC; without a seal, when its last file was written.
      run_id: of the run that saved it; empty where nothing says.
      path: its directory.
    """

    step: int
    state: str
    nbytes: int
    num_files: int
    saved_at: str
    run_id: str
    path: str


class LeafRow(NamedTuple):
    """One array or number of a checkpoint; `digest` and `num_nonfinite` are None unless asked for."""

    leaf: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    digest: str | None = None
    num_nonfinite: int | None = None


class Contents(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      path: where.
      step: the step's number, where a directory's name says it.
      source: how it was found.
      form: its form and optimizer, or why neither is known.
      seal: what its seal says besides files and leaves; None without one that can be read.
      without: why there is no `seal`; empty where there is.
      nbytes: of all leaves in memory.
      leaves: each of them.
    """

    path: str
    step: int | None
    source: str
    form: str
    seal: dict[str, Any] | None
    without: str
    nbytes: int
    leaves: list[LeafRow]


class LeafDifference(NamedTuple):
    """A leaf in which two checkpoints differ.

    Attributes:
      leaf: its keypath.
      what: `only in a`, `only in b`, `shape`, `dtype` or `values`.
      a, b: what there is on each side: dtype and shape; None where the leaf is not.
      num_different: elements whose bits differ.
      largest: the largest difference between finite elements.
    """

    leaf: str
    what: str
    a: str | None
    b: str | None
    num_different: int | None = None
    largest: float | None = None


class Difference(NamedTuple):
    """Where two checkpoints differ: nowhere, if `leaves` is empty."""

    a: str
    b: str
    num_equal: int
    leaves: list[LeafDifference]


def list_steps(directory: str | os.PathLike[str]) -> list[StepRow]:
    """The steps of a `Checkpointer`'s directory, ascending, with those that do not count as saved. Reads no array.

    Raises:
      FileNotFoundError: there is no such directory.
    """
    steps = Steps(existing(as_path(directory)))
    return [_step_row(steps, step) for step in sorted({*steps.seals(), *steps.unsealed()})]


def show(path: str | os.PathLike[str], *, with_digests: bool = False) -> Contents:
    """What a checkpoint holds. Reads metadata only, or with digests one leaf at a time.

    Args:
      path: a step's directory, a plain Orbax tree, or a directory of steps, of which the latest is taken.
      with_digests: computes each leaf's digest, the same whoever wrote the checkpoint, and counts NaN and inf.

    Raises:
      FileNotFoundError: there is nothing there.
      CheckpointError: it is no checkpoint.
    """
    found = find(as_path(path))
    by_name = leaves(found.tree)
    # Only params, or another optimizer's state: it can be looked at all the same.
    try:
        form = take_apart(found.tree).described()
    except CheckpointError as error:
        form = str(error).splitlines()[0].partition("; ")[0]
    names = list(by_name)
    rows = [_leaf_row("/".join(name), by_name[name]) for name in names]
    if with_digests:
        taken = map(digest_of, read(list(by_name.values())), map("/".join, names))
        rows = [
            row._replace(digest=digest.text, num_nonfinite=digest.num_nonfinite)
            for row, digest in zip(rows, taken, strict=True)
        ]
    nbytes = sum(row.nbytes for row in rows)
    return Contents(os.fspath(found.path), found.step, found.kind, form, *_seal(found.path), nbytes, rows)


def diff(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> Difference:
    """Compares two checkpoints by the bits of their leaves, one of each at a time.

    Args:
      a, b: each a step's directory, a plain Orbax tree, or a directory of steps, of which the latest is taken.

    Raises:
      FileNotFoundError, CheckpointError: see `show`.
    """
    left, right = find(as_path(a)), find(as_path(b))
    in_a, in_b = leaves(left.tree), leaves(right.tree)
    both = [name for name in in_a if name in in_b and _what(in_a[name]) == _what(in_b[name])]
    unlike = [_unlike(name, in_a.get(name), in_b.get(name)) for name in {**in_a, **in_b} if name not in set(both)]
    pairs = zip(both, read([in_a[name] for name in both]), read([in_b[name] for name in both]), strict=True)
    different = [found for name, x, y in pairs if (found := _compared(name, in_a[name], x, y)) is not None]
    return Difference(os.fspath(left.path), os.fspath(right.path), len(both) - len(different), unlike + different)


def _step_row(steps: Steps, step: int) -> StepRow:
    path = steps.path(step)
    sizes = list_files(path) if path.is_dir() else {}
    seal, fault = seal_or_fault(steps, step)
    state = "its directory is gone" if not sizes else fault if seal is None else seal.origin
    if seal is not None:
        saved_at, run_id = seal.sealed_at, seal.run_id
    else:
        written = max(((path / name).stat().mtime for name in sizes), default=0)
        saved_at, run_id = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(written)), ""
    return StepRow(step, state, sum(sizes.values()), len(sizes), saved_at, run_id, os.fspath(path))


def _seal(path: epath.Path) -> tuple[dict[str, Any] | None, str]:
    if not path.name.isdecimal():
        return None, "no seal"
    seal, fault = seal_or_fault(Steps(path.parent), int(path.name))
    if seal is None:
        return None, fault
    fields = dataclasses.asdict(dataclasses.replace(seal, files={}, leaves={}))
    return {name: value for name, value in fields.items() if name not in ("files", "leaves", "plan")}, ""


def _leaf_row(path: str, leaf: Leaf) -> LeafRow:
    return LeafRow(path, np.dtype(leaf.dtype).name, leaf.shape, leaf.nbytes)


def _what(leaf: Leaf | None) -> str | None:
    return None if leaf is None else f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _unlike(names: Sequence[str], a: Leaf | None, b: Leaf | None) -> LeafDifference:
    if a is None or b is None:
        what = "only in b" if a is None else "only in a"
    else:
        what = "shape" if a.shape != b.shape else "dtype"
    return LeafDifference("/".join(names), what, _what(a), _what(b))


def _compared(names: Sequence[str], leaf: Leaf, x: Any, y: Any) -> LeafDifference | None:
    """None where all bits are equal."""
    x, y = (np.asarray(jax.random.key_data(z) if is_key(z.dtype) else z) for z in (x, y))
    num_different, largest = _differing(x.reshape(-1), y.reshape(-1))
    if not num_different:
        return None
    return LeafDifference("/".join(names), "values", _what(leaf), _what(leaf), num_different, largest)


def _differing(x: np.ndarray, y: np.ndarray) -> tuple[int, float]:
    """How many elements have other bits, and the largest difference of those that are finite on both sides."""
    count, largest = 0, 0.0
    for start in range(0, x.size, _PART):
        a, b = (np.ascontiguousarray(z[start : start + _PART]) for z in (x, y))
        at = (a.view(np.uint8) != b.view(np.uint8)).reshape(a.size, -1).any(axis=1)
        if not at.any():
            continue
        count += int(at.sum())
        wide = np.complex128 if jnp.issubdtype(a.dtype, jnp.complexfloating) else np.float64
        with np.errstate(invalid="ignore"):
            apart = np.abs(a[at].astype(wide) - b[at].astype(wide))
        largest = max(largest, float(np.max(apart, where=np.isfinite(apart), initial=0)))
    return count, largest
