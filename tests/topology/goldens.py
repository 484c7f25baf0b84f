"""The small cases whose collectives, bytes and memory are held equal to what tests/goldens has; run, it renews them."""

import gzip
import json
import os
import sys
from pathlib import Path
from unittest import mock

from shardadam.topology import compile_for

HERE = Path(__file__).parent
GOLDENS = HERE.parent / "goldens"
TEXTS = HERE.parent / "hlo" / "texts"
PROGRAMS = HERE / "programs.py"
# float32 masters of bfloat16 parameters, two microbatches accumulated as shards, clipped; a step may be skipped.
FULL = {"master_dtype": "float32", "num_microbatches": 2, "max_grad_norm": 1.0, "skip_nonfinite": True}
ND = "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter"

# name: (topology, slices, builder, its kwargs, compiler options)
CASES = {
    "tpu": {
        "v5e plain collectives": ("v5e:4x4", 1, "plain_collectives", {}, {}),
        "v5e step joint": ("v5e:4x4", 1, "train_step", {}, {}),
        "v5e step per axis": ("v5e:4x4", 1, "train_step", {"per_axis": True}, {}),
        "v5e step joint nd": ("v5e:4x4", 1, "train_step", {}, {ND: True}),
        "v5e optax": ("v5e:4x4", 1, "optax_step", {}, {}),
        "v5p step joint": ("v5p:2x2x4", 1, "train_step", {}, {}),
        "v5p step per axis": ("v5p:2x2x4", 1, "train_step", {"per_axis": True}, {}),
        "v5p step per axis, stage 3": ("v5p:2x2x4", 1, "train_step", {"per_axis": True, "stage": 3}, {}),
        "v5p step per axis, all options": ("v5p:2x2x4", 1, "train_step", {"per_axis": True, **FULL}, {}),
        "v6e step per axis": ("v6e:4x4", 1, "train_step", {"per_axis": True}, {}),
        "tpu7x step per axis": ("tpu7x:2x2x2", 1, "train_step", {"per_axis": True}, {}),
        "2 slices of v5e": ("v5e:4x4", 2, "train_step", {"per_axis": True}, {}),
    },
    "gpu": {
        "h100 plain collectives": ("h100:1x1x8", 1, "plain_collectives", {}, {}),
        "h100 step joint": ("h100:1x1x8", 1, "train_step", {}, {}),
        "h100 optax": ("h100:1x2x8", 1, "optax_step", {}, {}),
        "h100 step stage 1": ("h100:1x2x8", 1, "train_step", {"stage": 1}, {}),
        "h100 step stage 3": ("h100:1x2x8", 1, "train_step", {"stage": 3}, {}),
        "h100 step, all options": ("h100:1x2x8", 1, "train_step", FULL, {}),
    },
}
# The texts that are kept whole, for the tests of shardadam.hlo to read without a compiler.
KEPT = (
    "tpu7x step per axis",
    "v5e plain collectives",
    "v5e step joint",
    "v5e step per axis",
    "h100 plain collectives",
    "h100 step joint",
)


def compiled(platform, name, **options):
    topology, num_slices, function, kwargs, compiler_options = CASES[platform][name]
    with mock.patch.dict(os.environ):
        os.environ.pop("JAX_NUMPY_DTYPE_PROMOTION", None)  # The tests' is strict, which optax is not.
        return compile_for(
            topology,
            f"{PROGRAMS}:{function}",
            kwargs=kwargs,
            num_slices=num_slices,
            compiler_options=compiler_options,
            **options,
        )


def record(found):
    """What is held equal: all but names and times."""
    ops = [
        f"{op.times} x {'async ' if op.is_async else ''}{op.op} of {' '.join(op.dtypes)} {op.operand_bytes:,} bytes, "
        f"{op.wire_bytes:,} on the wire, {len(op.groups)} groups of {op.group_size}{', in a loop' if op.loop else ''}"
        for op in found.collectives
    ]
    memory = {**found.memory._asdict(), "not_donated": list(found.memory.not_donated)}
    return {"num_devices": found.num_devices, "memory": memory, "collectives": sorted(ops)}


def text_path(name):
    return TEXTS / f"{name.replace(' ', '_')}.txt.gz"


def renew(platform, texts):
    GOLDENS.mkdir(exist_ok=True)
    TEXTS.mkdir(exist_ok=True)
    cases = {}
    for name in CASES[platform]:
        found = compiled(platform, name)
        print(f"{name}: {found.seconds:.1f} s", flush=True)
        cases[name] = record(found)
        if texts and name in KEPT:
            text_path(name).write_bytes(gzip.compress(found.text.encode(), mtime=0))
    golden = {"versions": found.versions, "cases": cases}
    (GOLDENS / f"{platform}.json").write_text(json.dumps(golden, indent=1) + "\n")
    pins = [f"{name}=={version}" for name, version in found.versions.items()]
    (GOLDENS / f"{platform}.txt").write_text("\n".join(pins) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] not in (["tpu"], ["gpu"]) or sys.argv[2:] not in ([], ["--texts"]):
        sys.exit("goldens: say which, tpu or gpu; and --texts to renew the kept texts as well")
    renew(sys.argv[1], texts=sys.argv[2:] == ["--texts"])
