"""The page of the comparison: goals met or not, then a table for each model and program."""

import itertools
from typing import Any

from grid import MEMORY, MODELS, STRATEGIES, TOPOLOGIES, all_cases

GIB = 2**30
HEAD = (
    "| topology | strategy | peak GiB | temp GiB | wire GiB | x ideal | state x even "
    "| collectives | compile s | commit |"
)
RULE = "| --- | --- | --: | --: | --: | --: | --: | --- | --: | --- |"
INTRO = """# Compiled for topologies that are not here

{versions}. {done} of {all} cases are done: {failed} of them the compiler
refused, {too_large} cannot fit by arithmetic alone. Compile times are of a busy machine of two cores. Written by
`./scripts/bench_topologies`; [topologies.md](../topologies.md) says what was learnt, and how to run more.

Nothing was run: these are the compilers' own programs and memory plans for one device, of parameters and gradients in
bfloat16 and moments in float32. *update*: every device's own gradient is reduced, applied, and the parameters are
gathered. *step*: the whole train step, one sequence of 1,024 tokens per device, each layer recomputed in the backward
pass of a scan.

- *wire*: what a device sends, by the ring algorithms, loops counted. *x ideal*: over a reduce-scatter of the gradients
  and an all-gather of the parameters. (Stage 3 gathers twice, so 1.5 is its ideal.) *state x even*: a device's part of
  mu over 1/N.
  Between slices a compiler's own sends and receives go, which no text has: of two slices only what stays within one
  is counted.
- *peak*: arguments, results and temporaries; in *update* the unreduced gradients are arguments. XLA:GPU compiles what
  does not fit, too; the page says where.
- *gspmd* is optax with moments placed by hand as the natural layout has them; *auto* and *packed* are this project's
  layouts; *nd* is the compiler option `xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter`.
- *commit*: which version was compiled; rows without are older than aeecd69, by a day at most.
"""


def page(results: dict[str, Any], versions: str) -> str:
    """From the results of all runs."""
    cases = [case for case in all_cases() if case.key in results]
    found = [results[case.key] for case in cases]
    intro = INTRO.format(
        versions=versions,
        done=len(cases),
        all=sum(1 for _ in all_cases()),
        failed=sum("error" in x for x in found),
        too_large=sum("too_large" in x for x in found),
    )
    parts = [intro, goals(results)]
    for model, program in itertools.product(MODELS, ("update", "step")):
        rows = [row(case, results[case.key]) for case in cases if (case.model, case.program) == (model, program)]
        if rows:
            parts.append("\n".join([f"## {model}, {program}", "", HEAD, RULE, *rows]))
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def row(case: Any, found: dict[str, Any]) -> str:
    """One case."""
    refused = found.get("too_large") or found.get("error")
    if refused:
        return f"| {case.where} | {case.name} | {refused.replace('|', '/')} | | | | | | | {found.get('commit', '')} |"
    ops = "; ".join(
        f"{times} {kind} {size / GIB:.2f}" for kind, (times, size) in found["collectives"].items() if size > 2**20
    )
    numbers = [found["peak_bytes"] / GIB, found["temp_bytes"] / GIB, found["wire_bytes"] / GIB]
    numbers += [found["wire_bytes"] / found["ideal_wire_bytes"], found["state_ratio"]]
    peak, *rest = (f"{x:.2f}" for x in numbers)
    fits = "" if numbers[0] <= MEMORY[case.chip] else f" of {MEMORY[case.chip]}, does not fit"
    cells = [case.where, case.name, peak + fits, *rest, ops, f"{found['compile_seconds']:.0f}", found.get("commit", "")]
    return f"| {' | '.join(cells)} |"


def goals(results: dict[str, Any]) -> str:
    """The best strategy of each topology, model and program against the goals; ties go to less on the wire."""
    lines = [
        "## Goals",
        "",
        "At most: 1.05 x the ideal on the wire, 1.02 x GSPMD's peak, 1.05 x an even split of the state; of the update",
        "alone, one layer's parameters of temp. Of the strategies at stage 2 that ran, the one that meets most.",
        "",
        "| topology | model | program | strategy | wire x ideal | peak x GSPMD | state x even | temp / layer |",
        "| --- | --- | --- | --- | --: | --: | --: | --: |",
    ]
    for model, where, program in itertools.product(MODELS, TOPOLOGIES, ("update", "step")):
        prefix = f"{where} | {model} | {program} | "
        gspmd = results.get(prefix + "gspmd", {})
        ours = {
            name: results[prefix + name]
            for name in STRATEGIES
            if name.startswith("stage 2") and "peak_bytes" in results.get(prefix + name, {})
        }
        if ours:
            name = min(ours, key=lambda name: rank(ours[name], gspmd, program))
            wire, *rest = verdicts(ours[name], gspmd, program)
            wire = wire if TOPOLOGIES[where][1] == 1 else "-"
            lines.append(f"| {' | '.join([where, model, program, name, wire, *rest])} |")
    return "\n".join(lines)


def rank(found: dict[str, Any], gspmd: dict[str, Any], program: str) -> tuple[int, float]:
    """How many goals are not met, then the bytes on the wire."""
    missed = sum("NOT" in verdict for verdict in verdicts(found, gspmd, program))
    return missed, found["wire_bytes"] + found["peak_bytes"]


def verdicts(found: dict[str, Any], gspmd: dict[str, Any], program: str) -> list[str]:
    """Each goal, met or not."""

    def verdict(value: float | None, limit: float) -> str:
        return "-" if value is None else f"{value:.2f} {'met' if value <= limit else 'NOT met'}"

    peak = found["peak_bytes"] / gspmd["peak_bytes"] if "peak_bytes" in gspmd else None
    temp = found["temp_bytes"] / found["layer_bytes"] if program == "update" else None
    return [
        verdict(found["wire_bytes"] / found["ideal_wire_bytes"], 1.05),
        verdict(peak, 1.02),
        verdict(found["state_ratio"], 1.05),
        verdict(temp, 1.0),
    ]
