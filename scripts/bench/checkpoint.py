"""Times one state's saves and restores by shardadam and by plain Orbax, in turns; says which goals are met."""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import shardadam
from shardadam.checkpoint import digest
from shardadam.checkpoint.digest import digests, start
from shardadam.checkpoint.slices import sliced
from shardadam.checkpoint.slots import slots

DOCS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
# The ratio of two figures of one round, and the most that its median may be.
GOALS = {
    "stall vs plain Orbax": ("stall", "orbax stall", 1.1),
    "whole save vs plain Orbax": ("save", "orbax save", 1.15),
    "restore, files verified, vs plain Orbax": ("restore", "orbax restore", 1.3),
    "digests, of a whole save": ("digest", "save", 0.05),
}
# What the ratios are where both do as much: shardadam compresses, plain Orbax copies to each device, or no core of the
# loop's computes digests.
ALIKE = {
    "whole save, compressed": ("compressed save", "orbax save"),
    "restore, files verified, compressed": ("compressed restore", "orbax restore"),
    "restore, files verified, both as each device's own": ("restore", "orbax restore, own"),
    "stall, digests begun and not computed": ("begun stall", "orbax stall"),
}
HOW = """\
A `TrainState` of float32 parameters, with mu and nu in shards (natural layout) over 8 simulated devices, is saved and
restored by `shardadam.Checkpointer` and by Orbax's `CheckpointManager` (`StandardSave`, asynchronous). Both keep two
steps and are given the same arrays. The variants take turns, each round beginning with another; a ratio is the median
over rounds of the ratio within a round. Written by `./scripts/bench_checkpoint --write`.

- *stall*: until `save` returns. *save*: until the step is committed, and for shardadam sealed. Of the step that is then
  superfluous plain Orbax removes the files within that time, shardadam after it; *and removal* is until it is gone.
- *restore*: into the shardings of the state; shardadam's verifies every file, large ones while they are read;
  *unverified* does not; *full* also compares the digests of the leaves in memory. Files are in the page cache, for all.
- *compressed*: with `compress=True`. Plain Orbax compresses array files by zstd, shardadam does not unless asked: that
  makes these files 8% larger, and most of the difference in processor time. The ratios of like with like have no goal.
- *own*: plain Orbax's arrays copied, one by one, so that each device has its own, as shardadam's have.
- *digest*: the digests of all leaves alone, as a save computes them, at stage 2 of the slices; *digest start*: until
  they are under way, with nothing else running.
- *disk*: as many bytes in one file, written with fsync, and read back. *CPU*: seconds of all cores.

The stall is Orbax's own, a few milliseconds to look through state and directory, and the start of the digests. XLA:CPU
starts a program by one thread for each simulated device, which then computes: with two cores the eighth gets its turn
when most is computed, so that the digests take the loop most of their own time. Real devices compute by themselves:
*begun* are saves where the digests' programs are begun alike, and read one element of each leaf.

At stage 3 the parameters lie in shards, at stage 2 every device has all of them, and writes a slice. Plain Orbax makes
the slices by one program for each leaf and device, shardadam by one for up to 32 leaves. Simulated devices share one
memory, and plain Orbax gives all eight the same host array; shardadam's restored arrays are each device's own, so that
a step can take their memory: at stage 2 eight copies of the parameters. On real devices Orbax has to make them, too.
"""
STAGES = {3: "Parameters in shards (stage 3)", 2: "Parameters on every device (stage 2)"}


def timed(work):
    """Seconds until what `work` returns is there."""
    return timed_with_cpu(work)[0]


def timed_with_cpu(work):
    """Seconds until what `work` returns is there, and those of all cores; it is freed after that."""
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    jax.block_until_ready(result)
    return time.perf_counter() - start, time.process_time() - cpu


def new_state(rows, num_leaves, stage=2):
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(0)
    replicated = jax.NamedSharding(mesh, jax.P())
    params = {
        f"w{i}": jax.device_put(rng.standard_normal((rows, 1024), np.float32), replicated) for i in range(num_leaves)
    }
    plan = shardadam.make_plan(params, mesh, layout="natural")
    tx = shardadam.adam(1e-3, plan=plan)
    state = shardadam.TrainState.create(apply_fn=None, params=params, tx=tx, plan=plan)
    state = jax.jit(lambda s: s.apply_gradients(grads=s.params))(state)
    like = shardadam.TrainState.create(apply_fn=None, params=params, tx=tx, plan=plan, stage=stage)
    placed = map(lambda x, y: jax.device_put(x, y.sharding), jax.tree.leaves(state), jax.tree.leaves(like))
    return jax.tree.unflatten(jax.tree.structure(like), list(placed))


def disk(directory, nbytes):
    """Seconds to write and to read as many bytes."""
    block, path = np.random.default_rng(0).bytes(2**24), directory / "raw"

    def write():
        with path.open("wb") as file:
            for _ in range(nbytes // 2**24):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    def read():
        with path.open("rb") as file:
            while file.read(2**24):
                pass

    figures = {"disk write": timed(write), "disk read": timed(read)}
    path.unlink()
    return figures


def saved(save, wait):
    """Seconds until `save` returns, and until it is done."""
    stall = timed(save)
    return stall, stall + timed(wait)


def saved_uncomputed(save, wait):
    """`saved`, where digests are begun and sum nothing: the seals are of no use."""
    with mock.patch.object(digest, "_summer", uncomputed):
        return saved(save, wait)


def begun(parts):
    """Seconds until the digests of leaves are under way, and what will hold them."""
    begin = time.perf_counter()
    started = start(parts)
    return time.perf_counter() - begin, [x for _, x in started.on_devices]


@functools.cache
def uncomputed(layouts):
    """In place of the program that sums such leaves: as many inputs and outputs, and one element read of each."""
    mesh = layouts[0].sharding.mesh

    def first(blocks, seeds):
        found = [x[(0,) * x.ndim].astype(jnp.uint32) + seed.sum() for x, seed in zip(blocks, seeds, strict=True)]
        return jnp.stack([jnp.stack([x, x, jnp.uint32(0)]) for x in found])[None]

    specs = tuple(layout.sharding.spec for layout in layouts)
    over = {"mesh": mesh, "in_specs": (specs, jax.P()), "out_specs": jax.P(mesh.axis_names)}
    return jax.jit(jax.shard_map(first, **over, check_vma=False))


@functools.cache
def own(sharding):
    """Copies an array, so that each device has its own."""
    return jax.jit(jnp.copy, out_shardings=sharding)


def removed(directory):
    """Waits until shardadam's old steps have been removed, which it does not let a save wait for."""
    trash = directory / "trash"
    while trash.exists() and any(trash.iterdir()):
        time.sleep(0.001)


def measure(state, rounds, directory):
    """Seconds of each figure, by round; the first round, which compiles and makes the writers, is not among them."""
    nbytes = sum(x.nbytes for x in jax.tree.leaves(state))
    parts = sliced(slots(state, state.plan))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    found = []
    with (
        shardadam.Checkpointer(directory / "ours", max_to_keep=2) as checkpointer,
        shardadam.Checkpointer(directory / "compressed", max_to_keep=2, compress=True) as compressing,
        shardadam.Checkpointer(directory / "begun", max_to_keep=2) as beginning,
        ocp.CheckpointManager(directory / "orbax", options=options) as manager,
    ):
        saves = {
            "": lambda step: saved(lambda: checkpointer.save(step, state), checkpointer.wait),
            "begun ": lambda step: saved_uncomputed(lambda: beginning.save(step, state), beginning.wait),
            "compressed ": lambda step: saved(lambda: compressing.save(step, state), compressing.wait),
            "orbax ": lambda step: saved(
                lambda: manager.save(step, args=ocp.args.StandardSave(state)), manager.wait_until_finished
            ),
        }
        reads = {
            "restore": lambda: checkpointer.restore(like),
            "restore unverified": lambda: checkpointer.restore(like, verify=False),
            "restore full": lambda: checkpointer.restore(like, verify="full"),
            "compressed restore": lambda: compressing.restore(like),
            "orbax restore": lambda: manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(like)),
            "orbax restore, own": lambda: [own(x.sharding)(x) for x in jax.tree.leaves(reads["orbax restore"]())],
            "digest": lambda: digests(parts) and None,
        }
        for step in range(rounds + 1):
            figures = disk(directory, nbytes)
            for name in turned(saves, step):
                os.sync()
                began, cpu = time.perf_counter(), time.process_time()
                figures[f"{name}stall"], figures[f"{name}save"] = saves[name](step)
                for ours in ("ours", "compressed", "begun"):
                    removed(directory / ours)
                figures[f"{name}save and removal"] = time.perf_counter() - began
                figures[f"{name}save, CPU"] = time.process_time() - cpu
            os.sync()
            for name in turned(reads, step):
                figures[name], figures[f"{name}, CPU"] = timed_with_cpu(reads[name])
            figures["digest start"], started = begun(parts)
            jax.block_until_ready(started)
            found.append(figures)
    return nbytes, found[1:]


def turned(names, by):
    """Names in an order that begins with another one each round."""
    names = list(names)
    return [names[(i + by) % len(names)] for i in range(len(names))]


def report(nbytes, found):
    seconds = {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name in sorted(found[0])
        if (values := [figures[name] for figures in found])
    }
    goals = {
        text: against | {"limit": limit, "met": against["ratio"] <= limit}
        for text, (figure, base, limit) in GOALS.items()
        if (against := ratio(found, figure, base))
    }
    alike = {text: ratio(found, *names) for text, names in ALIKE.items()}
    return {"nbytes": nbytes, "rounds": len(found), "goals": goals, "alike": alike, "seconds": seconds}


def ratio(found, figure, base):
    ratios = [figures[figure] / figures[base] for figures in found]
    return {"ratio": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def circumstances():
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, at the end a load of {os.getloadavg()[0]:.1f}",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint", "tensorstore", "numpy")},
    }


def page(answer):
    lines = ["# Checkpoints: time to save and to restore", "", HOW]
    lines += [f"{answer['date']}; {answer['machine']};"]
    lines += [", ".join(f"{name} {version}" for name, version in answer["versions"].items()) + "."]
    for stage, part in answer["stages"].items():
        lines += ["", f"## {STAGES[stage]}", "", f"{part['nbytes'] / 1e6:.0f} MB, {part['rounds']} rounds.", ""]
        lines += ["| goal: at most | limit | median | min | max | |", "| --- | --: | --: | --: | --: | --- |"]
        for text, goal in part["goals"].items():
            figures = " | ".join(f"{goal[key]:.3f}" for key in ("ratio", "min", "max"))
            lines.append(f"| {text} | {goal['limit']} | {figures} | {'met' if goal['met'] else 'NOT met'} |")
        for text, found in part["alike"].items():
            lines.append(f"| {text} | | " + " | ".join(f"{found[key]:.3f}" for key in ("ratio", "min", "max")) + " | |")
        lines += ["", "| seconds | median | min | max | MB/s |", "| --- | --: | --: | --: | --: |"]
        for name, x in part["seconds"].items():
            rate = part["nbytes"] / x["median"] / 1e6
            lines.append(f"| {name} | {x['median']:.3f} | {x['min']:.3f} | {x['max']:.3f} | {rate:.0f} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rows", type=int, default=2048, help="of each leaf, with 1024 columns")
    parser.add_argument("--leaves", type=int, default=8)
    parser.add_argument("--json", type=Path, help="writes the report there")
    parser.add_argument("--write", action="store_true", help="renews docs/benchmarks/checkpoint.{md,json}")
    args = parser.parse_args()
    stages = {}
    for stage in STAGES:
        with tempfile.TemporaryDirectory(prefix="bench-checkpoint-") as directory:
            stages[stage] = report(*measure(new_state(args.rows, args.leaves, stage), args.rounds, Path(directory)))
    answer = circumstances() | {"stages": stages}
    text = page(answer)
    print(text)
    targets = [args.json] if args.json else []
    if args.write:
        (DOCS / "checkpoint.md").write_text(text)
        targets.append(DOCS / "checkpoint.json")
    for target in targets:
        target.write_text(json.dumps(answer, indent=1) + "\n")


if __name__ == "__main__":
    main()
