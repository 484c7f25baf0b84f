"""`memory`: a compiled program's bytes on each device, and which of its donated arguments are not reused."""

import re
from typing import Any, NamedTuple

import jax

from shardadam.hlo.program import as_text

_ALIASED = re.compile(r"\((\d+), \{[\d, ]*\}")


class Memory(NamedTuple):
    """Bytes on each device, as the compiler planned them.

    Attributes:
      argument_bytes: of all arguments.
      output_bytes: of all results, those that reuse arguments included.
      alias_bytes: of the results that reuse donated arguments.
      temp_bytes: what the program needs beside arguments and results.
      peak_bytes: the most that is alive at once, arguments and results included.
      not_donated: the names of donated arguments that no result reuses.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    peak_bytes: int
    not_donated: tuple[str, ...]

    @property
    def donation_complete(self) -> bool:
        """Whether every donated argument that the program reads is reused for a result."""
        return not self.not_donated


def memory(compiled: Any) -> Memory:
    """What a compiled program needs on each device.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` returns.

    Returns:
      A `Memory`.

    Example:
      >>> f = jax.jit(lambda x: x + 1, donate_argnums=0)
      >>> found = shardadam.memory(f.lower(jnp.ones(8)).compile())
      >>> found.argument_bytes, found.alias_bytes, found.donation_complete
      (32, 32, True)
    """
    stats = compiled.memory_analysis()
    return Memory(
        argument_bytes=stats.argument_size_in_bytes,
        output_bytes=stats.output_size_in_bytes,
        alias_bytes=stats.alias_size_in_bytes,
        temp_bytes=stats.temp_size_in_bytes,
        peak_bytes=stats.peak_memory_in_bytes,
        not_donated=_not_donated(compiled),
    )


def _not_donated(compiled: Any) -> tuple[str, ...]:
    """Donated arguments without an alias. Those that the program does not read are no parameters of it."""
    arguments, treedef = jax.tree_util.tree_flatten_with_path(compiled.args_info)
    is_read = treedef.flatten_up_to(compiled.input_shardings)  # None: not read.
    parameters = [arg for arg, sharding in zip(arguments, is_read, strict=True) if sharding is not None]
    header = as_text(compiled).partition("\n")[0]
    _, _, rest = header.partition("input_output_alias={")
    aliased = {int(number) for number in _ALIASED.findall(rest.partition(" }")[0])}
    return tuple(
        jax.tree_util.keystr(keypath)
        for number, (keypath, arg) in enumerate(parameters)
        if arg.donated and number not in aliased
    )
