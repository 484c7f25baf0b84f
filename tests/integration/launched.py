"""Runs a config by `shardadam launch`, with faults in it, and reads what became of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from trees import by_path

from shardadam import Checkpointer
from shardadam.trainer.build import create_state
from shardadam.trainer.config import parse_config
from shardadam.trainer.devices import build_mesh
from shardadam.trainer.run_dir import run_directory

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# None is reached but by what is stuck, whatever else the machine does.
DEADLINES = {"compile": 250, "step": 100, "save": 100, "restore": 100, "heartbeat": 30}


def launched(config, cache, *options, processes=2, devices=8, faults=(), program="preloaded", grace=1, timeout=600):
    """Trains `config` in several processes; returns the finished launcher.

    Args:
      config: what a YAML file would hold.
      cache: a directory for compiled programs, which most starts share.
      *options: of `shardadam launch`.
      processes: how many.
      devices: how many they have in all.
      faults: see faulty.py.
      program: "preloaded" for processes that start fast, "faulty" for such as everybody has.
      grace: seconds that the others have after a failure.
      timeout: seconds after which it is a hang, and an error.
    """
    path = Path(config["runs_dir"]) / f"{config['name']}.yaml"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(yaml.safe_dump(config))
    done = path.with_suffix(".faults")
    done.unlink(missing_ok=True)
    environment = os.environ | {
        "FAULTS": json.dumps(faults), "FAULTS_DONE": str(done), "JAX_COMPILATION_CACHE_DIR": str(cache),
        "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiles faster
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu",
    }  # fmt: skip
    launcher = ["-m", "shardadam.cli"] if program == "faulty" else [str(HERE / "preloaded.py")]
    command = [
        sys.executable, *launcher, "launch", "--processes", str(processes),
        "--devices-per-process", str(devices // processes), "--grace", str(grace), "--backoff", "0.1", *options, "--",
        sys.executable, str(HERE / "faulty.py"), "train", str(path),
    ]  # fmt: skip
    try:
        ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(
            f"not done after {timeout} s:\n{(error.stderr or b'').decode(errors='replace')}"
        ) from error
    happened = [json.loads(line) for line in done.read_text().splitlines()] if done.exists() else []
    assert happened == list(faults), f"of {faults} have happened {happened}:\n{ran.stderr}"
    return ran


def final_state(config):
    """(The newest step, the leaves that were saved there by name), on this process's devices."""
    config = parse_config(config)
    like = create_state(config, build_mesh(config))
    with Checkpointer(run_directory(config) / "checkpoints") as checkpointer:
        return checkpointer.latest_step(), by_path(checkpointer.restore(like))


def assert_close(a, b):
    """For another number of processes: gloo adds up in another order than XLA does within one process."""
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_allclose(np.asarray(a[name]), np.asarray(b[name]), rtol=2e-3, atol=2e-5, err_msg=name)
