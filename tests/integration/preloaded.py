"""`shardadam launch` whose processes are forks of one that has imported JAX already: a start costs half.

They are processes of their own all the same, with environments, sessions, pipes and signals of their own. Not the real
thing: `scripts/torture` starts real ones.
"""

import atexit
import inspect
import os
import signal
import subprocess
import sys
import threading
import traceback

from faulty import run_faulty

from shardadam import process_group
from shardadam.cli import main
from shardadam.trainer import loop

SPOKEN = inspect.signature(subprocess.Popen._execute_child)


class Forked(subprocess.Popen):
    """A Popen that forks for `train`, and runs `shardadam` with the arguments after the program's path."""

    def _execute_child(self, *arguments):
        given = SPOKEN.bind(self, *arguments).arguments
        if "train" not in given["args"]:
            super()._execute_child(*arguments)
            return
        pipes = [given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        sys.stdout.flush()
        sys.stderr.flush()
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            become(given["args"][2:], given["env"], pipes[0], pipes[3], pipes[5])
        self._child_created = True
        self._close_pipe_fds(*pipes)
        # Until it leads a group of its own, as a Popen waits for exec: the launcher forgets a group that is not there.
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)


def become(arguments, environment, stdin, stdout, stderr):
    """What exec would do for a new process, and then its run and its end."""
    os.setsid()
    for number, source in enumerate((stdin, stdout, stderr)):
        os.dup2(source, number)
    for number in process_group._FORWARDED:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.closerange(3, 256)  # the other processes' pipes, and the one that the launcher waits at
    os.environ.clear()
    os.environ.update(environment)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    try:
        code = run_faulty(arguments)
    except SystemExit as end:
        code = end.code
    except Exception:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    assert loop
    subprocess.Popen = Forked
    sys.exit(main())
