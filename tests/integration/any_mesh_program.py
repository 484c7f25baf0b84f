"""What every process does: saves states, with masters and without, or restores them at each stage; prints digests.

`python any_mesh_program.py save|restore|memory DIRECTORY OUT`; process 0 writes OUT as JSON.
"""

import ctypes
import gc
import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from processes_program import everywhere
from trees import random_tree

import shardadam
from shardadam import runtime
from shardadam.checkpoint.digest import digests
from shardadam.checkpoint.slots import slots

SHAPES = {"kernel": (64, 48), "odd": (17, 257), "tiny": (7,)}  # natural, packed and whole, with few devices
DTYPES = {"plain": jnp.float32, "masters": jnp.bfloat16}
LARGE = {f"w{i}": (2048, 1024) for i in range(6)}  # 48 MB, and so are mu and nu


def mesh_of(count=None, axes=("data",), sizes=None):
    devices = jax.devices()[:count]
    sizes = (len(devices),) if sizes is None else sizes
    return jax.make_mesh(sizes, axes, devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))


def new_state(kind, mesh, *, seed=9, stage=2, layout="auto", specs=None, shapes=SHAPES):
    values = random_tree(seed, DTYPES[kind], shapes)
    params = {name: everywhere(x, mesh, (specs or {}).get(name, P())) for name, x in values.items()}
    plan = shardadam.make_plan(params, mesh, axis_name="data", min_size=100, layout=layout)
    master = jnp.float32 if kind == "masters" else None
    tx = shardadam.adam(1e-2, plan=plan)
    return shardadam.TrainState.create(apply_fn=None, params=params, tx=tx, plan=plan, stage=stage, master_dtype=master)


@partial(jax.jit, donate_argnums=0)
def train_step(state, grads):
    return state.apply_gradients(grads=grads)


def trained(kind, mesh):
    state = new_state(kind, mesh, seed=0)
    for seed in (1, 2):
        state = train_step(state, everywhere(random_tree(seed, DTYPES[kind], SHAPES), mesh))
    return state


def digests_of(state):
    """Of the leaves as they lie on the devices, by keypath."""
    parts = list(slots(state, state.plan))
    return {slot.path: digest.text for slot, digest in zip(parts, digests(parts), strict=True)}


def save(directory):
    found = {}
    for kind in DTYPES:
        state = trained(kind, mesh_of())
        with shardadam.Checkpointer(directory / kind) as checkpointer:
            checkpointer.save(2, state)
        found[kind] = digests_of(state)
    return found


def restore(directory):
    found = {}
    for kind in DTYPES:
        for stage in (2, 3):
            with shardadam.Checkpointer(directory / kind) as checkpointer:
                found[f"{kind} {stage}"] = digests_of(checkpointer.restore(new_state(kind, mesh_of(), stage=stage)))
    return found


def memory(directory):
    """Peak resident memory that a restore adds, over the bytes of this process's shards; the most of all processes."""
    state = new_state("plain", mesh_of(), stage=3, layout="natural", shapes=LARGE)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    own = sum(shard.data.nbytes for x in jax.tree.leaves(state) for shard in x.addressable_shards)
    with shardadam.Checkpointer(directory / "large") as checkpointer:
        checkpointer.save(1, state, wait=True)
        del state
        checkpointer.restore(like)  # What is compiled, imported and started once is not of interest.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
        before = status("VmRSS")
        restored = checkpointer.restore(like)
        grown = status("VmHWM") - before
        del restored
    return max(json.loads(text) for text in runtime.from_every_process("memory", json.dumps(grown / own))), own


def status(name):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    what, where, out = sys.argv[1:]
    runtime.initialize(heartbeat_seconds=30)
    answer = {"save": save, "restore": restore, "memory": memory}[what](Path(where))
    if jax.process_index() == 0:
        Path(out).write_text(json.dumps(answer))
