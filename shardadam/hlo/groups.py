"""Which devices take part in a collective together: every form in which XLA writes it."""

import math
import re

import numpy as np

Groups = tuple[tuple[int, ...], ...]

_LISTED = re.compile(r"\breplica_groups=\{((?:\{[\d, ]*\},?)*)\}")
_IOTA = re.compile(r"\breplica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"\breplica_groups=mesh\[(.*?)\](?: ?\{(.*?)\})?(?=,|$)")
_PAIRS = re.compile(r"\bsource_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


def device_groups(attributes: str, num_devices: int) -> Groups:
    """The groups of devices that exchange data, by their number in the program.

    Args:
      attributes: of a collective. Forms: `replica_groups={{0,1},{2,3}}`, `{}` for all, `[2,4]<=[4,2]T(1,0)` (numbers
        from 0, shaped, transposed and cut into 2 groups of 4), `mesh['x'=2,'y'=4] {'y'}` (along axes of a mesh);
        `source_target_pairs={{0,1},{1,0}}`, whose groups are the devices that a chain of pairs connects.
      num_devices: of the program.

    Raises:
      ValueError: a form that is not one of these.
    """
    if match := _PAIRS.search(attributes):
        return _connected([tuple(map(int, pair.split(","))) for pair in re.findall(r"\{([\d,]+)\}", match[1])])
    if match := _LISTED.search(attributes):
        listed = re.findall(r"\{([\d, ]*)\}", match[1])
        return tuple(tuple(map(int, group.split(","))) for group in listed) or (tuple(range(num_devices)),)
    if match := _IOTA.search(attributes):
        shape, dims, order = (_numbers(part) for part in match.groups(default=""))
        ids = np.arange(math.prod(dims)).reshape(dims)
        return _rows((ids.transpose(order) if order else ids).reshape(-1, shape[-1]))
    if (match := _MESH.search(attributes)) and "device_ids" not in match[1]:
        return _along(match[1], match[2])
    raise ValueError(f"compiled: got a collective with the groups `{attributes[:120]}`, in a form that is not known")


def _along(mesh: str, axes: str | None) -> Groups:
    """Groups along some axes of a mesh; an axis may be cut, `'x':(2)4` is the 4 after the first 2 of it."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    wanted = (
        re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes) if axes is not None else [(name, "", "") for name in sizes]
    )
    dims, chosen = [], []
    for name, size in sizes.items():
        parts = sorted((int(before or 1), int(part or size)) for axis, before, part in wanted if axis == name)
        done = 1
        for before, part in parts:
            dims.append(before // done)
            chosen.append(len(dims))
            dims.append(part)
            done = before * part
        dims.append(size // done)
    ids = np.arange(math.prod(sizes.values())).reshape(dims)
    kept = [dim for dim in range(len(dims)) if dim not in chosen]
    return _rows(ids.transpose(kept + chosen).reshape(-1, math.prod(dims[dim] for dim in chosen)))


def _connected(pairs: list[tuple[int, ...]]) -> Groups:
    """The sets of devices that pairs connect, smallest first."""
    group_of: dict[int, set[int]] = {}
    for source, target in pairs:
        merged = group_of.get(source, {source}) | group_of.get(target, {target})
        group_of.update(dict.fromkeys(merged, merged))
    return tuple(sorted({tuple(sorted(group)) for group in group_of.values()}))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _rows(ids: np.ndarray) -> Groups:
    return tuple(tuple(int(i) for i in row) for row in ids)
