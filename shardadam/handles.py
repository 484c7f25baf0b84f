"""`gather`, and the handles that it turns to arrays: parameters inside a loss, gathered and reduced where it says."""

import functools
from typing import Any

import jax

from shardadam.blocks import Region, gather_leaf, row_major_leaf, scatter_leaf
from shardadam.communication import tap
from shardadam.layout import LeafPlan
from shardadam.plan import Plan
from shardadam.sharding import map_leaves


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["held", "block"], meta_fields=["in_shards", "leaf", "region", "path"]
)
class Gatherable:
    """A parameter inside a loss that `gather` has not been called on yet: a pytree node, which a scan can slice."""

    def __init__(
        self, held: jax.Array, block: jax.Array, in_shards: bool, leaf: LeafPlan, region: Region, path: str
    ) -> None:
        self.held, self.block, self.in_shards, self.leaf, self.region = held, block, in_shards, leaf, region
        self.path = path

    def whole(self) -> jax.Array:
        """The parameter; its gradient is reduce-scattered onto `block`."""
        held = gather_leaf(self.held, leaf=self.leaf, region=self.region) if self.in_shards else self.held
        held = row_major_leaf(held, leaf=self.leaf, region=self.region)
        return tap(held, self.block, functools.partial(scatter_leaf, leaf=self.leaf, region=self.region))

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError(self._ungathered())

    # All by which it would be taken for an array: of JAX, of numpy, or in an expression.
    __jax_array__ = __array__ = __getitem__ = _refuse
    __add__ = __sub__ = __mul__ = __truediv__ = __matmul__ = __pow__ = __neg__ = _refuse
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rmatmul__ = __rpow__ = _refuse

    def __getattr__(self, name: str) -> Any:
        # Also JAX asks for attributes that it does not have.
        raise AttributeError(f"{name}: {self._ungathered()}" if "path" in vars(self) else name)

    def _ungathered(self) -> str:
        return (
            f"`{self.path}`: got a stacked leaf that is not gathered yet, wanted an array; call layer = "
            "shardadam.gather(layer) inside the body of the scan over its layers, or plan it with stacked_dims=0"
        )


def gather(params: Any) -> Any:
    """Parameters to compute with: to be called inside the body of a scan over stacked layers.

    `value_and_grad` and `make_train_step` call it themselves on every leaf that stacks no layers. Those that do
    (`make_plan(..., stacked_dims=...)`) reach the loss as handles that `lax.scan` slices; gathered in its body, a
    layer's gradient is reduce-scattered inside the backward scan. At stage 3 a layer is all-gathered there too; with
    `jax.checkpoint` around the body it is not kept for the backward pass, but gathered once more.

    A penalty of all weights gathers them, too: `optax.tree.norm(shardadam.gather(params))`. Without it the loss is not
    finite, as the leaves of a handle are no parameter.

    Args:
      params: a tree of arrays and handles. Arrays are returned as they are, so that the same model runs without a step.

    Returns:
      The tree with an array for each handle.

    Example:
      >>> def body(h, layer):
      ...     layer = shardadam.gather(layer)
      ...     return jnp.tanh(h @ layer["w"]), None
      >>> layers = {"w": jnp.zeros((3, 4, 4))}
      >>> jax.lax.scan(body, jnp.ones((2, 4)), layers)[0].shape
      (2, 4)
    """

    def is_handle(x: Any) -> bool:
        return isinstance(x, Gatherable)

    return jax.tree.map(lambda x: x.whole() if is_handle(x) else x, params, is_leaf=is_handle)


def handles(params: Any, blocks: Any, plan: Plan, region: Region, in_shards: bool) -> Any:
    """What the loss gets: arrays, gathered and tapped, and handles for leaves that stack layers."""

    def one(x: jax.Array, block: jax.Array, named: tuple[LeafPlan, str]) -> Any:
        leaf, path = named
        handle = Gatherable(x, block, in_shards, leaf, region, path)
        return handle if leaf.stacked_dims else handle.whole()

    return jax.tree.map(one, params, blocks, map_leaves(lambda leaf, x, path: (leaf, path), params, plan))
