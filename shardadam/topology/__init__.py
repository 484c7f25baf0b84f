"""Compiles a step for TPU and GPU topologies that are not here, and tells what their compilers made of it."""

from shardadam.topology.compiling import Compilation, CompilationError, MissingExtraError, compile_for
from shardadam.topology.names import Topology, parse_topology
from shardadam.topology.target import Target

__all__ = [
    "Compilation",
    "CompilationError",
    "MissingExtraError",
    "Target",
    "Topology",
    "compile_for",
    "parse_topology",
]
