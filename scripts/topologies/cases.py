"""Builds one case of the comparison for `compile_for`: a model, a strategy, the update alone or a whole step."""

import functools
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shardadam
from shardadam.apply import apply_on_shards
from shardadam.blocks import block_spec, block_to_state, scatter_leaf
from shardadam.gradients import region_of
from shardadam.sharding import map_leaves
from shardadam.topology import Target

sys.path.insert(0, str(Path(__file__).parent))
from models import MODELS, abstract_params, loss_of, stacked_dims, tensor_specs


def build(
    target: Target,
    *,
    model: str,
    program: str,
    strategy: str,
    layout: str = "auto",
    axes: str = "one",
    collective: str = "joint",
    stage: int = 2,
    tensor: int = 1,
) -> Any:
    """(step, *abstract arguments).

    Args:
      target: what to compile for.
      model: a name in `MODELS`.
      program: "update": gradients of each device are reduced, and applied. "step": they are computed, too.
      strategy: "replicated" is optax, "gspmd" is optax with moments that are sharded, "shardadam" this project.
      layout: of the plan.
      axes: "one" mesh axis for all devices, or those of the "torus".
      collective: "joint" or "per_axis".
      stage: of `make_train_step`.
      tensor: devices on the axis "model".
    """
    mesh = mesh_for(target, axes, tensor)
    data = tuple(axis for axis in mesh.axis_names if axis != "model")
    plan = shardadam.make_plan(
        abstract_params(model),
        mesh,
        axis_name=data,
        layout=layout,
        stacked_dims=stacked_dims(model),
        param_specs=tensor_specs(model) if tensor > 1 else None,
    )
    tx = optax.adam(1e-3) if strategy != "shardadam" else shardadam.adam(1e-3, plan=plan)
    state = abstract_state(model, plan, tx, sharded=strategy != "replicated", stage=stage)
    copies = math.prod(mesh.shape[axis] for axis in data)
    if program == "step":
        tokens = jax.ShapeDtypeStruct((copies, MODELS[model].seq_len), jnp.int32, sharding=NamedSharding(mesh, P(data)))
        if strategy != "shardadam":
            return plain_step(loss_of(model), state, tx), state, tokens
        return (
            shardadam.make_train_step(loss_of(model), state, stage=stage, collective=collective),
            state,
            tokens,
        )
    grads = map_leaves(lambda leaf, x, path: stacked_gradient(leaf, x, data, mesh), abstract_params(model), plan)
    if strategy != "shardadam":
        return plain_update(state, tx), state, grads
    return sharded_update(state, tx, data, collective, stage), state, grads


def mesh_for(target: Target, axes: str, tensor: int) -> Any:
    """The devices, those of a tensor-parallel group next to each other."""
    if tensor == 1:
        return target.mesh(target.torus() if axes == "torus" else "data")
    sizes = dict(target.torus()) if axes == "torus" else {"data": len(target.devices)}
    *_, last = sizes
    if sizes[last] % tensor:
        raise ValueError(f"tensor: got {tensor}, and the axis {last!r} has {sizes[last]} devices")
    sizes[last] //= tensor
    return target.mesh({**{axis: size for axis, size in sizes.items() if size > 1}, "model": tensor})


def abstract_state(model: str, plan: Any, tx: Any, *, sharded: bool, stage: int) -> shardadam.TrainState:
    """A TrainState of shapes, with float32 moments: whole ones where they are not `sharded`."""
    mesh = plan.mesh

    def moment(leaf: Any, x: Any, path: str) -> Any:
        natural = x.shape == leaf.shape
        spec = leaf.param_spec if not sharded else leaf.state_spec if natural else P()
        return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    state = created(abstract_params(model), plan, tx, stage)
    if isinstance(tx, shardadam.transformation.ShardedTransformation):
        return placed(state)
    whole = NamedSharding(mesh, P())
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), state)
    params = map_leaves(
        lambda leaf, x, path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, leaf.param_spec)),
        state.params,
        plan,
    )
    adam = state.opt_state[0]
    adam = adam._replace(mu=map_leaves(moment, adam.mu, plan), nu=map_leaves(moment, adam.nu, plan))
    return state.replace(params=params, opt_state=(adam, *state.opt_state[1:]))


def created(params: Any, plan: Any, tx: Any, stage: int = 2) -> shardadam.TrainState:
    """A TrainState of shapes."""
    at_rest = {"stage": 3} if stage == 3 else {}
    create = functools.partial(shardadam.TrainState.create, apply_fn=None, tx=tx, plan=plan, **at_rest)
    return jax.eval_shape(lambda params: create(params=params), params)


def placed(state: shardadam.TrainState) -> shardadam.TrainState:
    """This project's state where its plan has it, with float32 moments."""
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, state.shardings)
    adam = state.opt_state[0]
    wide = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding))
    return state.replace(opt_state=(adam._replace(mu=wide(adam.mu), nu=wide(adam.nu)), *state.opt_state[1:]))


def stacked_gradient(leaf: Any, x: Any, data: tuple[str, ...], mesh: Any) -> Any:
    """Every device's own gradient of a leaf, as one array with a leading dim for the devices."""
    copies = math.prod(mesh.shape[axis] for axis in data)
    spec = P(data, *leaf.param_spec)
    return jax.ShapeDtypeStruct((copies, *leaf.shape), x.dtype, sharding=NamedSharding(mesh, spec))


def plain_update(state: Any, tx: Any) -> Any:
    """Optax under jit: XLA places the collectives."""

    def update(state: Any, grads: Any) -> Any:
        summed = jax.tree.map(lambda g: jnp.sum(g, 0, dtype=g.dtype), grads)
        return optax_applied(state, tx, summed)

    return jax.jit(update, donate_argnums=0, out_shardings=jax.tree.map(lambda x: x.sharding, state))


def plain_step(loss_fn: Any, state: Any, tx: Any) -> Any:
    """The whole step with optax under jit."""

    def step(state: Any, tokens: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(state.params, tokens)
        return optax_applied(state, tx, grads), loss

    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def optax_applied(state: Any, tx: Any, grads: Any) -> Any:
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state)


def sharded_update(state: Any, tx: Any, data: tuple[str, ...], collective: str, stage: int) -> Any:
    """This project: gradients reduced onto shards (stage 1: whole), Adam on shards, parameters gathered."""
    plan = state.plan
    region = region_of(plan, collective, None)

    def reduced(leaf: Any, g: Any) -> Any:
        if stage == 1:
            own = jax.shard_map(
                lambda x: jax.lax.psum(x[0], data),
                mesh=plan.mesh,
                in_specs=P(data),
                out_specs=P(),
                axis_names=set(data),
                check_vma=False,
            )
            return own(g)
        spec = block_spec(leaf)
        manual = shardadam.sharding.only_axes(spec, data, len(spec))
        own = jax.shard_map(
            lambda x: scatter_leaf(x[0], leaf=leaf, region=region),
            mesh=plan.mesh,
            in_specs=P(data),
            out_specs=manual,
            axis_names=set(data),
            check_vma=False,
        )
        return block_to_state(own(g), leaf, plan.mesh)

    def update(state: Any, grads: Any) -> Any:
        grads = map_leaves(lambda leaf, g, path: reduced(leaf, g), grads, plan)
        done = apply_on_shards(
            grads,
            state.opt_state,
            state.params,
            tx=tx,
            plan=plan,
            scattered=stage != 1,
            at_rest=stage == 3,
            collective=region.collective,
        )
        return state.replace(step=state.step + 1, params=done.params, opt_state=done.opt_state)

    return jax.jit(update, donate_argnums=0)
