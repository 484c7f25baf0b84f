"""What `scripts/torture` runs: training that is disturbed at random moments, again and again, and its end compared."""

import argparse
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import conftest  # sets up eight devices, before JAX starts
import jax
from launched import DEADLINES, assert_close, final_state, launched
from tiny import tiny_raw
from trees import assert_same_bits

STEPS = 16
HOW = ("kill", "kill", "stop", "spin", "hold", "error", "term")
MAX_STARTS = 6  # of one run: after a SIGTERM, or its launcher's death, a run is started again


def random_faults(rng, processes):
    """A few, one after the other."""
    return [
        {
            "process": rng.randrange(processes), "how": rng.choice(HOW),
            "what": rng.choice(("compile", "step", "step", "save", "save", "restore")), "nth": rng.randint(1, 3),
            "delay": rng.choice((0, rng.uniform(0, 0.2), rng.uniform(0, 2))),
        }
        for _ in range(rng.randint(1, 3))
    ]  # fmt: skip


def disturb(config, cache, rng, processes, *options):
    """Runs a config to its end, whatever it takes; returns how often what went wrong where."""
    seen = Counter()
    for start in range(MAX_STARTS):
        faults = random_faults(rng, processes) if start < MAX_STARTS - 2 else []
        kill_after = rng.uniform(3, 25) if faults and rng.random() < 0.15 else None
        ran = launched(
            config, cache, "--max-restarts", "6", *options, processes=processes, faults=faults, kill_after=kill_after
        )
        for line in ran.stderr.splitlines():
            if "fault: " in line:
                fault = json.loads(line.split("fault: ")[1])
                seen[f"{fault['how']} in {fault['what']}"] += 1
        if ran.returncode == -9:
            seen["launcher killed"] += 1
        elif ran.returncode:
            raise AssertionError(f"the launcher ended with {ran.returncode}:\n{ran.stderr}")
        elif "done: step" in ran.stdout:
            return seen
    raise AssertionError(f"not done after {MAX_STARTS} starts:\n{ran.stderr}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--processes", type=int, default=2, choices=(2, 4))
    args = parser.parse_args()
    rng, seen, runs, end = random.Random(args.seed), Counter(), 0, time.monotonic() + 60 * args.minutes
    print(f"jax {jax.__version__}, {len(jax.devices())} devices, {args.processes} processes, seed {args.seed}")
    with tempfile.TemporaryDirectory(prefix="shardadam-torture-") as directory:
        cache = Path(directory, "compiled")
        base = tiny_raw(Path(directory, "whole"), steps=STEPS, save_every=3, log_every=2, deadlines=DEADLINES)
        assert launched(base, cache, processes=args.processes).returncode == 0
        _, wanted = final_state(base)
        while time.monotonic() < end:
            config = base | {"runs_dir": str(Path(directory, "disturbed"))}
            fewer = rng.random() < 0.2
            happened = disturb(config, cache, rng, args.processes, *(("--min-processes", "1") if fewer else ()))
            step, state = final_state(config)
            assert step == STEPS
            (assert_close if fewer else assert_same_bits)(state, wanted)
            runs, seen = runs + 1, seen + happened
            print(f"run {runs}: {'close' if fewer else 'same bits'} after {dict(happened)}", flush=True)
            shutil.rmtree(config["runs_dir"])
    print(f"{runs} runs, {sum(seen.values())} faults, all ended as the undisturbed one: {dict(seen.most_common())}")


if __name__ == "__main__":
    assert conftest
    main()
