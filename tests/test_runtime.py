import subprocess
import sys

import jax
import pytest

from shardadam import runtime
from shardadam.runtime import RuntimeSettingsError, Settings, given_settings

ADDRESS = "10.0.0.1:1234"


def environment(**changes):
    given = {"JAX_COORDINATOR_ADDRESS": ADDRESS, "JAX_PROCESS_ID": "1", "JAX_NUM_PROCESSES": "4"} | changes
    return {name: value for name, value in given.items() if value is not None}


@pytest.mark.parametrize(
    "changes", [{}, {"JAX_NUM_PROCESSES": None, "JAX_PROCESS_COUNT": "4"}, {"JAX_PROCESS_COUNT": "4"}]
)
def test_the_spellings_in_use(changes):
    assert given_settings(environment(**changes)) == Settings(ADDRESS, 4, 1)


@pytest.mark.parametrize("given", [{}, {"JAX_COORDINATOR_ADDRESS": ADDRESS}, {"JAX_PROCESS_ID": ""}])
def test_what_is_left_to_the_cluster(given):
    assert given_settings(given) is None


@pytest.mark.parametrize("given", [{"JAX_NUM_PROCESSES": "1"}, {"JAX_PROCESS_COUNT": "1", "JAX_PROCESS_ID": "0"}])
def test_one_process_needs_nothing_else(given):
    assert given_settings(given) == Settings(None, 1, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"JAX_PROCESS_COUNT": "2"}, "JAX_NUM_PROCESSES=4 and JAX_PROCESS_COUNT=2: they name two numbers of processes"),
        ({"JAX_PROCESS_ID": None}, "but not JAX_PROCESS_ID; set all three"),
        ({"JAX_COORDINATOR_ADDRESS": None}, "got JAX_PROCESS_ID=1, JAX_NUM_PROCESSES=4, but not JAX_COORD"),
        ({"JAX_NUM_PROCESSES": None}, "but not JAX_NUM_PROCESSES"),
        ({"JAX_NUM_PROCESSES": "0"}, "wanted a whole number of 1 or more"),
        ({"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES='four': wanted a whole number"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID='-1': wanted a whole number"),
        ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4 with JAX_NUM_PROCESSES=4: wanted 0 to 3"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "JAX_COORDINATOR_ADDRESS=10.0.0.1: wanted HOST:PORT"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_or_are_missing(changes, message):
    with pytest.raises(RuntimeSettingsError) as caught:
        given_settings(environment(**changes))
    assert message in str(caught.value)


@pytest.fixture
def bare(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID", "JAX_NUM_PROCESSES", "JAX_PROCESS_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_alone_it_does_nothing(bare):
    assert runtime.initialize() == 1
    assert not jax.distributed.is_initialized()
    assert runtime.coordination_client() is None
    assert runtime.from_process_zero("mine", "value") == "value"


def slurm(monkeypatch, tasks):
    for name, value in (("JOB_ID", 5), ("STEP_NODELIST", "node1"), ("NTASKS", tasks), ("PROCID", 0), ("LOCALID", 0)):
        monkeypatch.setenv(f"SLURM_{name}", str(value))


def test_a_lone_slurm_task_keeps_all_its_devices(bare):
    slurm(bare, 1)
    assert runtime.initialize() == 1
    assert not jax.distributed.is_initialized()


def test_slurm_goes_to_jax(bare):
    slurm(bare, 8)
    started = []
    bare.setattr(jax.distributed, "initialize", lambda *args, **options: started.append((args, options)))
    assert runtime.initialize(heartbeat_seconds=10) == 8
    (((address, count, index, devices), options),) = started
    assert (address.partition(":")[0], count, index, devices) == ("node1", 8, 0, [0])
    assert options["heartbeat_timeout_seconds"] == 10


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4, but JAX does not detect this cluster"),
        ({"JAX_COORDINATOR_ADDRESS": ADDRESS}, "not JAX_PROCESS_ID and JAX_NUM_PROCESSES, and JAX detects no cluster"),
    ],
)  # fmt: skip
def test_processes_that_would_train_alone_are_refused(bare, variables, message):
    for name, value in variables.items():
        bare.setenv(name, value)
    with pytest.raises(RuntimeSettingsError, match=message):
        runtime.initialize()


def test_a_pod_that_cannot_ask_for_the_others_is_refused(bare):
    bare.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    bare.setenv("JOB_COMPLETION_INDEX", "3")
    bare.setitem(sys.modules, "kubernetes", None)  # not installed
    with (
        pytest.warns(UserWarning, match="Kubernetes environment"),
        pytest.raises(RuntimeSettingsError, match="this is pod 3"),
    ):
        runtime.initialize()


@pytest.mark.parametrize("seconds", [9, 31])
def test_the_heartbeat_has_bounds(seconds):
    with pytest.raises(ValueError, match=f"heartbeat_seconds: got {seconds}, wanted 10 to 30"):
        runtime.initialize(heartbeat_seconds=seconds)


def test_leave_runs_no_exit_handlers():
    code = (
        "import atexit; from shardadam.runtime import leave; atexit.register(print, 'held up'); print('out'); leave(7)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert (ran.returncode, ran.stdout) == (7, "out\n")
