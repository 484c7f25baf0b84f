"""`collectives`: every collective of a compiled program, how often it runs, and the bytes it puts on the wire."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from shardadam.hlo.groups import Groups, device_groups
from shardadam.hlo.loops import trip_count
from shardadam.hlo.program import Array, Computation, Instruction, Program, arrays, as_text, parse, root_of

OPS = (
    "all-reduce",
    "reduce-scatter",
    "all-gather",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class CollectiveOp(NamedTuple):
    """One collective of a compiled program.

    Attributes:
      op: "all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute" or another of XLA's.
      name: the instruction's.
      operands: the arrays that go in on each device; several where XLA combined collectives into one.
      groups: the numbers of the devices that take part together.
      group_size: how many these are, of the largest group.
      operand_bytes: of all operands, on one device, in one run of the instruction.
      wire_bytes: what one device sends in one run, by the ring algorithms.
      times: how often it runs in a run of the program: the product of the enclosing loops' trip counts; None where one
        of them is not known. In a branch of a conditional it is counted as if the branch were taken.
      is_async: whether other work can go on while it runs.
      loop: the innermost while loop around it; None outside of loops.
      source: the name that JAX gave the operation, such as "jit(step)/psum".
    """

    op: str
    name: str
    operands: tuple[Array, ...]
    groups: Groups
    group_size: int
    operand_bytes: int
    wire_bytes: int
    times: int | None
    is_async: bool
    loop: str | None
    source: str

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of the operands, each once, as XLA calls them: "bf16", "f32"."""
        return tuple(dict.fromkeys(x.dtype for x in self.operands))

    @property
    def total_wire_bytes(self) -> int | None:
        """What one device sends in a run of the program; None where `times` is not known."""
        return None if self.times is None else self.wire_bytes * self.times

    def __str__(self) -> str:
        shapes = " ".join(f"{x.dtype}[{','.join(map(str, x.shape))}]" for x in self.operands[:4])
        more = f" and {len(self.operands) - 4} more" if len(self.operands) > 4 else ""
        times = "an unknown number of times" if self.times is None else f"{self.times} x"
        return (
            f"%{self.name}: {times} {'async ' if self.is_async else ''}{self.op} of {shapes}{more} over "
            f"{self.group_size} devices, {self.wire_bytes:,} bytes on the wire each"
            f"{f', in %{self.loop}' if self.loop else ''}{f' ({self.source})' if self.source else ''}"
        )


class _Place(NamedTuple):
    """Where in a run the walk is."""

    times: int | None
    loop: str | None
    is_async: bool


def collectives(compiled: Any) -> tuple[CollectiveOp, ...]:
    r"""Every collective that a run of a compiled program executes, in program order.

    What a device sends, of n in its group, by the ring algorithms, which are optimal in bandwidth::

        all-reduce           2 (n - 1) / n  operand bytes
        reduce-scatter         (n - 1) / n  operand bytes
        all-gather             (n - 1)      operand bytes: (n - 1) / n of the gathered array
        all-to-all             (n - 1) / n  operand bytes
        collective-permute                  operand bytes
        collective-broadcast                operand bytes

    TPU's all-reduce-scatter fusions are reduce-scatters here, of what they really move, their padding included. An
    async collective is counted once, where it starts.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` returns, or its text; compiled for CPU, TPU or GPU.

    Returns:
      A tuple of `CollectiveOp`.

    Raises:
      ValueError: a text that is not a compiled program's, or groups in a form that is not known.

    Example:
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> f = jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P(), out_specs=P())
      >>> [op.op for op in shardadam.collectives(jax.jit(f).lower(jnp.ones(8)).compile())]
      ['all-reduce']

    References:
      Patarasuk & Yuan, Bandwidth Optimal All-reduce Algorithms for Clusters of Workstations, 2009, sections 3 and 4.
      Thakur et al., Optimization of Collective Communication Operations in MPICH, 2005, sections 4.1 to 4.5.
    """
    program = parse(as_text(compiled))
    return tuple(_walk(program, program.entry, _Place(1, None, False)))


def _walk(program: Program, name: str, place: _Place) -> Iterator[CollectiveOp]:
    """The collectives of a computation and of all that it calls."""
    computation = program.computations[name]
    for x in computation.values():
        op = x.op.removesuffix("-start")
        if op in OPS:
            yield _collective(program, computation, x, place)
        elif scattered := _all_reduce_scatter(program, x):
            inside, all_reduce = scattered
            found = _collective(program, inside, all_reduce, place)
            sent = _wire_bytes("reduce-scatter", found.operand_bytes, found.group_size)
            yield found._replace(op="reduce-scatter", name=x.name, wire_bytes=sent, source=_source(x) or found.source)
        elif x.op == "while":
            trips = trip_count(program, computation, x)
            for called, more in (("condition", 1), ("body", 0)):  # A condition is looked at once more, to end.
                times = None if trips is None or place.times is None else (trips + more) * place.times
                yield from _walk(program, x.called(called)[0], place._replace(times=times, loop=x.name))
        elif not _continues(program, x):
            starts = x.op.endswith("-start") or _starts(program, x)
            for callee in _callees(x):
                yield from _walk(program, callee, place._replace(is_async=place.is_async or starts))


def _callees(x: Instruction) -> list[str]:
    """All computations that an instruction runs, whatever its op: fusions, calls, branches, TPU's `call-start`, ..."""
    return x.called(
        "calls", "to_apply", "branch_computations", "true_computation", "false_computation", "called_computations"
    )


def _collective(program: Program, computation: Computation, x: Instruction, place: _Place) -> CollectiveOp:
    op = x.op.removesuffix("-start")
    operands = tuple(array for name in x.operands for array in arrays(computation[name].type))
    groups = device_groups(x.attributes, program.num_devices)
    group_size = max(map(len, groups), default=1)
    operand_bytes = sum(array.num_bytes for array in operands)
    # GPU writes every collective as start and done; one that nothing overlaps with says so.
    is_async = place.is_async or (x.op != op and '"is_sync":true' not in x.rest)
    wire_bytes = _wire_bytes(op, operand_bytes, group_size)
    return CollectiveOp(
        op,
        x.name,
        operands,
        groups,
        group_size,
        operand_bytes,
        wire_bytes,
        place.times,
        is_async,
        place.loop,
        _source(x),
    )


def _wire_bytes(op: str, operand_bytes: int, n: int) -> int:
    """What each of n devices sends: see `collectives`."""
    if op == "all-reduce":
        return 2 * (n - 1) * operand_bytes // n
    if op == "all-gather":
        return (n - 1) * operand_bytes
    if op in ("reduce-scatter", "all-to-all", "ragged-all-to-all"):
        return (n - 1) * operand_bytes // n
    return operand_bytes if n > 1 else 0


def _all_reduce_scatter(program: Program, x: Instruction) -> tuple[Computation, Instruction] | None:
    """The all-reduce of a TPU fusion that keeps one device's slice of it: in truth a reduce-scatter."""
    if x.op != "fusion" or "kind=kCustom" not in x.attributes:
        return None
    inside = program.computations[x.called("calls")[0]]
    if root_of(inside).op != "dynamic-slice":
        return None
    sliced = inside.get(root_of(inside).operands[0])
    return (inside, sliced) if sliced is not None and sliced.op == "all-reduce" else None


def _starts(program: Program, x: Instruction) -> bool:
    """Whether a TPU fusion starts an async collective."""
    return x.op == "fusion" and any(
        '"AsyncCollectiveStart"' in y.rest for name in _callees(x) for y in program.computations[name].values()
    )


def _continues(program: Program, x: Instruction) -> bool:
    """Whether a TPU fusion goes on with, or ends, an async collective that another one started.

    The collective is written once more in each of a chain's fusions, with the chain's number.
    """
    if x.op != "fusion":
        return False
    inside = [y for name in _callees(x) for y in program.computations[name].values()]
    return any("chain_id=" in y.rest and y.op in OPS for y in inside) and not _starts(program, x)


def _source(x: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', x.attributes)
    return found[1] if found else ""
