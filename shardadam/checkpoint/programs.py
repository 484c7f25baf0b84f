"""Which leaves one program takes: starting a program for each would take the loop longer than all else in a save."""

from collections.abc import Hashable, Iterator, Mapping
from typing import TypeVar

Leaf = TypeVar("Leaf")

_TOGETHER = 32  # Leaves in a program: more would take longer to compile, and gain little.


def in_programs(kinds: Mapping[tuple[Hashable, ...], list[Leaf]]) -> Iterator[list[Leaf]]:
    """Leaves by the program that takes them: as many of a kind as it may, so that it serves again; all others together.

    Args:
      kinds: leaves that make the same program, by what makes it so; first by the devices, which are one program's.
    """
    left: dict[Hashable, list[Leaf]] = {}
    for (devices, *_), leaves in kinds.items():
        full = len(leaves) // _TOGETHER * _TOGETHER
        yield from _in_order(leaves[:full])
        left.setdefault(devices, []).extend(leaves[full:])
    for leaves in left.values():
        yield from _in_order(leaves)


def _in_order(leaves: list[Leaf]) -> Iterator[list[Leaf]]:
    return (leaves[first : first + _TOGETHER] for first in range(0, len(leaves), _TOGETHER))
