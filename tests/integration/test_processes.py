"""The library in 2 and 4 processes with 8 devices in all, against one process with 8: the same values and files."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import processes_program
import pytest
from conftest import make_mesh
from once import made_once
from trees import logical

from shardadam import Checkpointer, audit

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_mesh):
    """Results by the number of processes."""
    directory = made_once(tmp_path_factory, "processes", partial(run_all, data_mesh))
    return directory, {processes: dict(np.load(directory / f"{processes}.npz")) for processes in (1, 2, 4)}


def run_all(mesh, directory):
    """Each restores what the one before it saved: 4 what 1 did, 2 what 4 did, and 1 what 2 did."""
    with jax.numpy_dtype_promotion("standard"):
        state, _ = processes_program.trained(mesh)
        with Checkpointer(directory / "1") as checkpointer:
            checkpointer.save(int(state.step), state)
        for processes, before in ((4, 1), (2, 4)):
            arguments = [directory / f"{processes}.npz", directory / str(before), directory / str(processes)]
            launch(processes, *map(str, arguments))
        np.savez(directory / "1.npz", **processes_program.results(mesh, directory / "2", directory / "alone"))


def launch(processes, *arguments):
    command = [sys.executable, "-m", "shardadam.cli", "launch", f"--processes={processes}",
               f"--devices-per-process={8 // processes}", "--", sys.executable,
               str(ROOT / "tests/integration/processes_program.py"), *arguments]  # fmt: skip
    # The flags of this process's own backend: equal bits need matrices that are cut alike.
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    }
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("processes", [2, 4])
def test_given_the_gradients_every_bit_is_that_of_one_process(runs, processes):
    _, found = runs
    one, several = found[1], found[processes]
    assert set(one) == set(several)
    compared = [name for name in one if not name.startswith("summed/")]
    assert len(compared) > 40
    for name in compared:
        np.testing.assert_array_equal(several[name], one[name], err_msg=name)


@pytest.mark.parametrize("processes", [2, 4])
def test_gradients_that_are_summed_differ_by_the_order_of_the_sum(runs, processes):
    _, found = runs
    names = [name for name in found[1] if name.startswith("summed/params")]
    assert names
    for name in names:
        np.testing.assert_allclose(found[processes][name], found[1][name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_what_another_number_of_processes_saved_is_what_it_had(runs, processes):
    _, found = runs
    for name, x in found[processes].items():
        if name.startswith("restored/"):
            np.testing.assert_array_equal(x, found[processes]["given/" + name.removeprefix("restored/")], err_msg=name)


@pytest.mark.parametrize("devices", [1, 5])
def test_one_process_with_other_devices_restores_what_four_saved(runs, devices):
    directory, found = runs
    mesh = make_mesh({"data": devices})
    with Checkpointer(directory / "4") as checkpointer:
        state = checkpointer.restore(processes_program.new_state(mesh, seed=9))
        assert checkpointer.extra() == {"processes": 4}
    audit(state, state.plan)
    for name, x in state.params.items():
        np.testing.assert_array_equal(np.asarray(x), found[1][f"given/params/{name}"], err_msg=name)
    for moment in ("mu", "nu"):  # of a leaf that 8 devices do not pack
        kernel = logical(getattr(state.opt_state[0], moment), state.plan)["kernel"]
        np.testing.assert_array_equal(kernel, found[1][f"given/opt_state/0/{moment}/kernel"])
