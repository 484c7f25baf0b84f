"""`shardadam launch -- train` for real: as one process trains, and to the same bits whatever happens on the way."""

import json

import numpy as np
import pytest
from launched import DEADLINES, assert_close, final_state, launched
from tiny import tiny_config, tiny_raw
from trees import assert_same_bits, by_path

from shardadam.trainer.config import parse_config
from shardadam.trainer.loop import train
from shardadam.trainer.metrics import read_metrics
from shardadam.trainer.run_dir import run_directory

STEPS = 9
# Few devices: what costs is starting processes. test_processes.py has eight.
DEVICES = {"devices": 4}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where compiled programs are kept for the next start."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    config = tiny_raw(
        tmp_path_factory.mktemp("runs"), steps=STEPS, save_every=4, log_every=1, mesh="data=4", deadlines=DEADLINES
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


def test_two_processes_train_as_one_does(undisturbed, tmp_path):
    config, ran = undisturbed
    alone = train(tiny_config(tmp_path, steps=STEPS, mesh="data=4", log_every=1))
    step, state = final_state(config)
    assert step == STEPS
    assert_close(state, by_path(alone.state))
    one, two = losses(tmp_path / "tiny"), losses(run_directory(parse_config(config)))
    assert len(two) == STEPS
    np.testing.assert_allclose(two, one, rtol=1e-4)
    assert ran.stdout.count(f"done: step {STEPS}") == 1  # process 0 speaks for all
    assert f"[0] done: step {STEPS}" in ran.stdout
    assert json.loads((run_directory(parse_config(config)) / "run.json").read_text())["num_processes"] == 2


def test_it_ends_as_if_nothing_had_happened(undisturbed, cache, tmp_path):
    whole, _ = undisturbed
    config = whole | {"runs_dir": str(tmp_path)}
    stopped = launched(config, cache, faults=[{"process": 1, "what": "step", "nth": 4, "how": "term"}], **DEVICES)
    assert stopped.returncode == 0, stopped.stderr
    step, _ = final_state(config)
    assert 2 <= step < STEPS
    assert f"[0] stopped at step {step}, saved; run again to go on" in stopped.stdout

    faults = [
        {"process": 0, "what": "save", "nth": 1, "how": "kill", "delay": 0.05},  # the coordinator
        {"process": 1, "what": "restore", "nth": 1, "how": "stop", "delay": 0.01},
        {"process": 0, "what": "step", "nth": 2, "how": "spin"},
    ]
    ran = launched(config, cache, "--max-restarts", "8", faults=faults, **DEVICES)
    assert ran.returncode == 0, ran.stderr
    said = [
        "process 0 ended with SIGKILL", "restart 1 of 8", '"how": "stop"', "restart 2 of 8", '"how": "spin"',
        "[0] watchdog: 'step' has taken more than 6 s", "ended with exit code 75", "restart 3 of 8",
    ]  # fmt: skip
    assert_in_order(said, ran.stderr)
    assert "go_wrong" in ran.stderr  # where it was stuck
    (last, state), (_, wanted) = final_state(config), final_state(whole)
    assert last == STEPS
    assert_same_bits(state, wanted)
    assert losses(run_directory(parse_config(config))) == losses(run_directory(parse_config(whole)))
