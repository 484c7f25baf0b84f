"""The cases of the comparison, the most telling ones first: topologies x models x strategies x programs."""

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
PER_AXIS = {"axes": "torus", "collective": "per_axis"}
MODELS = ("8B", "1.3B", "124M", "70B")
# name: what `cases.build` is told; those with "options" are for TPUs only, as are those along the torus.
STRATEGIES: dict[str, dict[str, Any]] = {
    "gspmd": {"strategy": "gspmd"},
    "stage 2, natural, per axis": {"strategy": "shardadam", "layout": "natural", **PER_AXIS},
    "stage 2, natural, joint": {"strategy": "shardadam", "layout": "natural"},
    "stage 2, packed, per axis": {"strategy": "shardadam", "layout": "packed", **PER_AXIS},
    "stage 2, packed, joint": {"strategy": "shardadam", "layout": "packed"},
    "stage 2, natural, joint, nd": {"strategy": "shardadam", "layout": "natural", "options": ND},
    "stage 2, packed, joint, nd": {"strategy": "shardadam", "layout": "packed", "options": ND},
    "replicated": {"strategy": "replicated"},
    "stage 1, natural, joint": {"strategy": "shardadam", "layout": "natural", "stage": 1},
    "stage 3, natural, per axis": {
        "strategy": "shardadam", "layout": "natural", **PER_AXIS, "stage": 3,
    },
    "stage 3, natural, joint": {"strategy": "shardadam", "layout": "natural", "stage": 3},
    "stage 3, packed, per axis": {
        "strategy": "shardadam", "layout": "packed", **PER_AXIS, "stage": 3,
    },
}  # fmt: skip


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
    def tensor(self) -> int:
        """Devices on the axis "model"."""
        return TOPOLOGIES[self.where][2] if self.model == "70B" else 1

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
        for where, (topology, _, _) in TOPOLOGIES.items():
            for name, told in STRATEGIES.items():
                if topology.startswith("h100") and ("options" in told or told.get("axes") == "torus"):
                    continue
                for program in ("step", "update"):
                    if program == "step" or told.get("stage") != 3:
                        yield Case(where, model, program, name)
