"""A process that works on a small checkpoint and then on a large one; prints by how much its peak memory grew."""

import sys
from contextlib import redirect_stdout
from pathlib import Path

from shardadam.cli import main

directory, scratch = sys.argv[1:]


def work(name):
    for line in (
        f"show {directory}/{name} --digests",
        f"import {directory}/{name} {scratch}/{name}",
        f"diff {directory}/{name} {scratch}/{name}",
    ):
        with redirect_stdout(sys.stderr):
            assert main(["checkpoint", *line.split()]) == 0, line


def peak():
    # Not getrusage's, which begins with that of the process that started this one.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


work("small")
before = peak()
work("large")
print(peak() - before)
