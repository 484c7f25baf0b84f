"""`shardadam launch -- train` for real: as one process trains, and to the same bits whatever happens on the way."""

import json
import random

import numpy as np
import pytest
from launched import DEADLINES, assert_close, final_state, launched
from tiny import tiny_raw
from torture import Torture
from trees import assert_same_bits

from shardadam import Checkpointer
from shardadam.checkpoint.seal import Seal
from shardadam.trainer.config import parse_config
from shardadam.trainer.metrics import read_metrics
from shardadam.trainer.run_dir import run_directory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 16
# Few devices: what costs is starting processes. test_processes.py has eight.
DEVICES = {"devices": 2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where compiled programs are kept for the next start."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    config = tiny_raw(
        tmp_path_factory.mktemp("runs"), steps=STEPS, save_every=1, log_every=1, mesh="data=-1", deadlines=DEADLINES
    )
    ran = launched(config, cache, **DEVICES)
    assert ran.returncode == 0, ran.stderr
    return config, ran


def losses(directory):
    return [record["loss"] for record in read_metrics(directory) if "loss" in record]


def assert_in_order(parts, text):
    at = 0
    for part in parts:
        at = text.find(part, at)
        assert at >= 0, f"{part!r} is missing, or comes too early, in:\n{text}"


def ended(config, ran):
    """(The step, the state) that a run has ended with, which has told its every loss once."""
    assert ran.returncode == 0, ran.stderr
    step, state = final_state(config)
    assert len(losses(run_directory(parse_config(config)))) == step
    return step, state


def test_what_is_killed_while_it_compiles_goes_on_with_fewer_processes(undisturbed, cache, tmp_path):
    """One process trains as two do: the data and their order are those of the global batch."""
    whole, ran = undisturbed
    assert ran.stdout.count(f"done: step {STEPS}") == 1  # process 0 speaks for all
    assert f"[0] done: step {STEPS}" in ran.stdout
    config = whole | {"runs_dir": str(tmp_path)}
    kill = {"what": "compile", "nth": 1, "how": "kill"}
    faults = [{"process": 1, **kill}, {"process": 0, **kill}]
    ran = launched(config, cache, "--max-restarts", "2", "--min-processes", "1", faults=faults, **DEVICES)
    step, state = ended(config, ran)
    assert_in_order(
        ["process 1 ended with SIGKILL", "processes: 2", "process 0 ended with SIGKILL", "processes: 1"], ran.stderr
    )
    assert step == STEPS
    assert_close(state, final_state(whole)[1])
    one, two = (losses(run_directory(parse_config(c))) for c in (config, whole))
    np.testing.assert_allclose(one, two, rtol=1e-4)
    recorded = [json.loads((run_directory(parse_config(c)) / "run.json").read_text()) for c in (config, whole)]
    assert [record["num_processes"] for record in recorded] == [1, 2]


def test_sigterm_to_one_of_three_stops_all_at_the_same_step(cache, tmp_path):
    config = tiny_raw(tmp_path, steps=9999, save_every=9999, batch_size=6, mesh="data=3", data={"eval_tokens": 100})
    term = {"process": 1, "what": "step", "nth": 2, "how": "term"}
    ran = launched(config, cache, processes=3, devices=3, faults=[term])
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("SIGTERM: finishing the step, then saving") == 1  # nobody passed it on to the others
    with Checkpointer(run_directory(parse_config(config)) / "checkpoints") as checkpointer:
        (step,) = checkpointer.all_steps()
        assert Seal.from_text((checkpointer.directory / "seals" / f"{step}.json").read_text()).num_processes == 3
    assert 2 <= step < 9999
    assert f"[0] stopped at step {step}, saved; run again to go on" in ran.stdout


def test_it_ends_as_if_nothing_had_happened(undisturbed, cache, tmp_path):
    whole, _ = undisturbed
    config = whole | {"runs_dir": str(tmp_path)}
    faults = [
        # The coordinator, in its third save: the second has waited until the first was committed.
        {"process": 0, "what": "save", "nth": 3, "how": "kill", "delay": 0.02},
        {"process": 1, "what": "restore", "nth": 1, "how": "stop", "delay": 0.01},
        {"process": 1, "what": "step", "nth": 3, "how": "term"},
    ]
    config["deadlines"] = DEADLINES | {"restore": 30, "heartbeat": 10}  # one of them ends what is stopped
    stopped = launched(config, cache, "--max-restarts", "8", faults=faults, **DEVICES)
    step, _ = ended(config, stopped)
    assert_in_order(
        ["process 0 ended with SIGKILL", "restart 1 of 8", '"how": "stop"', '"how": "term"'], stopped.stderr
    )
    assert 2 <= step < STEPS
    assert f"[0] stopped at step {step}, saved; run again to go on" in stopped.stdout

    spin = [{"process": 0, "what": "step", "nth": 2, "how": "spin"}]
    config["deadlines"] = DEADLINES | {"step": 15}
    # Process 1, which waits for it, may reach its deadline first: process 0 is given the time to reach its own.
    ran = launched(config, cache, "--max-restarts", "8", faults=spin, grace=30, **DEVICES)
    said = [
        '"how": "spin"', "[0] watchdog: 'step' has taken more than 15 s", "ended with exit code 75", "restart 1 of 8",
    ]  # fmt: skip
    assert_in_order(said, ran.stderr)
    assert "go_wrong" in ran.stderr  # where it was stuck
    (last, state), (_, wanted) = ended(config, ran), final_state(whole)
    assert last == STEPS
    assert_same_bits(state, wanted)
    assert losses(run_directory(parse_config(config))) == losses(run_directory(parse_config(whole)))


def test_a_run_of_the_torture(undisturbed, cache, tmp_path):
    """`scripts/torture`, once, where its dealer draws an error in a save; its processes are forks, as all here."""
    whole, _ = undisturbed
    deadlines = DEADLINES | {"start": 250}
    torture = Torture(
        tmp_path, random.Random(52), whole, cache, devices={2: 2}, deadlines=deadlines, program="preloaded"
    )
    torture.undisturbed[2] = torture.end(whole)
    (fault,) = torture.run(2, fewer=False)  # which compares the bits
    assert (fault["how"], fault["what"], torture.restarts) == ("error", "save", {("error", "save"): 1})
