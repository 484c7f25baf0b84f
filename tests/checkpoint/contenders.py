"""Processes that want one lock: `contenders.py hold DIRECTORY`, or `contenders.py race DIRECTORY SECONDS`."""

import logging
import os
import random
import signal
import sys
import time
from pathlib import Path

from shardadam.checkpoint import CheckpointError, lock
from shardadam.checkpoint.holder import start_of

NUM_CONTENDERS, KILLED_IN = 6, 0.3


def hold(directory):
    lock.WriterLock(directory, "the-holder").acquire()
    print(os.getpid(), flush=True)
    signal.pause()


def race(directory, seconds):
    """Each contender takes the lock again and again; some kill themselves while they hold it, or take it."""
    end, index = time.monotonic() + seconds, 0
    running = {}
    while time.monotonic() < end or running:
        while time.monotonic() < end and len(running) < NUM_CONTENDERS:
            index += 1
            pid = os.fork()
            if not pid:
                contend(directory, end, random.Random(index))
            running[pid] = index
        pid, status = os.wait()
        del running[pid]
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, -signal.SIGKILL), code
    holds = (directory / "holds").read_text().split()
    print(len(holds), holds.count("killed"), index, flush=True)


def contend(directory, end, rng):
    lock._POLL = 0.002
    held = lock.WriterLock(directory / "checkpoints", "a-contender")
    be_disturbed(rng)
    inside = directory / "inside"
    while time.monotonic() < end:
        try:
            held.acquire()
        except CheckpointError:
            continue
        if inside.exists():  # Of one that was killed, or of one that still holds the lock?
            assert start_of(int(inside.read_text())) is None, "two hold the lock"
        inside.write_text(str(os.getpid()))
        time.sleep(rng.uniform(0, 0.01))
        assert inside.read_text() == str(os.getpid()), "two hold the lock"
        killed = rng.random() < KILLED_IN
        with (directory / "holds").open("a") as holds:
            holds.write("killed\n" if killed else "gave\n")
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        inside.unlink()
        held.release()
    os._exit(0)


def be_disturbed(rng):
    """Some pause, and some end, just before a step of taking over or giving back."""
    for module, name in ((os, "replace"), (os, "link"), (Path, "unlink")):
        call = getattr(module, name)

        def disturbed(*args, call=call, **kwargs):
            if rng.random() < 0.02:
                os.kill(os.getpid(), signal.SIGKILL)
            if rng.random() < 0.3:
                time.sleep(rng.uniform(0, 0.02))
            return call(*args, **kwargs)

        setattr(module, name, disturbed)


if __name__ == "__main__":
    logging.getLogger("shardadam.checkpoint").setLevel(logging.ERROR)
    if sys.argv[1] == "hold":
        hold(Path(sys.argv[2]))
    else:
        race(Path(sys.argv[2]), float(sys.argv[3]))
