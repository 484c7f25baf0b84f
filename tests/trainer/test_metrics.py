import builtins
import io
import json

import pytest
from rich.console import Console

from shardadam.trainer.config import ConfigError
from shardadam.trainer.metrics import Metrics, read_metrics


def metrics(directory, **kwargs):
    return Metrics(directory, **{"first_step": 0, "steps": 9, "console": Console(file=io.StringIO()), **kwargs})


def test_jsonl(tmp_path):
    with metrics(tmp_path) as out:
        out.write(1, {"loss": 2.5})
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.5}  # at once
        out.write(2, {"loss": 2.25, "grad_norm": 1.0})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25, "grad_norm": 1.0}]


def test_going_on_replaces_what_came_after_the_checkpoint(tmp_path):
    with metrics(tmp_path) as out:
        for step in range(1, 6):
            out.write(step, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # the run died here
    with metrics(tmp_path, first_step=3) as out:
        out.write(4, {"loss": 0.5})
    assert [(record["step"], record["loss"]) for record in read_metrics(tmp_path)] == [(1, 1), (2, 1), (3, 1), (4, 0.5)]


@pytest.mark.parametrize("line", [b"[]", b"null", b'{"loss": 1}', b"\xff\xfe\0", b"[" * 100_000])
def test_a_line_that_is_none_ends_the_record(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b"\n")
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_without_a_terminal_progress_is_lines(tmp_path):
    console = Console(file=io.StringIO(), width=100)
    with metrics(tmp_path, console=console) as out:
        out.show(3, 2.5, 12345.6)
    assert console.file.getvalue() == "step 3/9  loss 2.500  12,346 tokens/s\n"


def test_on_a_terminal_a_bar_shows_loss_speed_and_eta(tmp_path):
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with metrics(tmp_path, console=console) as out:
        out.show(3, 2.5, 12345.6)
    for part in ("3/9", "loss 2.500", "12,346 tokens/s", "ETA"):
        assert part in console.file.getvalue()


def test_tensorboard(tmp_path):
    with metrics(tmp_path, tensorboard=True) as out:
        out.write(1, {"loss": 2.5})
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in file.read_bytes()


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "tensorboardX":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"tensorboardX is not installed: pip install 'shardadam\[tensorboard\]'"):
        metrics(tmp_path, tensorboard=True)
