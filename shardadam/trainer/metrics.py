"""Where numbers go while a run trains: a progress bar, metrics.jsonl, and TensorBoard where it is asked for."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shardadam.trainer.config import ConfigError


class Metrics:
    """Writes metrics to all places at once. A context manager: leaving it closes the files.

    Args:
      directory: the run directory.
      first_step: where the run starts or goes on; older lines of metrics.jsonl are kept, later ones are written anew.
      steps: where it ends.
      tensorboard: write TensorBoard files, too.
      console: where the progress bar goes.
    """

    def __init__(
        self, directory: Path, *, first_step: int, steps: int, tensorboard: bool = False, console: Console | None = None
    ) -> None:
        self._tensorboard = _summary_writer(directory / "tensorboard", first_step) if tensorboard else None
        path = directory / "metrics.jsonl"
        _keep_until(path, first_step)
        self._file = path.open("a", encoding="utf-8")
        console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"),
            TextColumn("ETA"), TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._console = console
        self._task = self._progress.add_task("", total=steps, completed=first_step)
        self._steps = steps

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.pause()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def pause(self) -> None:
        """Takes the progress bar away, for what is printed next."""
        self._progress.stop()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and a point in each TensorBoard curve."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def show(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Moves the progress bar; where there is no terminal, a line of text."""
        text = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s"
        self._progress.update(self._task, completed=step, description=text)
        if self._progress.disable:
            self._console.print(f"step {step}/{self._steps}  {text}", highlight=False)


class NoMetrics(contextlib.nullcontext[Any]):
    """Takes what `Metrics` takes and writes nothing: for all processes but the first."""

    def pause(self) -> None:
        """Nothing is shown."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing is written."""

    def show(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Nothing is shown."""


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, up to the first that is none: it may have been cut off when the run died."""
    path = directory / "metrics.jsonl"
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not (isinstance(record, dict) and isinstance(record.get("step"), int)):
            break
        records.append(record)
    return records


def _keep_until(path: Path, step: int) -> None:
    """Leaves out what a run wrote after the checkpoint it resumes from: those steps are trained, and written, again."""
    records = read_metrics(path.parent)
    kept = "".join(json.dumps(record) + "\n" for record in records if record["step"] <= step)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(kept, encoding="utf-8")
    os.replace(temporary, path)


def _summary_writer(directory: Path, first_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ConfigError(
            "'tensorboard' is true, but tensorboardX is not installed: "
            "pip install 'shardadam[tensorboard]', or set it to false"
        ) from None
    return SummaryWriter(str(directory), purge_step=first_step + 1 if first_step else None)
