"""The launcher on small programs of Python's alone; tests/integration/test_launched_training.py has it train."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from shardadam.cli import _time_to_stop
from shardadam.launch import LaunchConfig, fewer_processes, launch, process_environment
from shardadam.trainer.config import ConfigError

ROOT = Path(__file__).parents[1]
INDEX = "index = int(os.environ['JAX_PROCESS_ID'])"


# For what a process has to wait for that the others do: when one starts says nothing of when another does.
MARKS = """
def mark(name): open(os.path.join(os.environ['MARKS'], name), 'w').close()
def awaits(*names):
    while not all(os.path.exists(os.path.join(os.environ['MARKS'], name)) for name in names): time.sleep(0.01)
"""


def program(code):
    return [sys.executable, "-c", f"import os, signal, sys, time\n{INDEX}\n{MARKS}{textwrap.dedent(code)}"]


def started(code, *options, environment=()):
    command = [sys.executable, "-m", "shardadam.cli", "launch", *options, "--", *program(code)]
    environment = os.environ | dict(environment)
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(code, *options, **environment):
    process = started(code, *options, **environment)
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def is_gone(process, within=100):
    """Or its new parent has not taken note of its end yet. What was killed takes a moment to go."""
    deadline = time.monotonic() + within
    while True:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout
        if state[:1] in ("", "Z"):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)


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
def test_the_first_failure_ends_the_others_and_its_code_is_kept(tmp_path, end, wanted, said):
    # Process 0 does not end by SIGTERM, process 2 has started one of its own.
    began = time.monotonic()
    code, out, err = finished(
        f"""
        if index == 0: signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if index == 2:
            child = os.fork()
            print('child', child or os.getpid())
        mark(str(index))
        if index == 1:
            awaits('0', '2'); {end}
        time.sleep(250)
        """,
        "--processes", "3", "--grace", "0.5", environment={"MARKS": str(tmp_path)},
    )  # fmt: skip
    assert (code, time.monotonic() - began < 200) == (wanted, True)
    assert said in err
    (child,) = {line.split()[-1] for line in out.splitlines() if "child" in line}
    assert is_gone(child)


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
        while len(count) < int(os.environ['TIMES']): time.sleep(0.05)
        for _ in range(50 if index else 30): time.sleep(0.05)
        """,
        # After a second SIGINT the processes have no more time than this to end by themselves.
        "--processes", "2", "--max-restarts", "3", "--grace", "100", environment={"TIMES": str(1 + again)},
    )  # fmt: skip
    assert process.stdout is not None
    said = [process.stdout.readline(), process.stdout.readline()]
    assert sorted(line.split()[-1] for line in said) == ["ready", "ready"]
    process.send_signal(number)
    if again:
        assert "got" in process.stdout.readline() + process.stdout.readline()
        process.send_signal(number)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == wanted
    if not again:
        assert sorted(out.split("\n"))[1:] == [f"[{index}] got {number.name} 1" for index in (0, 1)]


STUBBORN = """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
    if 'TELLS' in os.environ: signal.signal(signal.SIGINT, lambda *_: print('asked', flush=True))
    child = os.fork()
    if child: print('child', os.getpid(), child, flush=True)
    time.sleep(250)
"""


def told(process, lines):
    """The numbers at the ends of so many lines of the launcher's."""
    return [int(number) for _ in range(lines) for number in process.stdout.readline().split("child")[1].split()]


@pytest.mark.parametrize(
    ("number", "times", "options"),
    [
        (signal.SIGTERM, 1, ["--stop-grace", "0.5"]),
        (signal.SIGHUP, 1, ["--stop-grace", "0.5"]),
        (signal.SIGINT, 2, []),  # the second does not wait for the ten minutes
    ],
)
def test_what_does_not_end_when_it_is_asked_to_is_made_to(number, times, options):
    tells = {"TELLS": "1"} if times > 1 else {}
    arguments = ["--processes", "2", "--grace", "0.3", "--max-restarts", "2", *options]
    process = started(STUBBORN, *arguments, environment=tells)
    family = told(process, 2)
    process.send_signal(number)
    for _ in range(times - 1):
        assert [process.stdout.readline()[4:] for _ in range(2)] == ["asked\n"] * 2  # signals do not queue
        process.send_signal(number)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGKILL
    assert "ended with SIGKILL; it was asked to end, and then made to" in err
    assert "restart" not in err
    assert [is_gone(one) for one in family] == [True] * 4


def test_what_has_not_been_given_time_has_as_long_as_a_step_and_a_save_may_take():
    quickstart = ["train", str(ROOT / "configs/quickstart.yaml")]
    assert _time_to_stop(quickstart) == 600 + 3600
    assert _time_to_stop([*quickstart, "--deadlines.save", "20"]) == 620
    assert _time_to_stop([*quickstart, "--deadlines.save", "0"]) == math.inf
    with pytest.raises(ConfigError, match="which config"):
        _time_to_stop(["train"])


def test_nothing_is_left_of_what_ended_processes_have_started(tmp_path):
    """Of one that ended well before the others, and of one that failed, at each start."""
    code, out, _ = finished(
        """
        if not (child := os.fork()): time.sleep(250)
        print('child', child, flush=True)
        ended = f"ended-{os.environ['SHARDADAM_RESTARTS']}"
        if index == 0: mark(ended); sys.exit(0)
        awaits(ended); time.sleep(0.7); sys.exit(7)
        """,
        "--processes", "2", "--grace", "5", "--max-restarts", "1", "--backoff", "0",
        environment={"MARKS": str(tmp_path)},
    )  # fmt: skip
    assert code == 7
    children = [int(line.split("child")[1]) for line in out.splitlines() if "child" in line]
    assert [is_gone(child) for child in children] == [True] * 4


def test_the_end_of_a_killed_launcher_is_that_of_its_processes():
    """Without a watchdog of theirs, and though they do not listen."""
    process = started(STUBBORN, "--processes", "2", "--grace", "0.3")
    family = told(process, 2)
    process.kill()
    process.communicate(timeout=200)  # until nobody has its pipes any more
    assert [is_gone(one) for one in family] == [True] * 4


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
        [sys.executable, "-m", "shardadam.cli", "launch", *rest], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert ran.returncode in (1, 2)
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_command_that_cannot_be_started():
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        launch(["no-such-program"], LaunchConfig(processes=2))
