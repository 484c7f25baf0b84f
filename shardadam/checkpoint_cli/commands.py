"""What the `shardadam checkpoint` commands do and print; each imports what it needs when it runs."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from shardadam.checkpoint_cli import arguments


def _import(args: arguments.Import) -> int:
    from shardadam.checkpoint import import_checkpoint

    options = {"params": args.params, "opt_state": args.opt_state, "optimizer": args.optimizer, "drop": args.drop}
    allow = {"allow_nonfinite": args.allow_nonfinite}
    return _written(
        args, import_checkpoint(args.source, args.directory, step=args.step, to=args.to, **options, **allow)
    )


def _export(args: arguments.Export) -> int:
    from shardadam.checkpoint import export_checkpoint

    options = {"dtype": args.dtype, "optimizer": args.optimizer, "drop": args.drop}
    return _written(args, export_checkpoint(args.source, args.path, step=args.step, to=args.to, **options))


def _written(args: arguments.Import | arguments.Export, done: Any) -> int:
    if args.json:
        return _print_json(done._asdict())
    print(f"found    {done.source}: {done.found}")
    print(f"written  {done.path}: step {done.step}, {done.form}, {done.num_leaves} leaves, {_size(done.nbytes)}")
    return 0


def _list(args: arguments.List) -> int:
    from shardadam.checkpoint.inspection import list_steps

    rows = list_steps(args.directory)
    if args.json:
        return _print_json([row._asdict() for row in rows])
    heads = ("step", "state", "bytes", "files", "saved", "run")
    _print_table(heads, [(r.step, r.state, _size(r.nbytes), r.num_files, r.saved_at, r.run_id) for r in rows])
    return 0


def _verify(args: arguments.Verify) -> int:
    from shardadam.checkpoint.upkeep import verify

    verdicts = verify(args.step, every=args.all, with_digests=args.digests)
    if args.json:
        _print_json([verdict._asdict() for verdict in verdicts])
    for verdict in [] if args.json else verdicts:
        print(f"step {verdict.step}: {'as it was saved' if not verdict.faults else '; '.join(verdict.faults)}")
    return 1 if any(verdict.faults for verdict in verdicts) else 0


def _adopt(args: arguments.Adopt) -> int:
    from shardadam.checkpoint import Checkpointer
    from shardadam.checkpoint.convert import as_path
    from shardadam.checkpoint.files import existing

    with Checkpointer(existing(as_path(args.directory))) as checkpointer:
        checkpointer.adopt(args.step)
    if args.json:
        return _print_json({"step": args.step})
    print(f"step {args.step}: sealed as it is")
    return 0


def _prune(args: arguments.Prune) -> int:
    from shardadam.checkpoint.upkeep import prune

    done = prune(args.directory, keep=args.keep, keep_period=args.keep_period, dry_run=args.dry_run)
    if args.json:
        return _print_json(done._asdict())
    verb = "would be deleted" if args.dry_run else "deleted"
    print(f"{verb}: {', '.join(map(str, done.deleted)) or 'none'}; kept: {', '.join(map(str, done.kept)) or 'none'}")
    return 0


def _show(args: arguments.Show) -> int:
    from shardadam.checkpoint.inspection import show

    found = show(args.step, with_digests=args.digests)
    if args.json:
        return _print_json(found._asdict() | {"leaves": [row._asdict() for row in found.leaves]})
    sealed = f"{found.seal['origin']} {found.seal['sealed_at']}" if found.seal else found.without
    print(f"{found.path}: {found.source}\n{found.form}\n{sealed}\n{len(found.leaves)} leaves, {_size(found.nbytes)}\n")
    heads = ("leaf", "dtype", "shape", "bytes", *(("digest", "NaN or inf") if args.digests else ()))
    _print_table(heads, [_cells(row)[: len(heads)] for row in found.leaves])
    return 0


def _cells(row: Any) -> tuple[Any, ...]:
    shape = "x".join(map(str, row.shape)) or "-"
    return row.leaf, row.dtype, shape, _size(row.nbytes), row.digest, row.num_nonfinite


def _diff(args: arguments.Diff) -> int:
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


COMMANDS: dict[type, Callable[[Any], int]] = {
    arguments.Import: _import,
    arguments.Export: _export,
    arguments.List: _list,
    arguments.Show: _show,
    arguments.Verify: _verify,
    arguments.Diff: _diff,
    arguments.Adopt: _adopt,
    arguments.Prune: _prune,
}
