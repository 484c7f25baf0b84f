"""Runs one experiment, one process per compilation, and writes its page: docs/benchmarks/NAME.json and .md."""

import argparse
import datetime
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from shardadam.topology import CompilationError, compile_for, parse_topology

ROOT = Path(__file__).parents[2]
# name: its module, which has `cases()`, by key what `compile_for` is told; `read(case, found)`, the columns;
# `also(case)`, what needs no compiler; and `page(results, versions)`.
EXPERIMENTS = {
    "topologies": "topology_cases",
    "pallas": "pallas_cases",
    "orders": "order_cases",
    "options": "option_cases",
}


def main() -> None:
    """Runs what has no result yet."""
    args = arguments()
    module = importlib.import_module(EXPERIMENTS[args.experiment])
    path = args.results or ROOT / "docs" / "benchmarks" / f"{args.experiment}.json"
    cases, done = module.cases(), read(path)
    for key in [key for key in cases if all(part in f" {key} " for part in args.only)]:
        if args.list:
            print(f"{'done' if key in done else 'to do':6} {key}")
        elif (
            not args.report
            and (args.again or key not in done)
            and datetime.datetime.now().strftime("%H:%M") < args.until
        ):
            found = measured(module, cases[key], args)
            done = read(path) | {key: found}  # Read anew: another may run other cases.
            write(path, done)
            print(f"{key}: {found}", flush=True)
    if not args.list:
        kept = {key: done[key] for key in cases if key in done}
        write(path, kept)
        path.with_suffix(".md").write_text(module.page(kept, made_with(kept)))


def arguments() -> argparse.Namespace:
    """Of the command."""
    parser = argparse.ArgumentParser(prog="bench_experiments", description=__doc__)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--only", nargs="*", default=[], help="run the cases that have all of these in their names")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--again", action="store_true", help="run also what has a result")
    parser.add_argument("--report", action="store_true", help="only write the page from the results")
    parser.add_argument("--until", default="99", help="begin no case after this time of day, such as 18:30")
    parser.add_argument("--tpu-python", default=str(ROOT / ".venv-aot/bin/python"), help="has the extra aot-tpu")
    parser.add_argument("--gpu-python", default=str(ROOT / ".venv-aot-gpu/bin/python"), help="has the extra aot-gpu")
    parser.add_argument("--results", type=Path, help="default: docs/benchmarks/EXPERIMENT.json")
    return parser.parse_args()


def read(path: Path) -> dict[str, Any]:
    """The results so far."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, results: dict[str, Any]) -> None:
    """Inverse of `read`; ended meanwhile, it leaves what was there."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)


def measured(module: Any, case: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """What one case says, or why it does not compile."""
    head = subprocess.run(
        ["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    record = {"date": datetime.date.today().isoformat(), "commit": head.stdout.strip()}
    if "topology" not in case:
        return record | module.also(case)
    on_gpu = parse_topology(case["topology"]).platform == "gpu"
    try:
        found = compile_for(**case, python=args.gpu_python if on_gpu else args.tpu_python)
    except CompilationError as error:
        return record | {"error": " ".join(str(error).split())[:400]}
    return record | {"versions": found.versions, "compile_seconds": round(found.seconds, 1)} | module.read(case, found)


def made_with(results: dict[str, Any]) -> str:
    """Versions and date, for the page's head."""
    ran = [found for found in results.values() if "versions" in found]
    versions = {f"{name} {version}" for found in ran for name, version in found["versions"].items()}
    commits = dict.fromkeys(found["commit"] for found in ran if "commit" in found)
    made = f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    return f"{', '.join(sorted(versions))}; {max(found['date'] for found in results.values())}, {made}"


if __name__ == "__main__":
    main()
