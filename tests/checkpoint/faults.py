"""Faults in a directory of sealed steps, drawn at random and really applied, and what must come of every one.

`python faults.py --faults N --seed S` injects N of them into copies of one directory, and counts how they were found.
"""

import argparse
import contextlib
import functools
import hashlib
import logging
import os
import pickle
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shardadam
from shardadam.checkpoint import Checkpointer, CheckpointError, sealing, verify
from shardadam.checkpoint.hashing import hash_file
from shardadam.checkpoint.seal import Seal
from shardadam.checkpoint.sealing import list_files
from shardadam.checkpoint.steps import Steps

STEPS = (1, 2, 3)
LARGE = verify._LARGE  # Files of so many bytes are hashed in the background, while they are read.
_LARGE_LEAF = (512, 520)  # On every device, and so in one piece, which makes the file that it is in a large one.


@functools.cache
def state_of(step):
    """A TrainState of eight devices, packed, other in every leaf for every step."""
    mesh = conftest.make_mesh({"data": 8})
    rng = np.random.default_rng(step)
    params = {
        name: jax.device_put(rng.standard_normal(shape).astype(np.float32), NamedSharding(mesh, P()))
        for name, shape in (("kernel", (17, 13)), ("other", (17, 13)), ("bias", (7,)), ("large", _LARGE_LEAF))
    }
    plan = shardadam.make_plan(params, mesh, layout="packed", min_size=0)
    state = shardadam.TrainState.create(apply_fn=None, params=params, tx=shardadam.adam(1e-2, plan=plan), plan=plan)
    return _trained(state).replace(step=jnp.int32(step))


@jax.jit
def _trained(state):
    return state.apply_gradients(grads=state.params)


def clean_directory(path):
    with Checkpointer(path) as checkpointer:
        for step in STEPS:
            checkpointer.save(step, state_of(step), extra={"step": step})
    assert all(_large_files(path / str(step)) for step in STEPS)


def snapshot(root):
    """What is in a directory: for every path its bytes' hash, or where a link leads."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        else:
            found[name] = "dir" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def large_file(rng, root):
    """A step, and its file with array data, whose hash is only known when it has been read."""
    step = rng.choice(STEPS)
    return step, rng.choice(_large_files(root / str(step)))


def _large_files(path):
    return sorted(file for file in path.rglob("d/*") if file.stat().st_size >= LARGE)


def any_file(rng, root):
    """A step, and one of its files: every other time a large one, every fourth time its seal."""
    kind = rng.randrange(4)
    if kind < 2:
        return large_file(rng, root)
    step = rng.choice(STEPS)
    if kind == 2:
        return step, root / "seals" / f"{step}.json"
    return step, rng.choice(sorted(path for path in (root / str(step)).rglob("*") if path.is_file()))


def flip(rng, root):
    step, path = any_file(rng, root)
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    return step


def lose_page(rng, root):
    """As where the machine went down: the file has its size, and one page of it was never written."""
    step, path = any_file(rng, root)
    raw = bytearray(path.read_bytes())
    start = rng.randrange(0, len(raw), 4096)
    raw[start : start + 4096] = bytes(len(raw[start : start + 4096]))
    path.write_bytes(raw)
    return step


def truncate(rng, root):
    step, path = any_file(rng, root)
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    return step


def append(rng, root):
    step, path = any_file(rng, root)
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 9)))
    return step


def delete(rng, root):
    step, path = any_file(rng, root)
    path.unlink()
    return step


def delete_directory(rng, root):
    step = rng.choice(STEPS)
    inner = [path for path in (root / str(step)).rglob("*") if path.is_dir()]
    shutil.rmtree(rng.choice([root / str(step), *sorted(inner)]))
    return step


def commit_mark(rng, root):
    step = rng.choice(STEPS)
    rng.choice(sorted((root / str(step)).rglob("commit_success.txt"))).unlink()
    return step


def rename(rng, root):
    """To another number; every other time with its seal."""
    step, to = rng.choice(STEPS), rng.choice((0, 7, 9000))
    (root / str(step)).rename(root / str(to))
    if rng.random() < 0.5:
        (root / "seals" / f"{step}.json").rename(root / "seals" / f"{to}.json")
        return to
    return step


def swap_steps(rng, root):
    one, two = rng.sample(STEPS, 2)
    (root / str(one)).rename(root / "between")
    (root / str(two)).rename(root / str(one))
    (root / "between").rename(root / str(two))
    return one


def stale_seal(rng, root):
    """The seal of another step, or of the same one as another run saved it."""
    step = rng.choice(STEPS)
    seals = root / "seals"
    if rng.random() < 0.5:
        shutil.copy(seals / f"{rng.choice([s for s in STEPS if s != step])}.json", seals / f"{step}.json")
    else:
        seal = Seal.from_text((seals / f"{step}.json").read_text())
        other = Seal.from_text((seals / f"{STEPS[step % 3]}.json").read_text())
        text = Seal(step=step, files=other.files, leaves=seal.leaves, run_id="another").to_text()
        (seals / f"{step}.json").write_text(text)
    return step


def file_of_another_step(rng, root):
    """One of the same name; every other time the large one, which has another name and the same size."""
    step, other = rng.sample(STEPS, 2)
    if rng.random() < 0.5:
        shutil.copy(_large_files(root / str(other))[0], _large_files(root / str(step))[0])
        return step
    same = ("state/manifest.ocdbt", "state/_METADATA", "extra/metadata", "_CHECKPOINT_METADATA")
    differ = [p for p in same if (root / str(step) / p).read_bytes() != (root / str(other) / p).read_bytes()]
    name = rng.choice(differ)
    shutil.copy(root / str(other) / name, root / str(step) / name)
    return step


def swap_chunks(rng, root):
    """The stored chunks of two leaves of one shape, in a database that is whole in itself."""
    step = rng.choice(STEPS)
    _swap(root / str(step) / "state", rng)
    return step


def swap_chunks_before_the_seal(rng, root):
    """As if the wrong bytes had come from the devices: the files are those that are sealed; only digests can tell."""
    step = swap_chunks(rng, root)
    steps = Steps(Checkpointer(root).directory)
    seal, path = steps.read_seal(step), steps.path(step)
    files = {name: hash_file(path / name) for name in list_files(path)}
    steps.write_seal(Seal(step=step, files=files, leaves=seal.leaves, run_id=seal.run_id))
    return step


def _swap(item, rng):
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{item}/"}).result()
    chunks = [key for key in store.list().result() if b".zarray" not in key]
    alike = sorted(key for key in chunks if b"kernel" in key or b"other" in key)
    name = rng.choice([b"params.", b"opt_state.0.mu.", b"opt_state.0.nu."])
    one = next(key for key in alike if key.startswith(name + b"kernel"))
    two = next(key for key in alike if key.startswith(name + b"other"))
    first, second = (store.read(key).result().value for key in (one, two))
    assert first != second
    store.write(one, second).result()
    store.write(two, first).result()


def link(rng, root):
    """A file or directory that is a symbolic link now; every other time to the very same bytes."""
    step = rng.choice(STEPS)
    within = [root / str(step), *sorted((root / str(step)).rglob("*"))]
    path = rng.choice(within if rng.random() < 0.5 else _large_files(root / str(step)))
    target = root.parent / f"outside-{rng.randrange(10**9)}"
    path.rename(target)
    path.symlink_to(target if rng.random() < 0.5 else os.path.relpath(target, path.parent))
    return step


def planted(rng, root):
    """A file that nobody sealed."""
    step = rng.choice(STEPS)
    places = [path for path in (root / str(step)).rglob("*") if path.is_dir()]
    (rng.choice(sorted(places)) / rng.choice(("x.pkl", "0", "zarr.json"))).write_bytes(pickle.dumps({"a": 1}))
    return step


FAULTS = (
    flip, lose_page, truncate, append, delete, delete_directory, commit_mark, rename, swap_steps, stale_seal,
    file_of_another_step, swap_chunks, swap_chunks_before_the_seal, link, planted,
)  # fmt: skip


class Found(NamedTuple):
    """How a fault was found, and whether it was one of a large file and nothing else."""

    how: str
    of_large: bool


class Warned(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


def inject(clean, scratch, fault, rng, truth, check=None):
    """Applies one fault to a copy, restores with `verify=check` (default: any), and returns how it was found.

    Raises:
      AssertionError: it was not applied, was not found, or what was restored is not what was saved.
    """
    root = scratch / "checkpoints"
    shutil.copytree(clean, root)
    before = snapshot(root)
    step = fault(rng, root)
    differ = [name for name, _ in before.items() ^ snapshot(root).items()]
    assert differ, f"{fault.__name__}: not applied"
    of_large = len(set(differ)) == 1 and (clean / differ[0]).is_file() and (clean / differ[0]).stat().st_size >= LARGE
    check = check or ("full" if fault is swap_chunks_before_the_seal or rng.random() < 0.3 else "files")
    log, warned = logging.getLogger("shardadam.checkpoint"), Warned()
    log.addHandler(warned)
    how = set()
    try:
        with Checkpointer(root) as checkpointer:
            newest = checkpointer.restore(truth[0], verify=check)
            _assert_saved(newest, checkpointer.restored_step, truth)
            if any(damage.step == step for damage in checkpointer.damaged):
                how.add("moved aside, an older step restored" if step > checkpointer.restored_step else "moved aside")
            elif any("have no seal" in said for said in warned.said):
                how.add("no seal: not restored, and said so")
            listed = checkpointer.all_steps()
            for other in {*listed, *STEPS} if not how else listed if rng.random() < 0.2 else ():
                try:
                    _assert_saved(checkpointer.restore(truth[0], other, verify=check), other, truth)
                except (CheckpointError, FileNotFoundError):
                    how.add("an older step: an error when it is asked for")
            _goes_on(checkpointer, truth)
    finally:
        log.removeHandler(warned)
        shutil.rmtree(root)
        for left in scratch.glob("outside-*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    assert how, f"{fault.__name__} in step {step}: silent"
    return Found(how.pop() if len(how) == 1 else "both of these", of_large)


def _goes_on(checkpointer, truth):
    """The run saves past what was damaged, and restores that."""
    step = (checkpointer.latest_step() or 0) + 1
    checkpointer.save(step, truth[1], wait=True)
    _assert_same(checkpointer.restore(truth[0]), truth[1])
    assert checkpointer.restored_step == step


def _assert_saved(restored, step, truth):
    assert step in STEPS
    _assert_same(restored, truth[step])


def _assert_same(one, two):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def all_truth():
    return {0: jax.tree.map(jnp.zeros_like, state_of(1)), **{step: state_of(step) for step in STEPS}}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    rng, found, silent, began = random.Random(args.seed), Counter(), 0, time.monotonic()
    of_large = Counter()
    versions = ", ".join(f"{name} {version}" for name, version in sealing.versions().items())
    print(f"{versions}; {args.faults} faults, seed {args.seed}", flush=True)
    logging.getLogger("shardadam.checkpoint").propagate = False
    truth = all_truth()
    with tempfile.TemporaryDirectory(prefix="shardadam-faults-") as directory:
        clean, scratch = Path(directory, "clean"), Path(directory, "scratch")
        clean_directory(clean)
        for number in range(args.faults):
            fault = FAULTS[number % len(FAULTS)]
            scratch.mkdir()
            try:
                how, large = inject(clean, scratch, fault, rng, truth)
                of_large[fault.__name__] += large
            except Exception as error:  # noqa: BLE001 - counted
                how, silent = f"NOT FOUND: {type(error).__name__}: {error}"[:300], silent + 1
                print(f"fault {number}, {fault.__name__}: {how}", flush=True)
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(scratch)
            found[fault.__name__, how] += 1
    for (name, how), count in sorted(found.items()):
        print(f"| {name.replace('_', ' ')} | {count} | {how} |")
    print(f"on files of {LARGE:,} bytes or more: {of_large.total()}, of them {dict(+of_large)}")
    print(f"{args.faults} faults, {silent} silent, {time.monotonic() - began:.0f} s")
    raise SystemExit(1 if silent else 0)


if __name__ == "__main__":
    main()
