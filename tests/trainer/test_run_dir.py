"""What a run is recorded as, what it may go on with, and when it may begin."""

import functools
import json
from dataclasses import replace

import pytest
from tiny import tiny_config

from shardadam.trainer.config import ConfigError, load_config
from shardadam.trainer.run_dir import (
    check_resume,
    checkpoint_directory,
    refusal_to_begin,
    run_directory,
    versions,
    write_run,
)


@pytest.fixture
def tiny(tmp_path):
    return functools.partial(tiny_config, tmp_path)


@pytest.fixture
def started(tiny):
    config = tiny()
    write_run(config, sha256="ab" * 32, report="the plan", facts={"mesh": "data=8"})
    return config


def test_what_is_recorded(started):
    directory = run_directory(started)
    record = json.loads((directory / "run.json").read_text())
    assert load_config(directory / "config.yaml") == started
    assert (directory / "plan.txt").read_text() == "the plan\n"
    assert record["data_sha256"] == "ab" * 32
    assert record["versions"] == versions()
    assert record["mesh"] == "data=8"
    assert set(versions()) >= {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "shardadam"}


@pytest.mark.parametrize(
    "changes",
    [{"steps": 99, "log_every": 1, "save_every": 1}, {"mesh": "data=2"}, {"optimizer": {"layout": "packed"}}],
)
def test_what_may_change(started, tiny, changes):
    check_resume(tiny(**changes), "ab" * 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"d_ff": 64}}, "'model.d_ff' was 32, is 64"),
        ({"data": {"files": "other/*"}}, "'data.files' was "),
        ({"data": {"eval_fraction": 0.5}}, "'data.eval_fraction' was 0.2, is 0.5"),
        ({"seed": 1}, "'seed' was 0, is 1"),
        ({"batch_size": 16}, "'batch_size' was 8, is 16"),
        ({"optimizer": {"decay_steps": 30}}, "'optimizer.decay_steps' was 20, is 30"),
        ({"seed": 1, "batch_size": 16}, "'batch_size' was 8, is 16; 'seed' was 0, is 1"),
    ],
)
def test_what_may_not(started, tiny, changes, message):
    with pytest.raises(ConfigError) as caught:
        check_resume(tiny(**changes), "ab" * 32)
    assert message in str(caught.value)
    assert "choose another 'name'" in str(caught.value)


def test_another_text(started):
    with pytest.raises(ConfigError, match=r"trained on another text: sha256 was abababababababab\.\.\., is cdcd"):
        check_resume(started, "cd" * 32)


@pytest.mark.parametrize("name", ["config.yaml", "run.json"])
def test_checkpoints_of_nobody_knows_what(started, name):
    (run_directory(started) / name).unlink()
    with pytest.raises(ConfigError, match=f"has checkpoints but no {name}"):
        check_resume(replace(started, steps=9), "ab" * 32)


@pytest.mark.parametrize("name", ["config.yaml", "run.json"])
@pytest.mark.parametrize("text", ["", "[1]", '{"seed', "[" * 10_000, "\0\0"])
def test_a_record_that_is_damaged(started, name, text):
    """A mistake for the user to set right, exit code 2: a launcher would start such a run again and again."""
    (run_directory(started) / name).write_text(text)
    with pytest.raises(ConfigError, match=f"has checkpoints but a damaged {name}.*; put it back"):
        check_resume(started, "ab" * 32)


def test_a_directory_that_no_checkpoint_can_be_written_to(tiny):
    with pytest.raises(ConfigError, match=r"'name' or 'runs_dir': .*give a directory without any of"):
        checkpoint_directory(tiny(name="run[1]"))


def leave(started, *paths):
    """Makes these in the run's directory of checkpoints, each a step (a name that ends in /) or a file."""
    for path in (run_directory(started) / "checkpoints" / name for name in paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name.isdecimal():
            path.mkdir()
            (path / "_CHECKPOINT_METADATA").write_text("{}")
        else:
            path.write_text("")


def trained_until(started, step):
    (run_directory(started) / "metrics.jsonl").write_text(f'{{"step": {step}, "loss": 1.0}}\n')


@pytest.mark.parametrize(
    ("left", "step"),
    [
        ([], 0),
        ([], 100),  # Killed before its first save has begun, at step 100.
        (["seals/.tmp", "100"], 100),  # Killed between Orbax's commit and the seal,
        (["seals/.tmp", "damaged/100-T-1/x", "damaged/100-T-1.txt", "100"], 100),  # and once more.
        (["seals/.tmp"], 250),  # No save has succeeded, and on_save_error is "warn".
        (["damaged/note.json", "damaged/x-y.json"], 100),  # A user's own.
    ],
)
def test_what_was_never_saved_may_begin(started, left, step):
    leave(started, *left)
    trained_until(started, step)
    assert refusal_to_begin(started) == ""


@pytest.mark.parametrize(
    ("left", "step", "message"),
    [
        (
            ["seals/.tmp", "damaged/4-T-1/x", "damaged/4-T-1.txt", "damaged/4-T-1.json"],
            0,
            "steps 4 had been saved, and ",
        ),
        (["seals/4.json"], 0, "has seals of steps 4, whose directories are gone"),
        (["4"], 0, "steps 4 are there without seals: `shardadam checkpoint adopt`"),  # `seals` was removed.
        (["seals/.tmp", "2", "4"], 0, "steps 2, 4 are there without seals"),
        ([], 101, "metrics.jsonl goes to step 101, past the first save"),  # All of `checkpoints` was.
        ([], 1, "metrics.jsonl goes to step 1, past"),  # So it was, and nothing says how often was saved.
    ],
)
def test_what_was_saved_and_is_gone_is_not_begun_anew(started, left, step, message):
    leave(started, *left)
    trained_until(started, step)
    if step == 1:
        (run_directory(started) / "config.yaml").write_text("")
    refusal = refusal_to_begin(started)
    assert message in refusal
    assert "choose another 'name', or move" in refusal
