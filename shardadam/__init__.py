"""optax.adam whose state lives in shards.

The names below are imported on first use, so that `import shardadam` (and the command line's `--help`) does not
wait for JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardadam.assertions import assert_collectives
    from shardadam.checkpoint import Checkpointer
    from shardadam.estimate import Estimate, estimate_bytes
    from shardadam.gradients import total_and_weight, value_and_grad
    from shardadam.handles import gather
    from shardadam.hlo import CollectiveOp, Memory, collectives, memory
    from shardadam.layout import LeafPlan, pack, unpack
    from shardadam.optimizer import adam, adamw, nadam, nadamw, scale_by_adam
    from shardadam.params import pack_params, unpack_params
    from shardadam.plan import Plan, make_plan
    from shardadam.replicas import DivergenceError, check_replicas
    from shardadam.sharded import shard
    from shardadam.sharding import ShardingError, audit
    from shardadam.step import make_train_step
    from shardadam.train_state import TrainState

__version__ = "0.1.0"

_HOME = {
    "Checkpointer": "checkpoint",
    "CollectiveOp": "hlo",
    "DivergenceError": "replicas",
    "Estimate": "estimate",
    "LeafPlan": "layout",
    "Memory": "hlo",
    "Plan": "plan",
    "ShardingError": "sharding",
    "TrainState": "train_state",
    "adam": "optimizer",
    "adamw": "optimizer",
    "assert_collectives": "assertions",
    "audit": "sharding",
    "check_replicas": "replicas",
    "collectives": "hlo",
    "estimate_bytes": "estimate",
    "gather": "handles",
    "make_plan": "plan",
    "make_train_step": "step",
    "memory": "hlo",
    "nadam": "optimizer",
    "nadamw": "optimizer",
    "pack": "layout",
    "pack_params": "params",
    "scale_by_adam": "optimizer",
    "shard": "sharded",
    "total_and_weight": "gradients",
    "unpack": "layout",
    "unpack_params": "params",
    "value_and_grad": "gradients",
}

__all__ = [
    "Checkpointer",
    "CollectiveOp",
    "DivergenceError",
    "Estimate",
    "LeafPlan",
    "Memory",
    "Plan",
    "ShardingError",
    "TrainState",
    "adam",
    "adamw",
    "assert_collectives",
    "audit",
    "check_replicas",
    "collectives",
    "estimate_bytes",
    "gather",
    "make_plan",
    "make_train_step",
    "memory",
    "nadam",
    "nadamw",
    "pack",
    "pack_params",
    "scale_by_adam",
    "shard",
    "total_and_weight",
    "unpack",
    "unpack_params",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'shardadam' has no attribute '{name}'")
    value = getattr(import_module(f"shardadam.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
