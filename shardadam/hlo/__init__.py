"""Reads a compiled program and knows nothing else: its collectives, their bytes and number, its memory."""

from shardadam.hlo.donation import Memory, memory
from shardadam.hlo.traffic import CollectiveOp, collectives

__all__ = ["CollectiveOp", "Memory", "collectives", "memory"]
