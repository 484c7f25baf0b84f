"""`make_train_step`: gradients as shards, clipped by their norm, applied on shards; it never waits for the host."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from shardadam.apply import apply_on_shards, global_norm, unsplit
from shardadam.communication import resolve_collective
from shardadam.gradients import value_and_grad
from shardadam.plan import Plan
from shardadam.validation import check_choice, check_max_norm, check_scale

_FP8_STATISTICS = "_overwrite_with_gradient"  # flax.linen.fp8_ops.OVERWRITE_WITH_GRADIENT: the core imports no Flax.


def make_train_step(
    loss_fn: Callable[..., Any],
    state: Any,
    *,
    num_microbatches: int = 1,
    accumulate: Literal["shards", "local"] = "shards",
    max_grad_norm: float | None = None,
    skip_nonfinite: bool | None = None,
    has_aux: bool = False,
    reduce_dtype: Any = None,
    collective: Literal["joint", "per_axis", "auto"] = "auto",
    stage: Literal[1, 2, 3] | None = None,
    loss_scale: float | Literal["dynamic"] | None = None,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A jitted, donating `step(state, batch, *args) -> (state, metrics)`.

    Args:
      loss_fn: `loss_fn(params, batch, *args)`, as for `value_and_grad`: it sees whole parameters and one device's part
        of the batch, and returns a mean, or `(sum, weight)`. The `*args`, such as a dropout key, are the same on every
        device and for every microbatch: put keys in the batch, one a row, or fold `jax.lax.axis_index(axis)` into one.
      state: a `shardadam.TrainState`, concrete or abstract: its plan, optimizer and stage are used, and which of its
        optional fields it has; not its arrays. Master weights, where it has them, are updated.
      num_microbatches: see `value_and_grad`.
      accumulate: see `value_and_grad`.
      max_grad_norm: gradients with a greater global norm are scaled down to it.
      skip_nonfinite: a step whose gradients have a NaN or an inf, on any device, or a sum of squares that overflows
        float32, changes neither params nor opt_state (so not its count); `state.step` goes on, and `state.num_skipped`,
        where the state has it, counts. The choice is made element by element as the results are written. Default: where
        the state counts skipped steps.
      has_aux: see `value_and_grad`; the aux is in the metrics, under "aux": its mean over devices and microbatches,
        unweighted also where the losses have weights.
      reduce_dtype: see `value_and_grad`.
      collective: how gradients are reduced and parameters gathered over several axes: see `value_and_grad`.
      stage: 1: gradients are reduced whole on every device, as XLA likes. 2: onto shards. 3: onto shards, and the
        parameters are at rest in shards, too, which the state has to know: `TrainState.create(..., stage=3)`. Default:
        the state's, which is 2 unless it was created otherwise.
      loss_scale: for float16: the loss is multiplied with it before the backward pass, the float32 gradients divided by
        it after. A number stays. "dynamic" is the state's (`TrainState.create(..., loss_scale="dynamic")`): it halves
        where gradients are not finite, and such a step is skipped; it doubles after 2,000 steps that were. Default:
        "dynamic" where the state has one, else none.

    Returns:
      The step. `metrics` are float32 scalars on the device: loss, grad_norm (before clipping), param_norm and
      update_norm (0 for a skipped step); skipped, 1 for a step that was; learning_rate, where the optimizer has one of
      shardadam's family, `adam` and so on, or one `optax.inject_hyperparams` with a learning_rate, alone or within
      combinators of optax's: that of this optimizer, whatever comes after it; loss_scale, where there is one. Both are
      those of this step, also of a skipped one.

    Raises:
      ValueError: a bad option, or one that the state was not created for; a state with Flax's fp8 statistics. The
        step raises it of a state with another plan or stage than it was made for, and of a bad batch or loss.

    References:
      Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, 2019 (arXiv 1910.02054).
      Pascanu et al., On the difficulty of training recurrent neural networks, 2012 (arXiv 1211.5063), section 3.2.
    """
    _check_params(state)
    stage = _check_stage(stage, state)
    dynamic = _check_loss_scale(loss_scale, state)
    check_max_norm("max_grad_norm", max_grad_norm)
    skipping = dynamic or (state.num_skipped is not None if skip_nonfinite is None else skip_nonfinite)
    plan, tx = state.plan, state.tx
    reduced = unsplit(plan, plan.leaves) if stage == 1 else plan
    differentiate = value_and_grad(
        loss_fn,
        reduced,
        stage=3 if stage == 3 else 2,
        has_aux=has_aux,
        num_microbatches=num_microbatches,
        accumulate=accumulate,
        reduce_dtype=reduce_dtype,
        collective=collective,
    )
    apply = functools.partial(
        apply_on_shards,
        tx=tx,
        plan=plan,
        scattered=stage != 1,
        at_rest=stage == 3,
        measure=True,
        collective=resolve_collective(collective, plan.mesh, plan.axis_names),
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, batch: Any, *args: Any) -> tuple[Any, dict[str, Any]]:
        _check_state(state, plan, stage, dynamic)
        scale = state.loss_scale.scale if dynamic else loss_scale
        loss, grads = differentiate(state.params, batch, *args, loss_scale=scale)
        loss, aux = loss if has_aux else (loss, None)
        grad_norm = global_norm(grads, reduced)
        finite = jnp.isfinite(grad_norm)
        if max_grad_norm is not None:
            factor = max_grad_norm / jnp.maximum(grad_norm, max_grad_norm)
            grads = jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)
        done = apply(grads, state.opt_state, state.params, master=state.master, keep=finite if skipping else None)
        skipped = 1 - finite.astype(jnp.int32) if skipping else jnp.zeros([], jnp.int32)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            **done.metrics,
            "skipped": skipped.astype(jnp.float32),
            **({} if scale is None else {"loss_scale": jnp.asarray(scale, jnp.float32)}),
            **({"aux": aux} if has_aux else {}),
        }
        changed = {"params": done.params, "opt_state": done.opt_state, "master": done.master}
        if state.num_skipped is not None:
            changed["num_skipped"] = state.num_skipped + skipped
        if dynamic:
            changed["loss_scale"] = state.loss_scale.adjusted(finite)
        return state.replace(step=state.step + 1, **changed), metrics

    return step


def _check_params(state: Any) -> None:
    """Refuses the fp8 statistics that Flax keeps beside the parameters, before they miss in the plan."""
    if isinstance(state.params, Mapping) and _FP8_STATISTICS in state.params:
        raise ValueError(
            f"state: got params with Flax's fp8 statistics ({_FP8_STATISTICS!r}), wanted trained parameters alone: "
            "each device would make its own statistics of its part of the batch; take jax.grad of the loss over the "
            "whole batch and state.apply_gradients(grads=grads)"
        )


def _check_state(state: Any, plan: Plan, stage: int, dynamic: bool) -> None:
    """Refuses a state of another kind than the step was made for: it would be moved to where that one's lies."""
    if _places(state.plan) != _places(plan):
        got = "another plan"
    elif (state.stage == 3) != (stage == 3):
        got = f"stage={state.stage}"
    elif dynamic and state.loss_scale is None:
        got = "no loss_scale"
    else:
        return
    raise ValueError(
        f"state: got one with {got}, wanted one like the state that this step was made with, stage={stage} and "
        f"{'a dynamic' if dynamic else 'no dynamic'} loss_scale; make_train_step makes a step for the other"
    )


def _places(plan: Plan) -> Any:
    """Where a plan has everything, whatever the devices: a plan of an abstract state may have none."""
    return plan.items, plan.axis_names, tuple(plan.mesh.shape.items())


def _check_stage(stage: Any, state: Any) -> Literal[1, 2, 3]:
    """The stage to take, refused where the state's parameters do not lie as it has them."""
    stage = state.stage if stage is None else stage
    check_choice("stage", stage, (1, 2, 3))
    if (stage == 3) != (state.stage == 3):
        raise ValueError(
            f"stage: got {stage}, and the state was created for stage {state.stage}: its parameters are "
            f"{'in shards' if state.stage == 3 else 'whole'}; create it with TrainState.create(..., stage={stage})"
        )
    return stage


def _check_loss_scale(loss_scale: Any, state: Any) -> bool:
    """Whether the loss scale is the state's own, dynamic one."""
    if loss_scale is None:
        return state.loss_scale is not None
    check_scale("loss_scale", loss_scale)
    if loss_scale == "dynamic":
        if state.loss_scale is None:
            raise ValueError(
                "loss_scale: got 'dynamic', and the state has none to change; create it with "
                "TrainState.create(..., loss_scale='dynamic')"
            )
        return True
    return False
