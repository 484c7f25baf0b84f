"""What `scripts/torture` runs: training that is disturbed at random moments, again and again, and its end compared."""

import argparse
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

STEPS, SAVE_EVERY = 16, 3
STUCK = ("kill", "kill", "stop", "spin", "hold", "error")
LAST = ("term", "launcher")  # after which the launcher starts nothing
MAX_LAUNCHES = 4  # of one run: it is launched again after one of the last


def random_fault(rng, processes, *, first, last):
    """One that is sure to come about: every start restores, compiles, takes a step or evaluates, and saves."""
    what = rng.choice(("compile", "step", "step", "save", "save", "restore", *(["delete"] if first else [])))
    nth = rng.randint(1, 10 if what == "step" else 3) if first and what in ("step", "save") else 1
    how = rng.choice(LAST if last else STUCK)
    if what == "delete":  # in a thread of process 0, whose stacking up stops nothing
        return {"process": 0, "what": what, "nth": 1, "how": "kill", "delay": 0}
    # Only signals come from outside, whatever the process does meanwhile.
    delay = rng.choice((0, rng.uniform(0, 0.1), rng.uniform(0, 1))) if how in ("kill", "stop", *LAST) else 0
    return {"process": rng.randrange(processes), "what": what, "nth": nth, "how": how, "delay": delay}


def random_faults(rng, processes, *, first):
    """One to three, one after the other."""
    num, ends = rng.randint(1, 3), rng.random() < 0.4
    return [random_fault(rng, processes, first=first and i == 0, last=ends and i == num - 1) for i in range(num)]


def disturb(config, cache, rng, processes, *options):
    """Runs a config to its end, whatever it takes; returns how often what went wrong where."""
    seen = Counter()
    for number in range(MAX_LAUNCHES):
        faults = random_faults(rng, processes, first=number == 0) if number < MAX_LAUNCHES - 1 else []
        ran = launched(
            config, cache, "--max-restarts", "12", *options, processes=processes, faults=faults, program="faulty"
        )  # which asserts that all of them have happened
        seen.update(f"{fault['how']} in {fault['what']}" for fault in faults)
        killed = any(fault["how"] == "launcher" for fault in faults)
        if ran.returncode != (-9 if killed else 0):
            raise AssertionError(f"the launcher ended with {ran.returncode}:\n{ran.stderr}")
        if "done: step" in ran.stdout:
            return seen
        assert killed or "stopped at step" in ran.stdout, ran.stdout + ran.stderr
    raise AssertionError(f"not done after {MAX_LAUNCHES} launches:\n{ran.stderr}")


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
        base = tiny_raw(
            Path(directory, "whole"),
            steps=SAVE_EVERY,
            save_every=SAVE_EVERY,
            log_every=2,
            deadlines=DEADLINES,
            mesh="data=-1",  # of as many devices as there are when fewer processes go on
        )
        assert launched(base, cache, processes=args.processes, program="faulty").returncode == 0
        shutil.copytree(base["runs_dir"], Path(directory, "begun"))  # so that there is something to restore at once
        base["steps"] = STEPS
        assert launched(base, cache, processes=args.processes, program="faulty").returncode == 0
        _, wanted = final_state(base)
        while time.monotonic() < end:
            config = base | {"runs_dir": str(Path(directory, "disturbed"))}
            shutil.copytree(Path(directory, "begun"), config["runs_dir"])
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
