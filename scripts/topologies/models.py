"""The models that topologies are compared on: parameter shapes, tensor-parallel specs and a loss, layers in a scan."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import shardadam


class Model(NamedTuple):
    """A decoder of Llama 3's kind; with `d_kv` = `d_model` and untied embeddings the smaller ones are of it, too."""

    num_layers: int
    d_model: int
    d_ff: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    seq_len: int = 1024


MODELS = {
    "tiny": Model(4, 512, 2048, 8, 4, 4000, 128),
    "124M": Model(12, 768, 2048, 12, 12, 50257),  # GPT-2's size, vocabulary and tied embedding.
    "1.3B": Model(24, 2048, 5632, 16, 16, 50257),
    "8B": Model(32, 4096, 14336, 32, 8, 128256),
    "70B": Model(80, 8192, 28672, 64, 8, 128256),
}
WIDTH = 2  # Bytes of a parameter, and of a gradient on the wire.
TIED = ("124M", "1.3B")
STACKED = {"embed": 0, "layers": 1, "norm": 0, "head": 0}


def abstract_params(name: str, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """Shapes and dtypes of a model's parameters."""
    m = MODELS[name]
    kv = m.d_model // m.num_heads * m.num_kv_heads
    per_layer = {
        "attn_norm": (m.d_model,),
        "wq": (m.d_model, m.d_model),
        "wk": (m.d_model, kv),
        "wv": (m.d_model, kv),
        "wo": (m.d_model, m.d_model),
        "mlp_norm": (m.d_model,),
        "gate": (m.d_model, m.d_ff),
        "up": (m.d_model, m.d_ff),
        "down": (m.d_ff, m.d_model),
    }
    shapes = {
        "embed": (m.vocab_size, m.d_model),
        "layers": {key: (m.num_layers, *shape) for key, shape in per_layer.items()},
        "norm": (m.d_model,),
        "head": (m.d_model, m.vocab_size),
    }
    if name in TIED:
        del shapes["head"]
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def stacked_dims(name: str) -> dict[str, int]:
    """For `make_plan`."""
    return {key: depth for key, depth in STACKED.items() if key in abstract_params(name)}


def tensor_specs(name: str) -> dict[str, Any]:
    """How parameters lie over the axis "model": heads and hidden units are split."""
    specs = {
        "embed": P("model"),
        "layers": {
            "attn_norm": P(),
            **dict.fromkeys(("wq", "wk", "wv", "gate", "up"), P(None, None, "model")),
            **dict.fromkeys(("wo", "down"), P(None, "model")),
            "mlp_norm": P(),
        },
        "norm": P(),
        "head": P(None, "model"),
    }
    return {key: spec for key, spec in specs.items() if key in abstract_params(name)}


def num_params(name: str) -> int:
    """How many."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_params(name)))


def layer_bytes(name: str, tensor: int = 1) -> int:
    """Bytes of one layer's parameters on one device."""
    layers = abstract_params(name)["layers"]
    return sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in jax.tree.leaves(layers)) // tensor


def loss_of(name: str) -> Any:
    """`loss_fn(params, tokens)`: next-token cross entropy, each layer recomputed in the backward pass."""
    m = MODELS[name]

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-5)).astype(x.dtype) * scale

    def layer(h: jax.Array, params: Any) -> tuple[jax.Array, None]:
        w = shardadam.gather(params)
        x = norm(h, w["attn_norm"])
        heads = (*x.shape[:2], -1, m.d_model // m.num_heads)
        q, k, v = ((x @ w[key]).reshape(heads) for key in ("wq", "wk", "wv"))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        h = h + mixed.reshape(h.shape) @ w["wo"]
        x = norm(h, w["mlp_norm"])
        return h + (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"], None

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        h = params["embed"][tokens]
        h, _ = jax.lax.scan(jax.checkpoint(layer), h, params["layers"])
        head = params["head"] if "head" in params else params["embed"].T
        logits = norm(h, params["norm"])[:, :-1] @ head
        picked = jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0].astype(jnp.float32)
        return jnp.mean(jax.nn.logsumexp(logits.astype(jnp.float32), -1) - picked)

    return loss_fn
