"""Save and resume: an adapter over Orbax that keeps logical shapes on disk, whatever the layout in memory."""

from shardadam.checkpoint.checkpointer import Checkpointer
from shardadam.checkpoint.convert import Converted, export_checkpoint, import_checkpoint
from shardadam.checkpoint.errors import CheckpointError, NotFiniteError, SaveError

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "Converted",
    "NotFiniteError",
    "SaveError",
    "export_checkpoint",
    "import_checkpoint",
]
