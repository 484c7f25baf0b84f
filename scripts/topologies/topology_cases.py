"""The experiment "topologies": the cases of `grid.py`, which of them cannot fit, and what is read of the others."""

from collections import Counter
from pathlib import Path
from typing import Any

from grid import MEMORY, TOPOLOGIES, Case, all_cases
from models import WIDTH, abstract_params, layer_bytes, num_params, stacked_dims, tensor_specs
from report import page

import shardadam
from shardadam.topology import Compilation, parse_topology

__all__ = ["also", "cases", "page", "read"]

BUILD = f"{Path(__file__).parent / 'cases.py'}:build"


def cases() -> dict[str, Any]:
    """By its key, what `compile_for` is told; of what cannot fit, no topology."""
    return {case.key: told(case) for case in all_cases()}


def told(case: Case) -> dict[str, Any]:
    """Of one case."""
    if (least := least_bytes(case) / 2**30) > MEMORY[case.chip]:
        return {"too_large": f"not compiled: {least:.1f} GiB at the least, {MEMORY[case.chip]} are there"}
    topology, num_slices, _ = TOPOLOGIES[case.where]
    return {
        "topology": topology,
        "num_slices": num_slices,
        "build": BUILD,
        "kwargs": case.kwargs,
        "compiler_options": case.options,
    }


def also(told: dict[str, Any]) -> dict[str, Any]:
    """Of what cannot fit."""
    return told


def read(told: dict[str, Any], found: Compilation) -> dict[str, Any]:
    """The columns of the table."""
    kwargs = told["kwargs"]
    tensor = kwargs["tensor"]
    ours = [op for op in found.collectives if not within_model(op, tensor)]
    bytes_of: Counter[str] = Counter()
    times_of: Counter[str] = Counter()
    for op in ours:
        kind = f"{'async ' if op.is_async else ''}{op.op} {'+'.join(op.dtypes)}"
        bytes_of[kind] += op.total_wire_bytes or 0
        times_of[kind] += op.times or 0
    return {
        **expected(kwargs, found.num_devices),
        "device_kind": found.device_kind,
        "peak_bytes": found.memory.peak_bytes,
        "temp_bytes": found.memory.temp_bytes,
        "argument_bytes": found.memory.argument_bytes,
        "not_donated": list(found.memory.not_donated),
        "wire_bytes": sum(bytes_of.values()),
        "unknown_times": sum(op.times is None for op in ours),
        "collectives": {kind: [times_of[kind], bytes_of[kind]] for kind in sorted(bytes_of)},
    }


def expected(kwargs: dict[str, Any], num_devices: int) -> dict[str, Any]:
    """From shapes alone: the ideal on the wire, one layer's parameters, and by how much the state exceeds 1/N."""
    model, tensor = kwargs["model"], kwargs["tensor"]
    copies = num_devices // tensor
    whole = num_params(model) * WIDTH // tensor
    return {
        "num_devices": num_devices,
        "param_bytes": whole,
        "layer_bytes": layer_bytes(model, tensor),
        "ideal_wire_bytes": 2 * whole * (copies - 1) // copies,
        "state_ratio": state_ratio(kwargs, copies),
    }


def least_bytes(case: Case) -> float:
    """What a device holds whatever the compiler does: parameters, float32 moments, and gradients that come in whole."""
    topology, num_slices, _ = TOPOLOGIES[case.where]
    copies = parse_topology(topology, num_slices).num_devices // case.tensor
    whole = num_params(case.model) * WIDTH // case.tensor
    params = whole / copies if case.stage == 3 else whole
    moments = 2 * 4 / WIDTH * whole * state_ratio(case.kwargs, copies) / copies
    grads = whole if case.program == "update" or case.stage == 1 or case.name == "replicated" else 0
    return params + moments + grads


def state_ratio(kwargs: dict[str, Any], copies: int) -> float:
    """Elements of a moment on each device over those that an even split would have.

    Args:
      kwargs: of `cases.build`.
      copies: how many devices, or groups of those that a tensor is split over.
    """
    if kwargs["strategy"] == "replicated":
        return float(copies)
    model, tensor = kwargs["model"], kwargs["tensor"]
    plan = shardadam.make_plan(
        abstract_params(model),
        {"data": copies, **({"model": tensor} if tensor > 1 else {})},
        layout=kwargs.get("layout", "natural"),
        stacked_dims=stacked_dims(model),
        param_specs=tensor_specs(model) if tensor > 1 else None,
    )
    held = sum(leaf.elements_per_device for leaf in plan.leaves.values())
    return held / (num_params(model) / tensor / copies)


def within_model(op: Any, tensor: int) -> bool:
    """Whether an op stays within the groups of tensor parallelism, the minor-most axis of the mesh."""
    return tensor > 1 and all(len({device // tensor for device in group}) == 1 for group in op.groups)
