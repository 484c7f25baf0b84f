"""The launcher on small programs of Python's alone; tests/integration/test_launched_training.py has it train."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from shardadam.launch import LaunchConfig, fewer_processes, launch, process_environment

ROOT = Path(__file__).parents[1]
INDEX = "index = int(os.environ['JAX_PROCESS_ID'])"


def program(code):
    return [sys.executable, "-c", f"import os, signal, sys, time\n{INDEX}\n{textwrap.dedent(code)}"]


def started(code, *options, environment=()):
    command = [sys.executable, "-m", "shardadam.cli", "launch", *options, "--", *program(code)]
    environment = os.environ | dict(environment)
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(code, *options, **environment):
    process = started(code, *options, **environment)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_each_process_is_told_who_it_is_and_speaks_under_its_number():
    code, out, err = finished(
        """
        names = ('JAX_NUM_PROCESSES', 'JAX_LOCAL_DEVICE_IDS', 'XLA_FLAGS')
        print(*(os.environ[name] for name in names)); print('broken', file=sys.stderr)
        host, port = os.environ['JAX_COORDINATOR_ADDRESS'].split(':')
        assert host == '127.0.0.1' and os.environ['JAX_COORDINATOR_BIND_ADDRESS'] == f'{host}:{port}'
        """,
        "--processes", "2", "--devices-per-process", "4",
        environment={"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"},
    )  # fmt: skip
    assert code == 0
    flags = "--xla_cpu_multi_thread_eigen=false --xla_force_host_platform_device_count=4"
    assert sorted(out.splitlines()) == [f"[0] 2 0,1,2,3 {flags}", f"[1] 2 4,5,6,7 {flags}"]
    assert sorted(err.splitlines()) == ["[0] broken", "[1] broken"]


def test_what_the_user_set_stands_but_not_another_number_of_devices():
    base = {"XLA_FLAGS": "--a=1 --xla_force_host_platform_device_count=8", "NPROC": "5", "JAX_PROCESS_COUNT": "7"}
    made = process_environment(base, 1, 2, 4, 999)
    assert made["XLA_FLAGS"].startswith("--a=1 --xla_force_host_platform_device_count=4")
    assert made["NPROC"] == "5"
    assert "JAX_PROCESS_COUNT" not in made
    assert process_environment(base, 1, 2, None, 999)["XLA_FLAGS"] == base["XLA_FLAGS"]


@pytest.mark.parametrize(
    ("end", "wanted", "said"),
    [
        ("sys.exit(7)", 7, "process 1 ended with exit code 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "process 1 ended with SIGKILL"),
    ],
)
def test_the_first_failure_ends_the_others_and_its_code_is_kept(end, wanted, said):
    # Process 0 does not end by SIGTERM, process 2 has started one of its own.
    began = time.monotonic()
    code, out, err = finished(
        f"""
        if index == 0: signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if index == 2:
            child = os.fork()
            print('child', child or os.getpid())
        if index == 1:
            time.sleep(1); {end}
        time.sleep(60)
        """,
        "--processes", "3", "--grace", "0.5",
    )  # fmt: skip
    assert (code, time.monotonic() - began < 30) == (wanted, True)
    assert said in err
    (child,) = {line.split()[-1] for line in out.splitlines() if "child" in line}
    state = subprocess.run(["ps", "-o", "stat=", "-p", child], capture_output=True, text=True).stdout
    assert state[:1] in ("", "Z")  # gone, or its new parent has not taken note yet


def test_a_group_is_started_again_until_it_is_through():
    code, out, err = finished(
        """
        restarts = int(os.environ['SHARDADAM_RESTARTS'])
        print(f"try {restarts} {os.environ['JAX_NUM_PROCESSES']}")
        if index == 1: sys.exit(3 if restarts < 2 else 0)
        """,
        "--processes", "4", "--max-restarts", "5", "--min-processes", "2", "--backoff", "0.01",
    )  # fmt: skip
    assert code == 0
    assert {line.split("try ")[1] for line in out.splitlines()} == {"0 4", "1 4", "2 2"}
    assert "restart 2 of 5 in 0.02 s, processes: 2" in err


@pytest.mark.parametrize(("end", "tries"), [("sys.exit(3)", 3), ("sys.exit(2)", 1)])
def test_it_gives_up(end, tries):
    code, out, _ = finished(f"print('try'); {end}", "--processes", "1", "--max-restarts", "2", "--backoff", "0")
    assert (code, out.count("try")) == (int(end[9]), tries)


@pytest.mark.parametrize(("number", "again", "wanted"), [(signal.SIGTERM, False, 0), (signal.SIGINT, True, 9)])
def test_signals_are_passed_on_and_end_the_restarts(number, again, wanted):
    process = started(
        """
        count = []
        def stop(number, frame):
            count.append(number)
            print('got', signal.Signals(number).name, len(count), flush=True)
            if len(count) == 2: sys.exit(9)
        signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGINT, stop); signal.signal(signal.SIGUSR1, stop)
        print('ready', flush=True)
        for _ in range(50 if index else 30): time.sleep(0.05)
        """,
        "--processes", "2", "--max-restarts", "3", "--grace", "0.5",
    )  # fmt: skip
    assert process.stdout is not None
    said = [process.stdout.readline(), process.stdout.readline()]
    assert sorted(line.split()[-1] for line in said) == ["ready", "ready"]
    process.send_signal(number)
    if again:
        assert "got" in process.stdout.readline() + process.stdout.readline()
        process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == wanted
    if not again:
        assert sorted(out.split("\n"))[1:] == [f"[{index}] got {number.name} 1" for index in (0, 1)]


@pytest.mark.parametrize(
    ("least", "sizes"), [(None, [8, 8]), (1, [8, 4, 2, 1, 1]), (3, [8, 4, 4]), (8, [8, 8])]
)  # fmt: skip
def test_fewer_processes_divide_the_full_number(least, sizes):
    config = LaunchConfig(processes=8, min_processes=least)
    got = [8]
    while len(got) < len(sizes):
        got.append(fewer_processes(got[-1], config))
    assert got == sizes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "0"], "--processes: got 0, wanted 1 or more"),
        (["--processes", "2", "--min-processes", "3"], "--min-processes: got 3, more than --processes 2"),
        (["--processes", "2", "--max-restarts", "-1"], "--max-restarts: got -1, wanted 0 or more"),
        (["--processes", "2", "--"], "launch what? Give a command after `--`"),
        (["--processes", "2", "--", "no-such-program"], "cannot start 'no-such-program': No such file or directory"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message):
    rest = arguments if "--" in arguments else [*arguments, "--", "true"]
    ran = subprocess.run(
        [sys.executable, "-m", "shardadam.cli", "launch", *rest], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode in (1, 2)
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_command_that_cannot_be_started():
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        launch(["no-such-program"], LaunchConfig(processes=2))
