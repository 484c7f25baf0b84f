"""`scripts/bench_update --small` runs, and what is exact in its report is right. Nothing here looks at a time."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardadam.layout import choose_lanes, num_rows

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["replicated optax", "hand-placed optax"]
NAMES += [f"{what} {layout}" for what in ("drop-in", "TrainState") for layout in ("natural", "packed")]
WIDTH, VOCAB = 64, 257
DENSE = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
BIASES = [(columns,) for _, columns in DENSE]
BLOCK = [*DENSE, *BIASES, *[(WIDTH,)] * 4]
SHAPES = [(VOCAB, WIDTH), (64, WIDTH), (WIDTH,), (WIDTH,), *BLOCK]


def run_small(out):
    options = ["--small", "--devices", "1", "8", "--trees", "gpt2", "--json", str(out)]
    command = [sys.executable, str(ROOT / "scripts/bench/update.py"), *options]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert "goal: at most" in done.stdout
    assert len(report["goals"]) == 7 * 4
    return {case["devices"]: case["variants"] for case in report["cases"]}


def moments(shape, shards, name):
    """Bytes of one leaf's mu and nu on a device, by the layouts' definition, float32."""
    size = math.prod(shape)
    if name == "replicated optax" or size < 1024:
        return 8 * size
    if "packed" in name and shards > 1:
        return 8 * num_rows(size, shards) // shards * choose_lanes(size, shards)
    return 8 * size // shards


@pytest.mark.slow
def test_what_is_exact_in_a_report_is_right(tmp_path):
    """One test, as every worker that had a part of it would run the benchmark anew."""
    cases = run_small(tmp_path / "update.json")
    split = [shape for shape in SHAPES if math.prod(shape) >= 1024]
    for devices, variants in cases.items():
        assert list(variants) == NAMES
        for name, figures in variants.items():
            assert figures["state_bytes"] == 4 + sum(moments(shape, devices, name) for shape in SHAPES)
            assert figures["temp_bytes"] >= 0
            operands = sum(moments(shape, devices, name) for shape in split) // 2
            gathers = {"all-gather": {"count": len(split), "bytes": operands}}
            assert figures["collectives"] == ({} if devices == 1 or name == "replicated optax" else gathers)
