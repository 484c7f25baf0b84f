"""Runs the cases of `grid.py`, one process each, and appends what they say to docs/benchmarks/topologies.json."""

import argparse
import datetime
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from grid import MEMORY, TOPOLOGIES, Case, all_cases
from models import WIDTH, abstract_params, layer_bytes, num_params, stacked_dims, tensor_specs

import shardadam
from shardadam.topology import Compilation, CompilationError, compile_for, parse_topology

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "benchmarks" / "topologies.json"


def main() -> None:
    """Runs what has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="run the cases that have all of these in their names")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--again", action="store_true", help="run also what has a result")
    parser.add_argument("--report", action="store_true", help="only write the page from the results")
    parser.add_argument("--tpu-python", default=str(ROOT / ".venv-aot/bin/python"), help="has the extra aot-tpu")
    parser.add_argument("--gpu-python", default=str(ROOT / ".venv-aot-gpu/bin/python"), help="has the extra aot-gpu")
    parser.add_argument("--until", default="99", help="begin no case after this time of day, such as 18:30")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    chosen = [case for case in all_cases() if all(part in f" {case.key} " for part in args.only)]
    done = json.loads(args.results.read_text()) if args.results.exists() else {}
    for case in () if args.report else chosen:
        state = "done" if case.key in done else "to do"
        if args.list:
            print(f"{state:6} {case.key}")
        elif datetime.datetime.now().strftime("%H:%M") < args.until and (args.again or case.key not in done):
            platform = parse_topology(TOPOLOGIES[case.where][0]).platform
            found = measured(case, args.tpu_python if platform == "tpu" else args.gpu_python)
            done = json.loads(args.results.read_text()) if args.results.exists() else {}
            done[case.key] = found
            part = args.results.with_suffix(".part")
            part.write_text(json.dumps(done, indent=1) + "\n")
            part.replace(args.results)
            print(f"{case.key}: {summary(found)}", flush=True)
    if not args.list:
        from report import write_page

        write_page(done, args.results.with_suffix(".md"))


def measured(case: Case, python: str) -> dict[str, Any]:
    """What one case says, or why it does not compile."""
    topology, num_slices, _ = TOPOLOGIES[case.where]
    record: dict[str, Any] = {"date": datetime.date.today().isoformat(), **expected(case)}
    least = least_bytes(case, record) / 2**30
    if least > MEMORY[case.chip]:
        return {**record, "too_large": f"not compiled: {least:.1f} GiB at the least, {MEMORY[case.chip]} are there"}
    try:
        found = compile_for(
            topology,
            f"{Path(__file__).parent / 'cases.py'}:build",
            kwargs=case.kwargs,
            num_slices=num_slices,
            compiler_options=case.options,
            python=python,
        )
    except CompilationError as error:
        used = re.search(r"Used ([\d.]+)([GM]) of ([\d.]+)([GM])", str(error))
        return {**record, "error": used[0] if used else " ".join(str(error).split())[:300]}
    return {**record, **said(case, found)}


def expected(case: Case) -> dict[str, Any]:
    """From shapes alone: the ideal on the wire, one layer's parameters, and by how much the state exceeds 1/N."""
    topology, num_slices, _ = TOPOLOGIES[case.where]
    devices = parse_topology(topology, num_slices).num_devices
    copies = devices // case.tensor
    whole = num_params(case.model) * WIDTH // case.tensor
    return {
        "num_devices": devices,
        "param_bytes": whole,
        "layer_bytes": layer_bytes(case.model, case.tensor),
        "ideal_wire_bytes": 2 * whole * (copies - 1) // copies,
        "state_ratio": state_ratio(case, copies),
    }


def least_bytes(case: Case, record: dict[str, Any]) -> float:
    """What a device holds whatever the compiler does: parameters, float32 moments, and gradients that come in whole."""
    copies = record["num_devices"] // case.tensor
    whole = record["param_bytes"]
    params = whole / copies if case.stage == 3 else whole
    moments = 2 * 4 / WIDTH * whole * record["state_ratio"] / copies
    grads = whole if case.program == "update" or case.stage == 1 or case.name == "replicated" else 0
    return params + moments + grads


def state_ratio(case: Case, copies: int) -> float:
    """Elements of a moment on each device over those that an even split would have."""
    if case.name == "replicated":
        return float(copies)
    told = case.kwargs
    plan = shardadam.make_plan(
        abstract_params(case.model),
        {"data": copies, **({"model": case.tensor} if case.tensor > 1 else {})},
        layout=told.get("layout", "natural"),
        stacked_dims=stacked_dims(case.model),
        param_specs=tensor_specs(case.model) if case.tensor > 1 else None,
    )
    held = sum(leaf.elements_per_device for leaf in plan.leaves.values())
    return held / (num_params(case.model) / case.tensor / copies)


def said(case: Case, found: Compilation) -> dict[str, Any]:
    """The columns of the table."""
    ours = [op for op in found.collectives if not within_model(op, case.tensor)]
    bytes_of: Counter[str] = Counter()
    times_of: Counter[str] = Counter()
    for op in ours:
        kind = f"{'async ' if op.is_async else ''}{op.op} {'+'.join(op.dtypes)}"
        bytes_of[kind] += op.total_wire_bytes or 0
        times_of[kind] += op.times or 0
    return {
        "device_kind": found.device_kind,
        "peak_bytes": found.memory.peak_bytes,
        "temp_bytes": found.memory.temp_bytes,
        "argument_bytes": found.memory.argument_bytes,
        "not_donated": list(found.memory.not_donated),
        "wire_bytes": sum(bytes_of.values()),
        "unknown_times": sum(op.times is None for op in ours),
        "collectives": {kind: [times_of[kind], bytes_of[kind]] for kind in sorted(bytes_of)},
        "compile_seconds": round(found.seconds, 1),
        "versions": found.versions,
    }


def within_model(op: Any, tensor: int) -> bool:
    """Whether an op stays within the groups of tensor parallelism, the minor-most axis of the mesh."""
    return tensor > 1 and all(len({device // tensor for device in group}) == 1 for group in op.groups)


def summary(found: dict[str, Any]) -> str:
    """For the terminal."""
    refused = found.get("error") or found.get("too_large")
    if refused:
        return refused
    gib = {key: found[key] / 2**30 for key in ("peak_bytes", "temp_bytes", "wire_bytes")}
    ratio = found["wire_bytes"] / found["ideal_wire_bytes"]
    return (
        f"peak {gib['peak_bytes']:.2f} GiB, temp {gib['temp_bytes']:.2f}, wire {gib['wire_bytes']:.2f} "
        f"({ratio:.2f} x ideal), {found['compile_seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
