"""`shardadam` with faults in it: a program for `shardadam launch`, which its tests and `scripts/torture` run.

FAULTS in the environment is a JSON list of what goes wrong, one thing after the other, however often the group is
started anew meanwhile: in the process `process`, at the `nth` time that it begins `what` (compile, step, save, restore)
since its start, `delay` seconds later. The file FAULTS_DONE holds a line for each that has happened.
"""

import ctypes
import json
import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

from shardadam.trainer import watchdog

DONE = Path(os.environ["FAULTS_DONE"])
NUM_DONE = len(DONE.read_text().splitlines()) if DONE.exists() else 0
FAULTS = json.loads(os.environ["FAULTS"])[NUM_DONE : NUM_DONE + 1]
BEGUN = Counter()
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}


class Faulty(watchdog.Watchdog):
    def begin(self, what, *, times=1):
        super().begin(what, times=times)
        BEGUN[what] += 1
        for fault in FAULTS:
            here = fault["process"] == int(os.environ["JAX_PROCESS_ID"])
            if here and (fault["what"], fault["nth"]) == (what, BEGUN[what]):
                with DONE.open("a") as done:
                    done.write(json.dumps(fault) + "\n")
                print(f"fault: {json.dumps(fault)}", file=sys.stderr, flush=True)
                go_wrong(fault["how"], fault.get("delay", 0))


def go_wrong(how, delay):
    if how in SIGNALS and delay:
        threading.Timer(delay, os.kill, (os.getpid(), SIGNALS[how])).start()
    elif how in SIGNALS:
        os.kill(os.getpid(), SIGNALS[how])
    elif how == "spin":  # stuck in Python
        while True:
            pass
    elif how == "hold":  # stuck in C, with the interpreter's lock
        ctypes.PyDLL(None).sleep(10**6)
    else:
        raise RuntimeError("a mistake in the code")


if __name__ == "__main__":
    watchdog.Watchdog = Faulty  # before the loop takes it
    from shardadam.cli import main

    sys.exit(main())
