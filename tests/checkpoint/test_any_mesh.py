"""Saved by 4 processes with 2 devices each: every digest is the same on any processes, devices, mesh, layout, stage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec as P
from once import made_once

from shardadam import Checkpointer, audit
from shardadam.checkpoint.digest import host_digest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "integration"))

import any_mesh_program as program  # noqa: E402 - its folder has only now been put on the path


def launch(what, directory, *, processes, devices, **environment):
    """Runs the program in several processes; returns what it says."""
    out = directory / f"{what}-{processes}.json"
    command = [sys.executable, "-m", "shardadam.cli", "launch", f"--processes={processes}",
               f"--devices-per-process={devices}", "--", sys.executable,
               str(ROOT / "tests/integration/any_mesh_program.py"), what, str(directory), str(out)]  # fmt: skip
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/integration")))}
    environment |= {"JAX_NUMPY_DTYPE_PROMOTION": "standard"}
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=250)
    assert ran.returncode == 0, ran.stderr
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directory, and the digests that the four processes had in memory."""
    directory = made_once(tmp_path_factory, "any-mesh", lambda path: launch("save", path, processes=4, devices=2))
    return directory, json.loads((directory / "save-4.json").read_text())


@pytest.mark.parametrize("kind", program.DTYPES)
def test_the_digests_are_those_of_the_numbers_that_plain_orbax_reads(saved, kind):
    directory, found = saved
    path = directory / kind / "2" / "state"
    with ocp.PyTreeCheckpointer() as orbax:
        known = orbax.metadata(path).item_metadata.tree
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), known)
        tree = orbax.restore(path, args=ocp.args.PyTreeRestore(restore_args=on_host))
    leaves = ocp.tree.to_flat_dict(tree, sep="/")
    read = {path: host_digest(np.asarray(x), path).text for path, x in leaves.items() if x is not None}
    assert read == found[kind]
    assert len(read) == (11 if kind == "plain" else 14)


@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (3, 2)])
def test_restored_by_several_processes(saved, processes, devices):
    directory, wanted = saved
    found = launch("restore", directory, processes=processes, devices=devices)
    for name, digests in found.items():
        assert digests == wanted[name.split()[0]], name


CASES = [
    ("plain", 1, 2, "auto", None), ("masters", 2, 3, "packed", None), ("plain", 3, 3, "auto", None),
    ("plain", 4, 2, "natural", None), ("masters", 5, 2, "auto", None), ("plain", 6, 3, "packed", None),
    ("masters", 7, 3, "auto", None), ("plain", 8, 1, "packed", None), ("masters", 8, 3, "natural", None),
    ("masters", 8, 2, "auto", {"data": 4, "model": 2}), ("plain", 8, 3, "packed", {"model": 4, "data": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "devices", "stage", "layout", "sizes"), CASES)
@pytest.mark.usefixtures("standard_promotion")
def test_restored_by_one_process(saved, kind, devices, stage, layout, sizes):
    directory, wanted = saved
    mesh = program.mesh_of(devices, *((tuple(sizes), tuple(sizes.values())) if sizes else ()))
    specs = {"kernel": P(None, "model")} if sizes else None
    like = program.new_state(kind, mesh, stage=stage, layout=layout, specs=specs)
    with Checkpointer(directory / kind) as checkpointer:
        state = checkpointer.restore(like, verify="full")
    audit(state, state.plan)
    assert program.digests_of(state) == wanted[kind]
    assert jax.tree.map(lambda x: x.sharding, state.params) == jax.tree.map(lambda x: x.sharding, like.params)


@pytest.mark.usefixtures("standard_promotion")
def test_restored_arrays_are_donated(saved):
    """Every buffer of the state is taken for its successor, on every device."""
    directory, _ = saved
    like = program.new_state("masters", program.mesh_of(8), stage=3)
    with Checkpointer(directory / "masters") as checkpointer:
        state = checkpointer.restore(like)
    before = [[shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards] for x in jax.tree.leaves(state)]
    shardings = jax.tree.map(lambda x: x.sharding, state)
    following = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0, out_shardings=shardings)(state)
    after = [[shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards] for x in jax.tree.leaves(following)]
    assert after == before
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
