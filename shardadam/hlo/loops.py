"""How often the body of a while loop runs, where the program's text says so."""

import re

from shardadam.hlo.program import Computation, Instruction, Program, root_of

_SAME_VALUE = ("copy", "bitcast", "convert", "copy-done", "copy-start", "optimization-barrier")


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """The number of times that a while loop's body runs; None where it cannot be read from the text.

    CPU and GPU write it down (`known_trip_count`). TPU does not: there it follows from the counter's first value, the
    constant that it is compared with, and the constant that the body adds to it.

    Args:
      program: the program.
      computation: where the loop is.
      loop: the while instruction.
    """
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    (condition,) = loop.called("condition")
    (body,) = loop.called("body")
    compared = _comparison(program.computations[condition])
    if compared is None:
        return None
    index, direction, limit = compared
    start = _constant(computation, _element(computation, loop.operands[0], index))
    step = _increment(program.computations[body], index)
    if start is None or not step:
        return None
    if direction == "LE" and step > 0:
        limit, direction = limit + 1, "LT"
    if direction == "GE" and step < 0:
        limit, direction = limit - 1, "GT"
    if (direction, step > 0) not in (("LT", True), ("GT", False)):
        return None
    return max(0, -((start - limit) // step))


def _comparison(condition: Computation) -> tuple[int, str, int] | None:
    """(element of the loop's tuple, direction, constant) where a condition only compares these two."""
    root = root_of(condition)
    direction = re.search(r"direction=(\w\w)", root.attributes)
    if root.op != "compare" or not direction:
        return None
    left, right = root.operands
    limit, index = _constant(condition, right), _tuple_index(condition, left)
    return None if limit is None or index is None else (index, direction[1], limit)


def _increment(body: Computation, index: int) -> int | None:
    """The constant that a body adds to one element of the loop's tuple."""
    name = _followed(body, _element(body, root_of(body).name, index))
    added = body.get(name) if name else None
    if added is None or added.op != "add":
        return None
    for counter, step in (added.operands, added.operands[::-1]):
        if _tuple_index(body, counter) == index:
            return _constant(body, step)
    return None


def _element(computation: Computation, name: str | None, index: int) -> str | None:
    """The name of one element of a tuple that is made in the computation."""
    made = computation.get(name) if name else None
    return made.operands[index] if made is not None and made.op == "tuple" else None


def _constant(computation: Computation, name: str | None) -> int | None:
    found = computation.get(_followed(computation, name) or "")
    if found is None or found.op != "constant" or not re.fullmatch(r"-?\d+", found.operands[0]):
        return None
    return int(found.operands[0])


def _tuple_index(computation: Computation, name: str) -> int | None:
    """Which element of the computation's parameter this is."""
    found = computation.get(_followed(computation, name) or "")
    if found is None or found.op != "get-tuple-element" or computation[found.operands[0]].op != "parameter":
        return None
    index = re.search(r"index=(\d+)", found.attributes)
    return int(index[1]) if index else None


def _followed(computation: Computation, name: str | None) -> str | None:
    """Where a value comes from, past the copies of it."""
    while name in computation and computation[name].op in _SAME_VALUE:
        name = computation[name].operands[0]
    return name
