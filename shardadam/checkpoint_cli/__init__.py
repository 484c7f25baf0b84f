"""`shardadam checkpoint import|export|list|show|verify|diff|adopt|prune`: on one device, a leaf at a time.

Exit codes: 0 done; 1 what was asked for is not so: a step is damaged, two checkpoints differ; 2 it could not be done,
and the message says why. Nothing of JAX is imported before the arguments are read.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from shardadam.checkpoint_cli.commands import COMMANDS


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns the exit code."""
    commands: dict[str, Callable[..., Any]] = {cls.__name__.lower(): cls for cls in COMMANDS}
    command = tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="shardadam checkpoint",
        description="Works on checkpoints, on one device, a leaf at a time.",
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    # A checkpoint is read on the host, beside a run that may hold the accelerators.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from shardadam.checkpoint import CheckpointError

    try:
        return COMMANDS[type(command)](command)
    except (CheckpointError, ValueError, OSError) as error:
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        print(f"shardadam checkpoint {type(command).__name__.lower()}: {error}{notes}", file=sys.stderr)
        return 2
