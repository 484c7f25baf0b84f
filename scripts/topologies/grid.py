"""The cases of the comparison: topologies x models x strategies x programs, as many as inform.

All of them would be 764, and a large step takes the TPU compiler minutes. So:

- every topology and model has what users choose between: replicated optax, optax under GSPMD, and of this project
  stages 2 and 3 as "auto" does them, and stage 1;
- the other layouts, joint collectives on TPUs and the compiler option are compared on four topologies (a 3-D torus, a
  2-D one, two of them, and GPUs), with the models of 8B and 1.3B parameters: they act on each leaf for itself, and the
  leaves of other models are no different;
- 70B with a tensor axis, and 8,960 devices, are there to see that the best strategy holds: that and GSPMD;
- what cannot fit by arithmetic (parameters, moments and whole gradients exceed the memory) is not compiled.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

ND = {"xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": True}

# name: (topology, slices, devices on the axis "model" of a model that needs one)
TOPOLOGIES = {
    "v5p-256": ("v5p:4x8x8", 1, 8),
    "v5e-256": ("v5e:16x16", 1, 16),
    "h100-64": ("h100:1x8x8", 1, 8),
    "v6e-256": ("v6e:16x16", 1, 16),
    "v5p-64": ("v5p:4x4x4", 1, 4),
    "2 x v5e-256": ("v5e:16x16", 2, 16),
    "h100-256": ("h100:1x32x8", 1, 8),
    "v5p-1024": ("v5p:8x8x16", 1, 8),
    "h100-8": ("h100:1x1x8", 1, 8),
    "h100-1024": ("h100:1x128x8", 1, 8),
    "v5p-8960": ("v5p:16x20x28", 1, 4),
}
# GiB on a device, as the compilers have it.
MEMORY = {"v5p": 95.74, "v5e": 15.75, "v6e": 31.25, "h100": 79.11}
PER_AXIS = {"axes": "torus", "collective": "per_axis"}
MODELS = ("8B", "1.3B", "124M", "70B")
# name: what `cases.build` is told; those with "options" are for TPUs only, as are those along the torus.
STRATEGIES: dict[str, dict[str, Any]] = {
    "gspmd": {"strategy": "gspmd", "layout": "natural"},
    "stage 2, auto, per axis": {"strategy": "shardadam", "layout": "auto", **PER_AXIS},
    "stage 2, auto, joint": {"strategy": "shardadam", "layout": "auto"},
    "stage 2, packed, per axis": {"strategy": "shardadam", "layout": "packed", **PER_AXIS},
    "stage 2, packed, joint": {"strategy": "shardadam", "layout": "packed"},
    "stage 2, auto, joint, nd": {"strategy": "shardadam", "layout": "auto", "options": ND},
    "stage 2, packed, joint, nd": {"strategy": "shardadam", "layout": "packed", "options": ND},
    "replicated": {"strategy": "replicated"},
    "stage 1, auto, joint": {"strategy": "shardadam", "layout": "auto", "stage": 1},
    "stage 3, auto, per axis": {"strategy": "shardadam", "layout": "auto", **PER_AXIS, "stage": 3},
    "stage 3, auto, joint": {"strategy": "shardadam", "layout": "auto", "stage": 3},
    "stage 3, packed, per axis": {"strategy": "shardadam", "layout": "packed", **PER_AXIS, "stage": 3},
}
IN_FULL = {"where": ("v5p-256", "v5e-256", "2 x v5e-256", "h100-64"), "model": ("8B", "1.3B")}


class Case(NamedTuple):
    """One compilation."""

    where: str
    model: str
    program: str
    name: str

    @property
    def key(self) -> str:
        """What `--only` looks in, and the JSON file is keyed by."""
        return f"{self.where} | {self.model} | {self.program} | {self.name}"

    @property
    def chip(self) -> str:
        """Such as "v5p"."""
        return TOPOLOGIES[self.where][0].partition(":")[0]

    @property
    def tensor(self) -> int:
        """Devices on the axis "model"."""
        return TOPOLOGIES[self.where][2] if self.model == "70B" else 1

    @property
    def stage(self) -> int:
        """Of `make_train_step`; optax's step has all of stage 1's parameters and, replicated, of its moments."""
        return STRATEGIES[self.name].get("stage", 2)

    @property
    def kwargs(self) -> dict[str, Any]:
        """For `cases.build`."""
        rest = {key: value for key, value in STRATEGIES[self.name].items() if key != "options"}
        return {"model": self.model, "program": self.program, "tensor": self.tensor, **rest}

    @property
    def options(self) -> dict[str, Any]:
        """For the compiler."""
        return STRATEGIES[self.name].get("options", {})


def all_cases() -> Iterator[Case]:
    """In the order they are run."""
    for model in MODELS:
        for where in TOPOLOGIES:
            if (where, model) != ("h100-8", "70B"):  # All 8 devices hold one copy: nothing is data parallel.
                for name in strategies(where, model):
                    for program in ("step", "update"):
                        if program == "step" or STRATEGIES[name].get("stage", 2) == 2:
                            yield Case(where, model, program, name)


def strategies(where: str, model: str) -> list[str]:
    """Those that inform, see above."""
    gpu = where.startswith("h100")
    best = "joint" if gpu else "per axis"
    if model == "70B" or where == "v5p-8960":
        return ["gspmd", f"stage 2, auto, {best}"]
    if where in IN_FULL["where"] and model in IN_FULL["model"]:
        return [name for name, told in STRATEGIES.items() if not gpu or not {"options", "axes"} & set(told)]
    return ["gspmd", f"stage 2, auto, {best}", "replicated", "stage 1, auto, joint", f"stage 3, auto, {best}"]
