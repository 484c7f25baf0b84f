"""Small parameter trees with awkward shapes, and how the tests place and compare them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from shardadam.sharding import named_sharding

# Over 8: natural on dim 0, natural on dim 1, packed, packed, whole (under a row), whole (scalar), one layer stack.
SHAPES = {
    "kernel": (64, 48),
    "head": (50, 24),
    "odd": (17, 257),
    "bias": (1300,),
    "tiny": (7,),
    "scale": (),
    "layers": {"w": (3, 16, 32)},
}


_COLLECTIVE = re.compile(
    r" = (\(.*?\)|\S+) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def collectives(text):
    """(shape, op) of every collective in a compiled program's text, in its order; the shape is a tuple's for some."""
    return _COLLECTIVE.findall(text)


def is_shape(x):
    return isinstance(x, tuple)


def random_tree(seed, dtype=jnp.float32, shapes=SHAPES):
    """Host arrays, so that no device placement leaks into a test."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        x = rng.standard_normal(shape)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            x = x + 1j * rng.standard_normal(shape)
        return np.asarray(jnp.asarray(x, dtype))

    return jax.tree.map(draw, shapes, is_leaf=is_shape)


def put(tree, mesh, specs=None):
    """Every leaf on the mesh, with the sharding that jit's outputs have; replicated where `specs` has no entry."""

    def place(name, sub):
        spec = (specs or {}).get(name, P())
        return jax.tree.map(lambda x: jax.device_put(x, named_sharding(mesh, spec, x.ndim)), sub)

    return {name: place(name, sub) for name, sub in tree.items()}


def make_step(tx, **jit_options):
    """A jitted step of a hand-written loop: (params, opt_state, grads) -> (params, opt_state)."""

    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(step, **jit_options)


def adam_state(opt_state):
    """The one ScaleByAdamState in an optax state."""
    (found,) = [x for x in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(x)]
    return found


def is_adam(x):
    return isinstance(x, optax.ScaleByAdamState)


def logical(moments, plan):
    """Moments as host arrays of their parameters' shapes, written without the package's own unpack."""
    from shardadam.sharding import map_leaves

    def one(leaf, x, path):
        x = np.asarray(x)
        if leaf.layout != "packed":
            return x
        local = [
            d // int(np.prod([plan.mesh.shape[a] for a in axes]))
            for d, axes in zip(leaf.shape, dims(leaf), strict=True)
        ]
        grid = [int(np.prod([plan.mesh.shape[a] for a in axes])) for axes in dims(leaf)][leaf.stacked_dims :]
        local = local[leaf.stacked_dims :]

        def layer(x):
            parts = x.reshape(leaf.num_parts, -1)[:, : int(np.prod(local))]
            blocks = parts.reshape(*grid, *local)
            order = [i for d in range(len(local)) for i in (d, d + len(local))]
            return blocks.transpose(order).reshape(leaf.shape[leaf.stacked_dims :])

        return np.stack([layer(x) for x in x.reshape(-1, *x.shape[-2:])]).reshape(leaf.shape)

    return map_leaves(one, moments, plan)


def dims(leaf):
    from shardadam.layout import entries

    return entries(leaf.param_spec, len(leaf.shape))


def by_path(tree):
    """Its leaves by name: comparable also where trees hold different functions beside their leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def assert_same_bits(got, wanted):
    """Every leaf equal to the last bit, dtype included, NaN equal to NaN."""
    keyed, treedef = jax.tree_util.tree_flatten_with_path(wanted)
    for (path, want), have in zip(keyed, treedef.flatten_up_to(got), strict=True):
        have, want = np.asarray(have), np.asarray(want)
        assert have.dtype == want.dtype, jax.tree_util.keystr(path)
        assert have.shape == want.shape, jax.tree_util.keystr(path)
        differ = have.view(np.uint8) != want.view(np.uint8) if have.ndim else np.array(have.tobytes() != want.tobytes())
        assert not differ.any(), f"{jax.tree_util.keystr(path)}: {differ.sum()} bytes differ"


def flip_a_bit(x, device_id):
    """`x` with the lowest bit of its last element flipped in one device's copy; on processes without it, `x` itself."""

    def own(shard):
        data = np.array(shard.data)
        if shard.device.id == device_id:
            data.reshape(-1)[-1:].view(np.uint8)[0] ^= 1
        return jax.device_put(data, shard.device)

    shards = [own(shard) for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)
