"""The training program: what `shardadam train` runs, for those who call it from Python.

`load_config` reads a YAML file into a `TrainConfig`, `train` runs it. Neither imports JAX before it is needed.
"""

from shardadam.trainer.config import ConfigError, TrainConfig, load_config

__all__ = ["ConfigError", "TrainConfig", "load_config"]
