"""`shardadam` with faults in it: a program for `shardadam launch`, which its tests and `scripts/torture` run.

FAULTS in the environment is a JSON list of what goes wrong, one thing after the other, however often the group is
started anew meanwhile: in the process `process` (of fewer: the rest of the division), as soon as it has begun `what`
(start, compile, step, save, restore, delete) `nth` times since its start, `delay` seconds later. FAULTS_DONE holds a
line for each that has really happened.
"""

import ctypes
import json
import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

from shardadam.checkpoint import steps
from shardadam.cli import main
from shardadam.trainer import loop, watchdog

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
TO_LAUNCHER = {"launcher": signal.SIGKILL, "term to launcher": signal.SIGTERM}
TERMS = ("term", "term to launcher")


class Faulty(watchdog.Watchdog):
    """Brings about the first fault that has not happened yet; after SIGTERM, which ends nothing at once, the next."""

    def __init__(self, seconds):
        super().__init__(seconds)
        self.done = Path(os.environ["FAULTS_DONE"])
        self.faults = json.loads(os.environ["FAULTS"])
        self.here = int(os.environ["JAX_PROCESS_ID"]), int(os.environ["JAX_NUM_PROCESSES"])
        self.first = self.num_happened()
        self.begun = Counter()
        self.armed = -1  # the last that this process brings about
        self.timers = []
        delete = steps.Steps._empty
        steps.Steps._empty = lambda *args: (self.may_go_wrong("delete"), delete(*args))

    def begin(self, what, *, times=1):
        super().begin(what, times=times)
        self.may_go_wrong(what)

    def num_happened(self):
        return len(self.done.read_text().splitlines()) if self.done.exists() else 0

    def may_go_wrong(self, what):
        self.begun[what] += 1
        number = self.num_happened()
        ended = any(fault["how"] not in TERMS for fault in self.faults[self.first : number])
        if ended or number == len(self.faults) or number == self.armed:
            return
        fault, (process, num_processes) = self.faults[number], self.here
        if fault["process"] % num_processes != process or fault["what"] != what or self.begun[what] < fault["nth"]:
            return
        self.armed = number
        if not fault.get("delay"):
            self.go_wrong(fault)
        else:
            self.timers.append(threading.Timer(fault["delay"], self.go_wrong, [fault]))
            self.timers[-1].start()

    def go_wrong(self, fault):
        with self.done.open("a") as done:
            done.write(json.dumps(fault) + "\n")
        print(f"fault: {json.dumps(fault)}", file=sys.stderr, flush=True)
        how = fault["how"]
        if how in SIGNALS:
            os.kill(os.getpid(), SIGNALS[how])
        elif how in TO_LAUNCHER:
            os.kill(os.getppid(), TO_LAUNCHER[how])
        elif how == "spin":  # stuck in Python
            while True:
                pass
        elif how == "hold":  # stuck in C, with the interpreter's lock
            ctypes.PyDLL(None).sleep(10**6)
        else:
            raise RuntimeError("a mistake in the code")

    def __exit__(self, *error):
        for timer in self.timers:  # However short the run is, what was to go wrong does.
            timer.join()
        super().__exit__(*error)


def run_faulty(arguments):
    """`shardadam` with these arguments; returns its exit code."""
    watchdog.Watchdog = loop.Watchdog = Faulty
    return main(arguments)


if __name__ == "__main__":
    sys.exit(run_faulty(sys.argv[1:]))
