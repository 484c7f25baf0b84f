"""A small text, and a config that trains on it in seconds."""

import functools
import tempfile
from pathlib import Path

from shardadam.trainer.config import TrainConfig, parse_config

WORDS = ("shard", "gather", "reduce", "scatter", "moment", "mesh", "axis", "\n")


@functools.cache
def _text_directory():
    directory = tempfile.TemporaryDirectory(prefix="shardadam-text-")
    for i in range(12):
        text = " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(400))
        (Path(directory.name) / f"{i:02}.txt").write_text(text)
    return directory  # removed when the process ends


def text_glob() -> str:
    """Twelve files of words."""
    return f"{_text_directory().name}/*.txt"


def tiny_raw(runs_dir, **changes) -> dict:
    """`tiny_raw(tmp_path, steps=5, model={"mlp": "gelu"})`: what a YAML file would hold."""
    raw = {
        "name": "tiny", "steps": 4, "batch_size": 8, "mesh": "data=8", "runs_dir": str(runs_dir),
        "log_every": 2, "save_every": 100,
        "model": {"num_layers": 2, "d_model": 16, "num_heads": 2, "d_ff": 32, "max_len": 16},
        "data": {"files": text_glob(), "eval_fraction": 0.2, "eval_tokens": 500},
        "optimizer": {"warmup_steps": 2, "decay_steps": 20, "min_size": 64},
    }  # fmt: skip
    for name, value in changes.items():
        raw[name] = {**raw.get(name, {}), **value} if isinstance(value, dict) else value
    return raw


def tiny_config(runs_dir, **changes) -> TrainConfig:
    """`tiny_raw` as a config."""
    return parse_config(tiny_raw(runs_dir, **changes))
