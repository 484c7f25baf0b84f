"""A state of which each device keeps the slices that it writes, and no copies."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax

from shardadam.checkpoint.copies import Cut, slicer
from shardadam.checkpoint.logical import Slot
from shardadam.checkpoint.programs import in_programs


def sliced(slots: Iterable[Slot]) -> list[Slot]:
    """The same leaves, cut where there are copies: see `Slot.cut`.

    Orbax makes the same slices, by a program for each leaf and device, which at stage 2 takes the loop most of a save.
    Here one program makes those of many leaves. They are arrays of their own, which no train step waits for; a device
    holds 1/copies of its part of the leaf in them until it is written.
    """
    slots = list(slots)
    kinds: dict[Any, list[tuple[int, jax.Array, Cut]]] = {}
    for place, slot in enumerate(slots):
        if isinstance(x := slot.like, jax.Array) and (cut := slot.cut) is not None:
            kinds.setdefault((cut.sharding.mesh, cut, x.shape, x.dtype), []).append((place, x, cut))
    for leaves in in_programs(kinds):
        places, xs, cuts = zip(*leaves, strict=True)
        for place, x in zip(places, slicer(cuts)(xs), strict=True):
            slots[place] = dataclasses.replace(slots[place], like=x)
    return slots
