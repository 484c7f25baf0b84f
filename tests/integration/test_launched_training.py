"""`shardadam launch -- train` for real: as one process trains, and to the same bits whatever happens on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from tiny import tiny_config, tiny_raw

from shardadam import Checkpointer
from shardadam.trainer.build import create_state
from shardadam.trainer.config import parse_config
from shardadam.trainer.devices import build_mesh
from shardadam.trainer.loop import train
from shardadam.trainer.metrics import read_metrics
from shardadam.trainer.run_dir import run_directory

ROOT = Path(__file__).parents[2]
STEPS = 12
DEADLINES = {"compile": 120, "step": 6, "save": 30, "restore": 30, "heartbeat": 10}
PROCESSES = ["--processes", "2", "--devices-per-process", "4"]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """A function that runs a config in two processes, and says how that went."""
    cache = str(tmp_path_factory.mktemp("compiled"))

    def run(config, *options, faults=()):
        path = Path(config["runs_dir"]) / f"{config['name']}.yaml"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(yaml.safe_dump(config))
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
            "FAULTS": json.dumps(faults), "JAX_COMPILATION_CACHE_DIR": cache, "PYTHONPATH": str(ROOT),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        program = [sys.executable, str(ROOT / "tests/integration/faulty.py"), "train", str(path)]
        command = [
            sys.executable,
            "-m",
            "shardadam.cli",
            "launch",
            *PROCESSES,
            "--grace",
            "1",
            *options,
            "--",
            *program,
        ]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)

    return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, launched):
    config = tiny_raw(tmp_path_factory.mktemp("runs"), steps=STEPS, save_every=4, log_every=1, deadlines=DEADLINES)
    ran = launched(config)
    assert ran.returncode == 0, ran.stderr
    return config, ran


def final_state(config):
    config = parse_config(config)
    like = create_state(config, build_mesh(config))
    with Checkpointer(run_directory(config) / "checkpoints") as checkpointer:
        return checkpointer.latest_step(), checkpointer.restore(like)


def assert_same_bits(a, b):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))


def assert_in_order(parts, text):
    at = 0
    for part in parts:
        at = text.find(part, at)
        assert at >= 0, f"{part!r} is missing, or comes too early, in:\n{text}"


def test_two_processes_train_as_one_does(undisturbed, tmp_path):
    config, ran = undisturbed
    alone = train(tiny_config(tmp_path, steps=STEPS, save_every=4, log_every=1))
    step, state = final_state(config)
    assert step == STEPS
    # Not to the bit: gloo adds the devices' gradients up in another order than XLA does within one process.
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(alone.state), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=2e-3, atol=2e-5)
    one, two = (
        [record["loss"] for record in read_metrics(directory) if "loss" in record]
        for directory in (tmp_path / "tiny", run_directory(parse_config(config)))
    )
    assert len(two) == STEPS
    np.testing.assert_allclose(two, one, rtol=1e-4)
    assert ran.stdout.count("done: step 12") == 1  # process 0 speaks for all
    assert "[0] done: step 12" in ran.stdout
    assert json.loads((run_directory(parse_config(config)) / "run.json").read_text())["num_processes"] == 2


def test_it_ends_as_if_nothing_had_happened(undisturbed, launched, tmp_path):
    whole, _ = undisturbed
    config = whole | {"runs_dir": str(tmp_path)}
    stopped = launched(config, faults=[{"restarts": 0, "process": 1, "what": "step", "nth": 4, "how": "term"}])
    assert stopped.returncode == 0, stopped.stderr
    step, _ = final_state(config)
    assert 2 <= step < STEPS
    assert f"[0] stopped at step {step}, saved; run again to go on" in stopped.stdout

    faults = [
        {"restarts": 0, "process": 1, "what": "step", "nth": 3, "how": "kill"},
        {"restarts": 1, "process": 0, "what": "save", "nth": 1, "how": "kill", "delay": 0.05},  # the coordinator
        {"restarts": 2, "process": 1, "what": "restore", "nth": 1, "how": "stop", "delay": 0.01},
        {"restarts": 3, "process": 0, "what": "step", "nth": 2, "how": "spin"},
    ]
    ran = launched(config, "--max-restarts", "8", "--backoff", "0.1", faults=faults)
    assert ran.returncode == 0, ran.stderr
    said = [
        "process 1 ended with SIGKILL", "restart 1 of 8", "process 0 ended with SIGKILL", "restart 2 of 8",
        "restart 3 of 8", "[0] watchdog: 'step' has taken more than 6 s", "ended with exit code 75", "restart 4 of 8",
    ]  # fmt: skip
    assert_in_order(said, ran.stderr)
    assert "go_wrong" in ran.stderr  # where it was stuck
    (last, state), (_, wanted) = final_state(config), final_state(whole)
    assert last == STEPS
    assert_same_bits(state, wanted)
    curves = [[r["loss"] for r in read_metrics(run_directory(parse_config(c))) if "loss" in r] for c in (config, whole)]
    assert curves[0] == curves[1]
