"""`check_replicas`: whether the devices that should hold the same bits do, by comparing digests."""

import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardadam import runtime
from shardadam.copies import copied_over, only_here
from shardadam.mixing import block_sums, natural
from shardadam.plan import path_name

_MAX_TOLD = 8  # leaves in a message


class DivergenceError(RuntimeError):
    """Devices hold different bits where they should hold the same."""


class _Copies(NamedTuple):
    """A leaf of which several devices hold copies."""

    path: str
    x: jax.Array
    sharding: NamedSharding

    @property
    def replica_axes(self) -> list[int]:
        """The dims of the mesh along which the copies lie."""
        return [self.sharding.mesh.axis_names.index(axis) for axis in copied_over(self.sharding)]


def check_replicas(state: Any) -> None:
    """Checks that what is replicated is the same on every device, to the bit: parameters, count, whole moments.

    Nothing in data-parallel training makes it so again once it is not: a device that computes wrongly, or a process
    that was started with other values, goes its own way while the loss looks well.

    Each device digests its own copies; what travels is 12 bytes per leaf and device. It reads the copies once, waits
    for the state, and leaves shards of which there is only one alone. All processes make the same call, and all raise.

    Args:
      state: any tree of arrays and numbers, such as a TrainState. Numbers and arrays that each process has for itself
        are compared between the processes.

    Raises:
      DivergenceError: names each leaf, the devices that differ from the most, and their processes.

    Example:
      >>> check_replicas(state)

    References:
      Dixit et al., Silent Data Corruptions at Scale, 2021, https://arxiv.org/abs/2102.11245
    """
    copies, own = _split(state)
    faults = _faults_of_processes(own) if own else []
    for mesh in dict.fromkeys(leaf.sharding.mesh for leaf in copies):
        on_mesh = [leaf for leaf in copies if leaf.sharding.mesh == mesh]
        sums = [_summer(leaf.sharding)(leaf.x) for leaf in on_mesh]  # All started before the first is waited for.
        assert isinstance(mesh, Mesh)  # of arrays that are there
        found = np.asarray(_gatherer(mesh)(sums))
        faults += [
            f"`{leaf.path}`: {who}"
            for leaf, of_leaf in zip(on_mesh, found, strict=True)
            if (who := _who_differs(of_leaf, mesh, leaf.replica_axes))
        ]
    if faults:
        more = [f"... and {len(faults) - _MAX_TOLD} more"] if len(faults) > _MAX_TOLD else []
        raise DivergenceError(
            "copies that should be equal are not:\n  "
            + "\n  ".join(faults[:_MAX_TOLD] + more)
            + "\nDo not save this state: go on from a checkpoint. A device that differs again is broken; a "
            "whole process that differs was given other values"
        )


def _split(state: Any) -> tuple[list[_Copies], dict[str, str]]:
    """The leaves with copies on several devices, and digests of those that every process has for itself."""
    copies, own, alone = [], {}, jax.process_count() == 1
    for keypath, x in jax.tree_util.tree_flatten_with_path(state)[0]:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if isinstance(x, jax.Array) and not only_here(x):
            if isinstance(x.sharding, NamedSharding):  # Else it is on one device.
                copies.append(_Copies(path_name(keypath), *_on_device(x, x.sharding)))
        elif not alone:
            data = np.asarray(x)
            own[path_name(keypath)] = f"{data.dtype}{data.shape}{hashlib.sha256(data.tobytes()).hexdigest()}"
    return [leaf for leaf in copies if leaf.replica_axes], own


def _on_device(x: jax.Array, sharding: NamedSharding) -> tuple[jax.Array, NamedSharding]:
    kind = next(iter(sharding.device_set)).default_memory().kind
    if sharding.memory_kind in (None, kind):
        return x, sharding
    sharding = sharding.with_memory_kind(kind)
    return jax.device_put(x, sharding), sharding


@functools.cache
def _summer(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    """x -> uint32[num_devices, 3]: the sums over what each device holds, there where it holds it."""
    mesh = sharding.mesh

    def own(block: jax.Array) -> jax.Array:
        coordinates = natural(block.shape, [0] * block.ndim, block.shape)
        return block_sums(block, np.zeros(2, np.uint32), coordinates, block.shape)[None]

    return jax.jit(jax.shard_map(own, mesh=mesh, in_specs=sharding.spec, out_specs=P(mesh.axis_names), check_vma=False))


@functools.cache
def _gatherer(mesh: Mesh) -> Callable[[list[jax.Array]], jax.Array]:
    """A list of uint32[num_devices, 3] -> uint32[leaves, num_devices, 3], on every device."""

    def gather(sums: list[jax.Array]) -> jax.Array:
        return jax.lax.all_gather(jnp.stack(sums), mesh.axis_names, axis=1, tiled=True)

    # The values are equal after an all-gather; that they vary is what is asked here.
    return jax.jit(jax.shard_map(gather, mesh=mesh, in_specs=P(mesh.axis_names), out_specs=P(), check_vma=False))


def _who_differs(sums: np.ndarray, mesh: Mesh, replica_axes: list[int]) -> str:
    """The devices of a leaf whose sums are not those of the most copies; empty where all are equal."""
    order = replica_axes + [i for i in range(mesh.devices.ndim) if i not in replica_axes]
    shape = mesh.devices.shape
    num_copies = math.prod(shape[i] for i in replica_axes)
    sums = sums.reshape(*shape, -1).transpose(*order, len(order)).reshape(num_copies, -1, sums.shape[-1])
    if (sums == sums[:1]).all():
        return ""
    devices = mesh.devices.transpose(order).reshape(num_copies, -1)
    wrong = [
        f"device {devices[copy, place].id} (process {devices[copy, place].process_index})"
        for place in range(sums.shape[1])
        for copy in _minority([tuple(x) for x in sums[:, place].tolist()])
    ]
    return _told(wrong, num_copies)


def _faults_of_processes(own: dict[str, str]) -> list[str]:
    said = [json.loads(text) for text in runtime.from_every_process("replicas", json.dumps(own))]
    wrong = {path: _minority([each.get(path) for each in said]) for path in own}
    return [f"`{path}`: {_told([f'process {i}' for i in who], len(said))}" for path, who in wrong.items() if who]


def _minority(seen: Sequence[Hashable]) -> list[int]:
    """Where values are not the most frequent one; all of them where no value is, for then nobody is right."""
    (most, times), *others = Counter(seen).most_common()
    tie = any(count == times for _, count in others)
    return [i for i, x in enumerate(seen) if tie or x != most]


def _told(who: list[str], num_copies: int) -> str:
    named = ", ".join(who[:_MAX_TOLD]) + (f" and {len(who) - _MAX_TOLD} more" if len(who) > _MAX_TOLD else "")
    return f"{named} of {num_copies} copies " + ("differ from one another" if len(who) == num_copies else "not as most")
