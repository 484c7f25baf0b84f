"""`estimate_bytes`: what a plan costs each device, in memory and on the wire, from shapes alone."""

import math
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from shardadam.layout import LeafPlan, entries
from shardadam.plan import Plan


class Estimate(NamedTuple):
    """Bytes on each device.

    Attributes:
      param_bytes: of the parameters between steps.
      grad_bytes: of the gradients that reach the optimizer, in float32 as `value_and_grad` returns them.
      state_bytes: of mu, nu, count and masters.
      reduce_bytes: sent to reduce the gradients once.
      gather_bytes: sent to gather the parameters in one step.
    """

    param_bytes: int
    grad_bytes: int
    state_bytes: int
    reduce_bytes: int
    gather_bytes: int

    @property
    def wire_bytes(self) -> int:
        """All that one device sends in a step."""
        return self.reduce_bytes + self.gather_bytes


def estimate_bytes(
    plan: Plan,
    *,
    stage: Literal[1, 2, 3] = 2,
    reduce_dtype: Any = None,
    mu_dtype: Any = None,
    master_dtype: Any = None,
    padding: bool = True,
) -> Estimate:
    r"""What one step costs each device, if every collective is the one the stage asks for.

    Of a leaf whose part on one device has b bytes, split over n devices, one device sends by the ring algorithms::

        stage 1    2 (n - 1) / n b  to all-reduce the gradient    (n - 1) / n b  to gather the new parameter
        stage 2      (n - 1) / n b  to reduce-scatter it          (n - 1) / n b
        stage 3      (n - 1) / n b                              2 (n - 1) / n b  in the forward and the backward pass

    Leaves that stay whole are all-reduced, and need no gathering.

    Args:
      plan: of the parameters.
      stage: as for `make_train_step`.
      reduce_dtype: what gradients are reduced in; default: each leaf's own dtype.
      mu_dtype: what mu is held in; default: what nu is held in, which is each leaf's own dtype or the masters'.
      master_dtype: of the masters of narrower parameters; default: there are none.
      padding: whether to count what packed leaves are padded with; without it, this is the least that any layout needs.

    Returns:
      An `Estimate`.

    Raises:
      ValueError: a stage that is not 1, 2 or 3.

    Example:
      >>> plan = make_plan({"kernel": jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16)}, {"data": 8})
      >>> found = estimate_bytes(plan, mu_dtype=jnp.float32)
      >>> found.param_bytes, found.grad_bytes, found.reduce_bytes, found.gather_bytes
      (8388608, 2097152, 7340032, 7340032)

    References:
      Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, 2019 (arXiv 1910.02054),
      section 7.
    """
    if stage not in (1, 2, 3):
        raise ValueError(f"stage: got {stage!r}, wanted 1, 2 or 3")
    params = grads = reduced = gathered = 0
    for leaf in plan.leaves.values():
        width = leaf.dtype.itemsize
        reduced_width = width if reduce_dtype is None else jnp.dtype(reduce_dtype).itemsize
        whole, shard = _part_size(leaf), leaf.elements_per_device
        moved = shard * leaf.num_shards if padding else whole
        params += (shard if stage == 3 else whole) * width
        grads += (whole if stage == 1 else shard) * max(width, 4)
        n = num_copies(leaf, plan)
        if stage == 1 or leaf.num_shards == 1:
            reduced += 2 * (n - 1) * whole * reduced_width // n
        else:
            reduced += (n - 1) * moved * reduced_width // n
        if leaf.num_shards > 1:
            gathered += (2 if stage == 3 else 1) * (n - 1) * moved * width // n
    return Estimate(params, grads, plan.state_bytes_per_device(mu_dtype, master_dtype), reduced, gathered)


def num_copies(leaf: LeafPlan, plan: Plan) -> int:
    """On how many devices of the plan's axes the same part of a parameter is: over these its gradient is summed."""
    used = {axis for axes in entries(leaf.param_spec, len(leaf.shape)) for axis in axes}
    return math.prod(plan.mesh.shape[axis] for axis in plan.axis_names if axis not in used)


def _part_size(leaf: LeafPlan) -> int:
    """Elements of a parameter on one device, as its own spec has it."""
    return leaf.size // (leaf.num_parts * leaf.stack_parts)
