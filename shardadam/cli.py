"""The command line: `shardadam train|plan|checkpoint|launch|env`. Parses, prints, turns errors into exit codes.

Exit codes: 0 done, or stopped by a signal after saving; 1 the run could not go on; 2 the user can set it right;
75 it was stuck; 128 + a signal's number when a second one ended it. `launch` has that of the process that failed first;
for those of `checkpoint` see checkpoint_cli.
"""

import argparse
import contextlib
import logging
import math
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from shardadam.launch import LaunchConfig, launch
from shardadam.trainer.config import ConfigError, TrainConfig, load_config, parse_config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    own, program = _split(sys.argv[1:] if argv is None else argv)
    args, rest = build_parser().parse_known_args(own)
    args.program = program
    if rest and args.command == "env":
        print(f"shardadam env: takes no arguments, got {' '.join(rest)}", file=sys.stderr)
        return 2
    try:
        return _COMMANDS[args.command](args, rest)
    except KeyboardInterrupt:
        print("\nshardadam: interrupted before there was anything to save", file=sys.stderr)
        code = 130
    except Exception as error:
        code = _exit_code(error)
        if code is None and not _has_peers():
            raise
        if code is None:
            traceback.print_exc()
            code = 1
        else:
            print(f"shardadam {args.command}: {error}", file=sys.stderr)
    if _has_peers():
        from shardadam.runtime import leave

        leave(code)
    return code


def build_parser() -> argparse.ArgumentParser:
    """The commands. The fields of a config are tyro's part, see `read_config`."""
    parser = argparse.ArgumentParser(prog="shardadam", description="optax.adam whose state lives in shards.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("train", "train a config, or go on where the run stopped"),
        ("plan", "show where Adam's state of a config's model would live; allocates nothing"),
    ):
        # tyro shows the fields, and so answers --help.
        command = commands.add_parser(name, help=text, description=text, add_help=False, allow_abbrev=False)
        command.add_argument("config", metavar="CONFIG", nargs="?", help="a YAML file, such as configs/quickstart.yaml")
    commands.add_parser(
        "launch", help="run one of these in several processes on this machine", add_help=False, allow_abbrev=False
    )
    commands.add_parser(
        "checkpoint",
        help="list, verify, compare, import, export and prune checkpoints",
        add_help=False,
        allow_abbrev=False,
    )
    commands.add_parser("env", help="show versions and devices", description="Show versions, devices, memory kinds.")
    return parser


def read_config(command: str, path: str | None, overrides: Sequence[str]) -> TrainConfig:
    """A config file with the command line's `--field value` on top. `--help` prints all fields and exits.

    Raises:
      ConfigError: see `load_config`.
    """
    import tyro

    asks_for_help = any(flag in ("-h", "--help") for flag in overrides)
    if path is None and not asks_for_help:
        raise ConfigError(f"which config? Give the path of a YAML file: shardadam {command} configs/quickstart.yaml")
    config = tyro.cli(
        TrainConfig,
        prog=f"shardadam {command} CONFIG",
        description="Every field of the config can be set here; defaults are those of CONFIG.",
        default=TrainConfig() if path is None else load_config(path),
        args=list(overrides),
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )
    return parse_config(asdict(config)) if overrides else config


def _train(args: argparse.Namespace, rest: Sequence[str]) -> int:
    config = read_config("train", args.config, rest)
    from shardadam.trainer.loop import train

    with _log_to_stderr():
        result = train(config)
    if _process_index() == 0:
        print(result.summary())
    return 0


def _plan(args: argparse.Namespace, rest: Sequence[str]) -> int:
    config = read_config("plan", args.config, rest)
    from shardadam.trainer.build import plan_for

    with _log_to_stderr():
        print(plan_for(config).report(config.optimizer.mu_dtype, config.train_step.master_dtype))
    return 0


def _launch(args: argparse.Namespace, rest: Sequence[str]) -> int:
    import tyro

    try:
        config = tyro.cli(
            LaunchConfig,
            prog="shardadam launch",
            description="Runs `shardadam COMMAND`, or any program that calls shardadam.runtime.initialize(), in "
            "several processes on this machine: shardadam launch --processes 2 --devices-per-process 4 -- train CONFIG",
            args=list(rest),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not args.program:
        raise ConfigError("launch what? Give a command after `--`, such as: -- train configs/quickstart.yaml")
    own = args.program[0] in _COMMANDS
    if args.program[0] == "train" and config.stop_grace is None:
        config = replace(config, stop_grace=_time_to_stop(args.program))
    try:
        return launch([sys.executable, "-m", "shardadam.cli", *args.program] if own else args.program, config)
    except OSError as error:
        known = ", ".join(_COMMANDS)
        raise ConfigError(f"cannot start '{args.program[0]}': {error.strerror}; give {known}, or a program") from None


def _time_to_stop(program: Sequence[str]) -> float:
    """Seconds that the deadlines of `train CONFIG` let a step and the save after it take; raises what `train` would."""
    args, rest = build_parser().parse_known_args(program)
    deadlines = read_config("train", args.config, rest).deadlines
    return (deadlines.step or math.inf) + (deadlines.save or math.inf)


def _checkpoint(args: argparse.Namespace, rest: Sequence[str]) -> int:
    del args
    from shardadam import checkpoint_cli

    return checkpoint_cli.main(rest)


def _env(args: argparse.Namespace, rest: Sequence[str]) -> int:
    del args, rest
    import jax

    from shardadam import runtime
    from shardadam.trainer.run_dir import versions

    runtime.initialize()
    for name, version in versions().items():
        print(f"{name:18} {version}")
    devices = jax.local_devices()
    memories = ", ".join(
        memory.kind + (" (default)" if memory == devices[0].default_memory() else "")
        for memory in devices[0].addressable_memories()
    )
    print(
        f"{'devices':18} {jax.device_count()} x {devices[0].device_kind} ({devices[0].platform}), {len(devices)} local"
    )
    print(f"{'memory kinds':18} {memories}")
    print(f"{'processes':18} {jax.process_count()}, this is {jax.process_index()}")
    return 0


def _has_peers() -> bool:
    """Whether this process has joined others; without waiting for JAX where nothing has loaded it."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def _process_index() -> int:
    import jax

    return jax.process_index()


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments before the first `--` of `launch`, and the program after it."""
    argv = list(argv)
    cut = argv.index("--") if argv[:1] == ["launch"] and "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1 :]


_COMMANDS = {"train": _train, "plan": _plan, "checkpoint": _checkpoint, "launch": _launch, "env": _env}


def _exit_code(error: Exception) -> int | None:
    """None for what is a mistake in the code, and so deserves its traceback."""
    if isinstance(error, ConfigError):
        return 2
    # These can only come from modules that are loaded; a mistake in the config is told without waiting for JAX.
    if "shardadam.runtime" in sys.modules:
        from shardadam.runtime import RuntimeSettingsError

        if isinstance(error, RuntimeSettingsError):
            return 2
    if "shardadam.trainer.loop" in sys.modules:
        from shardadam.checkpoint import CheckpointError
        from shardadam.trainer.loop import TrainingError

        if isinstance(error, TrainingError | CheckpointError | OSError):
            return 1
    return None


@contextlib.contextmanager
def _log_to_stderr() -> Iterator[None]:
    log, handler = logging.getLogger("shardadam"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    # Of several processes the first speaks for all, until one has something of its own to say.
    handler.addFilter(lambda record: record.levelno > logging.INFO or not _has_peers() or _process_index() == 0)
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # libraries configure the root logger, which would say everything twice
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before


if __name__ == "__main__":
    sys.exit(main())
