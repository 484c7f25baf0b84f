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

from shardadam.topology import CompilationError, compile_for

ROOT = Path(__file__).parents[2]
# name: its module, which has `cases()`, by key what `compile_for` is told; `read(case, found)`, the columns;
# `also(case)`, what needs no compiler; and `page(results, versions)`.
EXPERIMENTS = {"pallas": "pallas_cases", "orders": "order_cases", "options": "option_cases"}


def main() -> None:
    """Runs what has no result yet."""
    parser = argparse.ArgumentParser(prog="bench_experiments", description=__doc__)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--only", nargs="*", default=[], help="run the cases that have all of these in their names")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--again", action="store_true", help="run also what has a result")
    parser.add_argument("--report", action="store_true", help="only write the page from the results")
    parser.add_argument("--tpu-python", default=str(ROOT / ".venv-aot/bin/python"), help="has the extra aot-tpu")
    parser.add_argument("--results", type=Path, help="default: docs/benchmarks/EXPERIMENT.json")
    args = parser.parse_args()
    module = importlib.import_module(EXPERIMENTS[args.experiment])
    path = args.results or ROOT / "docs" / "benchmarks" / f"{args.experiment}.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    cases = module.cases()
    for key in [key for key in cases if all(part in f" {key} " for part in args.only)]:
        if args.list:
            print(f"{'done' if key in done else 'to do':6} {key}")
        elif not args.report and (args.again or key not in done):
            done[key] = measured(module, cases[key], args.tpu_python)
            path.write_text(json.dumps(done, indent=1) + "\n")
            print(f"{key}: {done[key]}", flush=True)
    if not args.list:
        kept = {key: done[key] for key in cases if key in done}
        path.write_text(json.dumps(kept, indent=1) + "\n")
        path.with_suffix(".md").write_text(module.page(kept, made_with(kept)))


def measured(module: Any, case: dict[str, Any], python: str) -> dict[str, Any]:
    """What one case says, or why it does not compile."""
    head = subprocess.run(
        ["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    record = {"date": datetime.date.today().isoformat(), "commit": head.stdout.strip()}
    if "topology" not in case:
        return record | module.also(case)
    try:
        found = compile_for(**case, python=python)
    except CompilationError as error:
        return record | {"error": " ".join(str(error).split())[:400]}
    return record | {"versions": found.versions, "compile_seconds": round(found.seconds, 1)} | module.read(case, found)


def made_with(results: dict[str, Any]) -> str:
    """Versions and date, for the page's head."""
    ran = [found for found in results.values() if "versions" in found]
    versions = {f"{name} {version}" for found in ran for name, version in found["versions"].items()}
    commits = dict.fromkeys(found["commit"] for found in ran)
    made = f"commit {commits.popitem()[0]}" if len(commits) == 1 else f"commits {', '.join(commits)}"
    return f"{', '.join(sorted(versions))}; {max(found['date'] for found in results.values())}, {made}"


if __name__ == "__main__":
    main()
