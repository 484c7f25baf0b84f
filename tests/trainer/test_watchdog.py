"""The watchdog, in processes of their own that it may end; they do not wait for JAX."""

import os
import signal
import subprocess
import sys
import time

import pytest

from shardadam.trainer.watchdog import EXIT_ORPHANED, EXIT_STUCK, Watchdog

OPENING = """
import ctypes, os, subprocess, sys, threading, time
from shardadam.trainer import watchdog as module
from shardadam.trainer.watchdog import Watchdog
def begin(**seconds):
    watchdog = Watchdog(seconds).__enter__()
    watchdog.begin(next(iter(seconds)))
    return watchdog
"""
# Whichever thread the machine lets run, one of the two ends the process: in Python the watchdog's own has time enough,
# and the interpreter's lock is not asked back from the main thread before that keeps it in C.
ITS_OWN, FAULTHANDLERS = "module._GRACE = 300", "sys.setswitchinterval(300)"
STUCK = {
    "Python": (ITS_OWN, "while True: pass"),
    "a wait of C's": (ITS_OWN, "lock = threading.Lock(); lock.acquire(); lock.acquire()"),
    "C with the interpreter's lock": (FAULTHANDLERS, "ctypes.PyDLL(None).sleep(250)"),
}
# Time that goes by when the test says so. That it has gone by, the watchdog's thread has seen, and ended nothing.
CLOCK = """
class Clock:
    now, looks = 0.0, 0
    def monotonic(self):
        self.looks += threading.current_thread().name == 'watchdog'
        return self.now
clock = module.time = Clock()
def go_by(seconds):
    clock.now += seconds
    looks = clock.looks
    while clock.looks < looks + 2: time.sleep(0.01)
"""


LAUNCHER = """
import os, subprocess, sys
subprocess.run([sys.executable, '-c', {child!r}], env=os.environ | {{'SHARDADAM_LAUNCHER': str(os.getpid())}})
"""


def run(body, **options):
    return subprocess.run(
        [sys.executable, "-c", f"{OPENING}{body}"], capture_output=True, text=True, timeout=200, **options
    )


@pytest.mark.parametrize("where", list(STUCK))
def test_a_stuck_process_ends_itself_and_says_where(where):
    prepare, stuck = STUCK[where]
    ran = run(f"{prepare}\ndef stuck_here():\n    begin(save=0.3)\n    {stuck}\nstuck_here()")
    if where == "C with the interpreter's lock":
        assert ran.returncode == 1  # faulthandler's own, the only one that needs no lock
    else:
        assert ran.returncode == EXIT_STUCK
        assert "watchdog: 'save' has taken more than 0.3 s, its deadline" in ran.stderr
    assert "in stuck_here" in ran.stderr


def test_each_thing_begun_has_a_deadline_of_its_own():
    ran = run(
        f"{CLOCK}\n"
        "watchdog = begin(step=100, save=0)\n"
        "for _ in range(4): go_by(60); watchdog.begin('step')\n"
        "watchdog.begin('step', times=4); go_by(399)\n"
        "watchdog.begin('save'); go_by(10**6)\n"
        "watchdog.begin('step'); watchdog.__exit__(None, None, None); clock.now += 1000; time.sleep(1)\n"
        "print('through')"
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "through\n", "")


def test_what_has_no_deadline_cannot_begin():
    with Watchdog({"step": 1}) as watchdog, pytest.raises(KeyError):
        watchdog.begin("lunch")


def test_a_process_whose_launcher_is_gone_ends(tmp_path):
    ready = tmp_path / "ready"
    child = f"{OPENING}watchdog = begin(step=0); open({str(ready)!r}, 'w').close(); time.sleep(250)"
    parent = subprocess.Popen([sys.executable, "-c", LAUNCHER.format(child=child)], stderr=subprocess.PIPE, text=True)
    while not ready.exists():
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    _, err = parent.communicate(timeout=200)  # ends when the child, too, has closed the pipe
    assert f"the launcher, process {parent.pid}, is gone" in err
    assert f"exit code {EXIT_ORPHANED}" in err


def test_a_process_whose_launcher_was_gone_before_it_had_a_watchdog_ends():
    """As when it is killed while the processes import JAX or join: one of them would go on, and hold the run's lock."""
    launcher = subprocess.Popen([sys.executable, "-c", ""])
    launcher.wait()
    ran = run("begin(step=0); time.sleep(250)", env=os.environ | {"SHARDADAM_LAUNCHER": str(launcher.pid)})
    assert f"the launcher, process {launcher.pid}, is gone" in ran.stderr
    assert ran.returncode == EXIT_ORPHANED


def test_a_process_ends_though_nobody_reads_what_it_says(tmp_path):
    """A launcher that is killed takes the pipes of its processes with it."""
    ready, (reader, writer) = tmp_path / "ready", os.pipe()
    child = f"{OPENING}watchdog = begin(step=0); open({str(ready)!r}, 'w').close(); time.sleep(250)"
    options = f"stderr=subprocess.PIPE, pass_fds=[{writer}], "
    code = LAUNCHER.format(child=child).replace("env=", f"{options}env=")
    launcher = subprocess.Popen([sys.executable, "-c", code], pass_fds=[writer])
    os.close(writer)
    while not ready.exists():
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    began = time.monotonic()
    assert os.read(reader, 1) == b""  # its end closes when the process has ended
    assert time.monotonic() - began < 200
    os.close(reader)
