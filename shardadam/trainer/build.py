"""From a config to what it trains: the plan, the sharded state at step 0, the jitted step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike

import shardadam
from shardadam.plan import path_name
from shardadam.sharding import map_leaves
from shardadam.trainer import model
from shardadam.trainer.config import OptimizerConfig, StepConfig, TrainConfig
from shardadam.trainer.data import Batch
from shardadam.trainer.devices import planned_mesh


def plan_for(config: TrainConfig, mesh: Mesh | None = None) -> shardadam.Plan:
    """The plan of a config's model: on a mesh of devices, or from the mesh's numbers alone. Allocates nothing."""
    sizes = planned_mesh(config) if mesh is None else mesh
    params = model.abstract_params(model.Transformer(config.model))
    return shardadam.make_plan(
        params,
        sizes,
        axis_name="data",
        param_specs=model.param_specs(params, sizes),
        stacked_dims=model.stacked_dims(params),
        layout=config.optimizer.layout,
        min_size=config.optimizer.min_size,
    )


def learning_rate_schedule(config: OptimizerConfig) -> Callable[[ArrayLike], jax.Array]:
    """Linear warmup, a cosine, then level at `end_fraction`. It knows nothing of the run's number of steps.

    Not optax.warmup_cosine_decay_schedule, which JAX's strict dtype promotion refuses.
    """
    peak, end = config.learning_rate, config.learning_rate * config.end_fraction
    warmup, decay = config.warmup_steps, config.decay_steps

    def schedule(count: ArrayLike) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        rising = peak * (step + 1) / (warmup + 1)  # not from 0, which would make the first step a no-op
        done = jnp.clip((step - warmup) / (decay - warmup), 0.0, 1.0)
        falling = end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        return jnp.where(step < warmup, rising, falling)

    return schedule


def create_state(config: TrainConfig, mesh: Mesh) -> shardadam.TrainState:
    """The state at step 0, every array made where it lives: nothing is whole on a device that the plan splits."""
    plan, net, o = plan_for(config, mesh), model.Transformer(config.model), config.optimizer
    shardings = jax.tree_util.tree_map_with_path(
        lambda path, _: NamedSharding(mesh, plan.leaf(path_name(path)).param_spec), model.abstract_params(net)
    )
    init = jax.jit(lambda seed: model.init_params(net, jax.random.key(seed)), out_shardings=shardings)
    tx = shardadam.adamw(
        learning_rate_schedule(o), o.b1, o.b2, o.eps, 0.0, o.mu_dtype, o.weight_decay, model.decay_mask, plan=plan
    )
    step = config.train_step
    return shardadam.TrainState.create(
        apply_fn=net.apply,
        params=init(config.seed),
        tx=tx,
        plan=plan,
        stage=step.stage,
        master_dtype=step.master_dtype,
        loss_scale="dynamic" if step.loss_scale == "dynamic" else None,
        skip_nonfinite=step.skip_nonfinite,
    )


def state_bytes(state: shardadam.TrainState) -> tuple[int, int]:
    """Bytes of mu, nu, count and masters on each device: as they lie, and as they would if they followed the params."""
    trees = [optax.tree.get(state.opt_state, name) for name in ("mu", "nu")] + [state.master]
    lying = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(trees))
    followed = [
        map_leaves(lambda leaf, x, path: leaf.size // leaf.num_parts * x.dtype.itemsize, tree, state.plan)
        for tree in trees
        if tree is not None
    ]
    return 4 + lying, 4 + sum(jax.tree.leaves(followed))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(Sum of the cross-entropy in nats, number of targets), over the targets that are scored."""
    scored = targets >= 0
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return jnp.sum(jnp.where(scored, each, 0.0)), jnp.sum(scored, dtype=jnp.int32)


def loss_function(apply_fn: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(params, batch) -> what `cross_entropy` has of the model's logits."""

    def loss_fn(params: Any, batch: Batch[jax.Array]) -> tuple[jax.Array, jax.Array]:
        return cross_entropy(apply_fn({"params": params}, batch.inputs), batch.targets)

    return loss_fn


def make_train_step(
    config: StepConfig, state: shardadam.TrainState
) -> Callable[..., tuple[shardadam.TrainState, dict[str, jax.Array]]]:
    """A jitted (state, batch) -> (state, metrics) that reuses the state's memory."""
    return shardadam.make_train_step(
        loss_function(state.apply_fn),
        state,
        stage=config.stage,
        num_microbatches=config.num_microbatches,
        accumulate=config.accumulate,
        max_grad_norm=config.max_grad_norm,
        skip_nonfinite=config.skip_nonfinite,
        reduce_dtype=config.reduce_dtype,
        collective=config.collective,
        loss_scale=config.loss_scale,
    )
