"""The experiment "orders": an update along the axes of a torus, in every order, and with two of them taken as one."""

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from cases import created, placed, sharded_update, stacked_gradient
from jax.sharding import AxisType, Mesh
from models import WIDTH, abstract_params, stacked_dims

import shardadam
from shardadam.sharding import map_leaves
from shardadam.topology import Compilation, Target

# name: (topology, orders): axes that + joins are one axis of the mesh.
ORDERS_2D = ("x y", "y x", "x+y")
ORDERS_3D = (
    *(" ".join(order) for order in itertools.permutations("xyz")),
    *("x+y z", "x+z y", "y+z x", "x y+z", "y x+z", "z x+y", "x+y+z"),
)
TOPOLOGIES = {
    "v5p-128": ("v5p:4x4x8", ORDERS_3D),
    "v5p-256": ("v5p:4x8x8", ORDERS_3D),
    "v5e-256": ("v5e:16x16", ORDERS_2D),
    "v6e-256": ("v6e:16x16", ORDERS_2D),
    "tpu7x-64": ("tpu7x:2x4x4", ("x y z core", "core x y z", "x+y z+core", "y+z x+core", "x+y+z+core")),
}
# name: (shape, stacked dims): Llama 3's embedding, eight layers of its largest matrix, and one of its smaller ones.
LEAVES = {"embedding": ((128256, 4096), 0), "layers": ((8, 4096, 14336), 1), "one piece": ((4096, 4096), 0)}
MODEL = "8B"
MODEL_ON = {"v5p-256": ("x y z", "x+y z", "y+z x", "x y+z"), "v6e-256": ("x y",)}
KINDS = ("reduce-scatter", "all-gather", "all-reduce", "collective-permute")
HEAD = (
    "| topology | leaf | order | x ideal | "
    + " | ".join(f"{kind} MiB" for kind in KINDS)
    + " | calls | temp MiB | compile s | commit |"
)
RULE = "| --- | --- | --- |" + " --: |" * (len(KINDS) + 4) + " --- |"
INTRO = """# Orders of the axes

{versions}. Nothing was run. Written by `./scripts/bench_experiments orders`.

An update in the natural layout: every device's own gradient is reduced, applied, and the parameter is gathered, along
the axes of a mesh one at a time (`collective="per_axis"`). *order*: `axis_name=`, along which the gradient is
scattered; the parameter is gathered in the reverse order. x, y and z are the axes of the torus, and x+y an axis of the
mesh that has both. *embedding* is (128256, 4096), *layers* (8, 4096, 14336), *one piece* (4096, 4096), each alone;
{model} is a whole model. Parameters and gradients are in bfloat16, moments in float32. {sizes}.

*x ideal*: what a device sends, by the ring algorithms, over one reduce-scatter of the gradient and one all-gather of
the parameter. *temp*: beside arguments and results; the parameter is donated, and the gradient is an argument. *calls*:
how many collectives are run, permutes not counted. *commit*: which version was compiled: since ae36fd3 reduce-scatters
are of whole tiles, and pieces are smaller.
"""


def build(target: Target, *, order: str, leaf: str) -> Any:
    """(step, *abstract arguments).

    Args:
      target: what to compile for.
      order: see `mesh_of`.
      leaf: a name in `LEAVES`, or a model.
    """
    mesh = mesh_of(target, order)
    axes = tuple(mesh.axis_names)
    params, stacked = tree_of(leaf)
    plan = shardadam.make_plan(params, mesh, axis_name=axes, layout="natural", stacked_dims=stacked)
    tx = shardadam.adam(1e-3, plan=plan)
    state = placed(created(params, plan, tx))
    grads = map_leaves(lambda leaf, x, path: stacked_gradient(leaf, x, axes, mesh), params, plan)
    return sharded_update(state, tx, axes, "per_axis", 2), state, grads


def tree_of(leaf: str) -> tuple[Any, Any]:
    """Parameters of a leaf alone, or of a model, and the stacked dims."""
    if leaf not in LEAVES:
        return abstract_params(leaf), stacked_dims(leaf)
    shape, stacked = LEAVES[leaf]
    return {"w": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}, {"w": stacked}


def mesh_of(target: Target, order: str) -> Mesh:
    """Devices along the torus's axes in some order, those that + joins as one axis."""
    torus = target.mesh(target.torus())
    groups = [group.split("+") for group in order.split()]
    at = [torus.axis_names.index(axis) for group in groups for axis in group]
    sizes = [math.prod(torus.shape[axis] for axis in group) for group in groups]
    devices = torus.devices.transpose(at).reshape(sizes)
    return Mesh(devices, tuple(map("_".join, groups)), axis_types=(AxisType.Auto,) * len(groups))


def cases() -> dict[str, dict[str, Any]]:
    """By key, what `compile_for` is told."""
    found = {}
    for where, (topology, orders) in TOPOLOGIES.items():
        asked = [(leaf, order) for leaf in LEAVES for order in orders]
        for leaf, order in [*asked, *((MODEL, order) for order in MODEL_ON.get(where, ()))]:
            told = {"topology": topology, "build": f"{Path(__file__)}:build", "kwargs": {"order": order, "leaf": leaf}}
            found[f"{where} | {leaf} | {order}"] = told
    return found


def read(case: dict[str, Any], found: Compilation) -> dict[str, Any]:
    """The columns."""
    sent: Counter[str] = Counter()
    for op in found.collectives:
        sent[op.op] += op.total_wire_bytes or 0
    calls = sum(op.times or 0 for op in found.collectives if op.op != "collective-permute")
    params, n = tree_of(case["kwargs"]["leaf"])[0], found.num_devices
    ideal = 2 * WIDTH * sum(x.size for x in jax.tree.leaves(params)) * (n - 1) / n
    return {
        "wire_bytes": dict(sent),
        "calls": calls,
        "ideal_bytes": ideal,
        "temp_bytes": found.memory.temp_bytes,
        "peak_bytes": found.memory.peak_bytes,
    }


def page(results: dict[str, Any], versions: str) -> str:
    """Its table."""
    dims = (f"{name} is {topology}" for name, (topology, _) in TOPOLOGIES.items())
    rows = "\n".join([HEAD, RULE, *(row(key, found) for key, found in results.items())])
    return INTRO.format(versions=versions, model=MODEL, sizes=", ".join(dims)) + "\n" + rows + "\n"


def row(key: str, found: dict[str, Any]) -> str:
    """One compilation."""
    if "error" in found:
        return f"| {key} | {found['error'].replace('|', '/')} |" + " |" * (len(KINDS) + 4)
    sent = found["wire_bytes"]
    numbers = [f"{sum(sent.values()) / found['ideal_bytes']:.2f}"]
    numbers += [f"{sent.get(kind, 0) / 2**20:.0f}" for kind in KINDS]
    numbers += [
        str(found["calls"]),
        f"{found['temp_bytes'] / 2**20:.1f}",
        str(found["compile_seconds"]),
        found["commit"],
    ]
    return f"| {key} | {' | '.join(numbers)} |"
