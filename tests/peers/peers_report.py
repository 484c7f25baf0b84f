"""`scripts/peers`: all of optax's tests that use Adam, in each mode, with the counts written to docs/peers.md."""

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from peers_run import SITE, USES, expected, judge, run, uses, uses_version, went_through
from peers_swap import MODES

PAGE = Path(__file__).parents[2] / "docs" / "peers.md"
BEGIN, END = "<!-- counts: written by scripts/peers -->\n", "<!-- end of counts -->\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/peers", description=__doc__)
    parser.add_argument(
        "modes", nargs="*", metavar="MODE", help=f"of {', '.join(MODES)}; default: all, and docs/peers.md"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes to run the tests in")
    parser.add_argument(
        "--discover", action="store_true", help="run all tests of optax and write uses.txt; half an hour"
    )
    arguments = parser.parse_args()
    if arguments.discover:
        return discover(arguments.workers)
    if uses_version() != importlib.metadata.version("optax"):
        print(f"peers: uses.txt lists the tests of optax {uses_version()}: run scripts/peers --discover first")
        return 1
    results = {mode: run(mode, uses(), workers=arguments.workers) for mode in arguments.modes or MODES}
    wrong = [f"{mode}: {line}" for mode, result in results.items() for line in judge(mode, result)]
    print("\n".join([*(f"{mode}: {counts(result)}" for mode, result in results.items()), *wrong]))
    if not arguments.modes:
        text = PAGE.read_text()
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        PAGE.write_text(before + BEGIN + table(results) + END + after)
    return bool(wrong)


def discover(workers: int) -> int:
    """Runs every test of optax with optax's own functions, on one device, and lists those that call one of them."""
    files = sorted(str(path.relative_to(SITE)) for path in (SITE / "optax").rglob("*_test.py"))
    results = run("natural", files, plain="alone", workers=workers)
    found = sorted(test for test, result in results.items() if result.get("init", 0) + result.get("update", 0))
    USES.write_text(f"# optax {importlib.metadata.version('optax')}\n" + "\n".join(found) + "\n")
    print(f"{len(found)} of {len(results)} tests call {USES.name}'s functions; {counts(results)}")
    return 0


def counts(results: dict[str, dict[str, Any]]) -> dict[str, int]:
    return dict(Counter(result["outcome"] for result in results.values()))


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The versions, a row per mode, and the expected failures with their reasons."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("optax", "jax", "flax"))
    lines = [
        f"{datetime.date.today()}, {versions}, Python {platform.python_version()}, {os.cpu_count()} CPU cores.",
        "",
        "| mode | mesh | tests | passed | fail as listed | fail otherwise | skipped | in shards | whole | no leaf |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for mode, result in results.items():
        outcome, known = counts(result), expected(mode)
        listed = sum(r["outcome"] == "failed" and test in known for test, r in result.items())
        split = sum(r.get("split", 0) > 0 for r in result.values())
        whole = sum(r.get("split", 0) == 0 < r.get("whole", 0) for r in result.values())
        none = sum(went_through(r) and not r["split"] + r["whole"] for r in result.values())
        sizes = " x ".join(f"{axis} {size}" for axis, size in MODES[mode].sizes)
        lines.append(
            f"| {mode} | {sizes}, {MODES[mode].axis_type.name} | {len(result)} | {outcome.get('passed', 0)} | {listed} "
            f"| {outcome.get('failed', 0) - listed} | {outcome.get('skipped', 0)} | {split} | {whole} | {none} |"
        )
    lines += ["", "Expected failures:", ""]
    by_reason: dict[tuple[str, str], list[str]] = {}
    for mode in results:
        for test, entry in expected(mode).items():
            by_reason.setdefault((mode, entry["reason"]), []).append(test)
    for (mode, reason), tests in by_reason.items():
        names = Counter(re.sub(r"\d+$", "", test.split("::")[-1]) for test in tests)
        shown = ", ".join(f"`{name}`" + (f" ({count})" if count > 1 else "") for name, count in names.items())
        lines.append(f"- {mode}, {len(tests)}: {shown}. {reason}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
