"""What of `scripts/recipes` can be tried without a cluster: each says in its head what that is."""

import contextlib
import os
import runpy
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from tiny import tiny_raw

from shardadam.runtime import Settings, given_settings

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "scripts" / "recipes"


@pytest.fixture
def stand_in(tmp_path):
    """Puts a program of a name before all others; its output, a line per call, is in the file `calls`."""

    def make(name, code):
        path = tmp_path / name
        path.write_text(f"#!/usr/bin/env bash\n{code}\n")
        path.chmod(0o755)
        return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}

    return make


def bash(arguments, environment):
    ran = subprocess.run(
        ["bash", *arguments], env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    return ran.returncode, ran.stdout


@pytest.mark.parametrize("path", sorted(RECIPES.iterdir()), ids=lambda path: path.name)
def test_each_says_what_it_was_tested_on_and_what_not(path):
    if path.is_file():
        opening = path.read_text()[:1500]
        assert "\n# Tested:" in opening or "\nTested:" in opening
        assert "Not tested:" in opening


@pytest.mark.parametrize(
    ("codes", "wanted", "calls"), [("0", 0, 1), ("134 0", 0, 2), ("2 0", 2, 1), ("75 75 75 75 0", 75, 3)]
)
def test_slurm_starts_again_what_may_succeed(stand_in, codes, wanted, calls):
    environment = stand_in(
        "srun", 'echo "$@" >> "$CALLS"; codes=($CODES); exit "${codes[$(($(wc -l < "$CALLS") - 1))]}"'
    )
    settings = {"CODES": codes, "MAX_RESTARTS": "2", "BACKOFF": "0"}
    code, _ = bash([str(RECIPES / "slurm.sbatch"), "a.yaml", "--steps", "3"], environment | settings)
    said = Path(environment["CALLS"]).read_text().splitlines()
    assert (code, len(said)) == (wanted, calls)
    assert all(line.endswith("shardadam train a.yaml --steps 3") for line in said)


@contextlib.contextmanager
def free_job():
    """The number of a job for whose coordinator JAX takes a port that is free, and stays so; and that port."""
    first = 65535 - 2**12 + 1  # that of job 0, and the next ones
    for job in range(os.getpid() % 4096, 4096 + os.getpid() % 4096):
        with socket.socket() as probe, socket.socket() as holder:
            try:
                probe.bind(("127.0.0.1", first + job % 4096))
                probe.close()
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as the coordinator does
                holder.bind(("127.0.0.1", first + job % 4096))
            except OSError:
                continue
            yield job % 4096, first + job % 4096
            return
    raise AssertionError("no port is free")


def test_two_processes_find_each_other_by_slurms_variables():
    def task(index, job, port):
        slurm = {
            "JOB_ID": job,
            "STEP_NODELIST": "localhost",
            "NTASKS": 2,
            "PROCID": index,
            "LOCALID": index,
        }
        environment = os.environ | {f"SLURM_{name}": str(value) for name, value in slurm.items()}
        environment["JAX_COORDINATOR_BIND_ADDRESS"] = f"127.0.0.1:{port}"
        command = [sys.executable, "-m", "shardadam.cli", "env"]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=250)

    with free_job() as (job, port), ThreadPoolExecutor() as pool:
        for index, ran in enumerate(pool.map(lambda index: task(index, job, port), range(2))):
            assert ran.returncode == 0, ran.stderr
            assert f"processes          2, this is {index}" in ran.stdout
            assert "16 x cpu" in ran.stdout


def test_skypilots_variables_are_what_initialize_reads(stand_in):
    recipe = yaml.safe_load((RECIPES / "skypilot.yaml").read_text())
    said = stand_in("shardadam", 'echo "$@"; echo "$JAX_COORDINATOR_ADDRESS $JAX_PROCESS_ID $JAX_NUM_PROCESSES"')
    cloud = {"SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2"}
    code, out = bash(["-c", recipe["run"]], said | cloud | recipe["envs"])
    command, variables = out.splitlines()
    assert code == 0
    assert command == "train configs/gpt2-124m.yaml --runs-dir /runs --mesh data=-1"
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID", "JAX_NUM_PROCESSES")
    assert given_settings(dict(zip(names, variables.split(), strict=True))) == Settings("10.0.0.4:8476", 2, 1)


@pytest.mark.parametrize("name", ["jobset-tpu", "jobset-gpu"])
def test_jobsets(name):
    jobset = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    assert container["command"][:2] == ["shardadam", "train"]
    environment = {x["name"]: x.get("value", "3") for x in container.get("env", ())}
    if name == "jobset-gpu":
        host = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['metadata']['name']}"
        assert given_settings(environment) == Settings(f"{host}:8476", job["parallelism"], 3)
    else:
        assert given_settings(environment) is None


def test_xpks_command(stand_in):
    environment = stand_in("xpk", 'printf "%s\\n" "$@"')
    places = {"CLUSTER": "c", "PROJECT": "p", "ZONE": "z", "IMAGE": "i"}
    code, out = bash([str(RECIPES / "xpk"), "run-1", "/configs/a.yaml", "--steps", "9"], environment | places)
    assert code == 0
    assert out.splitlines()[:2] == ["workload", "create"]
    assert "--command=shardadam train /configs/a.yaml --name run-1 --mesh data=-1 --steps 9" in out.splitlines()


@pytest.mark.slow
def test_what_ray_runs_in_each_process(tmp_path):
    recipe = runpy.run_path(str(RECIPES / "ray_train.py"))
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(tiny_raw(tmp_path / "runs", steps=0)))
    recipe["train_config"]({"config": str(path)})
    assert (tmp_path / "runs" / "tiny" / "checkpoints" / "0").is_dir()
