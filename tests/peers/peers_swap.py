"""The swap: optax's Adam family replaced, wherever optax holds it, by shardadam's on eight devices; calls recorded."""

import dataclasses
import functools
import sys
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh

import shardadam
from shardadam.placement import ambient_mesh

NAMES = ("adam", "adamw", "nadam", "nadamw", "scale_by_adam")


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to run the tests: the mesh, the axis that the state is split over, and the layout."""

    sizes: tuple[tuple[str, int], ...]
    axis_type: AxisType
    layout: Any

    @functools.cached_property
    def mesh(self) -> Mesh:
        names, sizes = zip(*self.sizes, strict=True)
        return jax.make_mesh(sizes, names, axis_types=(self.axis_type,) * len(names))


# The tests' parameters are small: a dim of 2 or 4 divides by two shards, hardly one by eight.
MODES = {
    "natural": Mode((("data", 2), ("model", 4)), AxisType.Explicit, "natural"),
    "packed": Mode((("data", 8),), AxisType.Auto, "packed"),
}


@dataclasses.dataclass
class Record:
    """What the swapped functions did during one test."""

    made: int = 0  # factories called
    init: int = 0
    update: int = 0
    devices: int = 0  # of the mesh that the state was planned on
    split: int = 0  # leaves planned in shards, over all calls
    whole: int = 0  # leaves planned as the parameter, because no dim divides or they are scalars
    measured: int = 0  # arrays of the state whose shards on the devices were measured


class Swap:
    """Replaces optax's functions for the life of the process; `record` is the current test's."""

    def __init__(self, mode: Mode, *, plain: str = ""):
        self.mode = mode
        self.plain = plain
        self.record = Record()

    def install(self) -> int:
        """Replaces every name, in every module of optax, that is bound to one of the functions; how many there were."""
        replacements = {id(getattr(optax, name)): self._recorded(name) for name in NAMES}
        count = 0
        for name, module in list(sys.modules.items()):
            if name != "optax" and not name.startswith("optax."):
                continue
            for attribute, value in list(vars(module).items()):
                if id(value) in replacements:
                    setattr(module, attribute, replacements[id(value)])
                    count += 1
        return count

    def _recorded(self, name: str) -> Any:
        factory = getattr(optax if self.plain else shardadam, name)

        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
            self.record.made += 1
            own = factory(*args, **kwargs)  # An argument that it refuses is refused here, as in optax.

            def placed(tree: Any) -> tuple[Any, shardadam.Plan | None]:
                if self.plain:
                    return optax.with_extra_args_support(own), None
                plan = self._plan(tree)
                return factory(*args, **kwargs | {"plan": plan}), plan  # inject_hyperparams passes plan=None

            def init_fn(params: Any) -> Any:
                tx, plan = placed(params)
                self.record.init += 1
                state = tx.init(params)
                self._measure(state, plan)
                return state

            def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
                tx, plan = placed(updates if params is None else params)
                self.record.update += 1
                updates, state = tx.update(updates, state, params, **extra)
                self._measure(state, plan)
                return updates, state

            return optax.GradientTransformationExtraArgs(init_fn, update_fn)

        return make

    def _plan(self, tree: Any) -> shardadam.Plan:
        """A plan with min_size=0 on the mode's mesh, or on the test's own where the test has made one current."""
        ambient = ambient_mesh()
        mesh, axes = self.mode.mesh, self.mode.sizes[0][0]
        if ambient is not None and ambient.axis_names != mesh.axis_names:
            mesh, axes = ambient, ambient.axis_names
        plan = shardadam.make_plan(tree, mesh, axis_name=axes, layout=self.mode.layout, min_size=0)
        self.record.devices = max(self.record.devices, mesh.size)
        for leaf in plan.leaves.values():
            if leaf.state_shape != leaf.shape or leaf.num_shards * leaf.num_parts > 1:
                self.record.split += 1
            else:
                self.record.whole += 1
        return plan

    def _measure(self, state: Any, plan: shardadam.Plan | None) -> None:
        """Counts the eager arrays of mu and nu that are in shards, each of the size that the plan says."""
        if plan is None:
            return
        for found in (optax.tree.get_all_with_path(state, "mu"), optax.tree.get_all_with_path(state, "nu")):
            for _, moments in found:
                leaves = [(k, x) for k, x in jax.tree_util.tree_leaves_with_path(moments) if _has_shards(x)]
                for keypath, x in leaves:
                    leaf = plan.leaf(shardadam.plan.path_name(keypath))
                    shapes = {shard.data.shape for shard in x.addressable_shards}
                    sizes = {int(np.prod(shape)) for shape in shapes}
                    assert len(x.sharding.device_set) == plan.mesh.size, (keypath, x.sharding)
                    assert sizes == {leaf.elements_per_device}, (keypath, sizes, leaf)
                    self.record.measured += leaf.elements_per_device < max(x.size, 1)


def _has_shards(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
