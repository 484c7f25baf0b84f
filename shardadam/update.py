"""Adam on the shards of many leaves: gradients to the state's layout, the kernel, the updates back."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from shardadam.layout import LeafPlan
from shardadam.moments import Hyperparams, Step, bias_corrections, update_leaf
from shardadam.sharding import constrain, pack_leaf, unpack_leaf
from shardadam.transformation import select


def check_shapes(
    paths: Sequence[str], leaves: Sequence[LeafPlan], sharded: Sequence[bool], grads: Any, mu: Any, nu: Any
) -> None:
    """Refuses what does not fit the plan by the leaf's name, before XLA does by an operand's number."""
    for path, leaf, in_shards, g, *moments in zip(paths, leaves, sharded, grads, mu, nu, strict=True):
        wanted = leaf.state_shape if in_shards else leaf.shape
        if jnp.shape(g) != wanted:
            raise ValueError(
                f"`{path}`: the gradient has shape {jnp.shape(g)}, the plan has {wanted}; make the plan from the "
                "parameters that these are the gradients of"
            )
        for name, x in zip(("mu", "nu"), moments, strict=True):
            if jnp.shape(x) != leaf.state_shape:
                raise ValueError(
                    f"`{path}`: {name} has shape {jnp.shape(x)}, the plan has {leaf.state_shape} ({leaf.layout}); the "
                    "state was made with another plan, or by optax: use this transformation's own init, or restore the "
                    "state with shardadam.Checkpointer, which converts"
                )


def update_on_mesh(
    grads: list[jax.Array],
    mu: list[jax.Array],
    nu: list[jax.Array],
    count: jax.Array,
    keep: jax.Array | None,
    hyperparams: Hyperparams,
    leaves: tuple[LeafPlan, ...],
    sharded: tuple[bool, ...],
    mesh: Mesh | AbstractMesh,
    nesterov: bool,
) -> list[Step]:
    """Adam on the shards, from gradients and to updates that are in shards themselves where `sharded` says so."""
    if isinstance(mesh, Mesh):  # Eager gradients may still be on one device.
        grads = [
            g if in_shards or isinstance(g, jax.core.Tracer) else constrain(g, mesh, leaf.param_spec)
            for g, leaf, in_shards in zip(grads, leaves, sharded, strict=True)
        ]
    # Python scalars stay Python's: 1 - b1 is taken in double precision, as in optax, and folded into the program.
    static = tuple(h if isinstance(h, int | float) else None for h in hyperparams)
    arrays = tuple(None if isinstance(h, int | float) else jnp.asarray(h) for h in hyperparams)
    options = _Options(static, leaves, sharded, mesh, nesterov)
    return _kernel(grads, mu, nu, count, keep, arrays, options=options)


class _Options(NamedTuple):
    """What one compiled update is specialised on."""

    hyperparams: tuple[float | None, ...]
    leaves: tuple[LeafPlan, ...]
    sharded: tuple[bool, ...]
    mesh: Mesh | AbstractMesh
    nesterov: bool


@functools.partial(jax.jit, static_argnames="options", inline=True)
def _kernel(grads: Any, mu: Any, nu: Any, count: Any, keep: Any, arrays: Any, *, options: _Options) -> list[Step]:
    """Gradients to the state's layout, Adam on each device's shards, the updates back to the parameters' own specs."""
    _, leaves, sharded, mesh, nesterov = options

    def each(f: Callable[..., Any], *columns: Any) -> list[Any]:
        return [f(*row) for row in zip(*columns, strict=True)]

    def place(xs: Any) -> list[jax.Array]:
        return each(lambda x, leaf: constrain(x, mesh, leaf.state_spec), xs, leaves)

    def on_shards(grads: Any, mu: Any, nu: Any, count: Any, keep: Any, arrays: Any) -> list[tuple[jax.Array, ...]]:
        given = zip(options.hyperparams, arrays, strict=True)
        hyperparams = Hyperparams(*(array if scalar is None else scalar for scalar, array in given))
        corrections = bias_corrections(count, hyperparams)

        def one(leaf: LeafPlan, g: jax.Array, m: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
            own = _defined_on_padding(hyperparams, leaf, v)
            return tuple(keep_step(keep, update_leaf(g, m, v, own, corrections, nesterov=nesterov), m, v))

        return each(one, leaves, grads, mu, nu)

    def own_shard(g: jax.Array, leaf: LeafPlan, in_shards: bool) -> jax.Array:
        return _as_value(constrain(g, mesh, leaf.state_spec) if in_shards else pack_leaf(g, leaf, mesh), leaf)

    grads = each(own_shard, grads, leaves, sharded)
    scalars = jax.tree.map(lambda x: constrain(x, mesh, P()), (count, keep, arrays))
    specs = [leaf.state_spec for leaf in leaves]
    # Manual axes: XLA sees the very program of one device, and so rounds and fuses as it does there.
    steps = jax.shard_map(
        on_shards,
        mesh=mesh,
        in_specs=(specs, specs, specs, *jax.tree.map(lambda _: P(), scalars)),
        out_specs=[(spec, spec, spec) for spec in specs],
    )(grads, place(mu), place(nu), *scalars)

    def pin(step: tuple[jax.Array, ...], leaf: LeafPlan, in_shards: bool) -> Step:
        u, *moments = step
        u = constrain(u, mesh, leaf.state_spec) if in_shards else unpack_leaf(u, leaf, mesh)
        return Step(u, *(constrain(x, mesh, leaf.state_spec) for x in moments))

    return each(pin, steps, leaves, sharded)


def keep_step(keep: jax.Array | None, step: Step, mu: jax.Array, nu: jax.Array) -> Step:
    """The step where `keep` is True or None; where it is False no update, and the moments as they were."""
    return Step(select(keep, step.update, 0), select(keep, step.mu, mu), select(keep, step.nu, nu))


def _as_value(g: jax.Array, leaf: LeafPlan) -> jax.Array:
    """A gradient's shard as a value of its own.

    Without the barrier XLA:CPU fuses its slice into the moments' sums, and for odd shapes contracts b1 mu + (1 - b1) g
    into the other of its two FMAs than in the program of one device, an ulp away from optax. Costs 1/N of a gradient.
    """
    return jax.lax.optimization_barrier(g) if leaf.num_shards > 1 else g


def _defined_on_padding(hyperparams: Hyperparams, leaf: LeafPlan, nu: jax.Array) -> Hyperparams:
    """Hyperparameters for one shard with eps = 1 where the padding is, so that its update is 0 / 1, never 0 / 0.

    Then a norm over the shards is exact. Selecting on the update instead would part its product with the learning rate
    from the sum with the parameter, which one FMA takes on one device.
    """
    if not leaf.padding:
        return hyperparams
    dim = leaf.stacked_dims
    row = jax.lax.axis_index(leaf.shard_axes) * nu.shape[dim] + jax.lax.broadcasted_iota(jnp.int32, nu.shape, dim)
    lane = jax.lax.broadcasted_iota(jnp.int32, nu.shape, dim + 1)
    full, rest = divmod(leaf.layer_size // leaf.num_parts, leaf.lanes)
    real = (row < full) | ((row == full) & (lane < rest))
    # Weak where it is Python's, so that it takes no part in type promotion, as in optax.
    return hyperparams._replace(eps=jnp.where(real, hyperparams.eps, 1.0))
