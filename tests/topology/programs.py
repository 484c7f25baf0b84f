"""Small programs whose collectives are known by construction, for every compiler."""

import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shardadam

LAYERS, DIM = 3, 256


def sds(shape, dtype, mesh, spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def loss_fn(params, x):
    def body(h, layer):
        w = shardadam.gather(layer)
        return h + jnp.tanh(h @ w["up"]) @ w["down"], None

    h, _ = jax.lax.scan(jax.checkpoint(body), x, params["layers"])
    return jnp.mean((h * params["scale"]).astype(jnp.float32) ** 2)


def params_and_plan(mesh, axis_name):
    layer = {
        "up": jax.ShapeDtypeStruct((LAYERS, DIM, 4 * DIM), jnp.bfloat16),
        "down": jax.ShapeDtypeStruct((LAYERS, 4 * DIM, DIM), jnp.bfloat16),
    }
    params = {"layers": layer, "scale": jax.ShapeDtypeStruct((DIM,), jnp.bfloat16)}
    stacked = {"layers": 1, "scale": 0}
    return params, shardadam.make_plan(params, mesh, axis_name=axis_name, stacked_dims=stacked)


def abstract_state(params, plan, **options):
    tx = shardadam.adam(1e-3, plan=plan)
    state = jax.eval_shape(lambda p: shardadam.TrainState.create(apply_fn=None, params=p, tx=tx, **options), params)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, state.shardings)


def train_step(target, per_axis=False, stage=2, master_dtype=None, **options):
    """`make_train_step` over one axis, or over those of the torus one at a time."""
    mesh = target.mesh(target.torus() if per_axis else "data")
    params, plan = params_and_plan(mesh, mesh.axis_names)
    state = abstract_state(params, plan, stage=stage, master_dtype=master_dtype)
    collective = "per_axis" if per_axis else "joint"
    step = shardadam.make_train_step(loss_fn, state, stage=stage, collective=collective, **options)
    x = sds((mesh.size * 2, DIM), jnp.bfloat16, mesh, P(mesh.axis_names))
    return step, state, x


def many_leaves_step(target, *, skip_nonfinite=False, max_grad_norm=None):
    """A step over sixteen equal leaves, whose gradients could be applied one after the other."""
    mesh = target.mesh("data") if target.topology.platform == "gpu" else target.mesh(target.torus())
    params = {f"w{i}": jax.ShapeDtypeStruct((512, 512), jnp.bfloat16) for i in range(16)}
    plan = shardadam.make_plan(params, mesh, axis_name=mesh.axis_names)
    state = abstract_state(params, plan)

    def loss(params, x):
        for w in params.values():
            x = jnp.tanh(x @ w)
        return jnp.mean(x.astype(jnp.float32) ** 2)

    x = sds((mesh.size * 8, 512), jnp.bfloat16, mesh, P(mesh.axis_names))
    step = shardadam.make_train_step(loss, state, skip_nonfinite=skip_nonfinite, max_grad_norm=max_grad_norm)
    return step, state, x


AWKWARD = {"vocab": (50257, 768), "wide": (2048, 5632), "stack": (12, 768, 768), "tall": (4096, 7168)}


def awkward_step(target):
    """Leaves whose blocks are no whole tiles, or whose rings do not come out even, one axis of the torus at a time."""
    mesh = target.mesh(target.torus())
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in AWKWARD.items()}
    stacked = {name: int(name == "stack") for name in AWKWARD}
    plan = shardadam.make_plan(params, mesh, axis_name=mesh.axis_names, stacked_dims=stacked)
    state = abstract_state(params, plan)

    def loss(params, x):
        whole = [shardadam.gather(w) for w in params.values()]
        return sum(jnp.mean(jnp.tanh(x[:, : w.shape[-1]] @ jnp.swapaxes(w, -1, -2))) for w in whole)

    x = sds((mesh.size, 7168), jnp.bfloat16, mesh, P(mesh.axis_names))
    return shardadam.make_train_step(loss, state, collective="per_axis"), state, x


def plain_collectives(target):
    """One of each: 3 all-reduces of (8, 128) f32 in a loop, an all-gather of bf16, an all-to-all, a permute."""
    mesh = target.mesh("data")
    n = math.prod(mesh.devices.shape)

    def local(x, y, z):
        def body(i, acc):
            return acc + jax.lax.psum(x * acc, "data")

        summed = jax.lax.fori_loop(0, LAYERS, body, x)
        gathered = jax.lax.all_gather(y, "data", tiled=True)
        exchanged = jax.lax.all_to_all(z, "data", 0, 0, tiled=True)
        moved = jax.lax.ppermute(z, "data", [(i, (i + 1) % n) for i in range(n)])
        return summed, gathered, exchanged, moved

    specs = P("data"), P("data"), P("data")
    outs = P("data"), P(), P("data"), P("data")
    f = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=outs, check_vma=False))
    x, y = sds((n * 8, 128), jnp.float32, mesh, P("data")), sds((n * 16, 128), jnp.bfloat16, mesh, P("data"))
    return f, x, y, sds((n * n, 128), jnp.float32, mesh, P("data"))


def optax_step(target):
    """Optax under jit, moments sharded: what XLA does by itself."""
    mesh = target.mesh("data")
    params, plan = params_and_plan(mesh, "data")
    tx = optax.adam(1e-3)

    def spec(path, x):
        leaf = plan.leaves[jax.tree_util.keystr(path, simple=True, separator="/")]
        return sds(x.shape, x.dtype, mesh, leaf.state_spec)

    moments = jax.tree_util.tree_map_with_path(spec, params)
    whole = jax.tree.map(lambda x: sds(x.shape, x.dtype, mesh, P()), params)
    state = (optax.ScaleByAdamState(sds((), jnp.int32, mesh, P()), moments, moments), optax.EmptyState())
    x = sds((mesh.size * 2, DIM), jnp.bfloat16, mesh, P("data"))

    def step(params, state, x):
        grads = jax.grad(loss_fn)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    shardings = jax.tree.map(lambda x: x.sharding, (whole, state))
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings), whole, state, x
