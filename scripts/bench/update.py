"""Runs `measure.py` for each number of simulated devices; prints its tables, says which goals are met, writes docs."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "benchmarks"
BASES = ("replicated optax", "hand-placed optax")
FULL = {"compile_rounds": 3, "dispatch_rounds": 10, "dispatch_calls": 12}
SMALL = {"compile_rounds": 1, "dispatch_rounds": 1, "dispatch_calls": 4}

HOW = """\
One optimizer step, `params, state = step(params, state, grads)`, jitted, with params and state donated. The gradients
are given, reduced and replicated already: nothing of what is gained in their reduction shows here. The devices are
simulated: threads of one process on this machine's cores, with one memory, so that a ratio says how much work a variant
does and how it moves its bytes, not how fast a network is. Written by `./scripts/bench_update --write`.

- *replicated optax*: `optax.adam`, all of it replicated. On one device, jitted optax.
- *hand-placed optax*: `optax.adam`, its moments placed by hand on the first dim that divides, parameters pinned to be
  replicated: the rule and the `min_size` of shardadam's natural layout.
- *drop-in*: `shardadam.adam(plan=...)` and `optax.apply_updates`. *TrainState*: `shardadam.TrainState.apply_gradients`.
- `square` is 8 x [4096, 1024] float32, 33.6M parameters; `gpt2` is GPT-2 124M, 148 leaves of float32.

Each number of devices is a process of its own. Within it the variants take turns, each round beginning with another;
"vs" is the median over rounds of the ratio within a round. *CPU*: seconds of all threads together, in which what else
runs on the machine shows less. *compile*: trace, lower and compile from empty caches.
*dispatch*: the CPU time of the calling thread until the call returns, for the same tree with leaves of 8 to 1024
elements (`min_size=0`). *state*: mu, nu and count on the fullest device. *temp*: XLA's temporary bytes per device.
"""


class Goal(NamedTuple):
    """`figure` shall be at most `limit` for every variant of shardadam, on `devices` (None: on all that ran)."""

    text: str
    figure: str
    limit: float
    devices: int | None


GOALS = (
    Goal("step vs hand-placed optax, 8 devices", "step_vs_hand-placed", 0.75, 8),
    Goal("step vs replicated optax, 8 devices", "step_vs_replicated", 0.5, 8),
    Goal("step vs jitted optax, 1 device", "step_vs_replicated", 1.02, 1),
    Goal("dispatch vs replicated optax, worst", "dispatch_vs_replicated", 1.3, None),
    Goal("dispatch vs hand-placed optax, worst", "dispatch_vs_hand-placed", 1.3, None),
    Goal("compile vs replicated optax, worst", "compile_vs_replicated", 1.3, None),
    Goal("compile vs hand-placed optax, worst", "compile_vs_hand-placed", 1.3, None),
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_update", description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--trees", nargs="+", default=["square", "gpt2"], choices=["square", "gpt2"])
    parser.add_argument("--rounds", type=int, help="turns of each variant (default 15; 2 with --small)")
    parser.add_argument("--small", action="store_true", help="tiny trees: seconds in all, and times that mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    parser.add_argument("--write", action="store_true", help="renew docs/benchmarks/update.md and update.json")
    args = parser.parse_args()
    if args.write and args.small:
        parser.error("--write: got --small as well, whose times mean nothing; leave one of them out")
    args.rounds = args.rounds or (2 if args.small else 15)
    return args


def run_devices(devices: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The measured cases, one per tree, of a fresh process with so many devices."""
    options = {"trees": args.trees, "small": args.small, "rounds": args.rounds, **(SMALL if args.small else FULL)}
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip(), "JAX_NUMPY_DTYPE_PROMOTION": "standard"}
    command = [sys.executable, str(Path(__file__).with_name("measure.py")), json.dumps(options)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"bench_update: measuring {devices} devices failed; the lines above say why")
    return [json.loads(line) for line in done.stdout.splitlines()]


def environment() -> dict[str, Any]:
    """Hardware, versions and date."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    describe = ["git", "describe", "--always", "--dirty"]
    git = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load_average_before": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": git.stdout.strip(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax", "flax")},
    }


def judge(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One verdict per goal, tree and variant; none where the goal's number of devices did not run."""
    verdicts = []
    for goal in GOALS:
        for tree in dict.fromkeys(case["tree"] for case in cases):
            ran = [c["variants"] for c in cases if c["tree"] == tree and goal.devices in (None, c["devices"])]
            for name in [name for name in (ran[0] if ran else {}) if name not in BASES]:
                worst = max(variants[name][goal.figure] for variants in ran)
                verdict = {"goal": goal.text, "limit": goal.limit, "tree": tree, "variant": name, "measured": worst}
                verdicts.append(verdict | {"met": worst <= goal.limit})
    return verdicts


def case_rows(case: dict[str, Any]) -> list[list[str]]:
    """Header and one row per variant."""
    head = "variant|median ms|min ms|vs repl.|vs hand|CPU ms|vs hand|state MB|temp MB|collectives (MB)"
    rows = [[*head.split("|"), "compile s", "vs repl.", "dispatch us", "vs repl."]]
    for name, x in case["variants"].items():
        step, moved = x["step_seconds"], x["collectives"].items()
        times = [f"{step['median'] * 1e3:.1f}", f"{step['min'] * 1e3:.1f}"]
        times += [f"{x['step_vs_replicated']:.2f}", f"{x['step_vs_hand-placed']:.2f}"]
        times += [f"{x['cpu_seconds']['median'] * 1e3:.1f}", f"{x['cpu_vs_hand-placed']:.2f}"]
        held = [f"{x['state_bytes'] / 1e6:.2f}", f"{x['temp_bytes'] / 1e6:.2f}"]
        held += [", ".join(f"{c['count']} {op} ({c['bytes'] / 1e6:.2f})" for op, c in moved) or "none"]
        host = [f"{x['compile_seconds']['median']:.2f}", f"{x['compile_vs_replicated']:.2f}"]
        host += [f"{x['dispatch_seconds']['median'] * 1e6:.0f}", f"{x['dispatch_vs_replicated']:.2f}"]
        rows.append([name, *times, *held, *host])
    return rows


def goal_rows(verdicts: list[dict[str, Any]]) -> list[list[str]]:
    """Header and one row per goal and tree, with a column for each variant."""
    names = list(dict.fromkeys(v["variant"] for v in verdicts))
    table: dict[tuple[str, str, float], dict[str, str]] = {}
    for v in verdicts:
        cell = f"{v['measured']:.2f} {'met' if v['met'] else 'NOT met'}"
        table.setdefault((v["goal"], v["tree"], v["limit"]), {})[v["variant"]] = cell
    rows = [[text, tree, f"{limit}", *map(row.get, names)] for (text, tree, limit), row in table.items()]
    return [["goal: at most", "tree", "limit", *names], *rows]


def title(case: dict[str, Any]) -> str:
    return f"{case['tree']}, {case['devices']} device{'s' * (case['devices'] > 1)}"


def show(console: Console, heading: str, rows: list[list[str]]) -> None:
    table = Table(title=heading, title_justify="left")
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows[1:]:
        table.add_row(*(f"[red]{cell}[/]" if "NOT met" in cell else cell for cell in row))
    console.print(table)


def markdown(report: dict[str, Any]) -> str:
    def lines(rows: list[list[str]]) -> list[str]:
        rule = ["---", *["--:"] * (len(rows[0]) - 1)]
        return ["| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]]]

    on = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in on["versions"].items())
    where = f"{on['date']}, commit {on['commit']}; {on['cpu']}, {on['cores']} cores; {versions}."
    how_long = f"{report['rounds']} rounds; load average before: {on['load_average_before']:.1f}."
    out = [
        "# One optimizer step, side by side",
        "",
        where,
        how_long,
        "",
        HOW,
        "## Goals",
        "",
        *lines(goal_rows(report["goals"])),
    ]
    for case in report["cases"]:
        out += ["", f"## {title(case)}", "", *lines(case_rows(case))]
    return "\n".join(out) + "\n"


def main() -> None:
    args = parse_args()
    console = Console(width=None if sys.stdout.isatty() else 200)
    report: dict[str, Any] = {"environment": environment(), "small": args.small, "rounds": args.rounds}
    report["cases"] = []
    for devices in args.devices:
        for case in run_devices(devices, args):
            report["cases"].append(case)
            show(console, title(case), case_rows(case))
    report["goals"] = judge(report["cases"])
    show(console, "Goals", goal_rows(report["goals"]))
    paths = [*([args.json] if args.json else []), *([DOCS / "update.json"] if args.write else [])]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
    if args.write:
        (DOCS / "update.md").write_text(markdown(report))


if __name__ == "__main__":
    main()
