"""Processes that want one lock: `contenders.py hold DIRECTORY`, or `race DIRECTORY SECONDS HOLDS DEATHS`."""

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


def race(directory, seconds, least_holds, least_kills):
    """Each contender takes the lock again and again; some kill themselves while they hold it, or take it.

    It goes on for so many seconds, and until the lock was held so often, and by so many that were killed.
    """
    end, index = time.monotonic() + seconds, 0
    (directory / "holds").touch()
    running = {}

    def is_over():
        if time.monotonic() < end:
            return False
        holds = told(directory)
        return len(holds) >= least_holds and holds.count("killed") >= least_kills

    while running or not is_over():
        while len(running) < NUM_CONTENDERS and not is_over():
            index += 1
            pid = os.fork()
            if not pid:
                contend(directory, is_over, random.Random(index))
            running[pid] = index
        pid, status = os.wait()
        del running[pid]
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, -signal.SIGKILL), code
    holds = told(directory)
    print(len(holds), holds.count("killed"), index, flush=True)


def told(directory):
    """How each holding of the lock has ended."""
    return (directory / "holds").read_text().split()


def contend(directory, is_over, rng):
    lock._POLL = 0.002
    held = lock.WriterLock(directory / "checkpoints", "a-contender")
    be_disturbed(rng)
    inside = directory / "inside"
    me = f"{os.getpid()} {start_of(os.getpid())}"
    while not is_over():
        try:
            held.acquire()
        except CheckpointError:
            continue
        if inside.exists():  # Of one that was killed, or of one that still holds the lock?
            pid, start = map(int, inside.read_text().split())
            assert start_of(pid) != start, "two hold the lock"
        inside.write_text(me)
        time.sleep(rng.uniform(0, 0.01))
        assert inside.read_text() == me, "two hold the lock"
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
        race(Path(sys.argv[2]), float(sys.argv[3]), *map(int, sys.argv[4:]))
