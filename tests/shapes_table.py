"""docs/shapes.md, which `scripts/tables` writes: how evenly the plan splits the zoo over many numbers of shards."""

import math
import time
from typing import Any, NamedTuple

import jax
from zoo_trees import Model, models

import shardadam

SHARDS = (2, 3, 7, 8, 12, 24, 48, 192, 248, 256, 512, 1000, 1024, 2048, 4096, 8960)

INTRO = """\
# Any shape, any number of shards

`tests/zoo` holds the parameter trees of published models as small data files, each with the parameter count that was
published and where; a test holds every tree to its count. The tables are of plans for float32 with everything at its
default (`layout="auto"`, `min_size=1024`), made from shapes alone. They are written by `./scripts/tables`, and a test
holds them to what the plan says today.

## What the fullest device holds too much

Elements of mu on a device (every device holds the same number) over an even share, total / N, less one, in thousandths;
of all leaves but those set aside, which the next table counts. The goal is 1.00 at most; **bold** is beyond it.

"""

FLOOR = """
What is bold is arithmetic: behind the slash is the least that any split can have which keeps each leaf one array with
equal shards, as optax's tree and JAX's shardings ask. A leaf of s elements costs each device ceil(s / N) of them, up to
one too many per leaf. So a tree is sure to stay within a thousandth where a device's share is a thousand elements per
leaf, and the {least} of {name} in {leaves} leaves are far from it. In bytes of mu and nu it is nothing: {bytes:,} on
each device. With `min_size` at 1000 x N, such leaves are set aside, and what is split is within a thousandth; but then
they are whole on every device, which costs more than it evens out.

## What is set aside

Leaves under `min_size` and leaves with fewer elements than shards stay whole on every device, and are listed by
`Plan.report`. Their share of the parameters, in hundredths of a percent, and their number:

"""

LANES = """
## Rows and lanes

A packed leaf is folded to rows of 1,024 where that wastes at most 1/2048 of a shard, because both the TPU's and the
GPU's compiler do best on it. Else a shard gets, of the numbers of rows near that, the first that wastes a quarter of
this, or the one that wastes least; a shard of up to 2,048 elements is one row. How many leaves are packed, and how many
of these in rows of 1,024:

"""


class Split(NamedTuple):
    """How a plan for N shards splits one tree."""

    num_leaves: int
    num_whole: int
    whole: int  # Parameters in leaves that stay whole.
    split: int  # Parameters in the others,
    held: int  # the elements of them that each device holds,
    least: int  # and the least that equal shards of each leaf can hold.
    packed: int
    packed_1024: int
    num_shards: int

    @property
    def excess(self) -> float:
        """What a device holds over an even share, as a fraction of that."""
        return self.held * self.num_shards / self.split - 1

    @property
    def least_excess(self) -> float:
        """The excess of the best split there is."""
        return self.least * self.num_shards / self.split - 1


def split_of(model: Model, num_shards: int, **options: Any) -> Split:
    """Plans one tree."""
    leaves = shardadam.make_plan(model.params(), {"data": num_shards}, **options).leaves.values()
    split = [leaf for leaf in leaves if leaf.num_shards > 1]
    whole = [leaf for leaf in leaves if leaf.num_shards == 1]
    packed = [leaf for leaf in split if leaf.layout == "packed"]
    return Split(
        num_leaves=len(leaves),
        num_whole=len(whole),
        whole=sum(leaf.size for leaf in whole),
        split=sum(leaf.size for leaf in split),
        held=sum(leaf.elements_per_device for leaf in split),
        least=sum(math.ceil(leaf.size / num_shards) for leaf in split),
        packed=len(packed),
        packed_1024=sum(leaf.lanes == 1024 for leaf in packed),
        num_shards=num_shards,
    )


def all_splits() -> dict[str, list[Split]]:
    """Every tree over every number of shards."""
    return {model.name: [split_of(model, n) for n in SHARDS] for model in models()}


def page() -> str:
    """All of docs/shapes.md but its last line, which says how long planning took."""
    splits = all_splits()
    name, worst = max(((n, s) for n, row in splits.items() for s in row), key=lambda pair: pair[1].excess)
    floor = FLOOR.format(
        least=f"{worst.split // worst.num_shards:,}", name=name, leaves=worst.num_leaves - worst.num_whole,
        bytes=8 * math.ceil(worst.held - worst.split / worst.num_shards),
    )  # fmt: skip
    sizes = {model.name: model.parameters for model in models()}

    def table(cell: Any) -> str:
        head = [
            "| tree | parameters | leaves | " + " | ".join(map(str, SHARDS)) + " |",
            "|---" * (3 + len(SHARDS)) + "|",
        ]
        rows = [
            f"| {name} | {sizes[name]:,} | {row[0].num_leaves} | " + " | ".join(map(cell, row)) + " |"
            for name, row in splits.items()
        ]
        return "\n".join(head + rows) + "\n"

    return (
        INTRO
        + table(_excess)
        + floor
        + table(lambda s: f"{1e4 * s.whole / (s.whole + s.split):.2f} ({s.num_whole})")
        + LANES
        + table(lambda s: f"{s.packed} ({s.packed_1024})" if s.packed else "-")
    )


def timing() -> str:
    """How long the largest tree takes to plan for the most shards: CPU seconds, the best of five."""
    model = models()[-1]
    params = model.params()

    def once() -> float:
        start = time.process_time()
        shardadam.make_plan(params, {"data": SHARDS[-1]})
        return time.process_time() - start

    return (
        f"\n## Time\n\nPlanning {model.name} ({len(jax.tree.leaves(params))} leaves) for {SHARDS[-1]:,} shards takes "
        f"{1e3 * min(once() for _ in range(5)):.0f} ms"
    )


def _excess(split: Split) -> str:
    text = f"{1e3 * split.excess:.2f}"
    return f"**{text}** / {1e3 * split.least_excess:.2f}" if split.excess > 1e-3 else text
