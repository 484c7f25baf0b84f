"""`shardadam checkpoint import|export|list|show|diff`: works on checkpoints, on one device, a leaf at a time.

Exit codes: 0 done; 1 what was asked for is not so: two checkpoints differ; 2 it could not be done, and the message
says why. Nothing of JAX is imported before the arguments are read.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import tyro

Form = Literal["train_state", "opt_state", "nnx", "params"]
Optimizer = Literal["adam", "adamw", "nadam", "nadamw"]
Source = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
Directory = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIRECTORY")]
Keys = tyro.conf.UseAppendAction[tuple[Annotated[str, tyro.conf.arg(metavar="KEY")], ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Makes a checkpoint of optax's Adam into one that shardadam.Checkpointer restores, on any mesh."""

    source: Source
    """What plain Orbax, Flax or nnx.state saved: a tree, a step with items, or a directory of steps."""
    directory: Directory
    """The Checkpointer's directory."""
    step: int | None = None
    """Which step of a directory of steps; None: the latest."""
    to: Form | None = None
    """The form to write; None: the form that is found."""
    params: str | None = None
    """The keypath of the parameters, where the form is not known."""
    opt_state: str | None = None
    """The keypath of optax's state, where the form is not known."""
    optimizer: Optimizer = "adam"
    """What an nnx optimizer was made of."""
    drop: Keys = ()
    """Leaves this part out; may be given several times."""
    json: bool = False
    """Prints JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Writes a step as a plain Orbax tree, for optax, Flax or nnx without shardadam; or the parameters alone."""

    source: Source
    """The Checkpointer's directory, or that of one step."""
    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """The directory to make."""
    step: int | None = None
    """Which step; None: the latest."""
    to: Form | None = None
    """The form to write; None: the form that is found."""
    dtype: str | None = None
    """Of the parameters, for serving, such as bfloat16; only with --to params."""
    optimizer: Optimizer = "adam"
    """What an nnx optimizer was made of."""
    drop: Keys = ()
    """Leaves this part out; may be given several times."""
    json: bool = False
    """Prints JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class List:
    """Lists the steps of a directory, with their bytes and the time of their saving."""

    directory: Directory
    """The Checkpointer's directory."""
    json: bool = False
    """Prints JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show:
    """Shows what a step holds: form, optimizer, and each leaf's dtype, shape and bytes."""

    step: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STEP")]
    """A step's directory such as runs/a/checkpoints/500, a plain Orbax tree, or a directory of steps: its latest."""
    digests: bool = False
    """Reads all leaves, and shows their digests and how many elements are NaN or infinite."""
    json: bool = False
    """Prints JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diff:
    """Compares two checkpoints by the bits of their leaves. Exit code 1 if they differ."""

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """As STEP of `show`."""
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """As STEP of `show`."""
    json: bool = False
    """Prints JSON."""


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns the exit code."""
    commands: dict[str, Callable[..., Any]] = {cls.__name__.lower(): cls for cls in _COMMANDS}
    command = tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="shardadam checkpoint",
        description="Works on checkpoints, on one device, a leaf at a time.",
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    # A checkpoint is read on the host, beside a run that may hold the accelerators.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from shardadam.checkpoint import CheckpointError

    try:
        return _COMMANDS[type(command)](command)
    except (CheckpointError, ValueError, OSError) as error:
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        print(f"shardadam checkpoint {type(command).__name__.lower()}: {error}{notes}", file=sys.stderr)
        return 2


def _import(args: Import) -> int:
    from shardadam.checkpoint import import_checkpoint

    options = {"params": args.params, "opt_state": args.opt_state, "optimizer": args.optimizer, "drop": args.drop}
    return _written(args, import_checkpoint(args.source, args.directory, step=args.step, to=args.to, **options))


def _export(args: Export) -> int:
    from shardadam.checkpoint import export_checkpoint

    options = {"dtype": args.dtype, "optimizer": args.optimizer, "drop": args.drop}
    return _written(args, export_checkpoint(args.source, args.path, step=args.step, to=args.to, **options))


def _written(args: Import | Export, done: Any) -> int:
    if args.json:
        return _print_json(done._asdict())
    print(f"found    {done.source}: {done.found}")
    print(f"written  {done.path}: step {done.step}, {done.form}, {done.num_leaves} leaves, {_size(done.nbytes)}")
    return 0


def _list(args: List) -> int:
    from shardadam.checkpoint.inspection import list_steps

    rows = list_steps(args.directory)
    if args.json:
        return _print_json([row._asdict() for row in rows])
    _print_table(
        ("step", "bytes", "files", "saved"), [(r.step, _size(r.nbytes), r.num_files, r.saved_at) for r in rows]
    )
    return 0


def _show(args: Show) -> int:
    from shardadam.checkpoint.inspection import show

    found = show(args.step, with_digests=args.digests)
    if args.json:
        return _print_json(found._asdict() | {"leaves": [row._asdict() for row in found.leaves]})
    print(f"{found.path}: {found.source}\n{found.form}\n{len(found.leaves)} leaves, {_size(found.nbytes)}\n")
    heads = ("leaf", "dtype", "shape", "bytes", *(("digest", "NaN or inf") if args.digests else ()))
    _print_table(heads, [_cells(row)[: len(heads)] for row in found.leaves])
    return 0


def _cells(row: Any) -> tuple[Any, ...]:
    shape = "x".join(map(str, row.shape)) or "-"
    return row.leaf, row.dtype, shape, _size(row.nbytes), row.digest, row.num_nonfinite


def _diff(args: Diff) -> int:
    from shardadam.checkpoint.inspection import diff

    found = diff(args.a, args.b)
    if args.json:
        _print_json(found._asdict() | {"leaves": [row._asdict() for row in found.leaves]})
    else:
        for row in found.leaves:
            print(f"{row.leaf}: {_told(row)}")
        print(f"{found.num_equal} leaves are equal, {len(found.leaves)} are not")
    return 1 if found.leaves else 0


def _told(row: Any) -> str:
    if row.what == "values":
        return f"{row.num_different} elements of {row.a} differ, by up to {row.largest:.4g}"
    return f"{row.what}: {row.a or row.b}" if row.a is None or row.b is None else f"{row.a} in a, {row.b} in b"


def _print_json(value: Any) -> int:
    print(json.dumps(value, indent=1))
    return 0


def _print_table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    texts = [heads, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _size(nbytes: int) -> str:
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= divisor:
            return f"{nbytes / divisor:.1f} {unit}"
    return f"{nbytes} B"


_COMMANDS: dict[type, Callable[[Any], int]] = {
    Import: _import,
    Export: _export,
    List: _list,
    Show: _show,
    Diff: _diff,
}
