"""What `scripts/torture` runs: training that is disturbed at random moments, again and again, and its end compared."""

import argparse
import datetime
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import conftest  # sets up eight devices, before JAX starts
import numpy as np
from fault_deck import Dealer
from launched import assert_close, final_state, launched
from tiny import tiny_raw
from trees import assert_same_bits

from shardadam.checkpoint import sealing
from shardadam.trainer.config import parse_config
from shardadam.trainer.metrics import read_metrics
from shardadam.trainer.run_dir import run_directory

STEPS, SAVE_EVERY = 16, 3
# Many times what each takes where nothing else runs, and programs are compiled already; and not so long that a run that
# is stuck at any of them takes most of the time.
DEADLINES = {"start": 40, "compile": 40, "step": 15, "save": 25, "restore": 25, "heartbeat": 10}
DEVICES = {2: 4, 3: 3, 4: 4}  # by processes: two with two each, three and four with one each
MAX_LAUNCHES = 4  # of one run: it is launched again after one of the last faults
# Seconds until a group has restored, compiled and trained, or has ended: it takes 10 where nothing else runs, and what
# takes this long is a hang.
FOR_A_START = 180


class Torture:
    """Disturbs runs of a config that go on from one checkpoint, if there is one, and compares how they end.

    Args:
      directory: for all of it.
      rng: deals the faults.
      base: the config, whose `runs_dir` each run replaces.
      cache: a directory for compiled programs.
      devices: how many there are in all, by processes.
      deadlines: the disturbed runs'.
      program: see `launched`.
    """

    def __init__(self, directory, rng, base, cache, *, devices=DEVICES, deadlines=DEADLINES, program="faulty"):
        self.directory, self.rng, self.dealer = directory, rng, Dealer(rng)
        self.base, self.cache, self.devices, self.program = base, cache, devices, program
        self.deadlines = deadlines
        self.begun, self.undisturbed = directory / "begun", {}
        self.faults, self.restarts = Counter(), Counter()

    def begin(self, steps):
        """Trains so far, so that there is something to restore at once."""
        assert self._launch(self.base | {"runs_dir": str(self.begun), "steps": steps}, 2).returncode == 0

    def ended(self, processes):
        """How a run ends that nothing disturbs; one for each number of processes, whose sums have their own order."""
        if processes not in self.undisturbed:
            config = self._config("undisturbed", processes)
            assert self._launch(config, processes).returncode == 0
            self.undisturbed[processes] = self.end(config)
        return self.undisturbed[processes]

    def run(self, processes, *, fewer):
        """Disturbs one run and compares; returns what has happened."""
        config = self._config("disturbed", processes) | {"deadlines": self.deadlines}
        faults = self._disturb(config, processes, *(("--min-processes", "1") if fewer else ()))
        (state, losses), (wanted, wanted_losses) = self.end(config), self.ended(processes)
        (assert_close if fewer else assert_same_bits)(state, wanted)
        np.testing.assert_allclose(losses, wanted_losses, rtol=1e-3 if fewer else 0)
        return faults

    def _disturb(self, config, processes, *options):
        """Runs a config to its end, whatever it takes."""
        happened = []
        for number in range(MAX_LAUNCHES):
            faults = self.dealer.draw(processes, first=number == 0) if number < MAX_LAUNCHES - 1 else []
            ran = self._launch(config, processes, "--max-restarts", "12", *options, faults=faults)
            happened += faults
            self._count(faults, ran.stderr)
            wanted = expected_code(faults)
            if ran.returncode != wanted:
                raise AssertionError(f"the launcher ended with {ran.returncode}, not {wanted}:\n{ran.stderr}")
            if "done: step" in ran.stdout:
                return happened
            if wanted == 0:
                step = int(ran.stdout.split("stopped at step ")[1].split(",")[0])
                assert final_state(config)[0] == step, f"stopped at step {step}, but saved another:\n{ran.stderr}"
        raise AssertionError(f"not done after {MAX_LAUNCHES} launches:\n{ran.stderr}")

    def _launch(self, config, processes, *options, faults=()):
        slow = sum(self.deadlines[f["what"]] for f in faults if f["how"] in ("stop", "spin", "hold"))
        return launched(
            config,
            self.cache,
            *options,
            processes=processes,
            devices=self.devices[processes],
            faults=faults,
            program=self.program,
            timeout=FOR_A_START * (1 + len(faults)) + slow,
        )  # fmt: skip; it asserts that all of the faults have happened

    def _count(self, faults, stderr):
        """Counts the faults, and each restart to the fault before it: no restart is without one."""
        self.faults.update((fault["how"], fault["what"]) for fault in faults)
        fault = None
        for line in stderr.splitlines():
            if "] fault: {" in line:
                fault = json.loads(line.split("fault: ", 1)[1])
            elif line.startswith("shardadam launch: restart "):
                assert fault is not None, f"{line!r} without a fault before it:\n{stderr}"
                self.restarts[fault["how"], fault["what"]] += 1
                fault = None

    def _config(self, name, processes):
        directory = self.directory / name / str(processes)
        shutil.rmtree(directory, ignore_errors=True)
        if self.begun.exists():
            shutil.copytree(self.begun, directory)
        return self.base | {"runs_dir": str(directory)}

    def end(self, config):
        """(The state that a run has ended with, its losses)."""
        step, state = final_state(config)
        assert step == config["steps"]
        return state, [r["loss"] for r in read_metrics(run_directory(parse_config(config))) if "loss" in r]

    def table(self):
        """Rows of Markdown: how often what went wrong, when, and how often the group was started anew for it."""
        yield "| fault | while | times | restarts |\n|---|---|---|---|"
        for how, what in sorted(self.faults):
            yield f"| {how} | {what} | {self.faults[how, what]} | {self.restarts[how, what]} |"


def expected_code(faults):
    """The launcher's exit code. One that was asked to end starts nothing anew, and tells how its group has ended."""
    how = [fault["how"] for fault in faults]
    if "launcher" in how:
        return -signal.SIGKILL
    return 128 + signal.SIGKILL if "term to launcher" in how[:-1] else 0


def environment():
    """Hardware, versions and date in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in sealing.versions().items())
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    today = datetime.datetime.now(datetime.UTC).date()
    return f"{today}, commit {commit.stdout.strip()}; {os.cpu_count()} cores of {cpu}; {versions}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    rng, runs, began = random.Random(args.seed), Counter(), time.monotonic()
    print(f"{environment()}\nseed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="shardadam-torture-") as directory:
        config = tiny_raw(
            directory,
            steps=STEPS,
            save_every=SAVE_EVERY,
            log_every=2,
            batch_size=12,
            mesh="data=-1",  # of as many devices as there are when fewer processes go on
        )
        torture = Torture(Path(directory), rng, config, Path(directory) / "compiled")
        torture.begin(SAVE_EVERY)
        while time.monotonic() - began < 60 * args.minutes:
            processes, fewer = rng.choice((2, 2, 3, 4)), rng.random() < 0.2
            try:
                faults = torture.run(processes, fewer=fewer)
            except AssertionError as error:
                runs["FAILED"] += 1
                print(f"run {runs.total()}, {processes} processes: FAILED: {error}", flush=True)
                continue
            runs["close" if fewer else "same bits"] += 1
            told = ", ".join(f"{fault['how']} in {fault['what']}" for fault in faults)
            print(
                f"run {runs.total()}, {processes} processes: {'close' if fewer else 'same bits'} after {told}",
                flush=True,
            )
    print(*torture.table(), sep="\n")
    took = (time.monotonic() - began) / 60
    print(
        f"{runs.total()} runs, {torture.faults.total()} faults, {torture.restarts.total()} restarts, {took:.1f} minutes"
    )
    print(
        f"in the bits of the undisturbed run: {runs['same bits']}; with --min-processes 1, close: {runs['close']}; "
        f"failed: {runs['FAILED']}"
    )
    raise SystemExit(1 if runs["FAILED"] else 0)


if __name__ == "__main__":
    assert conftest
    main()
