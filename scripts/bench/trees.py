"""The parameter trees that the benchmarks update, as nested dicts of shapes."""

from typing import Any

import jax


def square(*, small: bool = False) -> dict[str, Any]:
    """Eight equal matrices: 33.6M parameters."""
    return {f"kernel_{i}": (64, 32) if small else (4096, 1024) for i in range(2 if small else 8)}


def gpt2(*, small: bool = False) -> dict[str, Any]:
    """GPT-2 124M as nanoGPT and Hugging Face have it: 148 leaves, the largest with an odd leading dim."""
    vocab, context, width, layers = (257, 64, 64, 1) if small else (50257, 1024, 768, 12)

    def norm() -> dict[str, Any]:
        return {"weight": (width,), "bias": (width,)}

    def dense(rows: int, columns: int) -> dict[str, Any]:
        return {"weight": (rows, columns), "bias": (columns,)}

    def block() -> dict[str, Any]:
        attn = {"c_attn": dense(width, 3 * width), "c_proj": dense(width, width)}
        mlp = {"c_fc": dense(width, 4 * width), "c_proj": dense(4 * width, width)}
        return {"ln_1": norm(), "attn": attn, "ln_2": norm(), "mlp": mlp}

    blocks = {f"h_{i}": block() for i in range(layers)}
    return {"wte": (vocab, width), "wpe": (context, width), **blocks, "ln_f": norm()}


def tiny(tree: dict[str, Any]) -> Any:
    """The same structure with leaves of 8 to 1024 elements, so that a step costs little but its dispatch."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, tuple))
    return treedef.unflatten([(8 << i % 8,) for i in range(len(leaves))])


TREES = {"square": square, "gpt2": gpt2}
