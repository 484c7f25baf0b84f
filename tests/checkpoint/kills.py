"""Processes that are really killed (SIGKILL) at every file operation of a deletion, a sealing, a moving aside.

`python kills.py CLEAN SCRATCH`: for each operation and each of its moments a copy of CLEAN, a forked process that works
on it until it is killed, and what must hold afterwards. Prints how many moments there were.
"""

import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

from etils import epath

from shardadam.checkpoint import reading
from shardadam.checkpoint.steps import Steps, make_room

_EVENTS = frozenset(("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open"))


def tree(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in Path(path).rglob("*") if p.is_file()}


def killed_at(moment, work):
    """Whether a process that does `work` was killed before its nth operation on files; False: it had fewer."""
    pid = os.fork()
    if pid == 0:
        left = [moment]

        def count(event, args):
            writes = event != "open" or (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if event in _EVENTS and writes:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def no_half_step_is_listed(steps, whole):
    """Whatever lists a directory, ours or Orbax, sees whole steps only."""
    for step in {*steps.sealed(), *reading.committed_steps(steps.directory)}:
        assert tree(steps.path(step)) == whole[step], f"step {step} is listed, and not whole"
    for step in steps.sealed():
        assert steps.read_seal(step).step == step


def after_delete(steps, whole):
    no_half_step_is_listed(steps, whole)
    assert {2, 3} <= set(steps.sealed())
    make_room(steps, 4)  # As the next save does.
    no_half_step_is_listed(steps, whole)
    if 1 not in steps.sealed():
        assert 1 not in reading.committed_steps(steps.directory)
    trash = steps.directory / "trash"
    assert not trash.exists() or not list(trash.iterdir())


def after_set_aside(steps, whole):
    no_half_step_is_listed(steps, whole)
    assert {1, 2} <= set(steps.sealed())
    # Never deleted: it is in one place or the other, with all its files.
    places = [path for path in (steps.path(3), *(steps.directory / "damaged").glob("3-*")) if path.is_dir()]
    assert [tree(path) for path in places] == [whole[3]]
    assert (3 in steps.seals()) or not steps.path(3).exists()  # A step that is gone and still sealed is told again.


def after_seal(steps, whole):
    no_half_step_is_listed(steps, whole)
    assert set(steps.sealed()) - {3} == {1, 2}
    make_room(steps, 4)
    assert {path.suffix for path in (steps.directory / "seals").iterdir()} == {".json"}


def resealing(steps):
    seal = steps.read_seal(3)
    steps.seal_path(3).unlink()
    return lambda: steps.write_seal(seal)


CASES = {
    "delete": (lambda steps: lambda: (steps.retire(1), steps.sweep()), after_delete),
    "set aside": (lambda steps: lambda: steps.set_aside(3, "damaged"), after_set_aside),
    "seal": (resealing, after_seal),
}


def main(clean, scratch):
    whole = {step: tree(Path(clean) / str(step)) for step in (1, 2, 3)}
    moments = Counter()
    for name, (prepare, check) in CASES.items():
        while True:
            root = Path(scratch, f"{name}-{moments[name]}")
            shutil.copytree(clean, root)
            steps = Steps(epath.Path(root))
            killed = killed_at(moments[name], prepare(steps))
            check(steps, whole)
            shutil.rmtree(root)
            if not killed:
                break
            moments[name] += 1
    print(*(f"{name}: {count}" for name, count in moments.items()), sep=", ")


if __name__ == "__main__":
    main(*sys.argv[1:])
