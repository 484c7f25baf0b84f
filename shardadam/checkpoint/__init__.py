"""Save and resume: an adapter over Orbax that keeps logical shapes on disk, whatever the layout in memory."""

from shardadam.checkpoint.checkpointer import Checkpointer
from shardadam.checkpoint.match import CheckpointError

__all__ = ["CheckpointError", "Checkpointer"]
