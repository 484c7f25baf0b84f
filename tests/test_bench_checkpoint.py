"""`scripts/bench_checkpoint` runs, and says of every goal whether it is met. Nothing here looks at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_a_small_state(tmp_path):
    options = ["--rounds", "1", "--rows", "8", "--leaves", "2", "--json", str(tmp_path / "report.json")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts/bench/checkpoint.py"), *options]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert ran.returncode == 0, ran.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["stages"]) == {"2", "3"}
    for part in report["stages"].values():
        assert part["nbytes"] == 3 * 2 * 8 * 1024 * 4 + 2 * 4
        for name, goal in part["goals"].items():
            assert goal["met"] == (goal["ratio"] <= goal["limit"])
            assert f"| {name} | {goal['limit']} | {goal['ratio']:.3f} " in ran.stdout
        assert all(x["min"] <= x["median"] <= x["max"] for x in part["seconds"].values())
        assert {"stall", "orbax stall", "save", "orbax save", "restore", "orbax restore", "disk write"} <= set(
            part["seconds"]
        )
