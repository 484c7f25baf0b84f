"""Adam as one Pallas kernel, for `bench_pallas` alone: what a kernel written by hand would be, against XLA's own.

The package ships none: docs/benchmarks/pallas.md says why.
"""

import functools
from contextlib import nullcontext
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shardadam
from shardadam.apply import apply_on_shards
from shardadam.moments import BiasCorrections, Hyperparams, bias_corrections, safe_increment, update_leaf
from shardadam.topology import Target

LEARNING_RATE = 1e-3
ADAM = Hyperparams()
BLOCK = (
    256,
    1024,
)  # Rows and lanes of all seven arrays that are in VMEM at once, twice: 512 rows are too many for v5e.


def build(
    target: Target,
    *,
    kernel: str,
    grad_dtype: str,
    shape: tuple[int, int] = (4096, 4096),
    block: tuple[int, int] = BLOCK,
    clipped: bool = False,
) -> Any:
    """(step, *abstract arguments): the update of one leaf that is in shards, gradient and parameter, too.

    Nothing is sent: what is compiled is what a device does with its block between the collectives.

    Args:
      target: what to compile for.
      kernel: "xla": this package's update. "unbarred": the same without its barrier between the update and what comes
        before it, which XLA:CPU needs to be equal to optax to the bit. "pallas": `adam_block`.
      grad_dtype: of the gradient; parameters are bfloat16 and moments float32.
      shape: of one device's block.
      block: for `adam_block`.
      clipped: whether the gradient is multiplied by a factor first, an argument of the step.
    """
    mesh = target.mesh("data")
    rows, columns = shape[0] * mesh.size, shape[1]
    leaf = jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16)
    plan = shardadam.make_plan({"w": leaf}, mesh, axis_name="data", layout="natural")
    assert plan.leaves["w"].state_spec == P("data"), plan.leaves["w"]

    def abstract(dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
        return {"w": jax.ShapeDtypeStruct((rows, columns), dtype, sharding=NamedSharding(mesh, P("data")))}

    count, factor = (jax.ShapeDtypeStruct((), d, sharding=NamedSharding(mesh, P())) for d in (jnp.int32, jnp.float32))
    adam = optax.ScaleByAdamState(count, abstract(jnp.float32), abstract(jnp.float32))
    params, grads = abstract(jnp.bfloat16), abstract(jnp.dtype(grad_dtype))
    tx = shardadam.adam(LEARNING_RATE, plan=plan)
    rest = jax.eval_shape(tx.init, {"w": leaf})[1:]

    def update(params: Any, grads: Any, adam: Any, factor: Any = None) -> Any:
        if factor is not None:
            grads = jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads)
        if kernel == "pallas":
            return by_hand(params, grads, adam, mesh=mesh, block=tuple(block))
        barrier = mock.patch("shardadam.update._as_value", lambda g, slot: g) if kernel == "unbarred" else nullcontext()
        with barrier:
            done = apply_on_shards(grads, (adam, *rest), params, tx=tx, plan=plan, scattered=True, at_rest=True)
        return done.params, done.opt_state[0]

    return jax.jit(update, donate_argnums=(0, 2)), params, grads, adam, *([factor] if clipped else [])


def by_hand(params: Any, grads: Any, adam: Any, *, mesh: Any, block: tuple[int, int]) -> Any:
    """The same update with `adam_block` on each device."""
    count = safe_increment(adam.count)
    split, whole = P("data"), P()
    own = jax.shard_map(
        functools.partial(adam_block, block=block),
        mesh=mesh,
        in_specs=(split, split, split, split, whole),
        out_specs=(split, split, split),
        check_vma=False,  # A Pallas call does not say over which axes its results vary.
    )
    param, mu, nu = own(params["w"], grads["w"], adam.mu["w"], adam.nu["w"], count)
    return {"w": param}, optax.ScaleByAdamState(count, {"w": mu}, {"w": nu})


def adam_block(
    param: jax.Array,
    grad: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    count: jax.Array,
    *,
    block: tuple[int, int] = BLOCK,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(param, mu, nu) after step `count`, in one pass over memory; each is written over what it was.

    Args:
      param: (rows, columns), of any float dtype.
      grad: of the same shape.
      mu: of the same shape.
      nu: of the same shape.
      count: of this step, 1 for the first: int32.
      block: rows and columns that are in VMEM at once; they need not divide.
      interpret: for `pallas_call`.
    """
    size = tuple(map(min, param.shape, block))
    tile = pl.BlockSpec(size, lambda i, j: (i, j))
    return pl.pallas_call(
        _kernel,
        grid=tuple(map(pl.cdiv, param.shape, size)),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), tile, tile, tile, tile],
        out_specs=[tile, tile, tile],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (param, mu, nu)],
        input_output_aliases={1: 0, 3: 1, 4: 2},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="adam_block",
    )(jnp.stack(bias_corrections(count, ADAM)), param, grad, mu, nu)


def _kernel(
    corrections: Any, param: Any, grad: Any, mu: Any, nu: Any, new_param: Any, new_mu: Any, new_nu: Any
) -> None:
    """The package's own maths on what is in VMEM."""
    of_step = BiasCorrections(*(corrections[i] for i in range(len(BiasCorrections._fields))))
    step = update_leaf(grad[...], mu[...], nu[...], ADAM, of_step)
    new_mu[...], new_nu[...] = step.mu, step.nu
    new_param[...] = (param[...] - LEARNING_RATE * step.update).astype(param.dtype)


def compare_with_optax(
    *,
    shape: tuple[int, int],
    param_dtype: Any,
    grad_dtype: Any,
    block: tuple[int, int] = BLOCK,
    steps: int = 3,
    seed: int = 0,
    interpret: Any = None,
) -> dict[str, int]:
    """In TPU interpret mode: by how many units in the last place param, mu and nu are apart after some steps, at most.

    Both are jitted, and begin and go on from the same numbers: optax's.

    Args:
      shape: of the leaf.
      param_dtype: of the parameter.
      grad_dtype: of the gradient; moments are float32.
      block: for `adam_block`.
      steps: how many.
      seed: of the numbers.
      interpret: `pltpu.InterpretParams`; default: with races detected and memory that nobody wrote NaN.
    """
    interpret = interpret or pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    tx = optax.adam(LEARNING_RATE)
    keys = jax.random.split(jax.random.key(seed), steps + 1)
    param = jax.random.normal(keys[0], shape).astype(param_dtype)
    state = tx.init(jnp.zeros(shape, jnp.float32))
    ours = jax.jit(functools.partial(adam_block, block=block, interpret=interpret))

    @jax.jit
    def theirs(param: Any, grad: Any, state: Any) -> Any:
        updates, state = tx.update(grad, state, param)
        return optax.apply_updates(param, updates), state

    apart = dict.fromkeys(("param", "mu", "nu"), 0)
    with jax.numpy_dtype_promotion("standard"):
        for key in keys[1:]:
            grad = jax.random.normal(key, shape).astype(grad_dtype)
            found = ours(param, grad, state[0].mu, state[0].nu, state[0].count + 1)
            param, state = theirs(param, grad, state)
            for name, x, y in zip(apart, found, (param, state[0].mu, state[0].nu), strict=True):
                apart[name] = max(apart[name], ulps_apart(x, y))
    return apart


def ulps_apart(x: jax.Array, y: jax.Array) -> int:
    """The most floats that lie between two elements: 0 for equal bits (and for 0.0 and -0.0)."""
    assert x.dtype == y.dtype, (x.dtype, y.dtype)
    bits = jnp.dtype(f"int{8 * x.dtype.itemsize}")

    def ordered(values: jax.Array) -> Any:
        whole = np.asarray(values).view(bits).astype(np.int64)
        return np.where(whole < 0, -(whole & np.iinfo(bits).max), whole)

    return int(abs(ordered(x) - ordered(y)).max())
