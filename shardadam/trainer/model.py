"""The decoder-only transformer, in Flax linen: pre-norm blocks in one scan, rotary positions, causal attention."""

import logging
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

import shardadam
from shardadam.plan import path_name
from shardadam.trainer.config import ModelConfig

log = logging.getLogger("shardadam.trainer")

# Parameter, by the end of its path -> its dims' mesh axes, the scan's layer dim first. Column-parallel into a block's
# hidden dim, row-parallel out of it, so that each block needs one all-reduce over the model axis.
_TENSOR_PARALLEL = {
    "embedding": ("model", None),
    "lm_head/kernel": (None, "model"),
    "attention/query/kernel": (None, None, "model", None),
    "attention/key/kernel": (None, None, "model", None),
    "attention/value/kernel": (None, None, "model", None),
    "attention/out/kernel": (None, "model", None, None),
    "mlp/gate/kernel": (None, None, "model"),
    "mlp/up/kernel": (None, None, "model"),
    "mlp/down/kernel": (None, "model", None),
}


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d] -> [..., d] in the dtype of x."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.dtype(self.config.param_dtype))
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-6)
        return (x32 * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Rotary positions (Su et al. 2021): turns each pair of features by an angle that grows with the position.

    Args:
      x: [batch, length, heads, head_dim], with an even head_dim.
      theta: base of the frequencies.
    """
    length, half = x.shape[1], x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """softmax(query key^T / sqrt(head_dim)) value over the positions so far, the softmax in float32.

    Written out, as `jax.nn.dot_product_attention` is refused in bfloat16 under JAX's strict dtype promotion.

    Args:
      query: [batch, length, heads, head_dim].
      key: [batch, length, kv_heads, head_dim]; kv_heads divides heads.
      value: as key.
    """
    batch, length, heads, head_dim = query.shape
    groups = query.reshape(batch, length, key.shape[2], heads // key.shape[2], head_dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", groups, key).astype(jnp.float32) * head_dim**-0.5
    causal = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, value).reshape(query.shape)


def _dense(config: ModelConfig, features: Any, name: str, *, axis: Any = -1, out: bool = False) -> nn.DenseGeneral:
    # Projections back to the residual stream start smaller, as in GPT-2, so that its variance does not grow with depth.
    stddev = 0.02 / (2 * config.num_layers) ** 0.5 if out else 0.02
    dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
    init = nn.initializers.normal(stddev)
    return nn.DenseGeneral(
        features, axis=axis, use_bias=False, dtype=dtype, param_dtype=param_dtype, kernel_init=init, name=name
    )


class Attention(nn.Module):
    """Causal self-attention with rotary positions; key and value heads may be fewer than query heads."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, length, d_model] -> the same."""
        c = self.config
        head_dim = c.d_model // c.num_heads
        kv = (c.num_kv_heads or c.num_heads, head_dim)
        query = rotate(_dense(c, (c.num_heads, head_dim), "query")(x), c.rope_theta)
        key = rotate(_dense(c, kv, "key")(x), c.rope_theta)
        value = _dense(c, kv, "value")(x)
        mixed = causal_attention(query, key, value)
        return _dense(c, c.d_model, "out", axis=(-2, -1), out=True)(mixed)


class MLP(nn.Module):
    """SwiGLU, down(silu(gate(x)) * up(x)), or GELU, down(gelu(up(x)))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d_model] -> the same."""
        up = _dense(self.config, self.config.d_ff, "up")(x)
        if self.config.mlp == "swiglu":
            hidden = jax.nn.silu(_dense(self.config, self.config.d_ff, "gate")(x)) * up
        else:
            hidden = jax.nn.gelu(up)
        return _dense(self.config, self.config.d_model, "down", out=True)(hidden)


class Block(nn.Module):
    """One layer: attention, then the MLP, each after a norm and added to the residual stream."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        """[batch, length, d_model] -> (the same, None), as `nn.scan` wants it."""
        x = x + Attention(self.config, name="attention")(RMSNorm(self.config, name="attention_norm")(x))
        x = x + MLP(self.config, name="mlp")(RMSNorm(self.config, name="mlp_norm")(x))
        return x, None


class Transformer(nn.Module):
    """Token ids -> logits."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[batch, length] int32 -> [batch, length, vocab_size] float32."""
        c = self.config
        dtype, param_dtype = jnp.dtype(c.dtype), jnp.dtype(c.param_dtype)
        init = nn.initializers.normal(0.02)
        embedding = self.param("embedding", init, (c.vocab_size, c.d_model), param_dtype)
        # In a train step a layer's parameters are gathered, and their gradients reduced, inside of the scan.
        block = nn.map_variables(Block, "params", trans_in_fn=shardadam.gather, init=self.is_initializing())
        # prevent_cse guards against a merge that cannot happen across a scan's steps, and costs there.
        block = nn.remat(block, prevent_cse=False) if c.remat else block
        layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.num_layers)
        x, _ = layers(c, name="layers")(embedding[tokens].astype(dtype), None)
        x = RMSNorm(c, name="final_norm")(x)
        if c.tie_embeddings:
            logits = jnp.einsum("btd,vd->btv", x, embedding.astype(dtype))
        else:
            logits = _dense(c, c.vocab_size, "lm_head")(x)
        return logits.astype(jnp.float32)


def abstract_params(model: Transformer) -> Any:
    """The parameters' shapes and dtypes, without any of them being made."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def init_params(model: Transformer, key: jax.Array) -> Any:
    """The initial parameters."""
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def param_specs(params: Any, mesh: Mesh | AbstractMesh | Mapping[str, int]) -> Any:
    """Where each parameter lives: tensor-parallel over the mesh's `model` axis, replicated where there is none.

    A dim that the axis does not divide stays whole; the log says which and why.
    """
    size = dict(mesh if isinstance(mesh, Mapping) else mesh.shape).get("model", 1)
    return jax.tree_util.tree_map_with_path(lambda path, x: _spec(path_name(path), x.shape, size), params)


def stacked_dims(params: Any) -> Any:
    """How many leading dims of each parameter stack layers: 1 below the scan, 0 elsewhere."""
    return jax.tree_util.tree_map_with_path(lambda path, _: int(path_name(path).startswith("layers/")), params)


def decay_mask(params: Any) -> Any:
    """True for the matrices, False for the norms' scales, which the scan stacks to matrices too."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not path_name(path).endswith("scale"), params)


def _spec(path: str, shape: tuple[int, ...], size: int) -> P:
    axes = next((axes for end, axes in _TENSOR_PARALLEL.items() if path.endswith(end)), None)
    if size == 1 or axes is None:
        return P()
    dim = axes.index("model")
    if shape[dim] % size:
        log.warning(
            "`%s`: dim %d is %d, not divisible by %d on axis 'model': it stays whole", path, dim, shape[dim], size
        )
        return P()
    return P(*axes[: dim + 1])  # no trailing None: the form that jit's outputs have
