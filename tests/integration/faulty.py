"""`shardadam` with faults in it: a program for `shardadam launch`, which its tests and `scripts/torture` run.

FAULTS in the environment is a JSON list of what goes wrong, one thing after the other, however often the group is
started anew meanwhile: in the process `process`, at the `nth` time since its start that it begins `what` (compile,
step, save, restore, delete), `delay` seconds later. FAULTS_DONE holds a line for each that has really happened.
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


class Faulty(watchdog.Watchdog):
    """Brings about the first fault that has not happened yet."""

    def __init__(self, seconds):
        super().__init__(seconds)
        self.done = Path(os.environ["FAULTS_DONE"])
        num_done = len(self.done.read_text().splitlines()) if self.done.exists() else 0
        self.faults = json.loads(os.environ["FAULTS"])[num_done : num_done + 1]
        self.begun = Counter()
        self.timers = []
        delete = steps.Steps._empty
        steps.Steps._empty = lambda *args: (self.may_go_wrong("delete"), delete(*args))

    def begin(self, what, *, times=1):
        super().begin(what, times=times)
        self.may_go_wrong(what)

    def may_go_wrong(self, what):
        self.begun[what] += 1
        for fault in self.faults:
            here = fault["process"] == int(os.environ["JAX_PROCESS_ID"])
            if not here or (fault["what"], fault["nth"]) != (what, self.begun[what]):
                continue
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
        elif how == "launcher":
            os.kill(os.getppid(), signal.SIGKILL)
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
