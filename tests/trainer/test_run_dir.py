import functools
import json
from dataclasses import replace

import pytest
from tiny import tiny_config

from shardadam.trainer.config import ConfigError, load_config
from shardadam.trainer.run_dir import check_resume, run_directory, versions, write_run


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
