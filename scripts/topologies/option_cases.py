"""The experiment "options": libtpu's own options, one at a time: which change the collectives, and the memory."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import jax
from grid import ND
from models import WIDTH, abstract_params, num_params
from order_cases import tree_of

from shardadam.topology import Compilation

HERE = Path(__file__).parent
SPARSE = "xla_tpu_enable_sparse_core_collective_offload_"
# name: (topology, all axes as one, the programs that are compiled for it).
TOPOLOGIES = {
    "v5p-64": ("v5p:4x4x4", "x+y+z", ("update, joint", "step, joint", "step, per axis", "1.3B, per axis")),
    "v6e-256": (
        "v6e:16x16",
        "x+y",
        ("update, joint", "8B, joint", "8B, per axis", "step, joint", "step, per axis"),
    ),
    "tpu7x-64": ("tpu7x:2x4x4", "x+y+z+core", ("update, joint",)),  # Its steps take half a minute each.
    "v5p-256": ("v5p:4x8x8", "x+y+z", ("8B, joint", "8B packed, joint", "8B, per axis")),
    "v5p-1024": ("v5p:8x8x16", "x+y+z", ("8B, per axis", "1.3B, per axis")),
}
MODEL = "tiny"
# What models larger than that are compiled with.
LARGE_WITH = {
    "joint": ("none", "nd reduce-scatter", "real reduce-scatter and gather"),
    "per axis": ("none", "reduce-scatter on sparse cores", "all on sparse cores"),
}
NOT_REDUCED = {"xla_tpu_prefer_async_allgather_to_allreduce": True}
SPARSE_SCATTER = {f"{SPARSE}reduce_scatter": True}
REAL_GATHER = {**NOT_REDUCED, f"{SPARSE}all_gather": True, f"{SPARSE}3d_all_gather": True}
# Of libtpu 0.0.42.1's 1,700 those whose names speak of it, and those that published recipes for these chips set.
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "nd reduce-scatter": ND,
    "reduce-scatter on sparse cores": SPARSE_SCATTER,
    "gathers on sparse cores": {f"{SPARSE}{kind}": True for kind in ("all_gather", "2d_all_gather", "3d_all_gather")},
    "all-reduce on sparse cores": {f"{SPARSE}all_reduce": True},
    "gather, not all-reduce": NOT_REDUCED,
    "real gather": REAL_GATHER,
    "real reduce-scatter and gather": {**ND, **REAL_GATHER},
    "all on sparse cores": {**SPARSE_SCATTER, **REAL_GATHER},
    "3d gather": {"xla_enable_all_gather_3d_emitter": True, "xla_always_enable_all_gather_3d_asymmetric": True},
    "2d reduce-scatter": {"xla_tpu_enable_2d_cross_module_reduce_scatter": True},
    "3d reduce-scatter decomposed": {"xla_tpu_enable_3d_reduce_scatter_decomposer": True},
    "all-reduce fused with its slice": {
        "xla_tpu_enable_all_reduce_scatter_fusion": True,
        "xla_tpu_assign_all_reduce_scatter_layout": True,
    },
    "legalizer without old limits": {
        "xla_tpu_enable_reduce_scatter_legalizer": True,
        "xla_tpu_check_legacy_constraints_in_reduce_scatter_legalizer": False,
    },
    "data parallel all-reduces": {
        "xla_tpu_enable_data_parallel_all_reduce_opt": True,
        "xla_tpu_data_parallel_opt_different_sized_ops": True,
    },
    "async collective fusion": {
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    },
    "more VMEM": {"xla_tpu_scoped_vmem_limit_kib": 65536},
    "scheduler minds memory": {"xla_tpu_enable_scheduler_memory_pressure_tracking": True},
    "no latency hiding": {"xla_tpu_enable_latency_hiding_scheduler": False},
    "a name that is none": {"xla_enable_reduce_scatter": True},
}
HEAD = "| topology | program | options | x ideal | collectives, x a parameter's bytes | temp MiB | peak MiB | commit |"
RULE = "| --- | --- | --- | --: | --- | --: | --: | --- |"
INTRO = """# Compiler options

{versions}. Nothing was run. Written by `./scripts/bench_experiments options`.

*update, joint*: the update of a leaf of (8, 4096, 14336) by one collective over all devices, as in
[orders.md](orders.md); *8B* and *1.3B*: those of such models, as in [topologies.md](topologies.md). *step*: the train
step at stage 2 of a model of {model} parameters, one sequence of 128 tokens per device.
*joint*: by one collective over all devices; *per axis*: by one for each. {sizes}.
What collectives send is in multiples of all parameters' bytes. Where an option changes nothing (collectives, temp and
peak are those of *none*), the row says so. *commit*: which version was compiled: since ae36fd3 reduce-scatters one
axis at a time are of whole tiles.

## Options

| name | options |
| --- | --- |
{options}
"""


def cases() -> dict[str, dict[str, Any]]:
    """By key, what `compile_for` is told."""
    found = {}
    asked = [(where, program) for where, (_, _, programs) in TOPOLOGIES.items() for program in programs]
    for (where, program), name in itertools.product(asked, OPTIONS):
        if program[0].isdigit() and name not in LARGE_WITH[program.partition(", ")[2]]:
            continue
        topology, order, _ = TOPOLOGIES[where]
        told = {"topology": topology, "compiler_options": OPTIONS[name], **program_of(program, order)}
        found[f"{where} | {program} | {name}"] = told
    return found


def program_of(program: str, order: str) -> dict[str, Any]:
    """Which builder makes a program, and what it is told."""
    what, _, how = program.partition(", ")
    if how == "joint" and what in ("update", "8B"):
        kwargs = {"order": order, "leaf": "layers" if what == "update" else what}
        return {"build": f"{HERE / 'order_cases.py'}:build", "kwargs": kwargs}
    kwargs = {"model": MODEL, "program": "step", "strategy": "shardadam", "layout": "natural"}
    if what != "step":
        model, _, layout = what.partition(" ")
        kwargs |= {"model": model, "program": "update", "layout": layout or "natural"}
    if how == "per axis":
        kwargs |= {"axes": "torus", "collective": "per_axis"}
    return {"build": f"{HERE / 'cases.py'}:build", "kwargs": kwargs}


def read(case: dict[str, Any], found: Compilation) -> dict[str, Any]:
    """The columns."""
    sent: Counter[str] = Counter()
    for op in found.collectives:
        sent[("async " if op.is_async else "") + op.op] += op.total_wire_bytes or 0
    kwargs, n = case["kwargs"], found.num_devices
    params = abstract_params(kwargs["model"]) if "model" in kwargs else tree_of(kwargs["leaf"])[0]
    whole = WIDTH * sum(x.size for x in jax.tree.leaves(params))
    return {
        "wire_bytes": dict(sorted(sent.items())),
        "whole_bytes": whole,
        "ideal_bytes": 2 * whole * (n - 1) / n,
        "temp_bytes": found.memory.temp_bytes,
        "peak_bytes": found.memory.peak_bytes,
    }


def page(results: dict[str, Any], versions: str) -> str:
    """Its tables."""
    settings = ((name, ", ".join(f"`{k}={v}`" for k, v in told.items())) for name, told in OPTIONS.items() if told)
    intro = INTRO.format(
        versions=versions,
        model=f"{num_params(MODEL) / 1e6:.0f}M",
        sizes=", ".join(f"{name} is {topology}" for name, (topology, _, _) in TOPOLOGIES.items()),
        options="\n".join(f"| {name} | {told} |" for name, told in settings),
    )
    rows = "\n".join([HEAD, RULE, *(row(key, found, results) for key, found in results.items())])
    return f"{intro}\n## What they do\n\n{rows}\n"


def row(key: str, found: dict[str, Any], results: dict[str, Any]) -> str:
    """One compilation."""
    if "error" in found:
        said = found["error"].partition("INVALID_ARGUMENT: ")[2] or found["error"]
        return f"| {key} | | {said.replace('|', '/')} | | | {found['commit']} |"
    where, program, name = key.split(" | ")
    plain = results.get(f"{where} | {program} | none", {})
    told = ("wire_bytes", "temp_bytes", "peak_bytes")
    if name != "none" and all(found[column] == plain.get(column) for column in told):
        return f"| {key} | | as with none | | | {found['commit']} |"
    sent = found["wire_bytes"]
    ops = "; ".join(f"{op} {total / found['whole_bytes']:.2f}" for op, total in sent.items() if total > 2**20)
    memory = (f"{found[column] / 2**20:.1f}" for column in told[1:])
    cells = [key, f"{sum(sent.values()) / found['ideal_bytes']:.2f}", ops, *memory, found["commit"]]
    return f"| {' | '.join(cells)} |"
