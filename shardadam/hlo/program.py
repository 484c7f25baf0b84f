"""The text of a compiled program as computations of instructions, and the bytes of their types."""

import functools
import math
import re
from typing import Any, NamedTuple

# A type is one word, or a tuple in parentheses: then it ends where an op's name and its parenthesis follow.
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)([a-z]\w*)?\[([\d,<=]*)\]")


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
      name: without the %.
      op: such as "all-gather-start".
      type: the result's, as it is written.
      rest: operands, and after them attributes.
      is_root: whether it is what its computation returns.
    """

    name: str
    op: str
    type: str
    rest: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """The names of its operands; of a constant, its value; of a parameter, its number."""
        text = self.rest[: _closing(self.rest)]
        words = [re.sub(r"/\*.*?\*/", "", part).split() for part in _split(text)]
        return [part[-1].lstrip("%") for part in words if part]

    @property
    def attributes(self) -> str:
        """All that follows the operands."""
        return self.rest[_closing(self.rest) + 1 :]

    def called(self, *attributes: str) -> list[str]:
        """The computations that some attributes name, such as `calls=%fused` or `branch_computations={%a, %b}`."""
        found = re.findall(rf"\b(?:{'|'.join(attributes)})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return [name.strip(" %{}") for names in found for name in names.split(",")]


class Array(NamedTuple):
    """One array of a type."""

    dtype: str
    shape: tuple[int, ...]
    bits: int

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Its bytes, layout padding excluded."""
        return -(-self.size * self.bits // 8)


Computation = dict[str, Instruction]


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      header: its first line.
      computations: by name, each with its instructions by name.
      entry: the name of the computation that a run begins with.
    """

    header: str
    computations: dict[str, Computation]
    entry: str

    @property
    def num_devices(self) -> int:
        """How many devices run it together."""
        sizes = [re.search(rf"\b{name}=(\d+)", self.header) for name in ("num_partitions", "replica_count")]
        return math.prod(int(size[1]) for size in sizes if size)


def as_text(compiled: Any) -> str:
    """The text of what `jax.stages.Lowered.compile` returns; a text as it is.

    Raises:
      ValueError: it has none.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    if not text:
        raise ValueError(f"compiled: got {type(compiled).__name__} without a text, wanted jit(f).lower(...).compile()")
    return text


@functools.lru_cache(maxsize=4)
def parse(text: str) -> Program:
    """Computations and instructions of a program.

    Args:
      text: what `as_text()` of a compiled program gives, on CPU, TPU or GPU.

    Raises:
      ValueError: the text has no ENTRY computation.
    """
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    entry = ""
    for line in text.splitlines():
        if current is not None:
            if line.startswith("}"):
                current = None
            elif match := _INSTRUCTION.match(line):
                root, name, kind, op = match.groups()
                current[name] = Instruction(name, op, kind, line[match.end() :], bool(root))
        elif match := _COMPUTATION.match(line):
            current = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
    if not entry:
        raise ValueError("compiled: its text has no ENTRY computation; wanted the text of a compiled program (HLO)")
    return Program(text[: text.index("\n")], computations, entry)


def arrays(kind: str) -> list[Array]:
    """The arrays in a type such as `bf16[8,4]{1,0}`, or in a tuple of such."""
    found = []
    for letters, digits, suffix, dims in _ARRAY.findall(kind):
        shape = tuple(int(dim.lstrip("<=")) for dim in dims.split(",") if dim)
        bits = int(digits) if digits else 8 if letters == "pred" else 0  # A token has none.
        found.append(Array(letters + digits + suffix, shape, bits))
    return found


def root_of(computation: Computation) -> Instruction:
    """What a computation returns."""
    return next(x for x in computation.values() if x.is_root)


def _closing(text: str) -> int:
    """Where the parenthesis that was open before `text` closes."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    return len(text)


def _split(text: str) -> list[str]:
    """`text` cut at the commas that are in no brackets."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(r"[(){}\[\],]", text):
        if match[0] == ",":
            if not depth:
                parts.append(text[start : match.start()])
                start = match.end()
        else:
            depth += 1 if match[0] in "({[" else -1
    return [*parts, text[start:]]
