"""A run's directory: what it was started with, and whether it may go on with the config it is given now."""

import contextlib
import json
import platform
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from etils import epath

from shardadam.checkpoint.files import check_writable_name, write_durably
from shardadam.checkpoint.steps import DAMAGED, SEALS, Steps, short
from shardadam.trainer.config import ConfigError, DeadlineConfig, TrainConfig, dump_config
from shardadam.trainer.metrics import read_metrics

# What does not change the numbers, or (the mesh, the step) changes no more than the order in which they are added up;
# and masters, which can be switched on and off over a checkpoint.
MAY_CHANGE = {
    "name", "steps", "mesh", "cpu_devices", "platform", "runs_dir", "log_every", "eval_every", "save_every",
    "check_every", "on_save_error", "max_to_keep", "keep_period", "tensorboard", "data.eval_tokens", "model.remat",
    "optimizer.layout", "optimizer.min_size",
    "train_step.stage", "train_step.num_microbatches", "train_step.accumulate", "train_step.collective",
    "train_step.master_dtype", "train_step.skip_nonfinite",
    *(f"deadlines.{field.name}" for field in fields(DeadlineConfig)),
}  # fmt: skip


def run_directory(config: TrainConfig) -> Path:
    """Where the run lives."""
    return Path(config.runs_dir) / config.name


def checkpoint_directory(config: TrainConfig) -> Path:
    """Where the run's checkpoints live.

    Raises:
      ConfigError: they cannot be written to a directory of that name.
    """
    directory = run_directory(config) / "checkpoints"
    try:
        check_writable_name(epath.Path(directory.absolute()))
    except ValueError as error:
        raise ConfigError(f"'name' or 'runs_dir': {error}") from None
    return directory


def versions() -> dict[str, str]:
    """Versions of Python and of all that takes part in the numbers."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "shardadam")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def check_resume(config: TrainConfig, sha256: str) -> None:
    """Refuses to go on with another model, text, seed, batch or optimizer than the run was started with.

    Raises:
      ConfigError: naming the field, what the run has, and what was given.
    """
    directory = run_directory(config)
    before, recorded = flat(_recorded(directory / "config.yaml")), _recorded(directory / "run.json").get("data_sha256")
    now = flat(asdict(config))
    changed = [name for name in now if name not in MAY_CHANGE and name in before and before[name] != now[name]]
    if changed:
        said = "; ".join(f"'{name}' was {before[name]!r}, is {now[name]!r}" for name in changed)
        raise ConfigError(f"{directory} was started with another config: {said}. Set it back, or choose another 'name'")
    if recorded != sha256:
        raise ConfigError(
            f"{directory} was trained on another text: sha256 was {str(recorded)[:16]}..., is {sha256[:16]}... (Python "
            f"{platform.python_version()} now). Bring that text back, or choose another 'name'"
        )


def _recorded(path: Path) -> dict[str, Any]:
    """What `write_run` has written to a file.

    Raises:
      ConfigError: it is not there, or cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        if isinstance(found, dict):
            return found
        why = f"a damaged {path.name}: it holds no fields"
    except FileNotFoundError:
        why = f"no {path.name}"
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        why = f"a damaged {path.name} ({' '.join(str(error).split())})"
    raise ConfigError(
        f"{path.parent} has checkpoints but {why} to say what they are of; put it back, or choose another 'name'"
    )


def refusal_to_begin(config: TrainConfig) -> str:
    """Why not to begin at step 0: the run has lost what it had saved, and a restart would train it all anew, unasked.

    For where no step has both seal and directory. What a run leaves that was killed in its first save, or before, is no
    reason to refuse, since nothing of it ever counted as saved: metrics, one step without a seal, or such a step that
    the next save has moved aside.

    Returns:
      What was found, where, and what to do; empty for a run that may begin.
    """
    directory = run_directory(config)
    if not (found := _traces(directory)):
        return ""
    return (
        f"{directory / 'checkpoints'}: no step to go on from is left, but {'; '.join(found)}. Not begun at step 0 over "
        f"that. To go on, put a whole copy of a step there: its directory as N, its seal as {SEALS}/N.json; to begin "
        f"anew, choose another 'name', or move {directory} away"
    )


def _traces(directory: Path) -> list[str]:
    """Of a run without a step to go on from: what shows that there were steps."""
    checkpoints, found = directory / "checkpoints", []
    steps = Steps(epath.Path(checkpoints))
    seals = (seal.name.partition("-")[0] for seal in (checkpoints / DAMAGED).glob("*.json"))
    if aside := sorted(int(step) for step in seals if step.isdecimal()):
        found.append(f"{short(aside)} had been saved, and are damaged: see the .txt of each in {checkpoints / DAMAGED}")
    if lost := steps.seals():
        found.append(f"{checkpoints / SEALS} has seals of {short(lost)}, whose directories are gone")
    # A save makes the directory of seals before anything else, and moves a step without a seal out of its way.
    before_any_save = not (checkpoints / SEALS).exists()
    unsealed = steps.unsealed()
    if len(unsealed) > (0 if before_any_save else 1):
        found.append(f"{short(unsealed)} are there without seals: `shardadam checkpoint adopt` seals one as it is")
    trained = max((record["step"] for record in read_metrics(directory)), default=0)
    if before_any_save and not found and trained > _save_every(directory):
        found.append(f"{directory / 'metrics.jsonl'} goes to step {trained}, past the first save")
    return found


def _save_every(directory: Path) -> float:
    """What the run was started with; infinite where it was not; 0 where that cannot be read: each step may be saved."""
    path = directory / "config.yaml"
    with contextlib.suppress(ValueError, TypeError):  # A ConfigError, too.
        return float(_recorded(path).get("save_every") or 0)
    return 0 if path.exists() else float("inf")


def write_run(config: TrainConfig, *, sha256: str, report: str, facts: dict[str, Any]) -> None:
    """Records config, versions, the text's hash and the plan, each file whole or not at all, and to outlast a crash."""
    directory = run_directory(config)
    directory.mkdir(parents=True, exist_ok=True)
    record = {"versions": versions(), "data_sha256": sha256, **facts}
    files = {
        "config.yaml": dump_config(config),
        "run.json": json.dumps(record, indent=2) + "\n",
        "plan.txt": report.rstrip() + "\n",
    }
    for name, text in files.items():  # Without them the checkpoints cannot be gone on from.
        write_durably(epath.Path(directory / name), text)


def flat(nested: dict[str, Any]) -> dict[str, Any]:
    """{"data": {"files": 1}} -> {"data.files": 1}: fields as the command line names them."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        inner = {f"{name}.{key}": x for key, x in value.items()} if isinstance(value, dict) else {name: value}
        flat.update(inner)
    return flat


def _version(package: str) -> str:
    if package == "shardadam":
        import shardadam

        return shardadam.__version__
    return version(package)
