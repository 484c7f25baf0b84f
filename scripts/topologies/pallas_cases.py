"""The experiment "pallas": Adam on one device's block as a kernel by hand, and as XLA fuses it, for four TPUs."""

import math
import re
from pathlib import Path
from typing import Any

from pallas_adam import BLOCK, compare_with_optax

from shardadam.hlo.program import Computation, Instruction, arrays, parse
from shardadam.topology import Compilation

BUILD = f"{Path(__file__).with_name('pallas_adam.py')}:build"
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
WIDTH = {"bfloat16": 2, "float32": 4}
SHAPE = (4096, 4096)
ODD = (501, 4096)  # A device's rows of Llama 3's embedding on 256: no whole tiles.
LARGE = (16384, 4096)  # More than VMEM holds.
NOTHING = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
SMALL = 2**16  # Bytes: what handles less is scalars.
HEAD = "| chip | gradient | block | kernel | kernels | MiB moved | x ideal | temp bytes | donated | compile s |"
RULE = "| --- | --- | --- | --- | --: | --: | --: | --: | --- | --: |"
INTRO = """# Adam as a Pallas kernel, against XLA's own

{versions}. Nothing was run on a TPU. Written by `./scripts/bench_experiments pallas`.

One leaf in shards, gradient and parameter too, so that nothing is sent: what a device does with its own block between
the collectives. Parameters in bfloat16, moments in float32, parameters and state donated. *xla* is this package's
update. *pallas* is a kernel by hand with the same maths (`scripts/topologies/pallas_adam.py`: parameter, gradient, mu
and nu in, parameter, mu and nu out and over the old ones, {rows} x {columns} at a time), compiled by Mosaic. *clipped*:
the gradient is multiplied by a factor first, as it is where its norm is clipped or the loss was scaled; *unbarred* is
xla without this package's barrier between the two, which is there for XLA:CPU (`shardadam/update.py`).

- *kernels*: those of the program that handle more than scalars. *MiB moved*: their operands and results that are in
  HBM, from the program's text; each is read or written once within a kernel. (The compiler's own cost analysis counts
  nothing of a Pallas call.) *x ideal*: over one reading of parameter, gradient, mu and nu, and one writing of
  parameter, mu and nu.
- *temp bytes*: beside arguments and results. *donated*: whether all that is donated is written over.
"""
INTERPRETED = """## In TPU interpret mode, on CPU

Against jitted `optax.adam`, three steps from the same numbers, a leaf of (512, 2048) in blocks of (128, 1024), with
races looked for and memory that nobody wrote NaN: floats between the two, at most.

| parameter | gradient | param | mu | nu |
| --- | --- | --: | --: | --: |
"""


def cases() -> dict[str, dict[str, Any]]:
    """By key, what `compile_for` is told; of those in interpret mode, what `compare_with_optax` is."""
    found = {}
    for chip, topology in CHIPS.items():

        def case(kernel: str, grad: str, topology: str = topology, **told: Any) -> dict[str, Any]:
            return {"topology": topology, "build": BUILD, "kwargs": {"kernel": kernel, "grad_dtype": grad, **told}}

        for kernel in ("xla", "pallas"):
            for grad in WIDTH:
                found[f"{chip} | {grad} | {SHAPE} | {kernel}"] = case(kernel, grad)
            found[f"{chip} | bfloat16 | {ODD} | {kernel}"] = case(kernel, "bfloat16", shape=ODD)
        for kernel in ("xla", "pallas", "unbarred"):
            key = f"{chip} | bfloat16, clipped | {LARGE} | {kernel}"
            found[key] = case(kernel, "bfloat16", shape=LARGE, clipped=True)
        for rows in (128, 512, 1024):
            found[f"{chip} | {rows} rows"] = case("pallas", "bfloat16", block=(rows, BLOCK[1]))
    for param, grad in (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")):
        told = {"param_dtype": param, "grad_dtype": grad, "shape": (512, 2048), "block": (128, 1024)}
        found[f"interpreted | {param} | {grad}"] = told
    return found


def also(case: dict[str, Any]) -> dict[str, Any]:
    """By how many units in the last place the kernel, interpreted, and optax are apart."""
    return {"ulps": compare_with_optax(**case)}


def read(case: dict[str, Any], found: Compilation) -> dict[str, Any]:
    """The columns."""
    moved = kernels(found.text)
    return {
        "kernels": len(moved),
        "moved_bytes": sum(moved.values()),
        "ideal_bytes": ideal_bytes(**case["kwargs"]),
        "temp_bytes": found.memory.temp_bytes,
        "not_donated": list(found.memory.not_donated),
        "collectives": len(found.collectives),
    }


def kernels(text: str) -> dict[str, int]:
    """Of a program without loops: what it runs on more than scalars, with the bytes it reads and writes in HBM."""
    program = parse(text)
    entry = program.computations[program.entry]
    moved = {name: moved_bytes(ins, entry) for name, ins in entry.items() if ins.op not in NOTHING}
    return {name: total for name, total in moved.items() if total > SMALL}


def moved_bytes(ins: Instruction, entry: Computation) -> int:
    """Operands and results in HBM; what is begun in the background is counted where it begins."""
    if ins.op.endswith("-done"):
        return 0
    made = in_hbm(ins.type)
    made = made[:1] if ins.op.endswith("-start") else made  # A tuple of result, operand and semaphore.
    read = [size for operand in ins.operands for size in in_hbm(entry[operand].type)]
    return sum(made) + sum(read)


def in_hbm(kind: str) -> list[int]:
    """The bytes of a type's arrays; 0 for those that are in another memory, which a layout says: S(1) is VMEM."""
    whole = re.findall(r"\w+\[[^\]]*\](?:\{[^}]*\})?", kind)
    return [0 if "S(" in text else sum(x.num_bytes for x in arrays(text)) for text in whole]


def ideal_bytes(*, grad_dtype: str, shape: tuple[int, int] = SHAPE, **_: Any) -> int:
    """Parameter and moments read and written, the gradient read."""
    return math.prod(shape) * (2 * (WIDTH["bfloat16"] + 2 * WIDTH["float32"]) + WIDTH[grad_dtype])


def page(results: dict[str, Any], versions: str) -> str:
    """Its tables."""
    compared = {key: found for key, found in results.items() if "ideal_bytes" in found and "rows" not in key}
    parts = [
        INTRO.format(versions=versions, rows=BLOCK[0], columns=BLOCK[1]),
        "\n".join([HEAD, RULE, *(row(key, found) for key, found in compared.items())]),
        "## Blocks that fit",
        "Rows of 1,024 elements that are in VMEM at once, of the gradient in bfloat16.",
        "\n".join(fits(results)),
        INTERPRETED + "\n".join(interpreted(results)),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def row(key: str, found: dict[str, Any]) -> str:
    """One compilation."""
    numbers = [found["kernels"], f"{found['moved_bytes'] / 2**20:.1f}"]
    numbers += [f"{found['moved_bytes'] / found['ideal_bytes']:.3f}", found["temp_bytes"]]
    donated = "not " + ", ".join(found["not_donated"]) if found["not_donated"] else "all"
    return f"| {key} | {' | '.join(map(str, numbers))} | {donated} | {found['compile_seconds']} |"


def fits(results: dict[str, Any]) -> list[str]:
    """For each chip, which heights of a block Mosaic takes."""
    heights = (128, *BLOCK[:1], 512, 1024)
    lines = ["| chip | " + " | ".join(map(str, heights)) + " |", "| --- |" + " --- |" * len(heights)]
    for chip in CHIPS:
        keys = [f"{chip} | {rows} rows" for rows in heights]
        keys[1] = f"{chip} | bfloat16 | {SHAPE} | pallas"
        said = ["-" if key not in results else refusal(results[key].get("error")) for key in keys]
        lines.append(f"| {chip} | " + " | ".join(said) + " |")
    return lines


def refusal(error: str | None) -> str:
    """In a word or two."""
    if error is None:
        return "yes"
    return "no: more than VMEM" if "vmem" in error.lower() else f"no: {error}"


def interpreted(results: dict[str, Any]) -> list[str]:
    """The rows of what was interpreted."""
    rows = [(key.split(" | "), found["ulps"]) for key, found in results.items() if "ulps" in found]
    return [f"| {param} | {grad} | {' | '.join(map(str, ulps.values()))} |" for (_, param, grad), ulps in rows]
