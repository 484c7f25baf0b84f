"""Runs optax's own tests with shardadam's Adam in them, and judges what came out against `expected.toml`."""

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optax

HERE = Path(__file__).parent
SITE = Path(optax.__file__).parent.parent  # Test ids begin with optax/, wherever it is installed.
USES = HERE / "uses.txt"


def uses() -> list[str]:
    """The ids of optax's tests that call one of the swapped functions, as `scripts/peers --discover` found them."""
    return [line for line in USES.read_text().splitlines() if line and not line.startswith("#")]


def uses_version() -> str:
    """The version of optax whose tests `uses` lists."""
    return re.search(r"^# optax (\S+)", USES.read_text(), re.M).group(1)


def run(mode: str, arguments: Sequence[str], *, plain: str = "", workers: int = 0) -> dict[str, dict[str, Any]]:
    """Runs the tests in a process of their own: {id: outcome, message, seconds and what the swapped functions did}."""
    with tempfile.TemporaryDirectory(prefix="shardadam-peers-") as directory:
        out = Path(directory) / "results.json"
        environment = os.environ | {"PYTHONPATH": str(HERE), "PEERS_MODE": mode, "PEERS_OUT": str(out)}
        environment.pop("JAX_NUMPY_DTYPE_PROMOTION", None)  # optax's tests are written for the standard one.
        environment["PEERS_PLAIN"] = plain
        command = [sys.executable, "-m", "pytest", "-q", "-c", str(HERE / "optax_tests.ini"), "--rootdir", str(SITE)]
        command += ["-p", "peers_plugin", "-n", str(workers), "--dist", "worksteal", *arguments]
        done = subprocess.run(command, cwd=SITE, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1) or not out.exists():  # 1: some tests failed, which `judge` is for.
            raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        return json.loads(out.read_text())


def expected(mode: str) -> dict[str, dict[str, str]]:
    """{test id: its entry in expected.toml} of the failures that are known in one mode."""
    entries = tomllib.loads((HERE / "expected.toml").read_text()).get("failure", [])
    return {test: entry for entry in entries if mode in entry["modes"] for test in entry["tests"]}


def judge(mode: str, results: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with a run: a failure that is not listed, a listed one that passes, one that did not use ours."""
    known, wrong = expected(mode), []
    for test, result in results.items():
        if result["outcome"] == "failed" and test not in known:
            wrong.append(f"{test} failed: {result['message'][:400]}")
        elif result["outcome"] == "failed" and not re.search(known[test]["message"], result["message"]):
            wrong.append(f"{test} failed otherwise than expected.toml says: {result['message'][:400]}")
        elif result["outcome"] == "passed" and test in known:
            wrong.append(f"{test} passed: take it out of expected.toml")
        elif result["outcome"] == "skipped":
            wrong.append(f"{test} was skipped, which it is not with optax: {result['message'][:400]}")
        elif result["outcome"] == "passed" and not went_through(result):
            wrong.append(f"{test} passed without our init or update on eight devices: {result}")
    return wrong


def went_through(result: dict[str, Any]) -> bool:
    """Whether the state of this test was planned on a mesh of eight devices and made or updated by our code."""
    return result.get("init", 0) + result.get("update", 0) > 0 and result["devices"] == 8
