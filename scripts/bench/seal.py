"""What a seal costs: the digests of a state on its devices, and the hashes of its files, beside the whole save.

`python scripts/bench/seal.py`: 8 x [4096, 1024] float32 parameters with mu and nu over 8 simulated CPU devices.
"""

import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from trees import square

import shardadam
from shardadam.checkpoint import checkpointer
from shardadam.checkpoint.sealing import versions

ROUNDS = 3


def timed(name, times):
    """Wraps a function of the checkpointer's so that its seconds are added to `times`."""
    work = getattr(checkpointer, name)

    def measured(*args):
        began = time.perf_counter()
        result = work(*args)
        times[name] = times.get(name, 0) + time.perf_counter() - began
        return result

    setattr(checkpointer, name, measured)


def main():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    keys = iter(jax.random.split(jax.random.key(0), 99))
    params = {name: jax.random.normal(next(keys), shape) for name, shape in square().items()}  # Not to be compressed.
    state = shardadam.TrainState.create(apply_fn=None, params=params, tx=shardadam.adam(1e-3, mesh=mesh))
    state = jax.block_until_ready(jax.jit(lambda s: s.apply_gradients(grads=s.params))(state))
    nbytes = sum(x.nbytes for x in jax.tree.leaves(state))
    rows, times = [], {}
    for name in ("sealed_leaves", "write_seal"):
        timed(name, times)
    with tempfile.TemporaryDirectory() as directory:
        for number in range(ROUNDS + 1):  # The first one compiles.
            times.clear()
            with shardadam.Checkpointer(Path(directory, str(number))) as saver:
                began = time.perf_counter()
                saver.save(1, state)
                stalled = time.perf_counter() - began
                saver.wait()
                whole = time.perf_counter() - began
            restores = {}
            for verify in (False, "files", "full"):
                began = time.perf_counter()
                jax.block_until_ready(
                    shardadam.Checkpointer(Path(directory, str(number))).restore(state, 1, verify=verify)
                )
                restores[verify] = time.perf_counter() - began
            rows.append((times["sealed_leaves"], times["write_seal"], stalled, whole, *restores.values()))
    names = (
        "digests",
        "hashes and seal",
        "loop stalled",
        "whole save",
        "restore, False",
        "restore, files",
        "restore, full",
    )
    print(f"{nbytes / 1e6:.0f} MB, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}, {versions()}")
    medians = [sorted(column)[ROUNDS // 2] for column in zip(*rows[1:], strict=True)]
    for name, median in zip(names, medians, strict=True):
        print(f"| {name} | {median:.2f} s | {median / medians[3]:.1%} of the whole save |")


if __name__ == "__main__":
    main()
